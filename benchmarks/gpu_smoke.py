"""Every public operation on the device against float64, the noise, and a captured step.

    python benchmarks/gpu_smoke.py [--device cpu] [--shard I/N]

With --device cpu the kernels run on Triton's interpreter. Nearly all of the time is compilation, on one core. Therefore
each operation has four checks, in which its dtypes, shapes, reductions and targets take turns; the tests have all of
their combinations. --shard runs every N-th check from number I on, so that N processes can share the work. The checks
are independent, and each prints one line when it ends. The exit code is 0 if all passed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

import fastvae
import fastvae.functional as F
from fastvae import random
from fastvae.likelihoods import DiscretizedLogistic, DiscretizedLogisticMixture
from fastvae.operations import Operation, Spec, operations
from fastvae.operations.operation import flattened
from pairwise import OBJECTIVES, Objective, drawn
from traffic import takes_bytes

Check = tuple[str, Callable[[], object]]  # its name, and what raises if it fails and returns a remark if not

NCHW, NHWC = torch.contiguous_format, torch.channels_last
# The checks of an operation: (dtype, whether a target is of bytes and sums are those of each sample).
TURNS = ((torch.float32, False), (torch.bfloat16, False), (torch.float16, False), (torch.float32, True))
# A batch of small latents; odd images; channels_last; rows of several tiles.
LATENTS = (((128, 16), NCHW), ((5, 3, 7, 3), NCHW), ((4, 8, 6, 5), NHWC), ((3, 9001), NCHW))
IMAGES = (((128, 1, 28, 28), NCHW), ((4, 3, 50, 41), NHWC), ((2, 3, 7, 5), NCHW))
ROWS = (((3, 9001), NCHW),)  # that no program can hold
# Of the norm of a result, in roundings of float32. The tests hold each element to a derived bound; this only has to
# tell a wrong result from a right one.
ROUNDINGS = 16.0
ROUNDINGS_OF_A_STEP = 64.0  # of a captured step, whose gradient is compared with that of a z that was rounded


def checks(device: torch.device) -> Iterator[Check]:
    """All of them, in an order that does not depend on the shard: at first each operation once, in float32."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        yield "card", card
        yield "copy", copy_bandwidth
    yield "noise", lambda: noise(torch.zeros(512, 2048 if on_gpu else 32, device=device))
    if on_gpu:
        yield "captured step", lambda: captured_step(device)
    for name, objective in OBJECTIVES.items():
        yield of_objective(name, objective, device)
    checked = [it for it in operations() if it.computes or it.measured]
    for turn, (number, operation) in product(range(len(TURNS)), enumerate(checked)):
        dtype, other = TURNS[turn]
        shapes = LATENTS if operation.likelihood is None else ROWS if operation.long_rows else IMAGES
        shape, memory_format = shapes[(turn + number) % len(shapes)]
        target_dtype = torch.uint8 if other and takes_bytes(operation) else None
        spec = Spec(shape, dtype, target_dtype, partial(Tensor.contiguous, memory_format=memory_format), device)
        reduction = "none" if other and "none" in operation.reductions else ""
        yield of_operation(operation, spec, reduction, "channels_last" if memory_format is NHWC else "")
    if on_gpu:
        yield "launches of the ELBO path", lambda: launches(device)  # last, because the profiler slows what follows


def of_operation(operation: Operation, spec: Spec, reduction: str, layout: str) -> Check:
    """As the operation stands in the list, or with another reduction."""
    words = [layout, str(spec.dtype)[6:], "uint8" if spec.target_dtype is torch.uint8 else ""]
    name = " ".join(filter(None, (operation.name, reduction, str(list(spec.shape)), *words)))
    # Where bins are narrow, the rounding errors of a byte's t / 255 and of the mean of a colour are magnified.
    narrow = isinstance(operation.likelihood, (DiscretizedLogistic, DiscretizedLogisticMixture))

    def check() -> str:
        options: dict[str, Any] = {"reduction": reduction} if reduction else {}
        if operation.draws_noise:
            options["eps"] = torch.randn(operation.shape_of_z(spec.shape), device=spec.device)
        call = partial(operation, F, **options)
        return compare(call, operation.inputs(spec), operation.roots, 16 * ROUNDINGS if narrow else ROUNDINGS)

    return name, check


