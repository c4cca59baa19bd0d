"""Faults that are planted in the sources, one after the other, and the tests of the contract that must find them.

    python tests/planted_faults.py [WORDS ...]     those whose names hold one of them

prints, as JSON, how many were planted, and those that were not found.

Each fault is planted in a copy of the sources, in a process that is forked from one that has imported torch and Triton
already, because importing them takes longer than the tests.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "1"  # before the first import of Triton

import hypothesis  # noqa: F401 - imported once for all
import pytest
import torch
import torch._inductor  # a second, by the fixture that asks for deterministic algorithms
import triton  # noqa: F401

ROOT = Path(__file__).parents[1]
FOLDERS = ("fastvae", "kernels", "tests", "benchmarks")


class Fault(NamedTuple):
    name: str
    file: str
    text: str  # stands there once
    instead: str
    tests: str  # a choice of tests, as pytest's -k takes it
    test_file: str = "test_contract.py"


NLL = "negative_log_likelihood_Bernoulli"
VALUES = "test_values_and_gradients and negative_log_likelihood"
AUTOGRAD, CONTINUOUS = "test_contract_autograd.py", "test_continuous_likelihoods.py"
COUNTS = "test_counts.py"
GROUPED = "test_grouped_likelihoods.py"
DISCREPANCY = "test_discrepancy.py"
DECOMPOSITION = "test_total_correlation.py"
GENERAL = "test_general_posterior.py"
FAULTS = (
    # Likelihoods
    Fault(
        "what is masked out reaches the sum", "kernels/elementwise.py",
        "    terms = tl.where(inside, value, 0.0)\n", "    terms = value\n",
        f"test_values_and_gradients and {NLL} and float32",
    ),
    Fault(
        "the tail is not in the sum", "kernels/elementwise.py",
        "                total += tl.sum(tl.where(place < tail, last_value, 0.0))\n", "",
        f"test_sizes and {NLL} and 4115",
    ),
    Fault(
        "the tail has no gradient", "kernels/elementwise.py",
        "            if tl.program_id(0) == 0:\n                place = tl.arange(0, TAIL)\n                _value",
        "            if tl.program_id(0) == -1:\n                place = tl.arange(0, TAIL)\n                _value",
        f"test_sizes and {NLL} and 4115",
    ),
    Fault(
        "the target lies as the parameters do", "kernels/elementwise.py",
        "    target_base, target_offsets = from_start(first_row, first_column, row, column, target_units, ALIGNMENT)\n"
        "    value,",
        "    target_base, target_offsets = from_start(first_row, first_column, row, column, stride_units, ALIGNMENT)\n"
        "    value,",
        f"test_layouts and {NLL} and sliced_batch",
    ),
    Fault(
        "bytes are fractions of 256", "kernels/elementwise.py", "(1.0 / 255.0)", "(1.0 / 256.0)",
        f"test_every_byte and {NLL}",
    ),
    Fault(
        "numbers are read as fractions", "kernels/elementwise.py", "    if UNIT and ", "    if ",
        "test_every_byte and negative_log_likelihood_SmoothL1",
    ),
    Fault(
        "a constant factor is forgotten", "kernels/elementwise.py",
        "factor = load_scalar(weight) * scale * load_scalar(grad_scale) * SLOPE_FACTOR",
        "factor = load_scalar(weight) * scale * load_scalar(grad_scale)",
        "test_values_and_gradients and elbo_value_and_grad-",
    ),
    Fault(
        "the gradient of another parameter", "kernels/elementwise.py",
        "slopes[tl.constexpr(WANTED[k])]", "slopes[k]",
        "test_one_launch and negative_log_likelihood_LearnedGaussian", AUTOGRAD,
    ),
    Fault(
        "upstream gradients are taken to be dense", "kernels/elementwise.py",
        "(first_row + row) * loss_grad_stride", "(first_row + row)",
        f"test_upstream_gradients_of_any_layout and {NLL} and every",
    ),
    Fault(
        "the gradient of kl is a sum", "kernels/elementwise.py",
        "        store_share(kl_grad_ptr, mean_kl_grad * scale,", "        store_share(kl_grad_ptr, mean_kl_grad,",
        "test_values_and_gradients and elbo_loss_Bernoulli-",
    ),
    Fault(
        "kl is taken to be dense", "kernels/elementwise.py",
        "sum_in_order(kl_ptr, batch, kl_stride, BLOCK)", "sum_in_order(kl_ptr, batch, 1, BLOCK)",
        "test_kl and elbo_loss_Bernoulli-",
    ),
    Fault(
        "a slope is off by 1e-5", "fastvae/likelihoods/bernoulli.py", "(y - target, -x)", "(1.00001 * y - target, -x)",
        f"test_values_and_gradients and {NLL} and float32",
    ),
    Fault(
        "a coefficient is off by 1e-4", "kernels/numerics.py", "0.3332996368408203", "0.3333996368408203",
        f"test_values_and_gradients and {NLL} and float32",
    ),
    Fault(
        "a variance has the slope of its root", "fastvae/likelihoods/gaussian.py",
        "tl.fma(-0.5, squared, 0.5)\n", "tl.fma(-1.0, squared, 1.0)\n",
        f"{VALUES}_Gaussian and float32",
    ),
    Fault(
        "a mean is not behind its sigmoid", "fastvae/likelihoods/gaussian.py",
        "    if SETTINGS[0]:\n        slope *= derivative\n    by_logvar", "    by_logvar",
        "test_terms_of_other_settings and sigmoid", CONTINUOUS,
    ),
    Fault(
        "a fixed variance counts twice", "fastvae/likelihoods/gaussian.py",
        "tl.fma(error * error, SETTINGS[2],", "tl.fma(error * error, 2.0 * SETTINGS[2],",
        "test_terms_of_other_settings and std", CONTINUOUS,
    ),
    Fault(
        "the slope of an absolute value at 0", "fastvae/likelihoods/laplace.py",
        "tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, 0.0)) * inverse",
        "tl.where(error > 0, 1.0, -1.0) * inverse",
        "test_extreme_values and negative_log_likelihood_Laplace and float32",
    ),
    Fault(
        "a fixed scale has another constant", "fastvae/likelihoods/laplace.py",
        "tl.fma(tl.abs(error), SETTINGS[1], SETTINGS[0])", "tl.fma(tl.abs(error), SETTINGS[1], 0.6931471805599453)",
        "test_terms_of_other_settings and Laplace", CONTINUOUS,
    ),
    Fault(
        "a series is taken too far", "fastvae/likelihoods/continuous_bernoulli.py",
        "near = tl.abs(x) < 1.5", "near = tl.abs(x) < 2.5",
        f"{VALUES}_ContinuousBernoulli and float32",
    ),
    Fault(
        "the slope of another tail", "fastvae/likelihoods/continuous_bernoulli.py",
        "tl.where(x > 0, -rest, rest))", "-rest)",
        f"{VALUES}_ContinuousBernoulli and float32",
    ),
    Fault(
        "a mean on the other side of an end", "fastvae/likelihoods/discretized_logistic.py",
        "beyond = (d > 0) ^ lowest", "beyond = (d > 0) ^ highest",
        f"{VALUES}_DiscretizedLogistic and float32",
    ),
    Fault(
        "the ends are closed", "fastvae/likelihoods/discretized_logistic.py",
        "at_an_end = lowest | highest", "at_an_end = lowest & highest",
        f"{VALUES}_DiscretizedLogistic and float32",
    ),
    Fault(
        "wide bins by the series of narrow ones", "fastvae/likelihoods/discretized_logistic.py",
        "narrow = w >= 0.6931471805599453", "narrow = w >= 2.0",
        f"{VALUES}_DiscretizedLogistic and float32",
    ),
    Fault(
        "a clamped scale has a slope", "fastvae/likelihoods/discretized_logistic.py",
        "tl.where(parameters[1] >= SETTINGS[2], by_scale, 0.0)", "by_scale",
        "test_terms_of_other_settings and Discretized", CONTINUOUS,
    ),
    Fault(
        "a logarithm of a factorial is cut off", "fastvae/likelihoods/poisson.py",
        "tl.fma(inverse, series, tl.fma(0.5,", "tl.fma(inverse, 0.08, tl.fma(0.5,",
        f"{VALUES}_Poisson and float32",
    ),
    Fault(
        "a target that lies otherwise is not copied", "kernels/layout.py",
        "    if not has_strides(target, (target.stride(0), *first.stride()[1:])) or target.is_neg():\n",
        "    if target.is_neg():\n",
        f"test_layouts and {NLL} and transposed",
    ),
    Fault(
        "a minus that is not in memory", "kernels/layout.py", " or target.is_neg():", ":",
        f"test_a_minus and {NLL} and last",
    ),
    Fault(
        "the mean over an empty batch", "kernels/elbo.py", 'value.fill_(float("nan"))', "value.fill_(0.0)",
        "test_empty and elbo_loss_Bernoulli-",
    ),
    # Parameters smaller than the target
    Fault(
        "what is masked out reaches a sum of gradients", "kernels/broadcast.py",
        "gradient = tl.where(inside, upstream * slopes[tl.constexpr(SUMMED[k])], 0.0)",
        "gradient = upstream * slopes[tl.constexpr(SUMMED[k])]",
        f"{VALUES}_Gaussian_logvar_per_channel and float32",
    ),
    Fault(
        "a block's columns are those of the first", "kernels/broadcast.py",
        "at_partial = block * (columns * groups) + first_column", "at_partial = first_column",
        "test_several_blocks", "test_smaller.py",
    ),
    Fault(
        "a group is taken for another", "kernels/broadcast.py", "x = tl.load(ptr + group)", "x = tl.load(ptr)",
        f"{VALUES}_Gaussian_logvar_per_channel and float32",
    ),
    Fault(
        "the tile of a row is lost", "kernels/broadcast.py",
        "(first_row + row) * tiles.to(tl.int64) + tile", "(first_row + row) * tiles.to(tl.int64)",
        "test_sizes and negative_log_likelihood_Gaussian_logvar_per_channel and bfloat16",
    ),
    # Elements that have an axis of their own
    Fault(
        "a component beyond the last has a weight", "fastvae/likelihoods/discretized_logistic_mixture.py",
        'tl.where(there, slots[0], -float("inf"))', "slots[0]", "test_check_finds_nothing and Mixture", GROUPED,
    ),
    Fault(
        "blue's mean is without green's part", "fastvae/likelihoods/discretized_logistic_mixture.py",
        "tl.fma(c2, green, tl.fma(c1, red, slots[7]))", "tl.fma(c1, red, slots[7])",
        "test_check_finds_nothing and Mixture", GROUPED,
    ),
    Fault(
        "the slope of a coefficient is that of its tanh", "fastvae/likelihoods/discretized_logistic_mixture.py",
        "mean_green * slope0 * red", "mean_green * red", "test_check_finds_nothing and Mixture", GROUPED,
    ),
    Fault(
        "a value next to 0 is a difference", "fastvae/likelihoods/discretized_logistic_mixture.py",
        "near = missed < 0.5", "near = missed < 0.0", "test_a_value_next_to_0", GROUPED,
    ),
    Fault(
        "a class that is nearly sure", "fastvae/likelihoods/categorical.py",
        "tl.where(greatest, 0.0, weights), axis=1, keep_dims=True)\n", "weights, axis=1, keep_dims=True) - 1.0 + 0.0\n",
        "test_a_class_that_is_nearly_sure and 5", GROUPED,
    ),
    Fault(
        "the second kind of numbers is read as the first", "kernels/grouped.py",
        "tl.load(parameters_ptr + at + k * SIZE * axis_stride,", "tl.load(parameters_ptr + at + k * axis_stride,",
        "test_check_finds_nothing and Mixture", GROUPED,
    ),
    Fault(
        "the parts of a row are not brought to one maximum", "kernels/softmax.py",
        "    d += t * tl.where(t == 0.0, 0.0, down)\n", "", "test_long_rows and counts-torch.float32", GROUPED,
    ),
    Fault(
        "the gradient of a long row is without its sum of counts", "kernels/softmax.py",
        "                    share = all_t * share\n", "                    share = share\n",
        "test_long_rows and counts-torch.float32", GROUPED,
    ),
    # The posterior
    Fault(
        "the divergence of each sample is not scaled", "kernels/gaussian.py",
        "tl.sum(terms, axis=1) * kl_scale", "tl.sum(terms, axis=1)",
        "test_values_and_gradients and gaussian_sample_kl and float32",
    ),
    Fault(
        "noise without its spread", "kernels/gaussian.py",
        "        z = tl.fma(exp_half(logvar, FAST), eps, mu)\n", "        z = tl.fma(exp(logvar, FAST), eps, mu)\n",
        "test_values_and_gradients and gaussian_sample- and float32",
    ),
    Fault(
        "backward draws other noise", "kernels/gaussian.py",
        "            logvar_grad = z_grad * (exp_half(logvar, FAST) * eps)\n",
        "            logvar_grad = z_grad * (exp_half(logvar, FAST) * -eps)\n",
        "test_backward_makes_the_noise", AUTOGRAD,
    ),
    Fault(
        "a series that is cut off", "kernels/numerics.py", "1.986334245884791e-04", "0.0",
        "test_values_and_gradients and gaussian_kl- and float32",
    ),
    # All pairs of a minibatch
    Fault(
        "the weight of a posterior counts in each dimension of the joint density", "kernels/total_correlation.py",
        "axis=1) - joint - other\n", "axis=1) - joint - dims * other\n",
        "test_equal_posteriors and triton", DECOMPOSITION,
    ),
    Fault(
        "a row's own weight is in the first column", "kernels/total_correlation.py",
        "tl.where(ahead == 0, own, ", "tl.where((component == 0)[None, :], own, ",
        "test_values_and_gradients and stratified and triton", DECOMPOSITION,
    ),
    Fault(
        "no row follows the last", "kernels/total_correlation.py", "(ahead == 1) | (ahead == 1 - rows)", "ahead == 1",
        "test_values_and_gradients and stratified and triton", DECOMPOSITION,
    ),
    Fault(
        "no gradient through the density of a row's own posterior", "kernels/total_correlation_gradients.py",
        "of_own[:, None], 0.0)", "0.0, 0.0)", "test_the_parts_sum and triton", DECOMPOSITION,
    ),
    Fault(
        "on the CPU, none either", "fastvae/reference/total_correlation.py",
        ".mul_(of_joint[rows, None]).diagonal(rows.start).add_(own)", ".mul_(of_joint[rows, None])",
        "test_the_parts_sum and blocks", DECOMPOSITION,
    ),
    Fault(
        "nor where all pairs are computed at once", "fastvae/reference/total_correlation.py",
        "add_(torch.where(present, of_information, 0.0))", "add_(0.0)",
        "test_the_parts_sum and once", DECOMPOSITION,
    ),
    Fault(
        "exponentials are taken for shares", "fastvae/reference/total_correlation.py",
        "through = (of_dimensions - of_correlation) / of_marginals", "through = of_dimensions - of_correlation",
        "test_the_parts_sum and once", DECOMPOSITION,
    ),
    Fault(
        "a scale at its bound has no slope", "fastvae/reference/precision.py",
        "torch.where(limited == x,", "torch.where((limited == x) & (x > low),",
        "test_a_clamped_scale_has_no_gradient_below and reference", "test_continuous_likelihoods.py",
    ),
    Fault(
        "sums are not brought to a new maximum", "kernels/total_correlation.py", "s * e + 1.0, s + e", "s + 1.0, s + e",
        "test_any_number_of_tiles", DECOMPOSITION,
    ),
    Fault(
        "the prior's variance is that of the posterior", "kernels/general_forward.py",
        "                difference = logvar - prior_logvar\n                terms",
        "                difference = logvar - logvar\n                terms",
        "test_values_and_gradients and gaussian_kl_prior and float32",
    ),
    Fault(
        "a second sample has the noise of the first", "kernels/general_forward.py",
        "                    position += tl.cast(rows, tl.int64) * columns\n                    sums",
        "                    sums",
        "test_values_and_gradients and gaussian_sample_samples and float32",
    ),
    Fault(
        "the gradient of a shared prior is that of one block", "kernels/general_backward.py",
        "                        second_total += tl.where(inside, gradient, 0.0)\n",
        "                        second_total = tl.where(inside, gradient, 0.0)\n",
        "test_sums_over_the_batch", GENERAL,
    ),
    Fault(
        "a density that z does not see", "fastvae/autograd/general.py",
        "        return None, z_grad, None, None, None, *_NO_GRADIENT\n",
        "        return None, None, None, None, None, *_NO_GRADIENT\n",
        "test_drawn_noise_gives", GENERAL,
    ),
    # What they share
    Fault(
        "a ticket is left", "kernels/tiles.py", "        tl.store(ticket_ptr, 0)\n", "        pass\n",
        f"test_repeats_bit_by_bit and {NLL}",
    ),
    Fault(
        "an aborted launch keeps its ticket", "kernels/launch.py", "        _tickets.clear()\n        raise\n",
        "        raise\n",
        f"test_an_aborted_launch and {NLL}",
    ),
    Fault(
        "gradients as they were written", "kernels/layout.py",
        " if gradient.stride() == tensor.stride() else with_strides(gradient, gradient_strides(tensor))\n", "\n",
        f"test_layouts and {NLL} and batch_innermost",
    ),
    Fault(
        "a gradient of a gradient is lost", "fastvae/autograd/registration.py",
        "    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():\n        return True\n",
        "",
        f"test_gradient_penalty and {NLL}", AUTOGRAD,
    ),
    # Gradients that are missing, given twice, or not to be had
    Fault(
        "an upstream gradient that is missing is 0 times infinity", "kernels/posterior.py",
        "    kl_grad = None if kl_grad is None else kl_grad.resolve_neg()\n",
        "    kl_grad = torch.zeros((), device=mu.device) if kl_grad is None else kl_grad.resolve_neg()\n",
        "test_extreme_values and gaussian_sample_kl- and float32",
    ),
    Fault(
        "only the loss reaches the parameters", "fastvae/autograd/elbo.py",
        "reaches_terms = loss_grad is not None or reconstruction_grad is not None",
        "reaches_terms = loss_grad is not None",
        "test_gradients_of_some and elbo_loss]", AUTOGRAD,
    ),
    Fault(
        "one tensor given twice has one gradient", "fastvae/autograd/likelihood.py",
        "        each = iter(gradients)\n        return None, None, *[next(each) if need else None for need in needed]",
        "        each = dict(zip(map(id, kernels.needed_of(tensors, needed)), gradients))\n"
        "        return None, None, *[each[id(t)] if need else None for t, need in zip(tensors, needed)]",
        "test_one_tensor and LearnedGaussian", AUTOGRAD,
    ),
    Fault(
        "the results are parts of one tensor", "kernels/elbo.py",
        "    return new_empty([], dtype=torch.float32), new_empty([], dtype=torch.float32), "
        "new_empty([], dtype=torch.float32)\n",
        "    return new_empty([3], dtype=torch.float32).unbind()\n",
        "test_the_results_may_be_modified and elbo_loss]", AUTOGRAD,
    ),
    Fault(
        "an upstream gradient is written", "kernels/likelihood.py",
        "    loss_grad = loss_grad.resolve_neg()\n", "    loss_grad = loss_grad.resolve_neg().clamp_(max=1.0)\n",
        "test_upstream_gradients_of_any_layout and sigmoid_mse_loss- and transposed",
    ),
    Fault(
        "the gradient of z is taken to lie as z does", "kernels/posterior.py",
        "None if z_grad is None else with_strides(z_grad, layout.strides)", "z_grad",
        "test_upstream_gradients_of_any_layout and gaussian_sample- and transposed",
    ),
    Fault(
        "the gradient of dimensions is taken to lie as they do", "kernels/posterior.py",
        "with_strides(kl_grad, layout.strides[1:]) if per_column else kl_grad", "kl_grad",
        "test_upstream_gradients_of_any_layout and gaussian_kl_free_bits and transposed",
    ),
    Fault(
        "vmap is not refused", "fastvae/autograd/elbo.py", 'refuse_vmap("elbo_loss")', "None",
        "test_vmap and elbo_loss]", AUTOGRAD,
    ),
    Fault(
        "a transform of what has its gradient", "fastvae/functional/elbo.py",
        '    refuse_transforms("elbo_value_and_grad")\n', "",
        "test_what_has_its_gradient and not_transformed and elbo_value_and_grad]", AUTOGRAD,
    ),
    Fault(
        "batched gradients are read as one", "fastvae/autograd/registration.py", " or _is_batched(tensor)", "",
        "test_func_grad_and_batched and sigmoid_mse_loss- and float32", AUTOGRAD,
    ),
    # Reductions, tiles and layouts
    Fault(
        "a mean is of the batch", "kernels/tiles.py", '"mean": batch * event', '"mean": batch',
        "test_values_and_gradients and gaussian_kl- and float32",
    ),
    Fault(
        "a partial sum is left out", "kernels/tiles.py", "(index < count)[None, :]", "(index < count - 1)[None, :]",
        "test_any_tile and gaussian_kl-",
    ),
    Fault(
        "kl is read in one block", "kernels/tiles.py",
        "    while start < count:\n        index = start + tl.arange(0, BLOCK)\n        # .cg",
        "    while start < 1:\n        index = start + tl.arange(0, BLOCK)\n        # .cg",
        "test_sizes and elbo_loss- and 1030",
    ),
    Fault(
        "rows of later programs are taken to have no gaps", "kernels/elementwise.py",
        "    return first_row * stride + first_column, row * stride + column\n",
        "    return first_row * (stride // 2) + first_column, row * stride + column\n",
        "test_any_tile and sigmoid_mse_loss- and 8",
    ),
    Fault(
        "rows of later programs of moments are taken to have no gaps", "kernels/gaussian.py",
        "    source += first_row * row_stride\n", "    source += first_row * columns\n",
        "test_any_tile and gaussian_sample-",
    ),
    Fault(
        "packed moments are taken to begin their memory", "kernels/moments.py", "packed.storage_offset() + ", "",
        "test_layouts and gaussian_sample_kl_packed- and sliced_batch",
    ),
    Fault(
        "the order of packed moments is that of the whole", "kernels/moments.py",
        "stride // 2 if stride > strides[dim] else stride", "stride",
        "test_layouts and gaussian_sample_kl_packed- and channels_last",
    ),
    Fault(
        "a mean over nothing is 0", "kernels/tiles.py",
        'float("nan") if reduction == "mean" or', 'float("nan") if',
        "test_empty and gaussian_kl-",
    ),
    Fault(
        "nothing is divided by", "kernels/tiles.py", "1.0 / terms if terms else 0.0", "1.0 / terms",
        "test_empty_twice and gaussian_kl-", AUTOGRAD,
    ),
    # Numbers
    Fault(
        "free bits hide NaN", "kernels/dimensions.py",
        "tl.where(kl <= free_bits, free_bits, kl)", "tl.where(kl > free_bits, kl, free_bits)",
        "test_extreme_values and gaussian_kl_free_bits and float32",
    ),
    Fault(
        "log t! counts twice", "fastvae/likelihoods/negative_binomial.py",
        "value -= special.log_factorial(target, FAST)", "value -= 2.0 * special.log_factorial(target, FAST)",
        "test_terms_of_other_settings and [NegativeBinomial", COUNTS,
    ),
    Fault(
        "eps is not added to the mean", "kernels/counts.py",
        "m, e = mean + EPS, d + EPS", "m, e = mean, d + EPS",
        "test_terms[NegativeBinomial", COUNTS,
    ),
    Fault(
        "the slope by the dispersion cancels", "kernels/counts.py",
        "near = tl.abs(x) < 0.5", "near = tl.abs(x) < 0.0",
        "test_terms[NegativeBinomial", COUNTS,
    ),
    Fault(
        "a coefficient of log t! is off by 1e-5", "kernels/counts.py",
        "tl.where(whole, -1.143561377569, -0.143561377569)", "tl.where(whole, -1.143572377569, -0.143561377569)",
        "test_terms[NegativeBinomial", COUNTS,
    ),
    Fault(
        "the zeros of inflation move the mean", "fastvae/likelihoods/zero_inflated.py",
        "factor = tl.where(zero, share, 1.0)", "factor = 1.0",
        "test_terms[ZeroInflatedNegativeBinomial", COUNTS,
    ),
    Fault(
        "log(1 - w) cancels for a small w", "fastvae/likelihoods/zero_inflated.py",
        "tl.where(w < 0.5, w - special.log1p_minus(-w, FAST),", "tl.where(w < 1e-3, w - special.log1p_minus(-w, FAST),",
        "test_terms[ZeroInflatedNegativeBinomial", COUNTS,
    ),
    Fault(
        "the slope by the logits has the other share", "fastvae/likelihoods/zero_inflated.py",
        "tl.where(zero, -w * inflated_share, inflation)", "tl.where(zero, -w * share, inflation)",
        "test_terms[ZeroInflatedNegativeBinomial", COUNTS,
    ),
    Fault(
        "large parameters are cut", "fastvae/likelihoods/bernoulli.py",
        "    x = parameters[0]\n", "    x = tl.minimum(tl.maximum(parameters[0], -60.0), 60.0)\n",
        f"test_extreme_values and {NLL}- and float32",
    ),
    Fault(
        "a slope has four times the error of rounding", "fastvae/likelihoods/bernoulli.py",
        "(y - target, -x)", "(1.00000024 * y - target, -x)",
        f"test_error_is_at_most_twice and {NLL}- and float32",
    ),
    Fault(
        "a float64 among the tensors is rounded", "fastvae/functional/checks.py",
        "if tensor is not None and tensor.dtype is torch.float64:", "if False:",
        "test_float64 and gaussian_sample]", AUTOGRAD,
    ),
    Fault(
        "the reference computes in half precision", "fastvae/reference/precision.py",
        "return tensor if tensor.dtype is torch.float64 else tensor.float()", "return tensor",
        "test_autocast and gaussian_sample_kl- and float16", AUTOGRAD,
    ),
    Fault(
        "kl of another device", "fastvae/functional/checks.py",
        '    check_device("kl", kl, first_name, first)\n', "",
        "test_wrong_arguments and elbo_loss]", AUTOGRAD,
    ),
    Fault(
        "every call draws the same noise", "fastvae/random.py",
        "device=device, generator=generator)", "device=device, generator=torch.Generator(device).manual_seed(1))",
        "test_backward_makes_the_noise and gaussian_sample]", AUTOGRAD,
    ),
    # The maximum mean discrepancy
    Fault(
        "two tiles opposite to each other meet twice", "kernels/discrepancy.py",
        "((2 * step == all_tiles) & (tile < step))", "(2 * step == all_tiles)",
        "test_any_number_of_tiles and 12", DISCREPANCY,
    ),
    Fault(
        "a row and itself are a pair", "kernels/discrepancy.py", " & (itself == 0)\n", "\n",
        "test_values_and_gradients and triton-2-2", DISCREPANCY,
    ),
    Fault(
        "the sums of programs are weighted in float32", "kernels/discrepancy.py",
        "* 2.0 / (count * prior_count)", "* (2.0 / (count * prior_count)).to(tl.float32)",
        "test_equal_rows", DISCREPANCY,
    ),
    Fault(
        "distances are made of products", "fastvae/reference/discrepancy.py",
        'compute_mode="donot_use_mm_for_euclid_dist"', 'compute_mode="use_mm_for_euclid_dist"',
        "test_far_rows and reference", DISCREPANCY,
    ),
)  # fmt: skip


def finds(fault: Fault, folder: Path) -> str | None:
    """What is wrong: None where the fault is found."""
    source = folder / fault.file
    before = source.read_text(encoding="utf-8")
    if before.count(fault.text) != 1:
        return f"{fault.file} has the text {before.count(fault.text)} times"
    source.write_text(before.replace(fault.text, fault.instead), encoding="utf-8")
    report = folder / "report"
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        sys.path[:0] = [str(folder)]
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            arguments = ["-q", "-x", "--slow", "-p", "no:cacheprovider", f"tests/{fault.test_file}"]
            status = pytest.main([*arguments, "-k", fault.tests])
        import fastvae.kernels

        planted = all(str(folder) in str(module.__file__) for module in (fastvae, fastvae.kernels))
        report.write_text(json.dumps([int(status), planted, output.getvalue()[-2000:]]))
        os._exit(0)
    os.waitpid(child, 0)
    source.write_text(before, encoding="utf-8")
    status, planted, output = json.loads(report.read_text())
    report.unlink()
    if not planted:
        return "the sources of another folder were tested"
    return None if status == pytest.ExitCode.TESTS_FAILED else f"exit status {status}:\n{output}"


def main(*words: str, every: int = 1) -> None:
    torch.set_num_threads(1)
    faults = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)][::every]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in FOLDERS:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        missed = {fault.name: why for fault in faults if (why := finds(fault, folder)) is not None}
    print(json.dumps({"planted": len(faults), "missed": missed}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--every"]:
        main(every=int(sys.argv[2]))
    else:
        main(*sys.argv[1:])
