"""The network of the reference example: its geometry against loops, its parameters, its shapes and its errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastvae.functional as F
from fastvae.models import ConvVAE
from fastvae.models.same_padding import Downsample, Upsample

# The reference example's table: shape, and Glorot's bound where there is one.
LAYERS = {
    "encoder.conv1": ((32, 1, 3, 3), 0.1421),
    "encoder.conv2": ((64, 32, 3, 3), 0.0833),
    "encoder.moments": ((32, 3136), 0.0435),
    "decoder.project": ((3136, 16), 0.0436),
    "decoder.transposed_conv1": ((64, 64, 3, 3), 0.0722),
    "decoder.transposed_conv2": ((64, 32, 3, 3), 0.0833),
    "decoder.logits": ((32, 1, 3, 3), 0.1421),
}
PARAMETERS = (320, 18_496, 100_384, 53_312, 36_928, 18_464, 289)
SIZES = [(28, 28), (14, 14), (7, 7), (5, 8), (8, 5), (2, 3), (1, 1), (1, 4)]


def crop_before(size: int) -> int:
    """What "same" padding puts before an image, from MATLAB's documentation, and nothing else."""
    out = math.ceil(size / 2)
    return max(0, (out - 1) * 2 + 3 - size) // 2


def convolution_in_loops(x, weight, bias):
    """x [C, H, W], weight [F, C, 3, 3] -> [F, ceil(H / 2), ceil(W / 2)], gathering."""
    channels, height, width = x.shape
    top, left = crop_before(height), crop_before(width)
    y = np.zeros((weight.shape[0], math.ceil(height / 2), math.ceil(width / 2)))
    for f, i, j in np.ndindex(y.shape):
        y[f, i, j] = bias[f]
        for c, p, q in np.ndindex(channels, 3, 3):
            row, column = 2 * i + p - top, 2 * j + q - left
            if 0 <= row < height and 0 <= column < width:
                y[f, i, j] += weight[f, c, p, q] * x[c, row, column]
    return y


def transposed_convolution_in_loops(x, weight, bias, size):
    """x [C, ceil(H / 2), ceil(W / 2)], weight [C, F, 3, 3] -> [F, H, W], scattering."""
    top, left = crop_before(size[0]), crop_before(size[1])
    y = np.tile(np.reshape(bias, (-1, 1, 1)), (1, *size)).astype(np.float64)
    for c, i, j in np.ndindex(x.shape):
        for f, p, q in np.ndindex(weight.shape[1], 3, 3):
            row, column = 2 * i + p - top, 2 * j + q - left
            if 0 <= row < size[0] and 0 <= column < size[1]:
                y[f, row, column] += weight[c, f, p, q] * x[c, i, j]
    return y


def randomise(layer: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()


def test_parameters_per_layer():
    model = ConvVAE()
    assert [name for name, _ in model.named_parameters()] == [f"{n}.{k}" for n in LAYERS for k in ("weight", "bias")]
    counts = []
    for name, (shape, _) in LAYERS.items():
        layer = model.get_submodule(name)
        assert tuple(layer.weight.shape) == shape
        counts.append(layer.weight.numel() + layer.bias.numel())
    assert tuple(counts) == PARAMETERS
    assert sum(counts) == 228_193
    assert sum(p.numel() for p in model.encoder.parameters()) == 119_200
    assert sum(p.numel() for p in model.decoder.parameters()) == 108_993


@pytest.mark.parametrize("name", LAYERS)
def test_glorot_uniform_weights_and_zero_biases(name):
    _, bound = LAYERS[name]
    weights, biases = [], []
    for seed in range(20):
        torch.manual_seed(seed)
        layer = ConvVAE().get_submodule(name)
        weights.append(layer.weight.detach().flatten())
        biases.append(layer.bias.detach())
    weight = torch.cat(weights).double()
    assert torch.cat(biases).abs().max() == 0
    # The largest of n uniform draws is within bound * 8 / n of it, but for a chance of e^-8. The table has 4 digits.
    assert bound * (1 - 8 / len(weight)) - 5e-5 <= weight.abs().max() <= bound + 5e-5
    # Uniform, not normal: the standard deviation is bound / sqrt(3), known to 5 deviations of itself.
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=5 * 0.45 / math.sqrt(len(weight)) + 1e-3)


def test_impulse_of_a_transposed_convolution(device):
    layer = ConvVAE().to(device).decoder.transposed_conv1
    impulse = torch.zeros(1, 64, 7, 7, device=device)
    impulse[0, 5, 0, 0] = 1.0
    image = layer(impulse)
    assert image.shape == (1, 64, 14, 14)
    torch.testing.assert_close(image[0, :, :3, :3], layer.weight[5], rtol=1e-3, atol=1e-4)
    assert image[0, :, 3:].abs().max() == 0
    assert image[0, :, :, 3:].abs().max() == 0


