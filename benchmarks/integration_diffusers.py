"""The posteriors of diffusers' autoencoders before and after `fastvae.integrations.diffusers.fuse`; see `drop_in.py`.

    python benchmarks/integration_diffusers.py [WORD ...] [--rounds 15]

A part makes a posterior from the parameters, and asks it for what a pipeline or a training script does. Training is
forward and backward. It needs diffusers, and no GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_oobleck import OobleckDiagonalGaussianDistribution
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from drop_in import Part, Step, main
from fastvae.integrations.diffusers import CorrectPosterior, OobleckPosterior, Posterior

Use = Callable[[Any], list[Tensor]]


def training(posterior: Any) -> list[Tensor]:
    return [posterior.sample(), posterior.kl()]


def sampling(posterior: Any) -> list[Tensor]:
    return [posterior.sample()]


def mode(posterior: Any) -> list[Tensor]:
    return [posterior.mode()]


def step_of(library: type, own: type, shape: tuple[int, ...], use: Use, trains: bool, fused: bool) -> Step:
    torch.manual_seed(0)
    cls, parameters = own if fused else library, torch.randn(shape, requires_grad=trains)
    upstream = [torch.ones_like(output) for output in use(cls(parameters))]

    def step() -> None:
        with torch.set_grad_enabled(trains):
            outputs = use(cls(parameters))
        if trains:
            torch.autograd.grad(outputs, parameters, upstream)

    return step


def part(
    name: str, own: type, shape: tuple[int, ...], use: Use, trains: bool, library: type = DiagonalGaussianDistribution
) -> Part:
    return Part(name, str(list(shape)), functools.partial(step_of, library, own, shape, use, trains))


IMAGES, IMAGE, VIDEO, SOUNDS = (4, 8, 64, 64), (1, 32, 128, 128), (1, 32, 5, 60, 104), (4, 128, 1024)
PARTS = [
    part("images, `sample` and `kl`, training", Posterior, IMAGES, training, True),
    part("an image, `sample` and `kl`, training", Posterior, IMAGE, training, True),
    part("a video, `sample` and `kl`, training", Posterior, VIDEO, training, True),
    part("the same video with `correct=True`", CorrectPosterior, VIDEO, training, True),
    part(
        "sounds, `sample` and `kl`, training",
        OobleckPosterior,
        SOUNDS,
        training,
        True,
        OobleckDiagonalGaussianDistribution,
    ),
    part("images, `sample`, no gradient", Posterior, IMAGES, sampling, False),
    part("images, `mode`, no gradient", Posterior, IMAGES, mode, False),
]

if __name__ == "__main__":
    main(PARTS, __doc__)
