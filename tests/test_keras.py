"""Weights from Keras: against a forward pass in loops over Keras' layouts, and against Keras where it is installed."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from fastvae.models import conv_vae_from_keras


class Network(NamedTuple):
    image_shape: tuple[int, int, int]
    channels: tuple[int, ...]
    latent_dim: int
    projection: int | None = None  # its channels, if not the encoder's last
    relu: bool = False  # after the projection
    heads: int = 1


# No two sizes are equal in the first, so that no two axes can be exchanged.
NETWORKS = {
    "example's form": Network((2, 12, 8), (3, 5), 4),
    "two heads": Network((1, 4, 6), (3,), 2, heads=2),
    "another projection, with ReLU": Network((2, 4, 8), (3, 2), 1, projection=5, relu=True),
}


def weights(network: Network) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What get_weights() of the two Keras models returns: random, of its shapes."""
    channels, height, width = network.image_shape
    levels = len(network.channels)
    area = height // 2**levels * (width // 2**levels)
    sizes = (channels, *network.channels)
    encoder = [((3, 3, inputs, outputs), outputs) for inputs, outputs in itertools.pairwise(sizes)]
    outputs = 2 * network.latent_dim // network.heads
    encoder += [((area * sizes[-1], outputs), outputs)] * network.heads
    depth = network.projection or sizes[-1]
    decoder: list[tuple[tuple[int, ...], int]] = [((network.latent_dim, area * depth), area * depth)]
    for filters in (*reversed(network.channels), channels):
        decoder.append(((3, 3, filters, depth), filters))
        depth = filters
    generator = np.random.default_rng(0)
    return tuple(
        [generator.standard_normal(shape) for kernel, bias in layers for shape in (kernel, (bias,))]
        for layers in (encoder, decoder)
    )


