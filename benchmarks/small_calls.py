"""Every operation, forward and backward, for the tools that look at a program from outside.

    compute-sanitizer --tool memcheck python benchmarks/small_calls.py
    ncu --profile-from-start off ... python benchmarks/small_calls.py --elements 16777216

Sizes are odd, so that every tile has an edge, and there are one and several tiles. With --elements each operation runs
once at that size, after a call that compiles it, and only the second is profiled.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastvae
import fastvae.functional as F


def moments_calls(moments: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    mu, logvar = (half.detach().clone().requires_grad_() for half in moments.chunk(2, 1))
    z_grad = torch.randn_like(mu)

    def packed() -> None:
        z, kl = F.gaussian_sample_kl_packed(moments)
        torch.autograd.grad((z, kl), moments, (z_grad, torch.ones_like(kl)))

    yield "gaussian_sample_kl_packed", packed
    yield "gaussian_sample", lambda: torch.autograd.grad(F.gaussian_sample(mu, logvar), (mu, logvar), z_grad)
    yield "gaussian_kl", lambda: torch.autograd.grad(F.gaussian_kl(mu, logvar), (mu, logvar))

    def dimensions() -> None:
        z, kl = F.gaussian_sample_kl_packed(moments, reduction="per_dimension", free_bits=0.5)
        torch.autograd.grad((z, kl), moments, (z_grad, torch.ones_like(kl)))

    yield "gaussian_sample_kl_packed per_dimension", dimensions


def image_calls(logits: Tensor, target: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    kl = torch.rand(len(logits), device=logits.device, requires_grad=True)
    yield "sigmoid_mse_loss", lambda: torch.autograd.grad(F.sigmoid_mse_loss(logits, target), logits)
    yield "elbo_loss", lambda: torch.autograd.grad(F.elbo_loss(logits, target, kl).loss, (logits, kl))
    yield "elbo_value_and_grad", lambda: F.elbo_value_and_grad(logits.detach(), target, kl.detach())


def calls(device: torch.device, elements: int | None) -> Iterator[tuple[str, Callable[[], object]]]:
    if elements is not None:
        # One row of the packed moments per sample of 16,384, as latents of a large autoencoder have.
        columns = min(16384, elements)
        rows = elements // columns
        yield from moments_calls(torch.randn(rows, 2 * columns, device=device, requires_grad=True))
        logits = torch.randn(rows, columns, device=device, requires_grad=True)
        yield from image_calls(logits, torch.rand(rows, columns, device=device))
        return
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((3, 10), (5, 6, 7, 3), (2, 10_006), (150, 42)):
            for channels_last in (False, True) if len(shape) == 4 else (False,):
                memory_format = torch.channels_last if channels_last else torch.contiguous_format
                moments = torch.randn(shape, device=device).to(dtype=dtype, memory_format=memory_format)
                yield from moments_calls(moments.requires_grad_())
        for shape in ((3, 1, 5, 5), (2, 3, 50, 41)):
            logits = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
            bytes_target = torch.randint(0, 256, shape, device=device, dtype=torch.uint8)
            yield from image_calls(logits, torch.rand(shape, device=device, dtype=dtype))
            yield from image_calls(logits, bytes_target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int)
    elements = parser.parse_args().elements
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    count = 0
    with fastvae.use_backend("triton"):
        for _, call in calls(device, elements):
            call()
            if elements is not None and on_gpu:
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                call()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            count += 1
    if on_gpu:
        torch.cuda.synchronize()
    print(f"{count} operations ran")


if __name__ == "__main__":
    main()
