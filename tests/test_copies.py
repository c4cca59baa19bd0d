"""Which layouts are copied before a launch, how often, and how the results lie then."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastvae.functional as F
from conftest import Launches
from contract import EVERY, check, noise
from fastvae.operations import Spec, named
from layouts import LAYOUTS

OPERATIONS = named(EVERY)


class Copies(TorchDispatchMode):
    """Counts the operations that read one tensor to write another of the same values."""

    NAMES = ("copy_", "clone", "cat", "_to_copy")
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in self.NAMES
        return function(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------------------------------------- likelihoods


@pytest.mark.parametrize(
    ("layouts", "copied"),
    [
        (("contiguous", "contiguous"), 0),
        (("channels_last", "channels_last"), 0),
        (("transposed", "transposed"), 0),
        (("sliced_batch", "sliced_batch"), 0),
        (("expanded_batch", "expanded_batch"), 0),
        (("contiguous", "channels_last"), 1),
        (("channels_last", "contiguous"), 1),
        (("contiguous", "sliced_batch"), 0),
        (("sliced_batch", "contiguous"), 0),
        (("sliced_inner", "contiguous"), 1),
        (("batch_innermost", "contiguous"), 1),
        (("expanded_inner", "contiguous"), 1),
        (("sliced_inner", "sliced_inner"), 2),
        (("sliced_batch", "channels_last"), 1),
    ],
    ids=str,
)
def test_of_a_likelihood(triton_backend, device, layouts, copied) -> None:
    """One copy of each tensor that cannot be read as it lies; forward and backward read the same."""
    logits, target, kl = (t.detach() for t in OPERATIONS["elbo_loss"].inputs(Spec((3, 3, 4, 5), device=device)))
    logits, target = (LAYOUTS[layout](t) for layout, t in zip(layouts, (logits, target), strict=True))
    logits.requires_grad_()
    kl = torch.stack([kl, kl], 1)[:, 0].requires_grad_()  # read as it lies
    # A gradient has strides of its own only where the input is not dense in any order with the batch outermost.
    of_gradient = layouts[0] == "batch_innermost"
    for loss in (
        lambda: F.sigmoid_mse_loss(logits, target, reduction="sum"),
        lambda: F.elbo_loss(logits, target, kl).loss,
    ):
        with Copies() as copies:
            value = loss()
        assert copies.count == copied
        with Copies() as copies:
            torch.autograd.grad(value, logits, torch.ones_like(value))
        assert copies.count == copied + of_gradient
    with Copies() as copies:
        F.elbo_value_and_grad(logits, target, kl)
    assert copies.count == copied + of_gradient


# ------------------------------------------------------------------------------------------------------------ posterior

# Read as they come: each sample is dense.
DENSE = {
    "channels_last": lambda randn: tuple(randn(2, 3, 4, 2, 5).permute(0, 1, 4, 2, 3)),
    "channels_last_3d": lambda randn: tuple(randn(2, 2, 2, 3, 2, 3).permute(0, 1, 5, 2, 3, 4)),
    "another order": lambda randn: tuple(randn(2, 3, 4, 2, 5).permute(0, 1, 3, 4, 2)),
    "every second sample": lambda randn: (randn(6, 7)[::2], randn(6, 7)[::2]),
    "columns of a matrix": lambda randn: (randn(3, 9)[:, 1:8], randn(3, 9)[:, 2:]),
    "halves of many samples": lambda randn: randn(70, 40).chunk(2, 1),  # three programs
    "halves of the channels": lambda randn: randn(3, 8, 2, 2).chunk(2, 1),
    "one sample for all": lambda randn: (randn(1, 7).expand(3, 7), randn(1, 7).expand(3, 7)),
    "dimensions of size 1": lambda randn: (randn(3, 1, 5, 1), randn(3, 5, 1, 1).transpose(1, 2)),
}
# Copied once.
EXOTIC = {
    "every second column": lambda randn: (randn(3, 14)[:, ::2], randn(3, 14)[:, 1::2]),
    "transposed": lambda randn: (randn(7, 3).t(), randn(7, 3).t()),
    "batch in the middle": lambda randn: tuple(randn(2, 4, 3, 5).transpose(1, 2)),
    "halves of the last dimension": lambda randn: randn(3, 2, 10).chunk(2, 2),
    "halves of channels_last": lambda randn: randn(2, 3, 2, 8).permute(0, 3, 1, 2).chunk(2, 1),
    "one element for all": lambda randn: (randn(3, 1).expand(3, 7), randn(3, 1).expand(3, 7)),
}
# One tensor follows the other.
MIXED = {
    "contiguous and channels_last": lambda randn: (randn(3, 4, 2, 5), randn(3, 2, 5, 4).permute(0, 3, 1, 2)),
    "half and whole": lambda randn: (randn(3, 14)[:, 7:], randn(3, 7)),
    "transposed and expanded": lambda randn: (randn(7, 3).t(), randn(3, 1).expand(3, 7)),
}


def lies_like(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same strides, where they matter."""
    return all(s == t for s, t, length in zip(a.stride(), b.stride(), b.shape, strict=True) if length != 1)


