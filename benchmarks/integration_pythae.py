"""The loss of pythae's models before and after `fastvae.integrations.pythae.fuse`; see `drop_in.py`.

    python benchmarks/integration_pythae.py [WORD ...] [--rounds 15]

The loss is what `forward` does between the encoder and the decoder, and after the decoder: networks that take no time
stand in for both. It needs pythae, and no GPU.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pythae.models as hosts
import torch
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from torch import Tensor, nn

from drop_in import Part, Step, main
from fastvae.integrations.pythae import fuse


class Subject(NamedTuple):
    host: str
    batch: int
    latent: int
    pixels: int
    settings: dict[str, Any]
    correct: bool = False
    samples: int = 1

    @property
    def name(self) -> str:
        extra = {name: value for name, value in self.settings.items() if name != "reconstruction_loss"}
        words = [self.host, self.settings.get("reconstruction_loss", "mse")]
        words += [f"{name}={value}" for name, value in extra.items()]
        return ", ".join(words + ["correct=True"] * self.correct)


BCE = {"reconstruction_loss": "bce"}
SUBJECTS = [
    Subject("VAE", 100, 16, 784, {}),
    Subject("VAE", 100, 16, 784, BCE),
    Subject("VAE", 100, 16, 784, BCE, correct=True),
    Subject("BetaVAE", 64, 64, 12288, {}),
    Subject("DisentangledBetaVAE", 64, 10, 4096, {}),
    Subject("BetaTCVAE", 64, 10, 4096, {"use_mss": True}),
    Subject("BetaTCVAE", 64, 10, 4096, {"use_mss": True}, correct=True),
    Subject("BetaTCVAE", 64, 10, 4096, {"use_mss": False}),
    Subject("BetaTCVAE", 512, 10, 4096, {"use_mss": False}),
    Subject("VAMP", 100, 40, 784, {"number_components": 500}),
    Subject("INFOVAE_MMD", 128, 16, 784, {}),
    Subject("INFOVAE_MMD", 512, 64, 784, {}),
    Subject("IWAE", 20, 50, 784, {"number_samples": 50}, samples=50),
    Subject("IWAE", 20, 50, 784, {"number_samples": 50, **BCE}, samples=50),
    Subject("IWAE", 20, 50, 784, {"number_samples": 50, **BCE}, correct=True, samples=50),
    Subject("MIWAE", 20, 50, 784, {"number_gradient_estimates": 8, "number_samples": 8}, samples=64),
]


class Encoder(BaseEncoder):
    """The moments of the data, and those of the components of a mixture."""

    def __init__(self, *counts: int, latent: int) -> None:
        super().__init__()
        self.mu = nn.ParameterList(torch.randn(count, latent) for count in counts)
        self.log_var = nn.ParameterList(torch.randn(count, latent) for count in counts)

    def forward(self, x: Tensor) -> ModelOutput:
        each = next(it for it in zip(self.mu, self.log_var, strict=True) if len(it[0]) == len(x))
        return ModelOutput(embedding=each[0], log_covariance=each[1])


class Decoder(BaseDecoder):
    """Probabilities of logits that do not depend on z, which is kept."""

    def __init__(self, rows: int, pixels: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(rows, pixels))
        self.sigmoid = nn.Sigmoid()
        self.z = torch.empty(0)

    def forward(self, z: Tensor) -> ModelOutput:
        self.z = z
        return ModelOutput(reconstruction=self.sigmoid(self.logits))


def loss_of(subject: Subject, fused: bool) -> Step:
    torch.manual_seed(0)
    name, batch, pixels = subject.host, subject.batch, subject.pixels
    components = [subject.settings["number_components"]] if name == "VAMP" else []
    encoder = Encoder(batch, *components, latent=subject.latent)
    decoder = Decoder(batch * subject.samples, pixels)
    config = getattr(hosts, "INFOVAE_MMD_Config" if name == "INFOVAE_MMD" else f"{name}Config")
    shape = {"input_dim": (pixels,), "latent_dim": subject.latent}
    model = getattr(hosts, name)(config(**shape, **subject.settings), encoder, decoder)
    if components:  # without the network that makes them
        model.pseudo_inputs, model.idle_input = nn.Identity(), torch.empty(components[0], pixels)
    if fused:
        fuse(model, correct=subject.correct)
    inputs = {"data": torch.rand(batch, pixels)}
    wanted = [*encoder.parameters(), decoder.logits]
    upstream = [torch.ones(()), torch.randn(batch * subject.samples, subject.latent)]

    def step() -> None:
        loss = model(inputs, dataset_size=60000, epoch=1).loss
        torch.autograd.grad((loss, decoder.z), wanted, upstream)

    return step


PARTS = [
    Part(f"`{it.name}`", f"{it.batch}, {it.latent}, {it.pixels}", functools.partial(loss_of, it)) for it in SUBJECTS
]

if __name__ == "__main__":
    main(PARTS, __doc__)
