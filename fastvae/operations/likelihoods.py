"""The operations of the likelihoods: of each, the loss, the bound, and the bound with its gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from fastvae.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Gaussian,
    Laplace,
    Likelihood,
    Multinomial,
    NegativeBinomial,
    Poisson,
    SigmoidMSE,
    ZeroInflatedNegativeBinomial,
)
from fastvae.operations.operation import REDUCTIONS, Call, Operation

LIKELIHOODS = (
    SigmoidMSE(),
    Bernoulli(),
    ContinuousBernoulli(),
    Gaussian(),
    Laplace(),
    DiscretizedLogistic(),
    Poisson(),
    NegativeBinomial(),
    ZeroInflatedNegativeBinomial(),
    DiscretizedLogisticMixture(),
    Categorical(),
    Multinomial(),
)
# Likelihoods of which a parameter is also tried with one number for each column or channel.
SMALLER = ((NegativeBinomial(), {"dispersion": "column"}), (Gaussian(), {"logvar": "channel"}))
# Likelihoods that are also tried with rows that no program can hold.
LONG_ROWS = (Multinomial(),)
# A gradient has so many roundings more than its slope, because the kernel multiplies it by a factor: a product of up to
# four numbers.
FACTOR = 5


def of_likelihood(likelihood: Likelihood) -> list[Operation]:
    """The three operations of a likelihood. If the target has a slope, two of them appear again with the target's
    gradient.
    """
    parameters = likelihood.parameters
    gradients = tuple(f"{name}_grad" for name in parameters)
    value, *slopes = likelihood.roundings
    each_slope = zip((*gradients, "target_grad"), slopes, strict=False)
    roundings = {"loss": value, **{name: slope + FACTOR for name, slope in each_slope}}
    read, written = " + ".join((*parameters, "target")), " + ".join(gradients)
    own = isinstance(likelihood, SigmoidMSE)  # the default, which has functions of its own
    named = in_short(likelihood)
    suffix = "" if own else f"_{named}".removesuffix("()")

    def call(function: Call, *tensors: Tensor, **options: Any) -> Any:
        if own:
            return function(*tensors, **options)
        return function(tensors[: len(parameters)], *tensors[len(parameters) :], likelihood=likelihood, **options)

    loss = Operation(
        name="sigmoid_mse_loss" if own else f"negative_log_likelihood{suffix}",
        function="sigmoid_mse_loss" if own else "negative_log_likelihood",
        arguments=(*parameters, "target"),
        gradients=parameters,
        outputs=("loss",),
        roots=1,
        forward=f"{read} ->",
        backward=f"{read} -> {written}",
        kernels={
            "forward": ("groups.grouped_kernel" if likelihood.grouped else "likelihood.value_kernel",),
            "backward": ("groups.grouped_kernel" if likelihood.grouped else "likelihood.gradient_kernel",),
        },
        roundings=roundings,
        launches={"forward": 1, "backward": 1},
        reductions=REDUCTIONS,
        call=call,
        likelihood=likelihood,
        computes="(sigmoid(logits) − target)², reduced" if own else f"−log p of {named}, reduced",  # noqa: RUF001 - a minus
    )
    bound = replace(
        loss,
        name=f"elbo_loss{suffix}",
        function="elbo_loss",
        kernels={
            direction: tuple(kernel.replace("likelihood.", "elbo.") for kernel in kernels)
            for direction, kernels in loss.kernels.items()
        },
        arguments=(*parameters, "target", "kl"),
        gradients=(*parameters, "kl"),
        outputs=("loss", "reconstruction", "kl"),
        # The weighted sums have 4 more; the gradient in kl is (beta * g + g') / B.
        roundings={**roundings, "loss": value + 4, "reconstruction": value + 4, "kl": 4, "kl_grad": 5},
        options={"beta": 0.5},
        reductions=(),
        computes="½ · squared error + beta · KL, in nats" if own else None,
    )
    at_once = replace(
        bound,
        name=f"elbo_value_and_grad{suffix}",
        function="elbo_value_and_grad",
        gradients=(),
        outputs=(*bound.outputs, *gradients, "kl_grad"),
        roots=0,
        forward=f"{read} -> {written}",
        backward=None,
        launches={"forward": 1},
        computes="the same, and its gradients" if own else None,
    )
    entries = [loss, bound, at_once]
    if likelihood.target_has_slope:
        entries += [
            replace(
                entry,
                name=f"{entry.name}_target",
                gradients=(*entry.gradients, "target"),
                backward=f"{entry.backward} + target_grad",
                computes=None,
                measured=False,
            )
            for entry in (loss, bound)
        ]
    return entries


def of_smaller(likelihood: Likelihood, smaller: Mapping[str, str]) -> list[Operation]:
    """The operations of a likelihood with parameters that are smaller than the target."""
    kinds = "_".join(f"{name}_per_{kind}" for name, kind in smaller.items())
    shapes = {"column": "[columns]", "channel": "[channels, 1, 1]"}
    entries = []
    for entry in of_likelihood(likelihood)[:3]:
        formulas = {}
        for direction in entry.directions:
            moved = [
                [it for it in names if it.removesuffix("_grad") not in smaller]
                for names in entry.tensors_moved(direction)
            ]
            formulas[direction] = " -> ".join(map(" + ".join, moved))
        entries.append(
            replace(
                entry,
                name=f"{entry.name}_{kinds}",
                kernels=dict.fromkeys(entry.directions, ("smaller.broadcast_kernel",)),
                forward=formulas["forward"],
                backward=formulas.get("backward"),
                smaller=smaller,
                computes=entry.computes
                and f"the same with {', '.join(f'{name} {shapes[kind]}' for name, kind in smaller.items())}",
                measured=entry.name.startswith("negative_log_likelihood"),
            )
        )
    return entries


def of_long_rows(likelihood: Likelihood) -> list[Operation]:
    """The operations of softmax over rows that are too long for one program. They compute the sums of each row first,
    and then the gradient, which reads everything again.
    """
    entries = []
    for entry in of_likelihood(likelihood)[:3]:
        formulas, kernels = {}, {}
        for direction in entry.directions:
            read, written = (" + ".join(names) for names in entry.tensors_moved(direction))
            formulas[direction] = f"{read} + {read} -> {written}" if written else f"{read} ->"
            kernels[direction] = ("long_rows.row_sums_kernel", *(["long_rows.row_gradient_kernel"] if written else []))
        entries.append(
            replace(
                entry,
                name=f"{entry.name}_long_rows",
                kernels=kernels,
                launches={direction: len(each) for direction, each in kernels.items()},
                forward=formulas["forward"],
                backward=formulas.get("backward"),
                long_rows=True,
                computes=entry.computes and "the same with rows of more than 4096 numbers",
                measured=False,
            )
        )
    return entries


def in_short(likelihood: Likelihood) -> str:
    """The likelihood's call, with the settings that differ from the defaults."""
    values = ((it, getattr(likelihood, it.name)) for it in fields(likelihood))
    changed = [f"{it.name}={value!r}" for it, value in values if value != it.default]
    return f"{type(likelihood).__name__}({', '.join(changed)})"
