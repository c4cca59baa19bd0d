"""Parameters smaller than the target: which shapes are read where they lie, and sums over several blocks of rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastvae
import fastvae.functional as F
from conftest import plan_anew
from contract import check
from fastvae.kernels import smaller
from fastvae.operations import of_likelihood
from layouts import LAYOUTS
from own_likelihood import LearnedGaussian

# `smaller` tells the oracle to expand; which kind it is does not matter to it.
LOSS, BOUND, AT_ONCE = (replace(it, smaller={"log_variance": "any"}) for it in of_likelihood(LearnedGaussian())[:3])
IMAGES = (4, 3, 5, 7)
SHAPES = [
    (IMAGES, (3, 1, 1)),
    (IMAGES, (1, 3, 1, 1)),
    (IMAGES, ()),
    (IMAGES, (1,)),
    (IMAGES, (3, 5, 7)),
    (IMAGES, (5, 7)),
    (IMAGES, (7,)),
    (IMAGES, (3, 1, 7)),  # in the middle: copied, in every layout
    (IMAGES, (4, 1, 1, 1)),  # one for each sample: copied
    (IMAGES, (5, 1)),
    ((3, 2100), (2100,)),
    ((3, 2100), (1,)),
    ((1, 5), (5,)),
    ((1, 5), (1,)),
    ((5, 1), (1,)),
]


def inputs(shape, small, layout, device):
    generator = torch.Generator().manual_seed(0)
    mean, target = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    logvar = 0.5 * torch.randn(small, generator=generator)
    return layout(mean.to(device)), logvar.to(device), target.to(device)


def try_all(tensors) -> None:
    for reduction in ("none", "mean"):
        check(LOSS, tensors, reduction=reduction)
    kl = torch.linspace(0.5, 2, len(tensors[0]), device=tensors[0].device)
    check(BOUND, (*tensors, kl))
    check(AT_ONCE, (*tensors, kl))


EACH_LAYOUT = [
    (*shapes, layout)
    for shapes in SHAPES
    for layout in ("contiguous", "channels_last", "sliced_batch", "transposed")
    if layout == "sliced_batch" or (shapes[0] == IMAGES and (layout != "transposed" or len(shapes[1]) == 3))
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "small", "layout"), EACH_LAYOUT, ids=str)
def test_every_shape_that_broadcasts(shape, small, layout, device, triton_backend) -> None:
    try_all(inputs(shape, small, LAYOUTS[layout], device))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "small"), [((130, 70), (70,)), ((40, 2, 3, 24), (2, 1, 1)), ((130, 70), ())], ids=str
)
@pytest.mark.parametrize("most", [16384, 4], ids=["a tile of rows each", "several tiles of rows each"])
def test_several_blocks(shape, small, most, monkeypatch, device, triton_backend) -> None:
    """Programs that share columns, and go through one tile of rows or through several."""
    plan_anew(monkeypatch)
    monkeypatch.setattr(smaller, "_MOST_PARTIAL_SUMS", most)
    try_all(inputs(shape, small, torch.Tensor.contiguous, device))


@pytest.mark.parametrize(
    ("shape", "small", "layout", "kind"),
    [
        (IMAGES, (3, 1, 1), torch.contiguous_format, (smaller._GROUP, 1, 3, 35)),
        (IMAGES, (3, 1, 1), torch.channels_last, (smaller._COLUMN, 35, 1, 3)),
        (IMAGES, (7,), torch.contiguous_format, (smaller._COLUMN, 15, 1, 7)),
        (IMAGES, (3, 5, 7), torch.channels_last, (smaller._COLUMN, 1, 1, 105)),
        (IMAGES, (), torch.contiguous_format, (smaller._SCALAR, 1, 1, 105)),
        (IMAGES, (3, 1, 7), torch.contiguous_format, (smaller._ELEMENT, 1, 1, 105)),
    ],
)
def test_what_is_read_where_it_lies(shape, small, layout, kind) -> None:
    mean = torch.empty(shape).contiguous(memory_format=layout)
    found = smaller.arrange(mean.shape, mean.stride(), True, (mean.shape, torch.Size(small)))
    assert (found.kinds[1], found.rows_per_sample, found.groups, found.columns) == kind


def test_repeats_bit_by_bit(device, triton_backend) -> None:
    mean, logvar, target = inputs((130, 70), (70,), torch.Tensor.contiguous, device)
    kl = torch.ones(130, device=device)
    first, second = (F.elbo_value_and_grad((mean, logvar), target, kl, likelihood=LearnedGaussian()) for _ in range(2))
    assert torch.equal(first[1][0][1], second[1][0][1])


def test_empty_events_have_gradients_of_zeros(device) -> None:
    mean, target, kl = torch.empty(4, 0, device=device), torch.empty(4, 0, device=device), torch.ones(4, device=device)
    logvar = torch.zeros(1, device=device, requires_grad=True)
    with fastvae.use_backend("triton"):
        loss = F.elbo_loss((mean, logvar), target, kl, likelihood=LearnedGaussian()).loss
        (gradient,) = torch.autograd.grad(loss, logvar)
    assert loss == 1
    assert gradient.tolist() == [0]
