"""The loss of pythae's models, as pythae has it and fused.

    python benchmarks/integration_pythae.py [NAME ...] [--rounds 15]

prints a table as Markdown. The loss is what `forward` does between the encoder and the decoder, and after the decoder:
networks that take no time stand in for both. Forward and backward are counted and measured together.

- Launches and bytes: what PyTorch dispatches (`Cost` of `eager_cost.py`), and the launches of fastvae's kernels for an
  H200, which a stand-in for its driver receives and does not run. The bytes of a launch are those of the tensors that
  it is given, each counted once.
- Peak: the most that was allocated at a time on the CPU, where fastvae runs plain PyTorch in blocks.
- Time: of one thread of the CPU, the least of each, and the median over the rounds of the ratio of alternating runs.

It needs pythae, and no GPU. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import pythae.models as hosts
import torch
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from torch import Tensor, nn

from eager_cost import Cost, _size
from fastvae.integrations.pythae import fuse
from stand_in import stand_in

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from memory_meters import peak_memory


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


class Loss(NamedTuple):
    forward: Callable[[], tuple[Tensor, Tensor]]  # the loss, and z
    backward: Callable[[Tensor, Tensor], Any]  # gradients of the moments and of the logits, given those of loss and z

    def __call__(self) -> None:
        self.backward(*self.forward())


def loss_of(subject: Subject, fused: bool) -> Loss:
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

    def forward() -> tuple[Tensor, Tensor]:
        loss = model(inputs, dataset_size=60000, epoch=1).loss
        return loss, decoder.z

    return Loss(forward, lambda *roots: torch.autograd.grad(roots, wanted, upstream))


class Meter:
    """One for all losses, because a kernel that was compiled for one of them is launched as it was then."""

    now = Cost()

    @classmethod
    def launch(cls, *arguments: Any) -> None:
        cls.now.launches += 1
        cls.now.bytes += sum({id(each): _size(each) for each in arguments if isinstance(each, Tensor)}.values())

    @classmethod
    def of(cls, function: Callable[..., Any], *arguments: Any) -> tuple[Cost, Any]:
        cls.now = cost = Cost()
        with cost:
            result = function(*arguments)
        cls.now = Cost()
        return cost, result


def costs(subject: Subject, fused: bool) -> list[Cost]:
    """Forward and backward."""
    loss = loss_of(subject, fused)
    with stand_in(Meter.launch):
        loss()  # the first call makes what is kept for later ones
        forward, roots = Meter.of(loss.forward)
        return [forward, Meter.of(loss.backward, *roots)[0]]


def times(subject: Subject, rounds: int) -> tuple[float, float, float]:
    """Milliseconds of pythae's and of the fused one, and the median of the ratios."""
    both = [loss_of(subject, fused) for fused in (False, True)]
    found: list[list[float]] = [[], []]
    repeats = 1
    for k in range(rounds + 1):
        for loss, each in zip(both, found, strict=True):
            start = process_time()
            for _ in range(repeats):
                loss()
            spent = process_time() - start
            if k:
                each.append(1e3 * spent / repeats)
        if not k:  # so that a measurement takes a twentieth of a second
            repeats = max(1, round(0.05 / spent))
    ratio = statistics.median(before / after for before, after in zip(*found, strict=True))
    return min(found[0]), min(found[1]), ratio


TITLES = [
    "model, reconstruction", "B, latents, pixels", "launches: pythae", "fused", "MB moved: pythae", "fused",
    "peak MB: pythae", "fused", "CPU ms: pythae", "fused", "pythae / fused",
]  # fmt: skip


def row(subject: Subject, rounds: int) -> list[str]:
    cells = [f"`{subject.name}`", f"{subject.batch}, {subject.latent}, {subject.pixels}"]
    both = [costs(subject, fused) for fused in (False, True)]
    cells += [" + ".join(str(each.launches) for each in directions) for directions in both]
    cells += [" + ".join(f"{each.bytes / 1e6:.1f}" for each in directions) for directions in both]
    cells += [f"{peak_memory(loss_of(subject, fused)) / 1e6:.1f}" for fused in (False, True)]
    before, after, ratio = times(subject, rounds)
    return [*cells, f"{before:.1f}", f"{after:.1f}", f"{ratio:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only models of these classes, such as VAE")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| {' | '.join(TITLES)} |\n|---|---|{'--:|' * (len(TITLES) - 2)}")
    for subject in SUBJECTS:
        if not arguments.names or subject.host in arguments.names:
            print(f"| {' | '.join(row(subject, arguments.rounds))} |", flush=True)


if __name__ == "__main__":
    main()
