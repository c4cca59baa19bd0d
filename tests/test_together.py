"""With the rest of PyTorch: GradScaler, hooks on saved tensors, DistributedDataParallel."""

from __future__ import annotations

import os
import socket

import pytest
import torch
from torch import nn

import fastvae
import fastvae.functional as F
from fastvae.models import VAE

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


def test_saved_tensors_may_be_moved_away(device, triton_backend):
    """What is saved goes through the hooks, so that it can be kept elsewhere; nothing of it is noise."""
    step = Step(device, torch.float32)
    moments = (step.hidden @ step.encoder).detach().requires_grad_()
    logits = step.features.requires_grad_()
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.detach().clone()

    def gradients():
        torch.manual_seed(3)
        z, kl = F.gaussian_sample_kl_packed(moments)
        loss = F.elbo_loss(logits, step.target, kl).loss + F.sigmoid_mse_loss(logits, step.target) + z.sum()
        return torch.autograd.grad(loss, (moments, logits))

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = gradients()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert any(tensor.shape == moments.shape for tensor in packed)
    assert not any(tensor.shape == (6, 4) and tensor.is_floating_point() for tensor in packed)


# ----------------------------------------------------------------------------------------------------------- processes


class Loss(nn.Module):
    """A VAE's loss of (x, batch_offset) as a module, which is what DistributedDataParallel wraps; with real noise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vae = VAE(nn.Linear(12, 6), nn.Linear(3, 12), 3)

    def forward(self, x, batch_offset):
        output = self.vae(x, batch_offset=batch_offset)
        return F.elbo_loss(output.logits, x, output.kl).loss


def joint_batch():
    return torch.rand(8, 12, generator=torch.Generator().manual_seed(1))


def gradients_of_two_calls(model, x, batch_offset):
    """Of two calls, the second with new noise, under the seed that all processes share."""
    torch.manual_seed(5)
    for _ in range(2):
        model(x, batch_offset).backward()
    return [parameter.grad for parameter in model.parameters()]


def half_of_the_batch(rank, port, folder, backend):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        model = nn.parallel.DistributedDataParallel(Loss())
        with fastvae.use_backend(backend):
            gradients = gradients_of_two_calls(model, joint_batch()[4 * rank : 4 * rank + 4], 4 * rank)
        torch.save(gradients, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the processes run on the CPU, on the interpreter")
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_two_processes_of_one_seed_have_the_gradients_of_the_joint_batch(backend, tmp_path):
    """Real noise: each process draws that of its own samples. The events have 3 elements, no multiple of 4."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(half_of_the_batch, (port, str(tmp_path), backend), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    with fastvae.use_backend("reference"):
        expected = gradients_of_two_calls(Loss(), joint_batch(), 0)
        other_noise = gradients_of_two_calls(Loss(), joint_batch(), 8)
    for a, b, gradient in zip(first, second, expected, strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, gradient, rtol=1e-5, atol=1e-6)
    assert not all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(first, other_noise, strict=True))
