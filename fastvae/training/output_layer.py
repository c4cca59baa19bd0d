"""Which decoders end in a layer that is computed together with the loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fastvae.functional.conv_elbo import MAX_INPUTS, MAX_KERNEL, MAX_OUTPUTS
from fastvae.models import VAE


class OutputLayer(NamedTuple):
    """A decoder in two: what makes the features, and the layer, with a ReLU before it or without."""

    features: nn.Sequential
    relu: bool
    layer: nn.ConvTranspose2d


def output_layer(model: VAE) -> OutputLayer:
    """The decoder's last layer, as `fastvae.functional.conv_elbo_value_and_grad` takes it.

    Raises ``ValueError`` for another decoder, saying what it has to be.
    """
    *modules, layer = model.decoder if isinstance(model.decoder, nn.Sequential) else [model.decoder]
    kernels = [((k, k), (k // 2, k // 2)) for k in range(1, MAX_KERNEL + 1, 2)]
    if not (
        modules
        and isinstance(layer, nn.ConvTranspose2d)
        and layer.stride == layer.dilation == (1, 1)
        and layer.output_padding == (0, 0)
        and layer.groups == 1
        and layer.in_channels <= MAX_INPUTS
        and layer.out_channels <= MAX_OUTPUTS
        and (layer.kernel_size, layer.padding) in kernels
    ):
        raise ValueError(
            "fuse_output_layer needs a decoder that is an nn.Sequential whose last module is a ConvTranspose2d of "
            f"stride 1 that keeps the image's size, with a kernel of 1, 3 or 5, from at most {MAX_INPUTS} to at most "
            f"{MAX_OUTPUTS} channels; it ends in {layer}"
        )
    relu = isinstance(modules[-1], nn.ReLU) and len(modules) > 1
    return OutputLayer(nn.Sequential(*(modules[:-1] if relu else modules)), relu, layer)
