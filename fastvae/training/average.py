"""A moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fastvae.models import VAE


class MovingAverage:
    """The exponential moving average of the weights of a model in training, a_t = a_(t-1) + w_t (p_t - a_(t-1)) for the
    weights p_t after step t, with w_t = max(1 - decay, 1 / t).

    So the first 1 / (1 - decay) steps have the plain mean, which does not hang on the initial weights. Everything
    happens on the device, so that it can be captured in a CUDA graph; torch.optim.swa_utils.AveragedModel reads its
    counter on the host at every step.

    model: a copy that holds the average; what is no parameter in it, like the statistics of a BatchNorm, is as it is in
    training. decay: between 0 and 1, 0.999 for example, which forgets in about 1000 steps.

    Raises ``ValueError`` for another decay.
    """

    def __init__(self, model: VAE, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay must lie between 0 and 1, got {decay}")
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.steps = torch.zeros((), device=next(model.parameters()).device)

    def begin(self, model: VAE) -> None:
        """Start with the weights that the model has."""
        self.model.load_state_dict(model.state_dict())
        self.steps.zero_()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        held: list[Tensor] = list(self.model.parameters())
        new: list[Tensor] = list(model.parameters())
        change = list(torch._foreach_sub(new, held))
        torch._foreach_mul_(change, self.steps.reciprocal().clamp(min=1 - self.decay))
        torch._foreach_add_(held, change)
        for ours, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
