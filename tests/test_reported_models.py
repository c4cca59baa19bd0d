"""Models that people reported elsewhere, as they write them, against float64: a table of metagenomic features, columns
behind a tanh with a learned deviation each, variants of MATLAB's example, batches of one, and traces that sample."""

from __future__ import annotations

import io

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import fastvae
import fastvae.functional as F
from fastvae.data import load_npy, load_signals
from fastvae.likelihoods import Categorical, Gaussian
from fastvae.models import VAE, ConvVAE
from fastvae.training import Training, train


def assert_like_float64(ours, theirs, tensors):
    """Value and gradients of `ours`, on float32, against those of `theirs` on float64 copies."""
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    given = [tensor.clone().requires_grad_() for tensor in tensors]
    value, expected = ours(*given), theirs(*exact)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value.double(), expected, rtol=1.3e-6, atol=0)  # float32's of assert_close
    for found, right in zip(given, exact, strict=True):
        torch.testing.assert_close(found.grad.double(), right.grad, rtol=1.3e-6, atol=1e-5 * right.grad.abs().max())


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_table_of_shares_and_standardised_columns(backend, device):
    """RasmussenLab/vamb: a posterior of unit variance, shares by cross entropy, z-scored columns by squared error, and
    a weight of each sample."""
    torch.manual_seed(0)
    mu, depths, columns = torch.randn(7, 4), torch.randn(7, 6), torch.randn(7, 10)
    shares, table, weights = torch.softmax(4 * torch.randn(7, 6), 1), torch.randn(7, 10), torch.rand(7) + 0.5
    eps = torch.randn(7, 4)

    def ours(mu, depths, columns):
        z, kl = F.gaussian_sample_kl(mu, torch.zeros_like(mu), eps=eps.to(mu))
        cross_entropy = F.negative_log_likelihood(depths, shares.to(mu), Categorical(), reduction="none")
        squared = F.negative_log_likelihood(columns, table.to(mu), Gaussian(std=1.0, constant=False), reduction="none")
        return ((0.1 * cross_entropy + 0.25 * squared + kl / 800) * weights.to(mu)).mean() + 0.01 * z.mean()

    def theirs(mu, depths, columns):
        cross_entropy = -(torch.log_softmax(depths, 1) * shares.to(mu)).sum(1)
        squared = 0.5 * (columns - table.to(mu)).square().sum(1)
        kl = 0.5 * mu.square().sum(1)
        loss = ((0.1 * cross_entropy + 0.25 * squared + kl / 800) * weights.to(mu)).mean()
        return loss + 0.01 * (mu + eps.to(mu)).mean()

    with fastvae.use_backend(backend):
        assert_like_float64(ours, theirs, [it.to(device) for it in (mu, depths, columns)])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_columns_behind_a_tanh_with_a_deviation_each(backend, device):
    """sdv-dev/CTGAN's TVAE."""
    torch.manual_seed(0)
    output, mu, logvar, deviation = torch.randn(9, 5), torch.randn(9, 3), torch.randn(9, 3), torch.rand(5) + 0.05
    table = 2 * torch.rand(9, 5) - 1

    def ours(output, mu, logvar, deviation):
        parameters = torch.tanh(output), 2 * deviation.log()
        likelihood = Gaussian(constant=False)
        nll = F.negative_log_likelihood(parameters, table.to(output), likelihood)
        return 2 * nll + F.gaussian_kl(mu, logvar)

    def theirs(output, mu, logvar, deviation):
        error = table.to(output) - torch.tanh(output)
        nll = (error.square() / 2 / deviation.square()).sum() + len(error) * deviation.log().sum()
        return 2 * nll / len(error) - 0.5 * (1 + logvar - mu.square() - logvar.exp()).sum() / len(error)

    with fastvae.use_backend(backend):
        assert_like_float64(ours, theirs, [it.to(device) for it in (output, mu, logvar, deviation)])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_largest_divergence_of_a_batch(backend, device):
    """A public variant of MATLAB's example: half of the squared error, and 0.1 times the largest divergence."""
    torch.manual_seed(0)
    mu, logvar, logits, images = torch.randn(5, 8), torch.randn(5, 8), torch.randn(5, 3, 6, 7), torch.rand(5, 3, 6, 7)

    def ours(mu, logvar, logits):
        divergence = F.gaussian_kl(mu, logvar, reduction="none")
        return 0.5 * F.sigmoid_mse_loss(logits, images.to(logits)) + 0.1 * divergence.max()

    def theirs(mu, logvar, logits):
        divergence = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)
        return (logits.sigmoid() - images.to(logits)).square().sum() / (2 * 5) + 0.1 * divergence.max()

    with fastvae.use_backend(backend):
        assert_like_float64(ours, theirs, [it.to(device) for it in (mu, logvar, logits)])


