"""Likelihoods on the CPU beside other libraries' code: the time and the peak memory of a loss and its gradients.

    python benchmarks/peers.py [NAME ...] [--threads N] [--rounds 15] [--compile]

The peers are scvi-tools' `log_nb_positive` and `log_zinb_positive`, torch.distributions, and the mixture of logistics
of PixelCNN++ and VDVAE. The providers are timed alternately in one process. The table has the least time of each, and
the median over the rounds of the ratio to fastvae. With one thread the times are CPU times, because other programs
disturb them less. The memory is the growth of the resident memory, in a separate process for each provider. With
--compile both are also measured under torch.compile.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import NamedTuple

import torch
from torch import Tensor, distributions
from torch.nn.functional import log_softmax, softplus

import fastvae.functional as F
import plain
from fastvae.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogisticMixture,
    Gaussian,
    Laplace,
    Likelihood,
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
)
from fastvae.operations import in_short

COUNTS, PIXELS = (128, 20000), (8, 32, 32)


class Subject(NamedTuple):
    likelihood: Likelihood
    peer: Callable[..., Tensor]  # each element's value, given the parameters and the target
    shape: tuple[int, ...] = COUNTS  # of the elements
    smaller: tuple[str, ...] = ()  # the parameters that have one number for each column

    @property
    def name(self) -> str:
        return in_short(self.likelihood) + "".join(f", {name} [columns]" for name in self.smaller)


def mixture_of_logistics(mixture: Tensor, target: Tensor) -> Tensor:
    """VDVAE's `discretized_mix_logistic_loss`, of a mixture [B, 100, H, W] and colours in [0, 1]."""
    l, x = mixture.permute(0, 2, 3, 1), 2 * target.permute(0, 2, 3, 1) - 1
    mixtures = l.shape[3] // 10
    logits = l[..., :mixtures]
    l = l[..., mixtures:].reshape(*x.shape, 3 * mixtures)
    means = l[..., :mixtures]
    log_scales = l[..., mixtures : 2 * mixtures].clamp(min=-7.0)
    coefficients = torch.tanh(l[..., 2 * mixtures :])
    x = x[..., None].expand(means.shape)
    green = means[..., 1, :] + coefficients[..., 0, :] * x[..., 0, :]
    blue = means[..., 2, :] + coefficients[..., 1, :] * x[..., 0, :] + coefficients[..., 2, :] * x[..., 1, :]
    centred = x - torch.stack([means[..., 0, :], green, blue], 3)
    inverse = torch.exp(-log_scales)
    above, below, middle = inverse * (centred + 1 / 255), inverse * (centred - 1 / 255), inverse * centred
    mass = torch.sigmoid(above) - torch.sigmoid(below)
    density = middle - log_scales - 2 * softplus(middle) - 4.8481164
    inner = torch.where(mass > 1e-5, torch.log(mass.clamp(min=1e-12)), density)
    inner = torch.where(x > 0.999, -softplus(below), inner)
    terms = torch.where(x < -0.999, above - softplus(above), inner).sum(3) + log_softmax(logits, -1)
    return -torch.logsumexp(terms, -1)


def by_torch(family: Callable[..., distributions.Distribution]) -> Callable[..., Tensor]:
    return lambda *tensors: -family(*tensors[:-1]).log_prob(tensors[-1])


SUBJECTS = (
    Subject(Bernoulli(), by_torch(lambda x: distributions.Bernoulli(logits=x, validate_args=False))),
    Subject(ContinuousBernoulli(), by_torch(lambda x: distributions.ContinuousBernoulli(logits=x))),
    Subject(Gaussian(), by_torch(lambda m, l: distributions.Normal(m, torch.exp(0.5 * l)))),
    Subject(Laplace(), by_torch(lambda m, l: distributions.Laplace(m, torch.exp(l)))),
    Subject(Poisson(), by_torch(lambda x: distributions.Poisson(torch.exp(x)))),
    Subject(NegativeBinomial(), lambda *tensors: plain.negative_binomial(*tensors, 1e-8)),
    Subject(NegativeBinomial(), lambda *tensors: plain.negative_binomial(*tensors, 1e-8), smaller=("dispersion",)),
    Subject(
        ZeroInflatedNegativeBinomial(),
        lambda *tensors: plain.zero_inflated(*tensors, 1e-8),
        smaller=("dispersion",),
    ),
    Subject(Categorical(), lambda x, t: -(t * torch.log_softmax(x, 1)).sum(1), (8, 64, 64)),
    Subject(DiscretizedLogisticMixture(), mixture_of_logistics, PIXELS),
)


