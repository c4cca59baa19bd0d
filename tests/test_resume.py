"""Training that stops and goes on: exactly, from a file, whatever stopped it."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

from fastvae.models import ConvVAE
from fastvae.training import MovingAverage, read_checkpoint, train, write_checkpoint
from fastvae.training.checkpoint import previous

EPOCHS = 3
STEPS = 5  # per epoch
BOUND = -0.33  # some gradients are below


@pytest.fixture
def data(device):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (4 * STEPS + 1, 1, 8, 6), dtype=torch.uint8, generator=generator).to(device)


def make_model(device):
    torch.manual_seed(1)
    return ConvVAE((1, 8, 6), latent_dim=3, channels=(4, 6)).to(device)


def run(model, data, path, epochs=EPOCHS, stop_after=None, resume=None, **options):
    """Train, stopping after so many steps, and keep the state in a file; returns the metrics without the time."""
    asked = 0
    epoch = 0

    def should_stop():
        nonlocal asked
        asked += 1
        return stop_after is not None and asked >= stop_after

    def on_epoch(row):
        nonlocal epoch
        epoch = row.epoch

    rows = train(
        model, data, data[:7], epochs=epochs, batch_size=4, learning_rate=1e-2, beta=2.0, kl_warmup=1.6, graph="off",
        should_stop=should_stop,
        on_epoch=on_epoch, on_state=lambda state: write_checkpoint(path, model, epoch, state, {"lr": 1e-2}),
        resume=resume, **options,
    )  # fmt: skip
    return timeless(rows)


def timeless(rows):
    return [row._replace(seconds=0.0) for row in rows]


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same_end(first, second):
    """Of two checkpoints: weights, Adam, generators and metrics, bit for bit."""
    assert equal(first.model.state_dict(), second.model.state_dict())
    assert equal(first.state.optimizer, second.state.optimizer)
    assert equal(first.state.generators, second.state.generators)
    assert equal(first.state[6:], second.state[6:])
    assert timeless(first.state.rows) == timeless(second.state.rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuDNN's sums may differ from run to run")
@pytest.mark.parametrize("stops", [[1], [3], [5], [6], [9], [14], [2, 1, 4], [5, 5]])
def test_a_run_that_goes_on_is_the_run_that_never_stopped(stops, data, device, tmp_path):
    """Stopped after so many steps, in the middle of an epoch and between two."""
    expected = run(make_model(device), data, tmp_path / "whole.pt")
    path = tmp_path / "checkpoint.pt"
    run(make_model(device), data, path, stop_after=stops[0])
    for stop_after in [*stops[1:], None]:
        torch.manual_seed(99)  # nothing may hang on what the process drew before
        found = read_checkpoint(path)
        rows = run(found.model.to(device), data, path, stop_after=stop_after, resume=found.state)
    assert rows == expected
    assert_same_end(read_checkpoint(path), read_checkpoint(tmp_path / "whole.pt"))


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)


def plateau(optimizer):
    """No test loss is half of the one before."""
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)


def all_options(model, schedule=cosine):
    """What an uninterrupted run and one that goes on are both called with."""
    return {
        "clip_norm": 3.0,
        "schedule": schedule,
        "average": MovingAverage(model, 0.8),
        "patience": 2,
        "skip_nonfinite": True,
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuDNN's sums may differ from run to run")
@pytest.mark.parametrize(("stops", "schedule"), [([3], cosine), ([5], plateau), ([7, 4], cosine)])
def test_with_every_option_too(stops, schedule, data, device, tmp_path):
    """Gradients of the output's bias below a bound are made NaN, so that some steps are skipped."""
    whole, path = tmp_path / "whole.pt", tmp_path / "checkpoint.pt"

    def make(model):
        model = model.to(device)
        model.decoder.logits.bias.register_hook(lambda gradient: gradient.where(gradient > BOUND, float("nan")))
        return model

    model = make(make_model(device))
    expected = run(model, data, whole, **all_options(model, schedule))
    assert 0 < sum(row.skipped for row in expected) < EPOCHS * STEPS / 2
    assert len({row.learning_rate for row in expected}) > 1
    model = make(make_model(device))
    run(model, data, path, stop_after=stops[0], **all_options(model, schedule))
    for stop_after in [*stops[1:], None]:
        torch.manual_seed(99)
        found = read_checkpoint(path)
        model = make(found.model)
        rows = run(model, data, path, stop_after=stop_after, resume=found.state, **all_options(model, schedule))
    assert rows == expected
    assert_same_end(read_checkpoint(path), read_checkpoint(whole))
    average = read_checkpoint(path).average
    assert average is not None and not equal(average.state_dict(), read_checkpoint(path).model.state_dict())


def test_a_state_of_other_options_is_refused(data, device, tmp_path):
    path = tmp_path / "checkpoint.pt"
    model = make_model(device)
    run(model, data, path, stop_after=3, average=MovingAverage(model, 0.5))
    state = read_checkpoint(path).state
    with pytest.raises(ValueError, match="resume must be a state of a run without average"):
        run(model, data, path, resume=state)
    with pytest.raises(ValueError, match="resume must be a state of a run with schedule"):
        run(model, data, path, resume=state, **all_options(model))


def test_a_learning_rate_on_the_device_stays_the_same_tensor(device):
    """A captured graph reads it where it was."""
    from fastvae.training.state import _restore_optimizer

    def make():
        rate = torch.tensor(0.5, device=device)
        return rate, torch.optim.Adam([torch.nn.Parameter(torch.ones(1, device=device))], lr=rate, fused=True)

    first, second = make(), make()
    first[0].fill_(0.25)
    _restore_optimizer(second[1], first[1].state_dict())
    assert second[1].param_groups[0]["lr"] is second[0] and second[0] == 0.25


