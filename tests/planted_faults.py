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
AUTOGRAD = "test_contract_autograd.py"
GROUPED = "test_grouped_likelihoods.py"
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
        "a target that lies otherwise is not copied", "kernels/likelihood.py",
        "    if not has_strides(target, (target.stride(0), *first.stride()[1:])) or target.is_neg():\n",
        "    if target.is_neg():\n",
        f"test_layouts and {NLL} and transposed",
    ),
    Fault(
        "a minus that is not in memory", "kernels/likelihood.py", " or target.is_neg():", ":",
        f"test_a_minus and {NLL} and last",
    ),
    Fault(
        "the mean over an empty batch", "kernels/likelihood.py", 'value.fill_(float("nan"))', "value.fill_(0.0)",
        "test_empty and elbo_loss_Bernoulli-",
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


def main(*words: str) -> None:
    torch.set_num_threads(1)
    faults = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in FOLDERS:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        missed = {fault.name: why for fault in faults if (why := finds(fault, folder)) is not None}
    print(json.dumps({"planted": len(faults), "missed": missed}))


if __name__ == "__main__":
    main(*sys.argv[1:])