def losses(subject: Subject, compiled: bool) -> tuple[dict[str, Callable[[], Tensor]], tuple[Tensor, ...]]:
    """Of each provider, as functions of nothing, and the parameters."""
    likelihood = subject.likelihood
    *drawn, target = likelihood.draw(subject.shape, torch.Generator().manual_seed(0))
    parameters = tuple(
        (x[0] if name in subject.smaller else x).clone().requires_grad_()
        for name, x in zip(likelihood.parameters, drawn, strict=True)
    )
    functions = {
        "fastvae": lambda *tensors: F.negative_log_likelihood(tensors[:-1], tensors[-1], likelihood),
        "peer": lambda *tensors: subject.peer(*tensors).sum() / len(tensors[-1]),
    }
    if compiled:
        functions = {name: torch.compile(function, fullgraph=True) for name, function in functions.items()}
    made = {name: lambda function=function: function(*parameters, target) for name, function in functions.items()}
    values = [function().item() for function in made.values()]
    assert abs(values[0] - values[1]) <= 1e-2 * abs(values[1]), f"{subject.name}: {values}"
    return made, parameters


def times(subject: Subject, compiled: bool, rounds: int) -> dict[str, float]:
    """Milliseconds of each provider, and the ratio of the peer's to fastvae's."""
    clock = process_time if torch.get_num_threads() == 1 else perf_counter
    made, parameters = losses(subject, compiled)
    found: dict[str, list[float]] = {name: [] for name in made}
    for k in range(rounds + 1):
        for name, function in made.items():
            start = clock()
            torch.autograd.grad(function(), parameters)
            if k:  # the first round compiles
                found[name].append(1e3 * (clock() - start))
    ratio = statistics.median(peer / own for own, peer in zip(found["fastvae"], found["peer"], strict=True))
    return {**{name: min(each) for name, each in found.items()}, "ratio": ratio}


def memory(subject: Subject, compiled: bool, provider: str) -> dict[str, float]:
    """MB by which a loss and its gradients raise the resident memory at most."""
    made, parameters = losses(subject, compiled)
    torch.autograd.grad(made[provider](), parameters)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    torch.autograd.grad(made[provider](), parameters)
    return {provider: _resident("VmHWM") - before}


def _resident(what: str) -> float:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measured(name: str, compiled: bool, arguments: argparse.Namespace, *of_memory: str) -> dict[str, float]:
    """In a process of its own."""
    options = [f"--threads={arguments.threads}", f"--rounds={arguments.rounds}", *["--compile"] * compiled]
    command = [sys.executable, str(Path(__file__)), name, *options, "--one", *of_memory]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only these, such as Poisson()")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--one", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    subjects = [it for it in SUBJECTS if not arguments.names or it.name in arguments.names]
    if arguments.one is not None:
        (subject,) = subjects
        if arguments.one:
            found = memory(subject, arguments.compile, *arguments.one)
        else:
            found = times(subject, arguments.compile, arguments.rounds)
        print(json.dumps(found))
        return
    print(f"{arguments.threads} threads, torch {torch.__version__}\n")
    print("| likelihood | elements | | fastvae, ms | peer, ms | peer / fastvae | fastvae, MB | peer, MB |")
    print("|---|---|---|--:|--:|--:|--:|--:|")
    for subject in subjects:
        for compiled in (False, True) if arguments.compile else (False,):
            time = measured(subject.name, compiled, arguments)
            own, peer = (measured(subject.name, compiled, arguments, name)[name] for name in ("fastvae", "peer"))
            print(
                f"| `{subject.name}` | {list(subject.shape)} | {'compiled' if compiled else 'eager'} | "
                f"{time['fastvae']:.0f} | {time['peer']:.0f} | {time['ratio']:.2f} | {own:.0f} | {peer:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
