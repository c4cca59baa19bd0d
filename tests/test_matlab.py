"""Weights from MATLAB: against a forward pass in loops over MATLAB's layouts, written from its documentation alone."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np
import pytest
import scipy.io
import torch

import fastvae
from fastvae.models import conv_vae_from_matlab
from fastvae.training import write_checkpoint


class Network(NamedTuple):
    image_shape: tuple[int, int, int]
    channels: tuple[int, ...]
    latent_dim: int
    projection: int | None = None  # its channels, if not the encoder's last
    older: bool = False  # the decoder begins with a transposed convolution and ReLU


# No two sizes are equal in the first, so that no two axes can be exchanged; in the second MATLAB drops dimensions.
NETWORKS = {
    "example's form": Network((2, 12, 8), (3, 5), 4),
    "sizes of 1": Network((1, 4, 2), (1,), 1),
    "one convolution of many": Network((1, 2, 6), (7,), 2),
    "another projection": Network((1, 4, 8), (2, 3), 2, projection=5),
    "older release": Network((1, 12, 8), (3, 4), 3, older=True),
    "older release, another projection": Network((2, 4, 2), (3,), 1, projection=4, older=True),
}


def learnables(network: Network, precision=np.float32) -> dict[str, np.ndarray]:
    """What the module's MATLAB lines save: random, of its shapes, trailing dimensions of 1 dropped as MATLAB does."""
    channels, height, width = network.image_shape
    levels = len(network.channels)
    inputs = height // 2**levels * (width // 2**levels) * network.channels[-1]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    depth = channels
    for level, filters in enumerate(network.channels, 1):
        shapes[f"conv{level}"] = (3, 3, depth, filters), (1, 1, filters)
        depth = filters
    shapes["moments"] = (2 * network.latent_dim, inputs), (2 * network.latent_dim, 1)
    depth = network.projection or depth
    size = height // 2**levels, width // 2**levels
    outputs = size[0] * size[1] * depth
    shapes["project"] = (outputs, network.latent_dim), (outputs, 1)
    if network.older:
        shapes["project"] = (*size, depth, network.latent_dim), (1, 1, depth)
    for level, filters in enumerate(reversed(network.channels), 1):
        shapes[f"transposed_conv{level}"] = (3, 3, filters, depth), (1, 1, filters)
        depth = filters
    shapes["logits"] = (3, 3, channels, depth), (1, 1, channels)
    generator = np.random.default_rng(0)

    def array(shape: tuple[int, ...]) -> np.ndarray:
        while len(shape) > 2 and shape[-1] == 1:
            shape = shape[:-1]
        return generator.standard_normal(shape).astype(precision)

    return {
        f"{name}_{kind}": array(shape)
        for name, pair in shapes.items()
        for kind, shape in zip(("Weights", "Bias"), pair, strict=True)
    }


def at(array: np.ndarray, *index: int) -> float:
    """An element as MATLAB addresses it: dimensions that are not there have size 1. (Counted from 0 here.)"""
    assert not any(index[array.ndim :])
    return float(array[index[: array.ndim]])