def test_signals_of_a_public_file(tmp_path, device):
    """[N, 480, 6] and [N, 480, 3] of any size, which images may not be: they are named, and signals take them."""
    signals = np.random.default_rng(0).standard_normal((40, 480, 6)).astype(np.float32)
    np.save(tmp_path / "images.npy", signals)
    with pytest.raises(ValueError, match=r"images.npy .*\[0, 1\]"):
        load_npy(tmp_path)
    for channels in (6, 3):
        np.save(tmp_path / "images.npy", signals[:, :, :channels])
        dataset = load_signals(tmp_path / "images.npy")
        assert dataset.train_images.shape == (36, channels, 1, 480)
    model = ConvVAE((3, 1, 480), 4, (4, 8), likelihood=Gaussian(std=1.0)).to(device)
    data = [it.to(device) for it in (dataset.train_images, dataset.test_images)]
    rows = train(model, *data, Training(epochs=3, batch_size=9, learning_rate=0.01))
    assert rows[-1].loss < rows[0].loss


@pytest.mark.parametrize("shape", [(1, 16), (1, 4, 6, 4), (10,), (1, 8, 8)], ids=str)
def test_batches_of_one(shape, device):
    size = int(np.prod(shape))
    model = VAE(
        nn.Sequential(nn.Flatten(), nn.Linear(size, 6)), nn.Sequential(nn.Linear(3, size), nn.Unflatten(1, shape)), 3
    ).to(device)
    data = torch.rand(5, *shape, device=device)
    rows = train(model, data[:4], data[4:], Training(epochs=1, batch_size=1))
    assert rows[-1].step == 4
    assert np.isfinite(rows[-1].test_loss)


class Sampler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 8), nn.Linear(4, 6)

    def forward(self, x):
        z, kl = F.gaussian_sample_kl_packed(self.encoder(x))
        return torch.sigmoid(self.decoder(z)), kl


@torch.no_grad()
def test_a_trace_that_samples_draws_anew():
    """Its divergence is that of the input that is given, and z is not frozen."""
    torch.manual_seed(0)
    module, x, other = Sampler(), torch.rand(3, 6), torch.rand(3, 6)
    expected = F.gaussian_kl(*module.encoder(other).chunk(2, 1), reduction="none")
    with fastvae.use_backend("triton"):
        saved = io.BytesIO()
        torch.jit.save(torch.jit.trace(module, (x,), check_trace=False), saved)
        saved.seek(0)
        content = torch.onnx.export(module, (x,), dynamo=True, verbose=False).model_proto.SerializeToString()
        exported = torch.export.export(module, (x,)).module()
        session = onnxruntime.InferenceSession(content)
        name = session.get_inputs()[0].name
        programs = {
            "jit": torch.jit.load(saved),
            "export": exported,
            "onnx": lambda x: [torch.from_numpy(it) for it in session.run(None, {name: x.numpy()})],
        }
        for kind, program in programs.items():
            (first, kl), (second, _) = program(other), program(other)
            torch.testing.assert_close(kl, expected, rtol=1e-5, atol=1e-5, msg=kind)
            assert not torch.equal(first, second), kind
