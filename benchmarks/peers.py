"""Likelihoods on the CPU beside what their users have: the time and the peak memory of a loss and its gradients.

    python benchmarks/peers.py [--rows 128] [--columns 20000] [--threads N] [--rounds 10]

Each is measured in a process of its own, in turns: the smallest of the rounds' times, and by how much the largest
resident memory exceeds that before the first round. The peers are `plain.py`, eager.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import torch

import fastvae.functional as F
import plain
from fastvae.likelihoods import Bernoulli, Gaussian, Laplace, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from fastvae.operations import in_short

# With the parameters that have one number for each column.
SUBJECTS = {
    in_short(likelihood) + "".join(f", {name} [columns]" for name in smaller): (likelihood, smaller)
    for likelihood, smaller in (
        (Bernoulli(), ()),
        (Gaussian(), ()),
        (Laplace(), ()),
        (Poisson(), ()),
        (NegativeBinomial(), ()),
        (NegativeBinomial(), ("dispersion",)),
        (ZeroInflatedNegativeBinomial(), ("dispersion",)),
    )
}


def measure(subject: str, provider: str, shape: tuple[int, int], rounds: int) -> tuple[float, float]:
    """Milliseconds of a loss and its gradients, and MB."""
    likelihood, smaller = SUBJECTS[subject]
    *drawn, target = likelihood.draw(shape, torch.Generator().manual_seed(0))
    parameters = tuple(
        (x[0] if name in smaller else x).clone().requires_grad_()
        for name, x in zip(likelihood.parameters, drawn, strict=True)
    )
    library = F if provider == "fastvae" else plain
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(rounds):
        start = perf_counter()
        torch.autograd.grad(library.negative_log_likelihood(parameters, target, likelihood), parameters)
        times.append(perf_counter() - start)
    return 1e3 * min(times), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--columns", type=int, default=20000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--one", nargs=2, metavar=("SUBJECT", "PROVIDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = arguments.rows, arguments.columns
    if arguments.one:
        print(json.dumps(measure(*arguments.one, shape, arguments.rounds)))
        return
    print(f"{list(shape)}, {arguments.threads} threads, torch {torch.__version__}: milliseconds, MB")
    print(f"{'':52} {'fastvae':>16} {'peer':>16}  ratio")
    for subject in SUBJECTS:
        found: dict[str, tuple[float, float]] = {}
        for provider in ("peer", "fastvae", "peer", "fastvae"):
            options = [f"--{name}={getattr(arguments, name)}" for name in ("rows", "columns", "threads", "rounds")]
            command = [sys.executable, str(Path(__file__)), *options, "--one", subject, provider]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[provider] = min(found.get(provider, (float("inf"), 0.0)), tuple(json.loads(output)))
        (own, own_memory), (peer, peer_memory) = found["fastvae"], found["peer"]
        print(f"{subject:52} {own:8.1f} {own_memory:7.0f} {peer:8.1f} {peer_memory:7.0f}  {own / peer:.2f}", flush=True)


if __name__ == "__main__":
    main()
