"""The public operations, in one list.

Every test, table and benchmark of all operations reads this list: the tests of the error bound, launches, bytes,
layouts, autograd and torch.compile; the tables of the compiled code; the cases of the benchmarks; and the table of
operations in the documentation. A new operation therefore needs one entry here. Kernels are given by name, because this
module imports no Triton.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import gcd, prod
from typing import Any

import torch
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

Call = Callable[..., Any]
REDUCTIONS = ("none", "batchmean", "sum", "mean")


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
# The kernels of the objectives that are no list's entries, because their inputs have not the shape of one batch.
PAIRWISE = {
    "gaussian_mixture_log_prob": (
        "mixture_log_prob.mixture_kernel",
        "mixture_log_prob.mixture_rows_kernel",
        "mixture_log_prob.mixture_components_kernel",
    ),
    "importance_weighted_bound": ("importance_weighted.bound_kernel", "importance_weighted.bound_backward_kernel"),
    "total_correlation": (
        "decomposition.total_correlation_kernel",
        "decomposition.total_correlation_rows_kernel",
        "decomposition.total_correlation_posteriors_kernel",
    ),
    "maximum_mean_discrepancy": (
        "mean_discrepancy.discrepancy_kernel",
        "mean_discrepancy.discrepancy_gradients_kernel",
    ),
}
# A gradient has so many roundings more than its slope, because the kernel multiplies it by a factor: a product of up to
# four numbers.
FACTOR = 5


@dataclass(frozen=True)
class Spec:
    """The tensors on which an operation is tried."""

    shape: tuple[int, ...]  # of z, or of the target, or as `Operation.elements` reads it
    dtype: torch.dtype = torch.float32
    target_dtype: torch.dtype | None = None  # dtype, unless given
    layout: Callable[[Tensor], Tensor] = Tensor.contiguous  # of every tensor but kl
    device: torch.device | str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class Operation:
    """A public function, and how the tests call it: its arguments, its options, and the arguments that get gradients.

    `forward` and `backward` name the tensors of the event's size that are read and written: "mu + logvar -> z". An
    operation may move the bytes of these tensors and no others. A gradient is named after its tensor: "z_grad".
    """

    name: str  # the function's name, and what is particular about this entry
    function: str  # of fastvae.functional
    arguments: tuple[str, ...]  # the tensors
    gradients: tuple[str, ...]  # of these arguments
    outputs: tuple[str, ...]  # what the function returns, flattened
    roots: int  # a training step differentiates so many of the outputs, the first ones
    forward: str
    backward: str | None  # None: the gradients are among the outputs
    kernels: Mapping[str, tuple[str, ...]]  # "forward", "backward": in order, "module.kernel" of fastvae.kernels
    roundings: Mapping[str, int]  # of each output and gradient, without the levels of sums: the kernels' docstrings
    launches: Mapping[str, int]  # "forward", "backward": Triton launches and operations of torch
    options: Mapping[str, Any] = field(default_factory=dict)  # what the function is called with
    reductions: tuple[str, ...] = ()  # that the function takes with these options
    call: Call = lambda function, *tensors, **options: function(*tensors, **options)
    draws_noise: bool = False  # where no `eps` is given
    likelihood: Likelihood | None = None
    computes: str | None = None  # the text of its row in the documentation; None: it has no row
    measured: bool = True  # by the benchmarks
    smaller: Mapping[str, str] = field(default_factory=dict)  # parameters with one number per "column" or "channel"
    long_rows: bool = False  # a shape is that of the logits, of which no program can hold those along dimension 1

    def __call__(self, library: Any, *tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
        """The outputs. `library` has the function: it is fastvae.functional, or a module with the same names."""
        return flattened(self.call(getattr(library, self.function), *tensors, **{**self.options, **options}))

    def inputs(self, spec: Spec) -> tuple[Tensor, ...]:
        """The arguments. Those named in `gradients` require grad."""
        generator = torch.Generator().manual_seed(spec.seed)
        drawn: dict[str, Tensor] = {}
        if self.likelihood:
            names = (*self.likelihood.parameters, "target")
            # There is one number of each column or channel also where there are no elements.
            shape = tuple(max(1, size) for size in spec.shape) if self.smaller else self.elements(spec.shape)
            drawn = dict(zip(names, self.likelihood.draw(shape, generator), strict=True))
            if self.long_rows:  # of independent numbers, in any order
                count = prod(spec.shape)
                drawn = {name: values.flatten()[:count].view(spec.shape) for name, values in drawn.items()}
        tensors = []
        for name in self.arguments:
            if name in ("moments", "prior"):
                halves = [_draw(half, spec.shape, generator) for half in ("mu", "logvar")]
                tensor = spec.layout(torch.cat(halves, 1).to(spec.device, spec.dtype))
            elif name == "kl":
                tensor = torch.logspace(-2, 2, spec.shape[0], device=spec.device)
            else:
                dtype = spec.target_dtype if name == "target" and spec.target_dtype else spec.dtype
                values = drawn[name] if name in drawn else _draw(name, spec.shape, generator)
                if name in self.smaller:
                    tensor = _one_of_each(self.smaller[name], values, spec.shape).to(spec.device, dtype).contiguous()
                    tensors.append(tensor.requires_grad_(name in self.gradients))
                    continue
                if self.smaller:
                    values = values[tuple(map(slice, spec.shape))]
                if dtype is torch.uint8:
                    values = values.clamp(0, 255) if self.target_kind == "number" else (255 * values).round()
                tensor = spec.layout(values.to(spec.device, dtype))
            tensors.append(tensor.requires_grad_(name in self.gradients and tensor.is_floating_point()))
        return tuple(tensors)

    def elements(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the elements that have a value of the formula, for the shape of a `Spec`. If an element has an
        axis of its own, this axis replaces the channels of images.
        """
        if self.long_rows:
            assert self.likelihood is not None
            return (-(-prod(shape) // self.likelihood.draw((1,))[0].numel()),)  # whose numbers fill those rows
        grouped = self.likelihood is not None and self.likelihood.grouped
        return (shape[0], *shape[2:]) if grouped and len(shape) == 4 else shape

    def shape_of_z(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """And so of the noise, given the shape of a `Spec`."""
        samples = self.options.get("samples")
        return shape if samples is None else (samples, *shape)

    @property
    def target_kind(self) -> str | None:
        return self.likelihood.target if self.likelihood else None

    @property
    def directions(self) -> tuple[str, ...]:
        return ("forward",) if self.backward is None else ("forward", "backward")

    def formula(self, direction: str) -> str:
        formula = self.forward if direction == "forward" else self.backward
        assert formula is not None, f"{self.name} has no backward pass"
        return formula

    def tensors_moved(self, direction: str) -> tuple[list[str], list[str]]:
        """The names of the tensors of the event's size: those that the operation reads, and those that it writes."""
        read, written = self.formula(direction).split("->")
        return re.findall(r"\w+", read), re.findall(r"\w+", written)

    def bytes_per_element(
        self, direction: str, dtype: torch.dtype = torch.float32, target_dtype: torch.dtype | None = None
    ) -> tuple[int, int]:
        """The bytes read and written per element of z or of the likelihood."""
        numbers = self.numbers_of_an_element

        def size(names: list[str]) -> int:
            of_target = (target_dtype or dtype).itemsize
            sizes = [of_target if name.startswith("target") else dtype.itemsize for name in names]
            return sum(
                size * numbers.get(name.removesuffix("_grad"), 1) for size, name in zip(sizes, names, strict=True)
            )

        read, written = self.tensors_moved(direction)
        return size(read), size(written)

    @property
    def numbers_of_an_element(self) -> dict[str, int]:
        """How many numbers of each tensor belong to an element that has an axis of its own."""
        if self.likelihood is None or not self.likelihood.grouped or self.long_rows:
            return {}
        names = (*self.likelihood.parameters, "target")
        return {name: of_one.numel() for name, of_one in zip(names, self.likelihood.draw((1,)), strict=True)}


def _one_of_each(kind: str, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A smaller parameter [columns] or [channels, 1, ...] for a target of that shape, of numbers drawn for every
    element.
    """
    if kind == "column":
        return values[(0,) * (values.ndim - 1)][: shape[-1]]
    first = values[0, : shape[1]]
    for dim in range(1, first.ndim):
        first = first.narrow(dim, 0, 1)
    return first


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    normal = torch.randn(shape, generator=generator)
    return 0.7 * normal - 0.5 if name.endswith("logvar") else normal


def flattened(result: Any) -> tuple[Tensor, ...]:
    """The tensors of a result, which is a tensor or a nested tuple of tensors."""
    if isinstance(result, Tensor):
        return (result,)
    tensors: list[Tensor] = []
    for part in result:
        tensors += flattened(part)
    return tuple(tensors)


def operations(extra: Sequence[Likelihood] = ()) -> list[Operation]:
    """Every public operation, and the operations of ``extra`` likelihoods, which are not part of fastvae."""
    of_likelihoods = [it for likelihood in (*LIKELIHOODS, *extra) for it in of_likelihood(likelihood)]
    smaller = [it for entry in SMALLER for it in of_smaller(*entry)]
    return [*_of_posterior(), *of_likelihoods, *smaller, *(it for each in LONG_ROWS for it in of_long_rows(each))]


def of_each_kind(operations: Sequence[Operation]) -> list[Operation]:
    """The operations of the posterior, and those of a few likelihoods: with one parameter, with two, with a smaller
    parameter, with elements that have an axis of their own, and with long rows.

    Tests of launches, bytes and layouts use these, because kernels and launchers do not depend on a likelihood's term.
    """
    return [it for it in operations if it.likelihood in (None, SigmoidMSE(), Bernoulli(), Gaussian(), Multinomial())]


def named(operations: Iterable[Operation]) -> dict[str, Operation]:
    return {operation.name: operation for operation in operations}


def kernel_names(operations: Sequence[Operation]) -> list[str]:
    """The names of the operations' kernels, "module.kernel" of fastvae.kernels, each once."""
    return sorted({kernel for operation in operations for kernels in operation.kernels.values() for kernel in kernels})


def all_kernel_names() -> list[str]:
    """Those of every operation and objective."""
    return sorted({*kernel_names(operations()), *(kernel for kernels in PAIRWISE.values() for kernel in kernels)})


def _of_posterior() -> list[Operation]:
    halves, packed = ("mu", "logvar"), ("moments",)
    reductions = (*REDUCTIONS, "per_dimension")
    of_dimensions = {
        "forward": ("posterior.dimensions_forward_kernel",),
        "backward": ("posterior.dimensions_backward_kernel",),
    }
    sample = Operation(
        name="gaussian_sample",
        function="gaussian_sample",
        arguments=halves,
        gradients=halves,
        outputs=("z",),
        roots=1,
        forward="mu + logvar -> z",
        backward="logvar + z_grad -> mu_grad + logvar_grad",
        kernels={
            "forward": ("posterior.gaussian_forward_kernel",),
            "backward": ("posterior.gaussian_backward_kernel",),
        },
        roundings={"z": 6, "kl": 10, "mu_grad": 4, "logvar_grad": 10},  # mu_grad: 3, and one for the upstream factor
        launches={"forward": 1, "backward": 1},
        draws_noise=True,
        computes="z = mu + exp(logvar / 2) · eps",
    )
    divergence = replace(
        sample,
        name="gaussian_kl",
        function="gaussian_kl",
        outputs=("kl",),
        forward="mu + logvar ->",
        backward="mu + logvar -> mu_grad + logvar_grad",
        reductions=reductions,
        draws_noise=False,
        computes="KL(N(mu, exp(logvar)) ‖ N(0, I))",
    )
    both = replace(
        sample,
        name="gaussian_sample_kl",
        function="gaussian_sample_kl",
        outputs=("z", "kl"),
        roots=2,
        backward="mu + logvar + z_grad -> mu_grad + logvar_grad",
        options={"reduction": "batchmean"},
        reductions=reductions,
        computes="z and its divergence",
    )
    of_packed = replace(
        both,
        name="gaussian_sample_kl_packed",
        function="gaussian_sample_kl_packed",
        arguments=packed,
        gradients=packed,
        computes="z and its divergence, from [mu \\| logvar] along any dimension, without a copy",
    )
    general = {
        "forward": ("general_posterior.general_forward_kernel",),
        "backward": ("general_gradients.general_backward_kernel",),
    }
    prior_halves = ("prior_mu", "prior_logvar")
    of_prior = {"kl": 26, "mu_grad": 26, "logvar_grad": 13, "prior_mu_grad": 26, "prior_logvar_grad": 28}
    to_prior = replace(
        divergence,
        name="gaussian_kl_prior",
        arguments=(*halves, *prior_halves),
        gradients=(*halves, *prior_halves),
        forward="mu + logvar + prior_mu + prior_logvar ->",
        backward="mu + logvar + prior_mu + prior_logvar -> mu_grad + logvar_grad + prior_mu_grad + prior_logvar_grad",
        kernels=general,
        roundings={**sample.roundings, **of_prior},
        call=lambda function, mu, logvar, *prior, **options: function(mu, logvar, prior=prior, **options),
        computes="KL(N(mu, exp(logvar)) ‖ N(prior_mu, exp(prior_logvar)))",
        measured=False,
    )
    return [
        sample,
        divergence,
        replace(
            divergence,
            name="gaussian_kl_free_bits",
            kernels=of_dimensions,
            launches={"forward": 2, "backward": 1},  # and a sum
            options={"free_bits": 0.5},
            reductions=("batchmean", "per_dimension"),
            computes="the same; each dimension counts as at least `free_bits`",
        ),
        to_prior,
        both,
        of_packed,
        replace(
            of_packed,
            name="gaussian_sample_kl_packed_eps",
            arguments=("moments", "eps"),
            forward="mu + logvar + eps -> z",
            backward="mu + logvar + eps + z_grad -> mu_grad + logvar_grad",
            call=lambda function, moments, eps, **options: function(moments, eps=eps, **options),
            draws_noise=False,
            computes=None,
            measured=False,
        ),
        replace(
            of_packed,
            name="gaussian_sample_kl_packed_per_dimension",
            kernels=of_dimensions,
            options={"reduction": "per_dimension", "free_bits": 0.5},
            reductions=("per_dimension", "batchmean"),
            computes="z, and the batch mean of each dimension's divergence, at least `free_bits`",
            measured=False,
        ),
        replace(
            of_packed,
            name="gaussian_sample_kl_packed_prior",
            arguments=("moments", "prior"),
            gradients=("moments", "prior"),
            forward="mu + logvar + prior_mu + prior_logvar -> z",
            backward="mu + logvar + prior_mu + prior_logvar + z_grad "
            "-> mu_grad + logvar_grad + prior_mu_grad + prior_logvar_grad",
            kernels=general,
            roundings=to_prior.roundings,
            call=lambda function, moments, prior, **options: function(moments, prior=prior, **options),
            computes="z and its divergence from a packed prior: a block of a hierarchical VAE",
            measured=False,
        ),
        replace(
            both,
            name="gaussian_sample_kl_softplus",
            kernels=general,
            roundings={"z": 14, "kl": 26, "mu_grad": 4, "logvar_grad": 26},
            options={"scale": "softplus", "scale_eps": 1e-4, "reduction": "batchmean"},
            computes="z and its divergence, with std = log(1 + exp(logvar)) + `scale_eps`",
            measured=False,
        ),
        replace(
            sample,
            name="gaussian_sample_samples",
            outputs=("z", "log_q"),
            roots=2,
            forward="mu + logvar -> z + z + z",
            backward="logvar + z_grad + z_grad + z_grad -> mu_grad + logvar_grad",
            kernels=general,
            # Two for each sample: its factor, and the sum.
            roundings={**sample.roundings, "log_q": 4, "mu_grad": 9, "logvar_grad": 16},
            options={"samples": 3, "log_prob": True},
            computes="three samples of each posterior, and their log-densities",
            measured=False,
        ),
    ]


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


def table(operations: Sequence[Operation], computes: bool) -> list[str]:
    """The lines of the documentation's table of operations. ``computes`` adds a column with what each computes."""
    titles = ["function", "computes", "launches, forward + backward", "bytes per float32 element, forward + backward"]
    rows = [titles, ["---"] * 4, *(_row(operation) for operation in operations if operation.computes)]
    return [f"| {' | '.join(row if computes else [row[0], *row[2:]])} |".replace(" --- ", "---") for row in rows]


def _row(operation: Operation) -> list[str]:
    # What belongs together: a logit and its number in the target, or all of a mixture's pixel.
    share = gcd(*operation.numbers_of_an_element.values()) or 1

    def both_directions(number: Callable[[str], int]) -> str:
        numbers = [str(number(direction)) for direction in operation.directions]
        return " + ".join(numbers) if len(numbers) > 1 else f"{numbers[0]} in all"

    moved = both_directions(lambda direction: sum(operation.bytes_per_element(direction)) // share)
    if operation.target_kind == "unit":
        of_uint8 = both_directions(lambda d: sum(operation.bytes_per_element(d, target_dtype=torch.uint8)) // share)
        moved += f"; {of_uint8.removesuffix(' in all')} with a uint8 target"
    given = list(operation.arguments)
    if operation.likelihood and (count := len(operation.likelihood.parameters)) > 1:
        given[:count] = [f"({', '.join(given[:count])})"]
    if operation.function == "negative_log_likelihood":
        assert operation.likelihood is not None
        given.append(in_short(operation.likelihood))
    elif operation.name != operation.function:
        given = _with_prior(given)
        given += [f"{name}={value!r}".replace("'", '"') for name, value in operation.options.items()]
    return [
        f"`{operation.function}({', '.join(given)})`",
        operation.computes or "",
        both_directions(operation.launches.__getitem__),
        moved,
    ]


def _with_prior(given: list[str]) -> list[str]:
    """The arguments with the prior as it is given."""
    moments = [name for name in given if not name.startswith("prior")]
    halves = ", ".join(given[len(moments) :])
    return [*moments, f"prior=({halves})" if "," in halves else f"prior={halves}"] if halves else moments
