"""VAEs on other data than images, and a conditional VAE, trained by fastvae's loop.

    python examples/any_data.py table          178 wines, 13 measurements of each
    python examples/any_data.py signal         waves of two channels, with convolutions in one dimension
    python examples/any_data.py volume         balls in a cube, with convolutions in three dimensions
    python examples/any_data.py conditional    handwritten digits by class; writes runs/conditional.png

Each is a `fastvae.models.VAE` with an encoder and a decoder. On a CUDA device the loop runs the fused operations
inside CUDA graphs, elsewhere plain PyTorch. The program prints losses of the test set, in nats per sample, and compares
the error of the reconstructions with the error of the training set's mean.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvae import plots
from fastvae.data import Standardisation, load_digits
from fastvae.evaluation import active_units, posteriors
from fastvae.likelihoods import Bernoulli, Gaussian
from fastvae.models import VAE, TabularVAE
from fastvae.program import Parser, choose_device, positive_integer, run_program, seed
from fastvae.training import EpochMetrics, Listener, Training, train

BATCH_SIZE, LEARNING_RATE = 32, 3e-3


class Task(NamedTuple):
    """A model, and data [N, ...] for it, with the condition of each sample, if any."""

    model: VAE
    data: Tensor
    condition: Tensor | None = None


def table() -> Task:
    """Any numbers, with each column standardised. (`fastvae.data.load_table` does this for your own files.)"""
    from sklearn.datasets import load_wine

    values = load_wine().data
    return Task(TabularVAE(13, latent_dim=4, hidden=(64, 32)), Standardisation.of(values).apply(values))


def signal() -> Task:
    """[N, 2, 64]: waves of one frequency and two phases."""
    time, frequency = torch.linspace(0, 1, 64), 1 + 4 * torch.rand(600, 1, 1)
    data = torch.sin(2 * torch.pi * (frequency * time + torch.rand(600, 2, 1))) + 0.1 * torch.randn(600, 2, 64)
    encoder = nn.Sequential(
        nn.Conv1d(2, 16, 5, 2, 2), nn.ReLU(), nn.Conv1d(16, 32, 5, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(512, 2 * 6)
    )
    decoder = nn.Sequential(
        nn.Linear(6, 512),
        nn.ReLU(),
        nn.Unflatten(1, (32, 16)),
        nn.ConvTranspose1d(32, 16, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose1d(16, 2, 4, 2, 1),
    )
    return Task(VAE(encoder, decoder, 6, Gaussian(std=0.2)), data)


def volume() -> Task:
    """[N, 1, 8, 8, 8], 0 or 1: balls of different places and sizes."""
    axes = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 8)] * 3, indexing="ij"))
    centre, radius = 0.5 * torch.rand(400, 3, 1, 1, 1) - 0.25, 0.4 + 0.4 * torch.rand(400, 1, 1, 1)
    data = ((axes - centre).square().sum(1) < radius**2).float()[:, None]
    encoder = nn.Sequential(
        nn.Conv3d(1, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 2 * 4)
    )
    decoder = nn.Sequential(
        nn.Linear(4, 64),
        nn.ReLU(),
        nn.Linear(64, 512),
        nn.ReLU(),
        nn.Unflatten(1, (8, 4, 4, 4)),
        nn.ConvTranspose3d(8, 1, 4, 2, 1),
    )
    return Task(VAE(encoder, decoder, 4, Bernoulli()), data)


class GivenClass(nn.Module):
    """Fully connected layers of x [B, ...] and a one-hot class [B, 10]. The encoder has two heads."""

    def __init__(self, inputs: int, outputs: tuple[int, ...], heads: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs + 10, 256), nn.ReLU())
        size = int(torch.tensor(outputs).prod())
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(256, size), nn.Unflatten(1, outputs)) for _ in range(heads))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor | tuple[Tensor, ...]:
        hidden = self.body(torch.cat([x.flatten(1), condition], 1))
        found = tuple(head(hidden) for head in self.heads)
        return found if len(found) > 1 else found[0]


def conditional() -> Task:
    """Digits and their classes. z need not hold the class."""
    digits = load_digits()
    assert digits.train_labels is not None
    encoder, decoder = GivenClass(784, (8,), heads=2), GivenClass(8, (1, 28, 28), heads=1)
    return Task(VAE(encoder, decoder, 8), digits.train_images / 255, nn.functional.one_hot(digits.train_labels).float())


TASKS: dict[str, Callable[[], Task]] = {f.__name__: f for f in (table, signal, volume, conditional)}


class Shown(Listener):
    """Prints the test of every tenth epoch."""

    def __init__(self, epochs: int, variance: float) -> None:
        self.epochs, self.variance = epochs, variance

    def epoch(self, metrics: EpochMetrics) -> None:
        if metrics.epoch == 1 or metrics.epoch % 10 == 0 or metrics.epoch == self.epochs:
            print(
                f"epoch {metrics.epoch:3}: test loss {metrics.test_loss:.2f} nats; the squared error of the "
                f"reconstructions is {metrics.test_mse / self.variance:.0%} of that of the mean"
            )


def main() -> int:
    """Run the program; returns its exit code."""
    return run_program("any_data.py", lambda: run(parse_arguments()))


def run(arguments: argparse.Namespace) -> None:
    device = choose_device(arguments.device)
    torch.manual_seed(arguments.seed)
    task = TASKS[arguments.task]()
    model = task.model.to(device)
    order = torch.randperm(len(task.data))
    test, training = order.tensor_split([len(order) // 5])
    test_data, data = task.data[test].to(device), task.data[training].to(device)
    test_condition, condition = (
        None if task.condition is None else task.condition[part].to(device) for part in (test, training)
    )
    parts = None if condition is None else ("input", "condition")
    settings = Training(
        epochs=arguments.epochs, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE, precision="fp32", parts=parts
    )
    shown = Shown(arguments.epochs, (test_data - data.mean(0)).square().mean().item())
    train(
        model,
        data if condition is None else (data, condition),
        test_data if test_condition is None else (test_data, test_condition),
        settings,
        listeners=[shown],
    )
    active = active_units(posteriors(model, test_data, condition=test_condition).mu)
    print(f"{int(active.sum())} of {active.numel()} dimensions of z are used")
    if arguments.task == "conditional":
        path = Path("runs", "conditional.png")
        path.parent.mkdir(exist_ok=True)
        classes = torch.arange(10, device=device).repeat(10)
        images = model.sample(100, condition=nn.functional.one_hot(classes).float())
        plots.write_image_grid(path, images, columns=10, title="z ~ N(0, I), given the digit of the column")
        print(f"written {path}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--epochs", type=positive_integer, default=60, help="default: 60")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=seed, default=0, help="of every random number, default: 0")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
