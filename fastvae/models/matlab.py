"""The reference example's network with the weights that MATLAB trained.

In MATLAB, with the encoder netE and the decoder netD of the example:

    names = ["conv1" "conv2" "moments" "project" "transposed_conv1" "transposed_conv2" "logits"];
    values = [netE.Learnables.Value; netD.Learnables.Value];  % of each layer its weights, then its bias
    for i = 1:numel(names)
        learnables.(names(i) + "_Weights") = gather(extractdata(values{2*i - 1}));
        learnables.(names(i) + "_Bias") = gather(extractdata(values{2*i}));
    end
    save("vae.mat", "-struct", "learnables")

and here ``conv_vae_from_matlab(scipy.io.loadmat("vae.mat"))``. With more or fewer convolutions the names are
conv1 ... convN and transposed_conv1 ... transposed_convN.

Older releases of the example begin the decoder with a transposed convolution of z, [1, 1, K], whose kernel is as large
as its stride and its result, 7x7, and with ReLU. These lines save its weights as those of "project", of shape
[7, 7, F, K]: by that they are recognised, and the model has ``projection_relu``.

MATLAB's layouts, against PyTorch's: a convolution's weights are [H, W, C, F] (PyTorch: [F, C, H, W]), those of a
transposed convolution [H, W, F, C] ([C, F, H, W]), neither is flipped; and an image [H, W, C] is flattened with its
first dimension fastest ([C, H, W] with its last), which orders the columns of "moments" and the rows of "project".

Source: MathWorks, Deep Learning Toolbox, convolution2dLayer, transposedConv2dLayer, fullyConnectedLayer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastvae.models.conv_vae import ConvVAE


def conv_vae_from_matlab(arrays: Mapping[str, Any], image_shape: tuple[int, int, int] = (1, 28, 28)) -> ConvVAE:
    """The model, on the CPU and in evaluation mode, in float32.

    Args:
        arrays: by the names above, arrays of single or double precision in MATLAB's shapes; trailing dimensions of 1
            may be missing. Names that begin with "__", which loadmat adds, are passed over. The projection may have
            another number of channels than the encoder's last convolution.
        image_shape: (C, H, W). H and W are multiples of 2^N for N convolutions, because MATLAB's transposed
            convolutions double a size.

    Raises:
        ValueError: a name that is missing or unknown, an array of another shape or of no floating-point numbers, named
            with its layer; or such an image_shape.
    """
    given = {name: np.asarray(value) for name, value in arrays.items() if not name.startswith("__")}
    channels = [_padded(given, "conv1_Weights", 4).shape[3]]
    while f"conv{len(channels) + 1}_Weights" in given:
        channels.append(_padded(given, f"conv{len(channels) + 1}_Weights", 4).shape[3])
    rows = _padded(given, "moments_Weights", 2).shape[0]
    if rows % 2:
        raise ValueError(f"moments_Weights must have an even number of rows, mu and logvar, got {rows}")
    factor = 2 ** len(channels)
    if image_shape[1] % factor or image_shape[2] % factor:
        raise ValueError(f"image_shape must have a height and width that {factor} divides, got {image_shape}")
    size = image_shape[1] // factor, image_shape[2] // factor  # of what is flattened and projected to
    older = given.get("project_Weights", np.empty(0)).ndim > 2
    if older:
        _project_from_transposed(given, size, rows // 2)
    projected, rest = divmod(_padded(given, "project_Weights", 2).shape[0], size[0] * size[1])
    if rest:  # of no image; the error names the shape that is expected
        projected = channels[-1]
    with torch.device("meta"):  # no weights are drawn that would be thrown away
        model = ConvVAE(image_shape, rows // 2, tuple(channels), projection_channels=projected, projection_relu=older)

    layers = {path: layer for path, layer in model.named_modules() if hasattr(layer, "weight")}
    names = [f"{path.partition('.')[2]}_{kind}" for path in layers for kind in ("Weights", "Bias")]
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(f"{unknown[0]} is not of this network, whose arrays are {', '.join(names)}")
    state: dict[str, Tensor] = {}
    for path, layer in layers.items():
        name = path.partition(".")[2]
        weight, bias = _weight(given, name, layer), _bias(given, name, layer)
        if name == "moments":
            weight = _row_major(weight, (channels[-1], *size), 1)
        if name == "project":
            weight, bias = (_row_major(array, (projected, *size), 0) for array in (weight, bias))
        for kind, array in (("weight", weight), ("bias", bias)):
            state[f"{path}.{kind}"] = torch.from_numpy(np.array(array, np.float32, order="C"))
    model.load_state_dict(state, assign=True)
    return model.eval()


def _project_from_transposed(given: dict[str, NDArray[Any]], size: tuple[int, int], latent_dim: int) -> None:
    """Put a fully connected layer in the place of a transposed convolution of [1, 1, K] to an image of its own size."""
    weights = _padded(given, "project_Weights", 4)
    filters = weights.shape[2]
    if weights.shape != (*size, filters, latent_dim):
        raise ValueError(
            f"project_Weights must have shape {[*size, filters, latent_dim]}, as of a transposed convolution of "
            f"{[1, 1, latent_dim]} to the size {list(size)}, got {list(given['project_Weights'].shape)}"
        )
    bias = _padded(given, "project_Bias", 4)
    if bias.size != filters or max(bias.shape) != filters:
        raise ValueError(f"project_Bias must have shape {[1, 1, filters]}, got {list(given['project_Bias'].shape)}")
    given["project_Weights"] = weights.reshape(-1, latent_dim, order="F")
    given["project_Bias"] = np.repeat(bias.ravel(), size[0] * size[1])[:, None]


def _padded(given: Mapping[str, NDArray[Any]], name: str, dimensions: int) -> NDArray[Any]:
    """The array with the trailing dimensions of 1 that MATLAB drops."""
    if name not in given:
        raise ValueError(f"{name} is missing; there are {', '.join(given) or 'none'}")
    array = given[name]
    if array.dtype.kind != "f":
        raise ValueError(f"{name} must hold floating-point numbers, got dtype {array.dtype}")
    if array.ndim > dimensions:
        raise ValueError(f"{name} must have {dimensions} dimensions, got shape {list(array.shape)}")
    return array.reshape(*array.shape, *[1] * (dimensions - array.ndim))


def _weight(given: Mapping[str, NDArray[Any]], name: str, layer: nn.Module) -> NDArray[Any]:
    """In PyTorch's layout, but for the order of what was or will be flattened."""
    assert isinstance(layer.weight, Tensor)
    shape = list(layer.weight.shape)
    array = _padded(given, f"{name}_Weights", len(shape))
    in_matlab = shape if len(shape) == 2 else [*shape[2:], shape[1], shape[0]]
    if list(array.shape) != in_matlab:
        raise ValueError(f"{name}_Weights must have shape {in_matlab}, got {list(given[f'{name}_Weights'].shape)}")
    return array if len(shape) == 2 else array.transpose(3, 2, 0, 1)


def _bias(given: Mapping[str, NDArray[Any]], name: str, layer: nn.Module) -> NDArray[Any]:
    """Of shape [F], from MATLAB's [1, 1, F] or [F, 1]."""
    assert isinstance(layer.bias, Tensor)
    array, size = _padded(given, f"{name}_Bias", 4), len(layer.bias)
    if array.size != size or max(array.shape) != size:
        raise ValueError(
            f"{name}_Bias must have shape {[size, 1]} or {[1, 1, size]}, got {list(given[f'{name}_Bias'].shape)}"
        )
    return array.reshape(size)


def _row_major(array: NDArray[Any], features: tuple[int, int, int], axis: int) -> NDArray[Any]:
    """Reorder one axis, of length C * H * W, from an image's rows fastest to its columns fastest."""
    channels, height, width = features
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    image = array.reshape(*before, channels, width, height, *after)
    ordered: NDArray[Any] = image.swapaxes(axis + 1, axis + 2).reshape(array.shape)
    return ordered
