"""Train the example from start to end with one provider, and report the time of all epochs and the loss of the last.

    python benchmarks/train_epochs.py PROVIDER [--data-dir DIR] [--epochs 30] [--seeds 0 ...] [--json PATH]

PROVIDER is textbook, eager, compile or fused, as in `training_step`; or fused-graph, the steps of `fastvae.training`
(on a CPU without a graph). The data are MNIST if its files are in DIR, else the digits that come with scikit-learn. The
time includes shuffling. It does not include compilation, capture and evaluation, because one epoch runs before the
clock starts. With several seeds training starts again with each; the times are those of the first.

benchmarks/reference_losses.json holds the losses, by seed, of eager PyTorch in float32 on a CPU after 30 epochs of
MNIST.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Adam

import fastvae
from fastvae.data import ImageDataset, load_digits, load_mnist
from fastvae.evaluation import evaluate
from fastvae.files import replacing
from fastvae.models import ConvVAE
from fastvae.training import Training
from fastvae.training.data import Arrays, Batch
from fastvae.training.memory import freed_memory_kept
from fastvae.training.precision import PRECISIONS, arithmetic
from fastvae.training.steps import Steps
from training_step import BATCH_SIZE, make_model, make_step

PROVIDERS = ("textbook", "eager", "compile", "fused", "fused-graph")


def choose_dataset(folder: Path | None) -> ImageDataset:
    return load_mnist(folder, download=False) if folder is not None else load_digits()


def train(
    provider: str, dataset: ImageDataset, device: torch.device, epochs: int, seed: int, limit: int | None
) -> dict[str, object]:
    images = dataset.train_images[:limit].to(device)
    model, optimizer = make_model(provider, device, seed)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    epoch = make_epoch(provider, model, optimizer, images)
    epoch()  # compiles, and captures where graphs are used
    model.load_state_dict(initial)
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()  # in place, because a graph knows these tensors

    synchronize(device)
    began = time.perf_counter()
    for _ in range(epochs):
        losses = epoch()
    synchronize(device)
    seconds = time.perf_counter() - began
    test = evaluate(model, dataset.test_images.to(device))
    steps = epochs * len(losses)
    return {
        "provider": provider,
        "dataset": dataset.name,
        "epochs": epochs,
        "steps": steps,
        "seconds_of_training": seconds,
        "steps_per_second": steps / seconds,
        "final_loss": losses.mean().item(),
        "test_loss": test.loss,
        "test_mse": test.mse,
    }


def make_epoch(provider: str, model: ConvVAE, optimizer: Adam, images: Tensor) -> Callable[[], Tensor]:
    """A function that trains one epoch and returns the loss of each of its steps, on the device."""
    device = images.device
    if provider.endswith("-graph"):
        graph = "on" if device.type == "cuda" else "off"
        steps = Steps(model, optimizer, Arrays(Batch(images, images), BATCH_SIZE), Training(graph=graph))

        def captured_epoch() -> Tensor:
            steps.shuffle()
            done = 0
            with fastvae.use_backend("triton" if device.type == "cuda" else "auto"):
                while done < steps.count:
                    done += steps.run(done)
            return steps.history[:, 0]

        return captured_epoch

    if provider == "textbook":
        images = images.float() / 255
    step = make_step(provider, model, optimizer)
    losses = torch.zeros(len(images) // BATCH_SIZE, device=device)

    def epoch() -> Tensor:
        order = torch.randperm(len(images), device=device)
        for index in range(len(losses)):
            losses[index] = step(images[order[index * BATCH_SIZE : (index + 1) * BATCH_SIZE]])
        return losses

    return epoch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights, shuffling and noise")
    parser.add_argument("--precision", choices=PRECISIONS[:2], default="tf32")
    parser.add_argument("--limit", type=int, help="train on the first so many images")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = choose_dataset(settings.data_dir)
    own_loop = settings.provider.endswith("-graph")
    with arithmetic(settings.precision), freed_memory_kept() if own_loop else nullcontext():
        runs = [
            train(settings.provider, dataset, device, settings.epochs, seed, settings.limit) for seed in settings.seeds
        ]
    result = {**runs[0], "seeds": settings.seeds, "final_losses": [run["final_loss"] for run in runs]}
    text = json.dumps(result)
    print(text)
    if settings.json:
        with replacing(settings.json) as file:
            file.write(text.encode())


if __name__ == "__main__":
    main()