def of_objective(name: str, objective: Objective, device: torch.device) -> Check:
    """The largest of the sizes of its forms, which has several tiles; on the interpreter a smaller one."""
    by_size = sorted(objective.forms, key=prod)
    sizes = by_size[-1 if device.type == "cuda" else (len(by_size) - 1) // 2]

    def check() -> str:
        tensors = drawn(objective, sizes, device)
        # The objectives are differences of larger sums.
        return compare(lambda *given: flattened(objective.function(*given)), tensors, 1, 16 * ROUNDINGS)

    return f"{name} {list(sizes)}", check


# ----------------------------------------------------------------------------------------------------- against float64


def compare(
    call: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor], differentiable: int, roundings: float
) -> str:
    """Results and gradients of the fused call against those of the reference in float64; the first results are the
    differentiable ones.
    """
    generator = torch.Generator(tensors[0].device).manual_seed(7)
    upstream: list[Tensor] = []

    def run(*tensors: Tensor) -> list[Tensor]:
        results = list(call(*tensors))
        roots = results[:differentiable]
        if not roots:
            return results
        if not upstream:
            upstream.extend(torch.randn(it.shape, generator=generator, device=it.device).to(it.dtype) for it in roots)
        grads = [grad.to(root.dtype) for grad, root in zip(upstream, roots, strict=True)]
        return [*results, *torch.autograd.grad(roots, [it for it in tensors if it.requires_grad], grads)]

    with fastvae.use_backend("triton"):
        found = run(*tensors)
    wide = (it.detach().double() if it.is_floating_point() else it for it in tensors)
    with fastvae.use_backend("reference"):
        expected = run(*(w.requires_grad_(it.requires_grad) for w, it in zip(wide, tensors, strict=True)))
    return largest_error(found, expected, roundings)


def largest_error(results: Sequence[Tensor], expected: Sequence[Tensor], roundings: float) -> str:
    """Of each result the norm of the error over the norm, as a share of what is allowed. NaN fails."""
    worst = 0.0
    for number, (found, right) in enumerate(zip(results, expected, strict=True)):
        assert found.shape == right.shape, f"result {number} has the shape {list(found.shape)}, not {list(right.shape)}"
        right = right.detach().double()
        error = (found.detach().double() - right).norm() / right.norm().clamp(min=1e-300)
        allowed = torch.finfo(found.dtype).eps + roundings * torch.finfo(torch.float32).eps
        assert error <= allowed, f"result {number} is off by {error:.3g} of its norm, {allowed:.3g} is allowed"
        worst = max(worst, float(error / allowed))
    return f"{worst:.2f} of the bound"


# ------------------------------------------------------------------------------------------------------------- the rest


def card() -> str:
    free, total = torch.cuda.mem_get_info()
    choice = fastvae.backend_for(torch.empty(0, device="cuda"))
    assert choice.name == "triton", choice
    return f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free; {choice}"


def copy_bandwidth() -> str:
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    milliseconds = sorted(elapsed(lambda: target.copy_(source)) for _ in range(8))
    return f"copying moves {2 * source.numel() / milliseconds[4] / 1e6:,.0f} GB/s"


def elapsed(run: Callable[[], object]) -> float:
    """Milliseconds on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def noise(zeros: Tensor) -> str:
    """manual_seed repeats it, each call draws anew, and its moments are a normal distribution's."""
    with fastvae.use_backend("triton"):
        torch.manual_seed(1)
        first, second = F.gaussian_sample(zeros, zeros), F.gaussian_sample(zeros, zeros)
        torch.manual_seed(1)
        again = F.gaussian_sample(zeros, zeros)
    count = zeros.numel()
    assert torch.equal(first, again), "manual_seed does not repeat the noise"
    assert not torch.equal(first, second), "two calls drew the same noise"
    # E[x^n], and the variance of x^n.
    for power, mean, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        moment = first.double().pow(power).mean().item()
        assert abs(moment - mean) < 6 * (variance / count) ** 0.5, f"moment {power} of the noise is {moment:.4f}"
    correlation = (first * second).mean().item()
    assert abs(correlation) < 6 / count**0.5, f"two calls correlate: {correlation:.4f}"
    return f"{count:,} normals"