@pytest.mark.parametrize("size", SIZES)
def test_convolution_equals_loops(device, size):
    layer = Downsample(2, 3).double()
    randomise(layer)
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    expected = [
        convolution_in_loops(image, layer.weight.detach().numpy(), layer.bias.detach().numpy()) for image in x.numpy()
    ]
    result = layer.to(device)(x.to(device)).cpu()
    torch.testing.assert_close(result, torch.from_numpy(np.stack(expected)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_transposed_convolution_equals_loops(device, size):
    layer = Upsample(3, 2, size).double()
    randomise(layer)
    x = torch.randn(2, 3, -(-size[0] // 2), -(-size[1] // 2), dtype=torch.float64)
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    expected = [transposed_convolution_in_loops(image, weight, bias, size) for image in x.numpy()]
    result = layer.to(device)(x.to(device)).cpu()
    torch.testing.assert_close(result, torch.from_numpy(np.stack(expected)), rtol=0, atol=1e-12)


def test_last_layer_equals_loops(device):
    """Stride 1: every output pixel is one input pixel's neighbourhood, flipped, centred."""
    model = ConvVAE((2, 5, 6), channels=(3,)).double()
    layer = model.decoder.logits
    randomise(layer)
    x = torch.randn(1, 3, 5, 6, dtype=torch.float64)
    expected = np.tile(layer.bias.detach().numpy().reshape(-1, 1, 1), (1, 5, 6))
    for c, i, j in np.ndindex(3, 5, 6):
        for f, p, q in np.ndindex(2, 3, 3):
            row, column = i + p - 1, j + q - 1
            if 0 <= row < 5 and 0 <= column < 6:
                expected[f, row, column] += layer.weight[c, f, p, q].item() * x[0, c, i, j].item()
    torch.testing.assert_close(layer.to(device)(x.to(device)).cpu()[0], torch.from_numpy(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_transposed_convolution_is_the_adjoint(device, size):
    """<conv(x), y> = <x, conv^T(y)> with one kernel and no biases."""
    down, up = Downsample(2, 3).double().to(device), Upsample(3, 2, size).double().to(device)
    with torch.no_grad():
        down.bias.zero_()
        up.bias.zero_()
        up.weight.copy_(down.weight)
    x = torch.randn(2, 2, *size, dtype=torch.float64, device=device)
    convolved = down(x)
    y = torch.randn_like(convolved)
    torch.testing.assert_close((convolved * y).sum(), (x * up(y)).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("image_shape", "channels"),
    [
        ((1, 28, 28), (32, 64)),
        ((3, 32, 32), (8, 16)),
        ((3, 31, 17), (4, 6, 8)),
        ((2, 1, 1), (4,)),
        ((1, 5, 8), (4, 6, 8, 10)),
    ],
)
def test_shapes(device, image_shape, channels):
    model = ConvVAE(image_shape, latent_dim=5, channels=channels).to(device)
    x = torch.rand(2, *image_shape, device=device)
    moments = model.encode(x)
    assert moments.shape == (2, 10)
    logits, z, kl = model(x)
    assert logits.shape == x.shape
    assert z.shape == (2, 5)
    assert kl.shape == (2,)
    F.elbo_loss(logits, x, kl).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for images in (model.reconstruct(x), model.reconstruct(x, deterministic=True), model.sample(2)):
        assert images.shape == x.shape
        assert images.min() >= 0
        assert images.max() <= 1
        assert not images.requires_grad


def test_every_size_is_restored():
    for height in range(1, 13):
        model = ConvVAE((1, height, 13 - height), latent_dim=1, channels=(1, 1, 1))
        assert model(torch.zeros(1, 1, height, 13 - height)).logits.shape == (1, 1, height, 13 - height)


def test_nothing_is_applied_to_the_projection():
    """It enters the first transposed convolution as it is, negative values included."""
    model = ConvVAE()
    features = {}
    model.decoder.transposed_conv1.register_forward_hook(lambda module, inputs, output: features.update(x=inputs[0]))
    z = torch.randn(4, 16)
    model.decode(z)
    torch.testing.assert_close(features["x"], model.decoder.project(z).view(4, 64, 7, 7), rtol=0, atol=0)
    assert features["x"].min() < 0


def test_activations():
    """ReLU after both convolutions and the first two transposed ones; none on the moments and the logits."""
    model = ConvVAE()
    outputs = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: outputs.update({name: output}))
    moments = model.encode(torch.rand(8, 1, 28, 28))
    logits = model.decode(10 * torch.randn(8, 16))
    for name in ("encoder.relu1", "encoder.relu2", "decoder.relu1", "decoder.relu2"):
        assert outputs[name].min() == 0
        assert outputs[name].max() > 0
    assert [name for name in outputs if "relu" in name] == [
        f"{h}.relu{i}" for h in ("encoder", "decoder") for i in (1, 2)
    ]
    assert moments.min() < 0
    assert logits.min() < 0
    assert outputs["encoder"] is moments
    assert outputs["decoder"] is logits


def test_forward_is_encode_sample_decode(device):
    model = ConvVAE().to(device)
    x = torch.rand(3, 1, 28, 28, device=device)
    torch.manual_seed(5)
    logits, z, kl = model(x)
    torch.manual_seed(5)
    expected_z, expected_kl = F.gaussian_sample_kl_packed(model.encode(x))
    torch.testing.assert_close(z, expected_z, rtol=0, atol=0)
    torch.testing.assert_close(kl, expected_kl, rtol=0, atol=0)
    torch.testing.assert_close(logits, model.decode(z), rtol=0, atol=0)


def test_reconstruct(device):
    model = ConvVAE().to(device)
    x = torch.rand(3, 1, 28, 28, device=device)
    mean = model.reconstruct(x, deterministic=True)
    torch.testing.assert_close(mean, torch.sigmoid(model.decode(model.encode(x)[:, :16])), rtol=0, atol=0)
    torch.manual_seed(5)
    sampled = model.reconstruct(x)
    torch.manual_seed(5)
    torch.testing.assert_close(sampled, torch.sigmoid(model(x).logits), rtol=0, atol=0)
    assert not torch.equal(sampled, mean)
    assert not torch.equal(sampled, model.reconstruct(x))


def test_sample(device):
    model = ConvVAE().to(device)
    images = model.sample(4, torch.Generator(device).manual_seed(3))
    z = torch.randn(4, 16, generator=torch.Generator(device).manual_seed(3), device=device)
    torch.testing.assert_close(images, torch.sigmoid(model.decode(z)), rtol=0, atol=0)
    assert not torch.equal(model.sample(4), model.sample(4))
    assert model.sample(0).shape == (0, 1, 28, 28)


def test_bytes_are_read_as_fractions(device):
    model = ConvVAE((3, 9, 8)).to(device)
    images = torch.randint(0, 256, (2, 3, 9, 8), dtype=torch.uint8, device=device)
    torch.testing.assert_close(model.encode(images), model.encode(images.float() / 255), rtol=0, atol=0)
    wide = model.double()
    torch.testing.assert_close(wide.encode(images), wide.encode(images.double() / 255), rtol=0, atol=0)


def test_channels_last_changes_nothing(device):
    model = ConvVAE((3, 9, 8), channels=(4, 6)).double().to(device)
    x = torch.rand(2, 3, 9, 8, dtype=torch.float64, device=device)
    moments = model.encode(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model.encode(x), moments, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        model.encode(x.contiguous(memory_format=torch.channels_last)), moments, rtol=0, atol=1e-12
    )


def test_state_dict_round_trip(tmp_path):
    model, other = ConvVAE(), ConvVAE()
    x = torch.rand(2, 1, 28, 28)
    assert not torch.equal(model.encode(x), other.encode(x))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    torch.testing.assert_close(model.encode(x), other.encode(x), rtol=0, atol=0)
    torch.testing.assert_close(
        model.reconstruct(x, deterministic=True), other.reconstruct(x, deterministic=True), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: ConvVAE((28, 28)), ValueError, r"image_shape must be three positive integers .*, got \(28, 28\)"),
        (lambda m: ConvVAE((1, 0, 28)), ValueError, r"image_shape must be .*, got \(1, 0, 28\)"),
        (lambda m: ConvVAE((1, 28.0, 28)), ValueError, r"image_shape must be .*, got \(1, 28.0, 28\)"),
        (lambda m: ConvVAE(latent_dim=0), ValueError, "latent_dim must be a positive integer, got 0"),
        (lambda m: ConvVAE(latent_dim=True), ValueError, "latent_dim must be a positive integer, got True"),
        (lambda m: ConvVAE(channels=()), ValueError, r"channels must be one or more positive integers, got \(\)"),
        (lambda m: ConvVAE(channels=(32, -1)), ValueError, r"channels must be .*, got \(32, -1\)"),
        (
            lambda m: m.encode(torch.zeros(2, 1, 28, 27)),
            ValueError,
            r"x must have shape \[B, 1, 28, 28\], got \[2, 1, 28, 27\]",
        ),
        (lambda m: m(torch.zeros(1, 28, 28)), ValueError, r"x must have shape \[B, 1, 28, 28\], got \[1, 28, 28\]"),
        (lambda m: m.reconstruct(torch.zeros(2, 3, 28, 28)), ValueError, r"x must have .*, got \[2, 3, 28, 28\]"),
        (
            lambda m: m.encode(torch.zeros(2, 1, 28, 28, dtype=torch.int64)),
            TypeError,
            "x must be uint8 .* or floating point, got torch.int64",
        ),
        (lambda m: m.decode(torch.zeros(2, 15)), ValueError, r"z must have shape \[B, 16\], got \[2, 15\]"),
        (lambda m: m.decode(torch.zeros(16)), ValueError, r"z must have shape \[B, 16\], got \[16\]"),
        (lambda m: m.sample(-1), ValueError, "n must not be negative, got -1"),
        (
            lambda m: m.to("meta").sample(1, torch.Generator("cpu")),
            ValueError,
            "generator must be of the model's device, meta, got cpu",
        ),
    ],
)
def test_errors_name_argument_value_and_expectation(call, error, message):
    with pytest.raises(error, match=message):
        call(ConvVAE())
