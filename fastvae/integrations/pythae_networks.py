"""The encoder and the decoder of pythae's models, and the logits of a decoder that ends in a sigmoid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def moments(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """mu and the log-variance [B, latent_dim], of the dtype that pythae draws z in."""
    output = model.encoder(x)
    mu, log_var = output.embedding, output.log_covariance
    if mu.ndim != 2:
        raise ValueError(f"the encoder's embedding must have shape [B, latent_dim], got {list(mu.shape)}")
    if mu.is_cuda and torch.is_autocast_enabled("cuda"):  # torch.exp returns float32 there
        return mu.float(), log_var.float()
    return mu, log_var


def decode(model: Any, z: Tensor, wants_logits: bool) -> tuple[Tensor, Tensor | None]:
    """The reconstruction, and the logits of which it is the sigmoid, where they are wanted and found."""
    if not wants_logits:
        return model.decoder(z)["reconstruction"], None
    calls: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((arguments[0], output))

    # For this call only: a decoder is saved and copied without them. First, because another hook may change the output.
    sigmoids = [module for module in model.decoder.modules() if type(module) is nn.Sigmoid]
    hooks = [module.register_forward_hook(keep, prepend=True) for module in sigmoids]
    try:
        recon_x = model.decoder(z)["reconstruction"]
    finally:
        for hook in hooks:
            hook.remove()
    return recon_x, next((logits for logits, output in calls if _in_another_shape(output, recon_x)), None)


def _in_another_shape(tensor: Tensor, view: Tensor) -> bool:
    """Whether view has the tensor's memory, elements and order."""
    if view.numel() != tensor.numel():
        return False
    same = tensor.reshape(view.shape)
    return same.data_ptr() == view.data_ptr() and same.stride() == view.stride()


def ends_in_sigmoid(model: Any) -> bool:
    """Whether `decode` finds logits: the decoder is tried on one latent, in eval mode."""
    like = next(model.decoder.parameters(), torch.empty(0))
    modes = [(module, module.training) for module in model.decoder.modules()]
    model.decoder.eval()
    try:
        with torch.no_grad():
            z = like.new_zeros(1, model.latent_dim)
            return decode(model, z, True)[1] is not None
    finally:
        for module, training in modes:
            module.training = training
