"""Trains in forked processes of one script, which imports torch once, and leaves what came of it in a folder.

    python distributed_runs.py FOLDER

Each run of each process is in NAME-RANK.pt: rows, weights, their average, seconds, and the error if there was one.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from fastvae.models import ConvVAE
from fastvae.training import MovingAverage, ProcessLost, Training, read_checkpoint, train, write_checkpoint
from listening import listener

SHAPE = (1, 8, 6)
EPOCHS, STEPS, BATCH = 2, 8, 8


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (STEPS * BATCH + 3, *SHAPE), dtype=torch.uint8, generator=generator)


def run(rank: int, name: str, folder: Path, *, dtype=torch.float32, seed=1, spoilt=0, **options) -> None:
    """Train, with other weights and seeds in the second process: the first one's count."""
    torch.manual_seed(seed + rank)
    model = ConvVAE(SHAPE, latent_dim=3, channels=(4, 6)).to(dtype)
    path, resume = folder / f"{name}.pt", None
    if path.exists():
        found = read_checkpoint(path)
        model, resume = found.model, found.state
    if spoilt:
        spoil(model, spoilt)
    average = MovingAverage(model, 0.8)
    torch.manual_seed(3 + rank)
    options = {"epochs": EPOCHS, "batch_size": BATCH, "learning_rate": 0.01, "kl_warmup": 0.5} | options
    should_stop, began = options.pop("should_stop", lambda: False), time.perf_counter()

    def epoch(row):
        assert rank == 0, "only the first process is told"
        if name.startswith("float"):
            torch.rand(3)  # as a user's listener may, in the first process alone

    def keep(state):
        write_checkpoint(path, model, state.epoch, state)

    told = [listener(should_stop=should_stop, epoch=epoch, state=keep)]
    result = {"rows": [], "error": None}
    try:
        settings = Training(**options)
        rows = train(model, images(), images()[:5], settings, average=average, listeners=told, resume=resume)
        result["rows"] = [row._replace(seconds=0.0)._asdict() for row in rows]
    except (ProcessLost, FloatingPointError, ValueError) as error:
        result["error"] = f"{type(error).__name__}: {error}"
    result["seconds"] = time.perf_counter() - began
    result["weights"] = dict(model.state_dict())
    result["average"] = dict(average.model.state_dict())
    torch.save(result, folder / f"{name}-{rank}.pt")


def spoil(model: ConvVAE, step: int) -> None:
    """Make a gradient NaN in that step; of a step below 0, kill the process there."""
    passes = 0

    def hook(gradient):
        nonlocal passes
        passes += 1
        if passes == -step:
            os.kill(os.getpid(), signal.SIGKILL)
        return gradient * float("nan") if passes == step else gradient

    model.decoder.logits.bias.register_hook(hook)


def together(size: int, name: str, folder: Path, suffix: str = "", in_second: dict | None = None, **options) -> None:
    """A run in so many processes."""
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            try:
                store = f"file://{folder}/store-{name}{suffix}"
                dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
                run(rank, name, folder, **options, **(in_second or {} if rank == 1 else {}))
            except BaseException as error:
                print(name, rank, repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def stop_after(steps: int):
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked >= steps

    return should_stop


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    # What torch loads at its first step takes longer than all the runs.
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    run(0, "warm", folder, epochs=1)
    dist.destroy_process_group()
    for dtype in (torch.float32, torch.float64):
        for size in (1, 2):
            together(size, f"{str(dtype)[6:]}-{size}", folder, dtype=dtype)
    options = {"epochs": 1, "clip_norm": 3.0, "skip_nonfinite": True, "batch_size": 2, "in_second": {"spoilt": 20}}
    together(2, "whole", folder, **options)
    options["in_second"] = {"spoilt": 20, "should_stop": stop_after(1)}
    together(2, "parts", folder, **options)
    for rank in (0, 1):
        (folder / f"parts-{rank}.pt").rename(folder / f"stopped-{rank}.pt")
    options["in_second"] = {"spoilt": 4}
    together(2, "parts", folder, suffix="-again", **options)
    together(2, "not-finite", folder, in_second={"spoilt": 11})
    together(2, "killed", folder, in_second={"spoilt": -13})


if __name__ == "__main__":
    main()