@pytest.mark.parametrize("layout", DENSE | EXOTIC | MIXED)
def test_of_mu_and_logvar(layout, device, triton_backend) -> None:
    mu, logvar = (DENSE | EXOTIC | MIXED)[layout](lambda *shape: torch.randn(shape).to(device))
    with Copies() as copies:
        z, _ = F.gaussian_sample_kl(mu, logvar, generator=torch.Generator(device))
    assert copies.count in ((1, 2) if layout in MIXED else (2,) if layout in EXOTIC else (0,))
    if lies_like(torch.empty_like(mu), mu) and layout in DENSE:
        assert lies_like(z, mu)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for memory_format in (torch.contiguous_format, formats.get(mu.ndim, torch.contiguous_format)):
        if mu.is_contiguous(memory_format=memory_format):
            assert z.is_contiguous(memory_format=memory_format)
    operation = OPERATIONS["gaussian_sample_kl"]
    check(operation, (mu, logvar), **noise(operation, Spec(mu.shape, device=device)), reduction="none")


PACKED = {
    "[B, 2K]": (lambda randn: randn(3, 14), 1),
    "[B, 2K], dim -1": (lambda randn: randn(3, 12), -1),
    "[B, 2]": (lambda randn: randn(5, 2), 1),
    "some samples": (lambda randn: randn(7, 14)[1::2], 1),
    "some of many samples": (lambda randn: randn(140, 40)[::2], 1),  # three programs
    "some columns": (lambda randn: randn(3, 19)[:, 2:16], 1),
    "[B, 2C, H, W]": (lambda randn: randn(3, 6, 2, 5), 1),
    "[B, 2C, H, W] channels_last": (lambda randn: randn(3, 2, 5, 6).permute(0, 3, 1, 2), 1),
    "[B, 16, H, W] channels_last": (lambda randn: randn(2, 5, 5, 16).permute(0, 3, 1, 2), 1),
    "[B, 2C, T, H, W] channels_last_3d": (lambda randn: randn(2, 2, 2, 3, 6).permute(0, 4, 1, 2, 3), 1),
    "[B, T, 2K]": (lambda randn: randn(3, 4, 10), 2),
    "[B, C, 2H, W]": (lambda randn: randn(2, 3, 4, 5), 2),
    "[B, C, 2H, W] channels_last": (lambda randn: randn(2, 4, 5, 3).permute(0, 3, 1, 2), 2),
    "[B, 2C, 1, 1] channels_last": (lambda randn: randn(3, 1, 1, 6).permute(0, 3, 1, 2), 1),
    "interleaved in several programs": (lambda randn: randn(1, 1100, 2).transpose(1, 2), 1),
}


# Of dimensions, whose tiles are narrower, [B, 16, H, W] is several programs.
CALLS = [(layout, {"reduction": "none"}) for layout in PACKED]
CALLS += [(layout, {"reduction": "per_dimension", "free_bits": 0.9}) for layout in PACKED if "several" not in layout]


@pytest.mark.parametrize(("layout", "options"), CALLS, ids=str)
def test_of_packed_moments(layout, options, device, triton_backend) -> None:
    """In two launches, without a copy, with one gradient tensor, and with the noise of the two halves."""
    make, dim = PACKED[layout]
    packed = make(lambda *shape: torch.randn(shape).to(device)).requires_grad_()
    generator = torch.Generator(device)
    z, kl = F.gaussian_sample_kl_packed(packed.detach(), dim=dim, generator=generator.manual_seed(5), **options)
    assert options["reduction"] == "none" or (kl.shape == z.shape[1:] and lies_like(kl, z[0]))
    halves, _ = F.gaussian_sample_kl(*packed.detach().chunk(2, dim), generator=generator.manual_seed(5), **options)
    assert torch.equal(z, halves), "the same noise, whichever way the moments lie"
    z_grad, kl_grad = torch.randn_like(z), torch.randn_like(kl)
    before = Launches.count
    with Copies() as copies:
        roots = F.gaussian_sample_kl_packed(packed, dim=dim, generator=generator.manual_seed(5), **options)
        torch.autograd.grad(roots, packed, (z_grad, kl_grad))
    assert (Launches.count, copies.count) == (before + 2, 0)
    noise_of_halves, _ = F.gaussian_sample_kl_packed(
        torch.zeros_like(packed), dim=dim, generator=generator.manual_seed(5), **options
    )
    check(OPERATIONS["gaussian_sample_kl_packed"], (packed,), dim=dim, eps=noise_of_halves.detach(), **options)