def test_more_epochs(data, device, tmp_path):
    path = tmp_path / "checkpoint.pt"
    run(make_model(device), data, path, epochs=1)
    found = read_checkpoint(path)
    rows = run(found.model.to(device), data, path, epochs=2, resume=found.state)
    assert [row[0] for row in rows] == [1, 2]
    assert rows[:1] == timeless(found.state.rows)


def test_nothing_is_left_to_do(data, device, tmp_path):
    path = tmp_path / "checkpoint.pt"
    rows = run(make_model(device), data, path)
    found = read_checkpoint(path)
    assert run(found.model.to(device), data, tmp_path / "other.pt", resume=found.state) == rows
    assert not (tmp_path / "other.pt").exists()


def test_time_goes_on(data, device, tmp_path):
    path = tmp_path / "checkpoint.pt"
    run(make_model(device), data, path, stop_after=STEPS)
    found = read_checkpoint(path)
    assert found.state.seconds >= found.state.rows[-1].seconds > 0
    later = found.state._replace(seconds=1000.0)
    run(found.model.to(device), data, path, resume=later)
    assert read_checkpoint(path).state.rows[-1].seconds > 1000.0


def test_a_state_of_other_images_is_refused(data, device, tmp_path):
    path = tmp_path / "checkpoint.pt"
    run(make_model(device), data, path, stop_after=3)
    found = read_checkpoint(path)
    with pytest.raises(ValueError, match="resume must be a state of 20 images in batches of 4, got 21 images and 3"):
        run(found.model.to(device), data[:20], path, resume=found.state)
    other = found.state._replace(generators=found.state.generators * 2)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="same kind of device"):
            run(found.model, data, path, resume=other)


# ------------------------------------------------------------------------------------------------------------ the file


def test_the_file_before_is_kept(data, device, tmp_path):
    path = tmp_path / "checkpoint.pt"
    model = make_model(device)
    write_checkpoint(path, model, 1)
    assert not previous(path).exists()
    before = path.read_bytes()
    write_checkpoint(path, model, 2)
    assert previous(path).read_bytes() == before
    assert (read_checkpoint(previous(path)).epoch, read_checkpoint(path).epoch) == (1, 2)
    assert read_checkpoint(path)[2:] == (None, None, None)
    assert {it.name for it in tmp_path.iterdir()} == {"checkpoint.pt", "checkpoint.previous.pt"}


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_what_is_no_checkpoint(content, tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a checkpoint of fastvae"):
        read_checkpoint(path)
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="is not a checkpoint of fastvae"):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "absent.pt")


def test_a_full_disk(device, tmp_path):
    """No file may grow beyond 64 KiB: the write fails, and what was there stays."""
    path = tmp_path / "checkpoint.pt"
    small, large = make_model(device), ConvVAE((1, 28, 28))
    write_checkpoint(path, small, 1)
    write_checkpoint(path, small, 2)
    before = {it.name: it.read_bytes() for it in tmp_path.iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, limit[1]))
    try:
        with pytest.raises(OSError):
            write_checkpoint(path, large, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    after = {it.name: it.read_bytes() for it in tmp_path.iterdir()}
    assert after["checkpoint.pt"] == before["checkpoint.pt"]
    assert after.keys() == before.keys()
    assert read_checkpoint(previous(path)).epoch in (1, 2)


# A process that loads torch once and forks a run for each kill: each goes on where the killed one left off.
KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from fastvae.models import ConvVAE
from fastvae.training import MovingAverage, read_checkpoint, train, write_checkpoint

folder, kills, epochs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
data = torch.randint(0, 256, (8, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))

def run(path, epochs):
    state, epoch = None, 0
    torch.manual_seed(1)
    model = ConvVAE((1, 4, 4), latent_dim=2, channels=(2, 3))
    if path.exists():
        found = read_checkpoint(path)
        model, state = found.model, found.state
    def keep(row):
        nonlocal epoch
        epoch = row.epoch
    train(model, data, data[:2], epochs=epochs, batch_size=4, learning_rate=1e-3, on_epoch=keep,
          on_state=lambda state: write_checkpoint(path, model, epoch, state), resume=state)

def forked(path, epochs):
    child = os.fork()
    if child == 0:
        try:
            run(path, epochs)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child

run(folder / "warm.pt", 1)  # what torch loads at its first step takes longer than a run may last
began = time.perf_counter()
run(folder / "warm.pt", 2)
epoch = time.perf_counter() - began
random.seed(int(sys.argv[4]))
path = folder / "checkpoint.pt"
reached = []
for _ in range(kills):
    child = forked(path, 10**6)
    time.sleep(epoch * random.uniform(0.4, 5.0))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it ended by itself"
    if path.exists():
        reached.append(read_checkpoint(path).epoch)  # raises if it is not whole
assert reached == sorted(reached) and len(set(reached)) > kills / 4, reached
last = reached[-1] + epochs
for name in (path, folder / "whole.pt"):
    _, status = os.waitpid(forked(name, last), 0)
    assert status == 0
print(last, len(set(reached)))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
def test_killed_at_any_moment(tmp_path):
    """Fifty times: the file is whole each time, no finished epoch is lost, and the end is that of one that was not."""
    result = subprocess.run(
        [sys.executable, "-c", KILLS, tmp_path, "50", "3", "0"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert_same_end(read_checkpoint(tmp_path / "checkpoint.pt"), read_checkpoint(tmp_path / "whole.pt"))