def captured_step(device: torch.device) -> str:
    """The ELBO path in a graph: its noise is new at each replay and repeats after manual_seed, and its gradients
    follow from that noise.
    """
    moments = torch.randn(128, 32, device=device, requires_grad=True)
    logits, target = torch.randn(128, 1, 28, 28, device=device), torch.rand(128, 1, 28, 28, device=device)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        z, kl = F.gaussian_sample_kl_packed(moments)
        values, (_, kl_grad) = F.elbo_value_and_grad(logits, target, kl)
        (gradient,) = torch.autograd.grad((kl, z), moments, (kl_grad, z.detach()))
        return z, values.loss, gradient

    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), random.by_pointer():
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay(seed: int | None = None) -> list[Tensor]:
        if seed is not None:
            torch.manual_seed(seed)
        graph.replay()
        return [it.clone() for it in results]

    first, second = replay(), replay()
    assert not torch.equal(first[0], second[0]), "two replays drew the same noise"
    for a, b in zip(replay(5), replay(5), strict=True):
        assert torch.equal(a, b), "manual_seed does not repeat a replay"
    mu, logvar = moments.detach().double().chunk(2, 1)
    z = results[0].double()
    expected = torch.cat((z + mu / 128, 0.5 * (z * (z - mu) + torch.expm1(logvar) / 128)), 1)
    note = largest_error([results[2]], [expected], ROUNDINGS_OF_A_STEP)
    replays = 1000

    def replay_often() -> None:
        for _ in range(replays):
            graph.replay()

    return f"{note}; a replay takes {1000 * elapsed(replay_often) / replays:.2f} us"


def launches(device: torch.device) -> str:
    """How many kernels the ELBO path launches, forward and backward, as the profiler sees them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    moments = torch.randn(128, 32, device=device, requires_grad=True)
    logits = torch.randn(128, 1, 28, 28, device=device, requires_grad=True)
    target = torch.rand(128, 1, 28, 28, device=device)

    def path() -> None:
        z, kl = F.gaussian_sample_kl_packed(moments)
        loss = F.elbo_loss(logits, target, kl).loss
        torch.autograd.grad((loss, z), (moments, logits), (torch.ones_like(loss), torch.ones_like(z)))

    counts = {}
    for backend in ("triton", "reference"):
        with fastvae.use_backend(backend):  # type: ignore[arg-type]
            path()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
                path()
                torch.cuda.synchronize()
        events = [it for it in recorded.events() if it.device_type == DeviceType.CUDA and not it.is_user_annotation]
        counts[backend] = len(events)
        print(f"      {backend}: {[it.name for it in events]}")
    # Four of fastvae's, and the two fills of this check's own ones_like. A profiler that saw nothing proves nothing.
    assert 4 <= counts["triton"] <= 6 < counts["reference"], f"{counts} launches, 4 to 6 and more than 6 are expected"
    return f"{counts['triton']} launches, in eager PyTorch {counts['reference']}"


# --------------------------------------------------------------------------------------------------------- the program


def run(everything: Iterable[Check], shard: int, shards: int) -> int:
    """Run every shards-th check, and print a line for each as it ends; returns the number of those that failed."""
    torch.manual_seed(0)
    passed = failed = 0
    for number, (name, body) in enumerate(everything):
        if number % shards != shard:
            continue
        began = time.perf_counter()
        details = ""
        try:
            note, verdict = str(body()), "ok  "
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as error:  # whatever it is, the other checks go on
            note, verdict = " ".join(f"{type(error).__name__}: {error}".split())[:300], "FAIL"
            details = "" if isinstance(error, AssertionError) else traceback.format_exc()
        passed, failed = passed + (verdict != "FAIL"), failed + (verdict == "FAIL")
        print(f"{verdict} {time.perf_counter() - began:6.2f} s  {name}: {note}", flush=True)
        if details:
            print(details, flush=True)
    print(f"{passed} checks passed, {failed} failed")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shard", default="0/1", metavar="I/N")
    settings = parser.parse_args()
    shard, shards = map(int, settings.shard.split("/"))
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device (--device cpu runs the kernels on the interpreter)")
    if settings.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the first operation imports Triton
    device = torch.device(settings.device, 0 if settings.device == "cuda" else None)
    return 1 if run(checks(device), shard, shards) else 0


if __name__ == "__main__":
    sys.exit(main())
