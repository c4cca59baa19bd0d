"""The example's training from start to end by one provider: the time of all epochs, and the loss of the last.

    python benchmarks/train_epochs.py PROVIDER [--data-dir DIR] [--epochs 30] [--json PATH]

PROVIDER is eager, compile or fused, as in `training_step`. MNIST where its files are in DIR, else the digits that come
with scikit-learn. Shuffling is counted; compilation, warm-up and evaluation are not.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from fastvae.data import ImageDataset, load_digits, load_mnist
from fastvae.evaluation import evaluate
from fastvae.files import replacing
from training_step import BATCH_SIZE, fast_arithmetic, make_model, make_step


def choose_dataset(folder: Path | None) -> ImageDataset:
    return load_mnist(folder, download=False) if folder is not None else load_digits()


def train(
    provider: str, dataset: ImageDataset, device: torch.device, epochs: int, limit: int | None
) -> dict[str, object]:
    torch.manual_seed(0)
    images = dataset.train_images[:limit].to(device)
    steps = len(images) // BATCH_SIZE
    model, optimizer = make_model(device)
    step = make_step(provider, model, optimizer)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        step(images[:BATCH_SIZE])
    model.load_state_dict(initial)
    optimizer.state.clear()

    synchronize(device)
    began = time.perf_counter()
    for _ in range(epochs):
        losses = torch.zeros(steps, device=device)
        order = torch.randperm(len(images), device=device)
        for index in range(steps):
            losses[index] = step(images[order[index * BATCH_SIZE : (index + 1) * BATCH_SIZE]])
    synchronize(device)
    seconds = time.perf_counter() - began
    test = evaluate(model, dataset.test_images.to(device))
    return {
        "provider": provider,
        "dataset": dataset.name,
        "epochs": epochs,
        "steps": epochs * steps,
        "seconds_of_training": seconds,
        "steps_per_second": epochs * steps / seconds,
        "final_loss": losses.mean().item(),
        "test_loss": test.loss,
        "test_mse": test.mse,
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("provider", choices=("eager", "compile", "fused"))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--limit", type=int, help="train on the first so many images")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with fast_arithmetic():
        result = train(settings.provider, choose_dataset(settings.data_dir), device, settings.epochs, settings.limit)
    text = json.dumps(result)
    print(text)
    if settings.json:
        with replacing(settings.json) as file:
            file.write(text.encode())


if __name__ == "__main__":
    main()
