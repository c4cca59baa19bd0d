"""A step in half precision with torch's GradScaler, by both ways to the gradients of the loss."""

from __future__ import annotations

import pytest
import torch

import fastvae
import fastvae.functional as F

SHAPE = (6, 2, 7, 5)
SCALE = 65536.0


class Step:
    """An encoder's and a decoder's last layer, float32 weights with half-precision products, and the ELBO of both."""

    def __init__(self, device, dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape, scale=1.0):
            return (scale * torch.randn(*shape, generator=generator)).to(device)

        self.dtype = dtype
        self.hidden, self.features, self.eps = normal(6, 9), normal(*SHAPE), normal(6, 4)
        self.target = torch.rand(SHAPE, generator=generator).to(device)
        self.encoder = normal(9, 8, scale=0.3).requires_grad_()
        self.decoder = normal(*SHAPE[1:]).requires_grad_()
        self.mixer = normal(4, 70, scale=0.1)
        self.weights = (self.encoder, self.decoder)

    def forward(self):
        """(logits, kl): the logits depend on z too."""
        moments = (self.hidden.to(self.dtype) @ self.encoder.to(self.dtype)).to(self.dtype)
        z, kl = F.gaussian_sample_kl_packed(moments, eps=self.eps.to(self.dtype))
        logits = self.features.to(self.dtype) * self.decoder.to(self.dtype) + (z @ self.mixer.to(self.dtype)).view(
            SHAPE
        )
        return logits, kl

    def by_loss(self, scaler) -> None:
        logits, kl = self.forward()
        scaler.scale(F.elbo_loss(logits, self.target, kl).loss).backward()

    def by_value_and_grad(self, scaler) -> None:
        logits, kl = self.forward()
        scale = scaler.scale(torch.ones((), device=logits.device))
        _, gradients = F.elbo_value_and_grad(logits, self.target, kl, grad_scale=scale)
        torch.autograd.backward((logits, kl), gradients)


def gradients_in_float64(device) -> list[torch.Tensor]:
    step = Step(device, torch.float64)
    for name in ("hidden", "features", "eps", "target", "mixer"):
        setattr(step, name, getattr(step, name).double())
    step.encoder, step.decoder = (weight.detach().double().requires_grad_() for weight in step.weights)
    with fastvae.use_backend("reference"):
        logits, kl = step.forward()
        return list(torch.autograd.grad(F.elbo_loss(logits, step.target, kl).loss, (step.encoder, step.decoder)))


@pytest.mark.parametrize("way", ["by_loss", "by_value_and_grad"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_scaled_step_has_the_gradients_of_float64(way, dtype, device, triton_backend):
    step = Step(device, dtype)
    scaler = torch.amp.GradScaler(device.type, init_scale=SCALE)
    optimizer = torch.optim.SGD(step.weights, lr=1.0)
    getattr(step, way)(scaler)
    scaler.unscale_(optimizer)
    for weight, expected in zip(step.weights, gradients_in_float64(device), strict=True):
        assert weight.grad.dtype is torch.float32
        # A few roundings to the half precision of what is between the weights and the loss.
        error = (weight.grad.double() - expected).norm() / expected.norm()
        assert error < 4 * torch.finfo(dtype).eps
    before = [weight.detach().clone() for weight in step.weights]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == SCALE  # nothing overflowed
    assert not any(torch.equal(weight, old) for weight, old in zip(step.weights, before, strict=True))


@pytest.mark.parametrize("way", ["by_loss", "by_value_and_grad"])
def test_an_overflow_skips_the_step_and_lowers_the_scale(way, device, triton_backend):
    step = Step(device, torch.float16)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40)
    optimizer = torch.optim.SGD(step.weights, lr=1.0)
    before = [weight.detach().clone() for weight in step.weights]
    getattr(step, way)(scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(weight, old) for weight, old in zip(step.weights, before, strict=True))