def convolution(x: np.ndarray, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """convolution2dLayer(3, F, Stride=2, Padding="same") of x [H, W, C]."""
    filters = bias.size
    sizes = [math.ceil(size / 2) for size in x.shape[:2]]
    # "same" pads max(0, (out - 1) * stride + 3 - in) pixels, the smaller half of them above and to the left.
    top, left = (max(0, (out - 1) * 2 + 3 - size) // 2 for out, size in zip(sizes, x.shape, strict=False))
    y = np.zeros((*sizes, filters))
    for i, j, f in np.ndindex(y.shape):
        y[i, j, f] = bias.ravel()[f]
        for p, q, c in np.ndindex(3, 3, x.shape[2]):
            row, column = 2 * i + p - top, 2 * j + q - left
            if 0 <= row < x.shape[0] and 0 <= column < x.shape[1]:
                y[i, j, f] += at(weights, p, q, c, f) * x[row, column, c]
    return y


def transposed_convolution(x: np.ndarray, weights: np.ndarray, bias: np.ndarray, stride: int) -> np.ndarray:
    """transposedConv2dLayer(3, F, Stride=stride, Cropping="same") of x [H, W, C]."""
    filters = bias.size
    full = np.zeros(((x.shape[0] - 1) * stride + 3, (x.shape[1] - 1) * stride + 3, filters))
    for i, j, c in np.ndindex(x.shape):
        for p, q, f in np.ndindex(3, 3, filters):
            full[i * stride + p, j * stride + q, f] += at(weights, p, q, f, c) * x[i, j, c]
    # "same" crops to in * stride, the smaller half of it above and to the left.
    before = (3 - stride) // 2
    height, width = x.shape[0] * stride, x.shape[1] * stride
    return full[before : before + height, before : before + width] + bias.ravel()


def encoder(arrays: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """[mu; logvar] of an image [H, W, C], its ReLUs between."""
    level = 1
    while f"conv{level}_Weights" in arrays:
        x = np.maximum(convolution(x, arrays[f"conv{level}_Weights"], arrays[f"conv{level}_Bias"]), 0)
        level += 1
    column = x.flatten(order="F")  # MATLAB's X(:)
    return arrays["moments_Weights"].astype(np.float64) @ column + arrays["moments_Bias"].ravel()


def decoder(arrays: dict[str, np.ndarray], z: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The image [H, W, C] before the sigmoid; `size` is that of the projection."""
    weights, bias = arrays["project_Weights"].astype(np.float64), arrays["project_Bias"].ravel()
    if weights.ndim > 2:  # transposedConv2dLayer(size, F, Stride=size, Cropping="same") of [1, 1, K], and reluLayer
        x = np.zeros((*size, bias.size))
        for i, j, f in np.ndindex(x.shape):
            x[i, j, f] = max(0, bias[f] + sum(at(weights, i, j, f, k) * z[k] for k in range(len(z))))
    else:
        x = (weights @ z + bias).reshape(*size, -1, order="F")  # MATLAB's reshape(X, h, w, [])
    level = 1
    while f"transposed_conv{level}_Weights" in arrays:
        weights, bias = arrays[f"transposed_conv{level}_Weights"], arrays[f"transposed_conv{level}_Bias"]
        x = np.maximum(transposed_convolution(x, weights, bias, 2), 0)
        level += 1
    return transposed_convolution(x, arrays["logits_Weights"], arrays["logits_Bias"], 1)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
@torch.no_grad()
def test_the_network_computes_what_matlab_would(network, tmp_path) -> None:
    """In float64, from a .mat file."""
    arrays = learnables(network)
    scipy.io.savemat(tmp_path / "vae.mat", arrays)
    model = conv_vae_from_matlab(scipy.io.loadmat(tmp_path / "vae.mat"), network.image_shape)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (model.channels, model.latent_dim, model.training) == (network.channels, network.latent_dim, False)
    model.double()

    channels, height, width = network.image_shape
    generator = np.random.default_rng(1)
    x = generator.standard_normal((height, width, channels))
    expected = encoder(arrays, x)
    actual = model.encode(torch.from_numpy(x).permute(2, 0, 1)[None])[0]
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)

    z = generator.standard_normal(network.latent_dim)
    factor = 2 ** len(network.channels)
    expected = decoder(arrays, z, (height // factor, width // factor)).transpose(2, 0, 1)
    actual = model.decode(torch.from_numpy(z)[None])[0]
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_a_file_gives_the_older_network_back(tmp_path) -> None:
    network = NETWORKS["older release, another projection"]
    model = conv_vae_from_matlab(learnables(network), network.image_shape)
    assert (model.projection_channels, model.projection_relu) == (4, True)
    write_checkpoint(tmp_path / "checkpoint.pt", model, 1)
    loaded = fastvae.load(tmp_path / "checkpoint.pt")
    z = torch.randn(3, 1)
    assert torch.equal(loaded.decode(z), model.decode(z))


def test_the_examples_own_sizes() -> None:
    """Double precision is rounded to single."""
    arrays = learnables(Network((1, 28, 28), (32, 64), 16), np.float64)
    assert arrays["moments_Weights"].shape == (32, 3136)
    model = conv_vae_from_matlab(arrays)
    assert sum(parameter.numel() for parameter in model.parameters()) == 228_193
    weight = model.get_parameter("decoder.transposed_conv2.weight")
    assert weight[3, 5, 1, 2].item() == np.float32(arrays["transposed_conv2_Weights"][1, 2, 5, 3])
    arrays["moments_Bias"][:] = 0  # nothing is shared with what was given
    assert model.get_parameter("encoder.moments.bias").abs().min() > 0
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv2_Weights": np.zeros((3, 3, 4, 5))}, "conv2_Weights must have shape [3, 3, 3, 5], got [3, 3, 4, 5]"),
        ({"conv1_Weights": np.zeros((5, 5, 2, 3))}, "conv1_Weights must have shape [3, 3, 2, 3], got [5, 5, 2, 3]"),
        (
            {"conv1_Weights": np.zeros((3, 3, 2, 3, 1))},
            "conv1_Weights must have 4 dimensions, got shape [3, 3, 2, 3, 1]",
        ),
        (
            {"transposed_conv1_Weights": np.zeros((3, 3, 3, 5))},
            "transposed_conv1_Weights must have shape [3, 3, 5, 5], got [3, 3, 3, 5]",
        ),
        ({"moments_Weights": np.zeros((8, 31))}, "moments_Weights must have shape [8, 30], got [8, 31]"),
        (
            {"moments_Weights": np.zeros((7, 30))},
            "moments_Weights must have an even number of rows, mu and logvar, got 7",
        ),
        ({"project_Weights": np.zeros((4, 30))}, "project_Weights must have shape [30, 4], got [4, 30]"),
        ({"project_Bias": np.zeros((5, 6))}, "project_Bias must have shape [30, 1] or [1, 1, 30], got [5, 6]"),
        ({"logits_Bias": np.zeros((1, 1, 3))}, "logits_Bias must have shape [2, 1] or [1, 1, 2], got [1, 1, 3]"),
        ({"logits_Bias": None}, "logits_Bias is missing; there are conv1_Weights, conv1_Bias, "),
        ({"conv1_Weights": None}, "conv1_Weights is missing; there are conv1_Bias, "),
        ({"conv2_Weights": None}, "conv2_Bias is not of this network"),
        (
            {"fc_Weights": np.zeros(3)},
            "fc_Weights is not of this network, whose arrays are conv1_Weights, conv1_Bias, ",
        ),
        ({"conv1_Bias": np.zeros((1, 1, 3), np.complex64)}, "conv1_Bias must hold floating-point numbers, got dtype c"),
        ({"conv1_Bias": np.array([None] * 3)}, "conv1_Bias must hold floating-point numbers, got dtype object"),
    ],
)
def test_wrong_arrays_are_named(change, message) -> None:
    network = NETWORKS["example's form"]
    arrays = {**learnables(network), **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        conv_vae_from_matlab({k: v for k, v in arrays.items() if v is not None}, network.image_shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"project_Weights": np.zeros((3, 2, 4, 2))},
            "project_Weights must have shape [3, 2, 4, 3], as of a transposed convolution of [1, 1, 3] to the size "
            "[3, 2], got [3, 2, 4, 2]",
        ),
        ({"project_Bias": np.zeros((24, 1))}, "project_Bias must have shape [1, 1, 4], got [24, 1]"),
        ({"transposed_conv1_Weights": np.zeros((3, 3, 4, 3))}, "transposed_conv1_Weights must have shape [3, 3, 4, 4]"),
    ],
)
def test_wrong_arrays_of_the_older_release_are_named(change, message) -> None:
    network = NETWORKS["older release"]
    with pytest.raises(ValueError, match=re.escape(message)):
        conv_vae_from_matlab({**learnables(network), **change}, network.image_shape)


@pytest.mark.parametrize("image_shape", [(2, 11, 8), (2, 12, 6)], ids=str)
def test_sizes_that_matlab_could_not_double_back(image_shape) -> None:
    with pytest.raises(ValueError, match=r"image_shape must have a height and width that 4 divides, got \(2, 1"):
        conv_vae_from_matlab(learnables(NETWORKS["example's form"]), image_shape)