def convolution(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Conv2D(filters, 3, 2, "same") of x [H, W, C], H and W even: padded by a row below and a column to the right."""
    padded = np.pad(x, ((0, 1), (0, 1), (0, 0)))
    y = np.zeros((x.shape[0] // 2, x.shape[1] // 2, len(bias)))
    for i, j in np.ndindex(y.shape[:2]):
        y[i, j] = bias + np.einsum("pqc,pqcf->f", padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3], kernel)
    return y


def transposed_convolution(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, stride: int) -> np.ndarray:
    """Conv2DTranspose(filters, 3, stride, "same") of x [H, W, C]: the gradient of a convolution with "same" padding."""
    full = np.zeros(((x.shape[0] - 1) * stride + 3, (x.shape[1] - 1) * stride + 3, len(bias)))
    for i, j in np.ndindex(x.shape[:2]):
        full[i * stride : i * stride + 3, j * stride : j * stride + 3] += np.einsum("c,pqfc->pqf", x[i, j], kernel)
    before = (3 - stride) // 2
    return full[before : before + x.shape[0] * stride, before : before + x.shape[1] * stride] + bias


def encoded(arrays: list[np.ndarray], network: Network, x: np.ndarray) -> np.ndarray:
    """[mu | logvar] of an image [H, W, C]."""
    layers = list(zip(arrays[::2], arrays[1::2], strict=True))
    for kernel, bias in layers[: len(network.channels)]:
        x = np.maximum(convolution(x, kernel, bias), 0)
    return np.concatenate([x.flatten() @ kernel + bias for kernel, bias in layers[len(network.channels) :]])


def decoded(arrays: list[np.ndarray], network: Network, z: np.ndarray) -> np.ndarray:
    """The logits [H, W, C]."""
    (kernel, bias), *convolutions, (last, last_bias) = zip(arrays[::2], arrays[1::2], strict=True)
    factor = 2 ** len(network.channels)
    x = (z @ kernel + bias).reshape(network.image_shape[1] // factor, network.image_shape[2] // factor, -1)
    x = np.maximum(x, 0) if network.relu else x
    for kernel, bias in convolutions:
        x = np.maximum(transposed_convolution(x, kernel, bias, 2), 0)
    return transposed_convolution(x, last, last_bias, 1)


def check(network: Network, encoder, decoder, encode, decode, rtol: float, atol: float) -> None:
    """The model, its weights then in float64, against functions of images [H, W, C] and latents [K]."""
    model = conv_vae_from_keras(encoder, decoder, network.image_shape, projection_relu=network.relu)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (model.channels, model.latent_dim, model.training) == (network.channels, network.latent_dim, False)
    model.double()
    generator = np.random.default_rng(1)
    channels, height, width = network.image_shape
    x, z = generator.standard_normal((height, width, channels)), generator.standard_normal(network.latent_dim)
    moments = model.encode(torch.from_numpy(x).permute(2, 0, 1)[None])[0]
    torch.testing.assert_close(moments, torch.from_numpy(encode(x)), rtol=rtol, atol=atol)
    logits = model.decode(torch.from_numpy(z)[None])[0].permute(1, 2, 0)
    torch.testing.assert_close(logits, torch.from_numpy(decode(z)), rtol=rtol, atol=atol)


def in_float32(arrays: list[np.ndarray]) -> list[np.ndarray]:
    return [array.astype(np.float32).astype(np.float64) for array in arrays]


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
@torch.no_grad()
def test_the_network_computes_what_keras_would(network) -> None:
    encoder, decoder = (in_float32(arrays) for arrays in weights(network))
    check(
        network,
        encoder,
        decoder,
        lambda x: encoded(encoder, network, x),
        lambda z: decoded(decoder, network, z),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="Keras is not installed")
def test_the_networks_compute_what_keras_does(tmp_path) -> None:
    """In a process of its own, because Keras takes its backend from the environment, once for all."""
    script = "import test_keras as it; [it.compare_with_keras(network) for network in it.NETWORKS.values()]"
    environment = {**os.environ, "KERAS_BACKEND": "torch", "KERAS_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@torch.no_grad()
def compare_with_keras(network: Network) -> None:
    import keras
    from keras import layers

    keras.config.set_floatx("float64")
    channels, height, width = network.image_shape
    factor, depth = 2 ** len(network.channels), network.projection or network.channels[-1]
    size = height // factor, width // factor
    activation = {"activation": "relu"}
    inputs = keras.Input((height, width, channels))
    x = inputs
    for filters in network.channels:
        x = layers.Conv2D(filters, 3, 2, "same", **activation)(x)
    x = layers.Flatten()(x)
    heads = [layers.Dense(2 * network.latent_dim // network.heads)(x) for _ in range(network.heads)]
    encoder = keras.Model(inputs, heads)
    decoder = keras.Sequential(
        [
            keras.Input((network.latent_dim,)),
            layers.Dense(size[0] * size[1] * depth, **(activation if network.relu else {})),
            layers.Reshape((*size, depth)),
            *(layers.Conv2DTranspose(filters, 3, 2, "same", **activation) for filters in reversed(network.channels)),
            layers.Conv2DTranspose(channels, 3, 1, "same"),
        ]
    )
    for model, arrays in zip((encoder, decoder), weights(network), strict=True):
        model.set_weights(in_float32(arrays))

    def encode(x: np.ndarray) -> np.ndarray:
        found = encoder(keras.ops.convert_to_tensor(x[None], "float64"))
        found = found if isinstance(found, list) else [found]
        return np.concatenate([keras.ops.convert_to_numpy(head)[0] for head in found])

    def decode(z: np.ndarray) -> np.ndarray:
        return keras.ops.convert_to_numpy(decoder(keras.ops.convert_to_tensor(z[None], "float64")))[0]

    # assert_close's bounds for float32, because Keras multiplies matrices of float64 in float32 on torch.
    check(network, encoder.get_weights(), decoder.get_weights(), encode, decode, rtol=1.3e-6, atol=1e-5)


def changed(place: int, array: object, half: str = "decoder"):
    """The weights with another array in one place, or none there."""
    encoder, decoder = weights(NETWORKS["example's form"])
    arrays = encoder if half == "encoder" else decoder
    arrays[place : place + 1] = [] if array is None else [array]
    return encoder, decoder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (changed(0, np.zeros((5, 5, 2, 3)), "encoder"), "of encoder.conv1 must have shapes [3, 3, 2, 3] and [3], got"),
        (changed(4, np.zeros((31, 8)), "encoder"), "of encoder.moments must have shapes [30, 8] and [8], got [31, 8]"),
        (changed(5, None, "encoder"), "encoder must be floating-point arrays, of each layer a kernel of 2 or 4"),
        (changed(1, np.zeros(3, np.int64), "encoder"), "encoder must be floating-point arrays, of each layer a kernel"),
        (changed(0, np.zeros((4, 29))), "of decoder.project must have shapes [4, 30] and [30], got [4, 29] and [30]"),
        (changed(1, np.zeros(31)), "of decoder.project must have shapes [4, 30] and [30], got [4, 30] and [31]"),
        (changed(2, np.zeros((3, 3, 3, 5))), "of decoder.transposed_conv1 must have shapes [3, 3, 5, 5] and [5], got"),
        ((weights(NETWORKS["example's form"])[0], []), "decoder must have a dense layer and 3 transposed convolutions"),
        (([], []), "encoder must have the kernels and biases of convolutions and then of one or two dense layers, got"),
    ],
)
def test_wrong_arrays_are_named(arguments, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        conv_vae_from_keras(*arguments, (2, 12, 8))


def test_heads_of_unequal_size_are_refused() -> None:
    encoder, decoder = weights(NETWORKS["two heads"])
    with pytest.raises(ValueError, match="encoder must end in as many outputs for logvar as for mu, got shapes"):
        conv_vae_from_keras([*encoder[:-2], encoder[-2][:, :1], encoder[-1][:1]], decoder, (1, 4, 6))


def test_sizes_that_keras_could_not_double_back() -> None:
    with pytest.raises(ValueError, match="image_shape must have a height and width that 4 divides"):
        conv_vae_from_keras(*weights(NETWORKS["example's form"]), (2, 11, 8))
