"""The reference example's network with the weights that Keras trained.

In Keras, with an encoder and a decoder of these layers, in channels-last format:

    encoder = keras.Sequential([
        keras.Input((28, 28, 1)),
        layers.Conv2D(32, 3, 2, "same", activation="relu"),
        layers.Conv2D(64, 3, 2, "same", activation="relu"),
        layers.Flatten(),
        layers.Dense(2 * 16),  # [mu | logvar]; or a layer for mu, and one for logvar
    ])
    decoder = keras.Sequential([
        keras.Input((16,)),
        layers.Dense(7 * 7 * 64),
        layers.Reshape((7, 7, 64)),
        layers.Conv2DTranspose(64, 3, 2, "same", activation="relu"),
        layers.Conv2DTranspose(32, 3, 2, "same", activation="relu"),
        layers.Conv2DTranspose(1, 3, 1, "same"),  # logits, or activation="sigmoid"
    ])

it is ``conv_vae_from_keras(encoder.get_weights(), decoder.get_weights())``.

Keras' layouts, against PyTorch's: a convolution's kernel is [H, W, in, out] (PyTorch: [out, in, H, W]), that of a
transposed convolution [H, W, out, in] ([in, out, H, W]), neither is flipped, and "same" pads below and to the right of
an even size, as MATLAB does. A dense kernel is [in, out] ([out, in]). An image [H, W, C] is flattened with its channels
fastest ([C, H, W] with its columns), which orders the inputs of the encoder's dense layer and the outputs of the
decoder's. Nothing shows where these are mixed up, because the shapes are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastvae.models.conv_vae import ConvVAE

Layer = tuple[NDArray[Any], NDArray[Any]]  # a kernel and a bias


def conv_vae_from_keras(
    encoder: Sequence[Any],
    decoder: Sequence[Any],
    image_shape: tuple[int, int, int] = (1, 28, 28),
    *,
    projection_relu: bool = False,
) -> ConvVAE:
    """The model, on the CPU and in evaluation mode, in float32.

    Args:
        encoder, decoder: what ``get_weights()`` of the two Keras models returns: of each layer the kernel, then the
            bias. The encoder has convolutions and one dense layer, [mu | logvar], or two, mu and then logvar; the
            decoder has a dense layer, as many transposed convolutions, and a last one of stride 1.
        image_shape: (C, H, W), where Keras has (H, W, C). H and W are multiples of 2^N for N convolutions, because
            Keras' transposed convolutions double a size.
        projection_relu: whether the decoder's dense layer has activation="relu".

    Raises:
        ValueError: arrays in another number or of another shape, named with their place, or such an image_shape.
    """
    encoding, decoding = _layers("encoder", encoder), _layers("decoder", decoder)
    convolutions = [layer for layer in encoding if layer[0].ndim == 4]
    heads = encoding[len(convolutions) :]
    if not convolutions or len(heads) not in (1, 2) or any(kernel.ndim != 2 for kernel, _ in heads):
        raise ValueError(
            "encoder must have the kernels and biases of convolutions and then of one or two dense layers, got shapes "
            f"{_shapes(encoding)}"
        )
    moments = tuple(np.concatenate(parts, axis=-1) for parts in zip(*heads, strict=True))
    channels = tuple(kernel.shape[3] for kernel, _ in convolutions)
    factor = 2 ** len(channels)
    _, height, width = image_shape
    if height % factor or width % factor:
        raise ValueError(f"image_shape must have a height and width that {factor} divides, got {image_shape}")
    if moments[0].shape[1] % 2 or (len(heads) == 2 and heads[0][0].shape != heads[1][0].shape):
        raise ValueError(f"encoder must end in as many outputs for logvar as for mu, got shapes {_shapes(heads)}")
    if len(decoding) != len(channels) + 2:
        raise ValueError(
            f"decoder must have a dense layer and {len(channels) + 1} transposed convolutions, because the encoder has "
            f"{len(channels)} convolutions, got shapes {_shapes(decoding)}"
        )
    size = height // factor, width // factor  # of what is flattened and projected to
    projected, rest = divmod(decoding[0][0].shape[-1], size[0] * size[1])
    if rest:  # of no image; the error names the shape that is expected
        projected = channels[-1]
    with torch.device("meta"):  # no weights are drawn that would be thrown away
        model = ConvVAE(
            image_shape,
            moments[0].shape[1] // 2,
            channels,
            projection_channels=projected,
            projection_relu=projection_relu,
        )
    state: dict[str, Tensor] = {}
    names = [f"encoder.conv{level}" for level in range(1, len(channels) + 1)]
    names += ["encoder.moments", "decoder.project"]
    names += [f"decoder.transposed_conv{level}" for level in range(1, len(channels) + 1)] + ["decoder.logits"]
    for name, (kernel, bias) in zip(names, [*convolutions, moments, *decoding], strict=True):
        shape = model.get_parameter(f"{name}.weight").shape
        # The same for convolutions, transposed ones and dense layers.
        expected = [*shape[2:], shape[1], shape[0]], list(model.get_parameter(f"{name}.bias").shape)
        if (list(kernel.shape), list(bias.shape)) != expected:
            raise ValueError(
                f"the kernel and bias of {name} must have shapes {expected[0]} and {expected[1]}, "
                f"got {list(kernel.shape)} and {list(bias.shape)}"
            )
        if name == "encoder.moments":
            kernel = _channels_first(kernel, (*size, channels[-1]))
        if name == "decoder.project":
            kernel = _channels_first(kernel.T, (*size, projected)).T
            bias = _channels_first(bias, (*size, projected))
        weight = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
        for kind, array in (("weight", weight), ("bias", bias)):
            state[f"{name}.{kind}"] = torch.from_numpy(np.array(array, np.float32, order="C"))
    model.load_state_dict(state, assign=True)
    return model.eval()


def _layers(name: str, arrays: Sequence[Any]) -> list[Layer]:
    """Kernels with their biases."""
    given = [np.asarray(array) for array in arrays]
    kernels, biases = given[::2], given[1::2]
    fits = len(given) % 2 == 0 and all(
        bias.ndim == 1 and kernel.ndim in (2, 4) and kernel.dtype.kind == bias.dtype.kind == "f"
        for kernel, bias in zip(kernels, biases, strict=False)
    )
    if not fits:
        found = ", ".join(f"{list(array.shape)} {array.dtype}" for array in given)
        raise ValueError(
            f"{name} must be floating-point arrays, of each layer a kernel of 2 or 4 dimensions and a bias of 1, as "
            f"get_weights() returns them, got {found or 'none'}"
        )
    return list(zip(kernels, biases, strict=True))


def _channels_first(array: NDArray[Any], image: tuple[int, int, int]) -> NDArray[Any]:
    """Reorder the first axis, of length H * W * C, from an image [H, W, C] to one [C, H, W]."""
    ordered: NDArray[Any] = np.moveaxis(array.reshape(*image, *array.shape[1:]), 2, 0).reshape(array.shape)
    return ordered


def _shapes(layers: Sequence[Layer]) -> str:
    return ", ".join(str(list(array.shape)) for layer in layers for array in layer)
