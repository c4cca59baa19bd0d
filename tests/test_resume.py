"""Training that stops and goes on: exactly, from a file, whatever stopped it."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fastvae.export import write_safetensors
from fastvae.models import ConvVAE
from fastvae.training import MovingAverage, Training, read_checkpoint, train, write_checkpoint
from fastvae.training.checkpoint import previous
from listening import listener

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


def run(model, data, path, epochs=EPOCHS, stop_after=None, resume=None, average=None, **settings):
    """Train, stopping after so many steps, and keep the state in a file; returns the metrics without the time."""
    asked = 0

    def should_stop():
        nonlocal asked
        asked += 1
        return stop_after is not None and asked >= stop_after

    def keep(state):
        write_checkpoint(path, model, state.epoch, state, {"lr": 1e-2})

    settings = Training(
        epochs=epochs, batch_size=4, learning_rate=1e-2, beta=2.0, kl_warmup=1.6, graph="off", **settings
    )
    told = [listener(should_stop=should_stop, state=keep)]
    return timeless(train(model, data, data[:7], settings, average=average, listeners=told, resume=resume))


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
    from fastvae.training.optimizer_state import restore_optimizer

    def make():
        rate = torch.tensor(0.5, device=device)
        return rate, torch.optim.Adam([torch.nn.Parameter(torch.ones(1, device=device))], lr=rate, fused=True)

    first, second = make(), make()
    first[0].fill_(0.25)
    restore_optimizer(second[1], first[1].state_dict())
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


@pytest.mark.parametrize("stop_after", [STEPS + 3, STEPS], ids=["in an epoch", "between two"])
@pytest.mark.parametrize("older", [False, True])
def test_a_state_of_other_images_is_refused(stop_after, older, data, device, tmp_path):
    """Or of other batches; files of before both were kept tell it by their steps."""
    path = tmp_path / "checkpoint.pt"
    run(make_model(device), data, path, stop_after=stop_after)
    found = read_checkpoint(path)
    state = found.state._replace(images=None, batch_size=None) if older else found.state
    model = found.model.to(device)
    # 5 instead of 4 images a batch leave 4 steps an epoch instead of 5.
    for images, batch_size in ((data[:16], 4), (data, 5)):
        with pytest.raises(
            ValueError, match=f"resume must be a state of {len(images)} images in batches of {batch_size}"
        ):
            train(model, images, images, Training(epochs=EPOCHS, batch_size=batch_size), resume=state)
    with pytest.raises(ValueError, match="resume must be a state of the same kind of device"):
        run(model, data, path, resume=state._replace(generators=state.generators * 3))
    if stop_after > STEPS:
        for order in (state.order * 0, state.order + 1):
            with pytest.raises(ValueError, match="resume must have the order of 21 images, each of them once"):
                run(model, data, path, resume=state._replace(order=order))


def changed_moment(state, change):
    """Of Adam, for the first convolution's weights."""
    moments = state.optimizer["state"][0]
    moments["exp_avg"] = change(moments["exp_avg"])


CRAFTED = {
    "shape": (lambda it: changed_moment(it, lambda moment: moment[:1]), "exp_avg of encoder.conv1.weight must be"),
    "dtype": (lambda it: changed_moment(it, torch.Tensor.double), "exp_avg of encoder.conv1.weight must be"),
    "empty": (lambda it: changed_moment(it, lambda moment: moment[:0]), "exp_avg of encoder.conv1.weight must be"),
    "no values": (lambda it: changed_moment(it, lambda moment: moment.to("meta")), "must be torch.float32 .* on meta"),
    "number": (lambda it: changed_moment(it, lambda moment: 3.0), "exp_avg of encoder.conv1.weight must be a tensor"),
    "step": (lambda it: it.optimizer["state"][1].update(step=torch.zeros(2)), "step of encoder.conv1.bias must be"),
    "missing": (lambda it: it.optimizer["state"][0].pop("exp_avg_sq"), "must have step, exp_avg and exp_avg_sq"),
    "another": (lambda it: it.optimizer["state"].update({99: {}}), "parameters, got number 99"),
    "option": (lambda it: it.optimizer["param_groups"][0].update(amsgrad=True), "amsgrad must be like False"),
    "betas": (lambda it: it.optimizer["param_groups"][0].update(betas=(0.9,)), "betas must be like"),
    "parameters": (lambda it: it.optimizer["param_groups"][0].update(params=[0]), "a group of parameters must be"),
    "groups": (lambda it: it.optimizer["param_groups"].clear(), "has 1 groups of parameters"),
    "no state_dict": (lambda it: it.optimizer.clear(), "must have the state_dict of an optimizer"),
    "average": (lambda it: it.average.update({"decoder.logits.bias": torch.zeros(2)}), "average of decoder.logits"),
    "schedule": (lambda it: it.schedule.update(optimizer=1), "state of a CosineAnnealingLR, got optimizer in it"),
}  # fmt: skip


@pytest.mark.parametrize("name", CRAFTED)
def test_a_state_that_does_not_fit_is_refused(name, data, device, tmp_path):
    """Before anything is changed. Loaded as it is, its tensors were read beyond their ends."""
    craft, message = CRAFTED[name]
    states = []
    model = make_model(device)
    average, settings = MovingAverage(model, 0.8), Training(epochs=1, batch_size=4, schedule=cosine, graph="off")
    train(model, data, data, settings, average=average, listeners=[listener(state=states.append)])
    craft(states[0])
    before = [value.clone() for value in model.state_dict().values()]
    generator = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        train(model, data, data, replace(settings, epochs=2), average=average, resume=states[0])
    assert all(map(torch.equal, before, model.state_dict().values()))
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_state_of_another_model_in_a_file_is_refused(data, device, tmp_path):
    """The weights of one run and the moments of another."""
    path = tmp_path / "checkpoint.pt"
    run(make_model(device), data, path, epochs=1)
    state = read_checkpoint(path).state
    larger = ConvVAE((1, 8, 6), latent_dim=3, channels=(8, 6))
    write_checkpoint(path, larger, 1, state)
    found = read_checkpoint(path)
    with pytest.raises(ValueError, match=r"exp_avg of encoder.conv1.weight must be torch.float32 .8, 1, 3, 3., got"):
        run(found.model.to(device), data, path, resume=found.state)


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuDNN's sums may differ from run to run")
def test_a_state_is_not_written_to(data, device, tmp_path):
    """So it can be gone on from twice."""
    path = tmp_path / "checkpoint.pt"
    model = make_model(device)
    run(model, data, path, stop_after=7, **all_options(model))
    state = read_checkpoint(path).state
    ends = []
    for _ in range(2):
        model = read_checkpoint(path).model.to(device)
        run(model, data, tmp_path / "end.pt", resume=state, **all_options(model))
        ends.append(read_checkpoint(tmp_path / "end.pt"))
    assert_same_end(*ends)


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuDNN's sums may differ from run to run")
def test_moments_of_other_strides_are_the_same_moments(data, device, tmp_path):
    """Adam goes through a parameter and its moments in the order of memory."""
    ends = []
    for format in (torch.preserve_format, torch.contiguous_format):
        path = tmp_path / "checkpoint.pt"
        run(make_model(device), data, path, epochs=1)
        found = read_checkpoint(path)
        moments = found.state.optimizer["state"]
        assert any(not it["exp_avg"].is_contiguous() for it in moments.values())
        for held in moments.values():
            held["exp_avg"] = held["exp_avg"].clone(memory_format=format)
        run(found.model.to(device), data, path, resume=found.state)
        ends.append(read_checkpoint(path))
    assert_same_end(*ends)


def test_tensors_of_a_state_that_share_memory_come_apart(data, device, tmp_path):
    """One step tensor of all parameters would be counted once for each of them."""
    ends = []
    for shared in (False, True):
        path = tmp_path / "checkpoint.pt"
        run(make_model(device), data, path, epochs=1)
        found = read_checkpoint(path)
        moments = found.state.optimizer["state"]
        if shared:
            for held in moments.values():
                held["step"] = moments[0]["step"]
        run(found.model.to(device), data, path, resume=found.state)
        ends.append(read_checkpoint(path))
    assert_same_end(*ends)


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
    model = make_model("cpu")
    torch.save({"model": model.to("meta").state_dict(), "settings": model.settings, "state": None}, path)
    with pytest.raises(ValueError, match="it has tensors without values"):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "absent.pt")


def small_checkpoint(path):
    model = ConvVAE((1, 4, 4), latent_dim=2, channels=(2,))
    states = []
    data = torch.rand(4, 1, 4, 4)
    train(model, data, data, Training(epochs=1, batch_size=2), listeners=[listener(state=states.append)])
    write_checkpoint(path, model, 1, states[0], {"lr": 1e-3}, keep_previous=False)
    return path.read_bytes()


def test_a_changed_bit_is_seen(tmp_path):
    """What is read of a changed file is what was written: the bit is one of those that pad it."""
    path = tmp_path / "checkpoint.pt"
    content = small_checkpoint(path)
    expected = read_checkpoint(path)
    refused = 0
    for place in torch.randint(0, 8 * len(content), (300,)).tolist():
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            found = read_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        assert equal(found[1:4], expected[1:4])
        assert equal(found.model.state_dict(), expected.model.state_dict())
    assert refused > 100


def test_a_damaged_file_is_named_and_the_one_before_it(tmp_path):
    path = tmp_path / "checkpoint.pt"
    content = small_checkpoint(path)
    weights = read_checkpoint(path).model.encoder.conv1.weight.detach().numpy().tobytes()
    changed = content.replace(weights, bytes(len(weights)))
    assert changed != content
    for damaged in (changed, content[: len(content) // 2], content[:-1]):
        path.write_bytes(damaged)
        previous(path).unlink(missing_ok=True)
        with pytest.raises(ValueError, match=r"checkpoint\.pt is not a checkpoint of fastvae: (?!.*previous)"):
            read_checkpoint(path)
        previous(path).write_bytes(content)
        with pytest.raises(
            ValueError, match=r"checkpoint\.pt is not .*; .*checkpoint\.previous\.pt, of epoch 1, is whole"
        ):
            read_checkpoint(path)
        previous(path).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.pt is not (?!.*previous)"):
            read_checkpoint(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_checkpoint_keeps_its_dtypes(dtype, tmp_path):
    model = make_model("cpu").to(dtype)
    average = MovingAverage(model, 0.5)
    data = torch.rand(8, 1, 8, 6).to(torch.float64 if dtype is torch.float64 else torch.float32)
    states = []
    if dtype is torch.float64:  # on a CPU, fastvae's operations take it where torch's convolutions do
        train(
            model,
            data,
            data,
            Training(epochs=1, batch_size=4),
            listeners=[listener(state=states.append)],
            average=average,
        )
    write_checkpoint(tmp_path / "checkpoint.pt", model, 1, *states)
    found = read_checkpoint(tmp_path / "checkpoint.pt")
    assert {it.dtype for it in found.model.parameters()} == {dtype}
    assert equal(found.model.state_dict(), model.state_dict())
    if states:
        assert {it.dtype for it in found.average.parameters()} == {dtype}
        assert equal(found.average.state_dict(), average.model.state_dict())


def replace_activation(model):
    model.encoder.relu1 = torch.nn.LeakyReLU()


def add_layer(model):
    model.decoder.append(torch.nn.Identity())


def remove_layer(model):
    del model.decoder.relu1


def prune(model):
    model.encoder.conv1.weight = torch.nn.Parameter(model.encoder.conv1.weight[:2].detach())


@pytest.mark.parametrize("change", [replace_activation, add_layer, remove_layer, prune])
def test_a_model_that_its_settings_do_not_build_is_not_written(change, tmp_path):
    model = make_model("cpu")
    change(model)
    for write, path in ((write_checkpoint, tmp_path / "a.pt"), (write_safetensors, tmp_path / "a.safetensors")):
        with pytest.raises(ValueError, match=r"model must have the layers that its settings make, .*, got "):
            write(path, model, *([1] if write is write_checkpoint else []))
    assert not list(tmp_path.iterdir())


def test_only_a_vae_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"model must be a fastvae.models.VAE, got torch.nn.modules.linear.Identity"):
        write_checkpoint(tmp_path / "a.pt", torch.nn.Identity(), 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuDNN's sums may differ from run to run")
def test_a_checkpoint_of_before_is_read(data, device, tmp_path):
    """As it was written before it had images and batch_size: training goes on from it."""
    path = tmp_path / "checkpoint.pt"
    expected = run(make_model(device), data, path)
    run(make_model(device), data, path, stop_after=7)
    saved = torch.load(path, weights_only=True)
    names = ["rows", "seconds", "order", "history", "optimizer", "generators", "average", "schedule"]
    older = {
        # In the order of the file, and as it lay in memory: channels_last.
        "model": {
            name: value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
            for name, value in saved["model"].items()
        },
        "settings": saved["settings"],
        "epoch": saved["epoch"],
        "state": {name: saved["state"][name] for name in names},
        "run": saved["run"],
    }
    torch.save(older, path)
    found = read_checkpoint(path)
    assert found.state.images is None and found.epoch == 2
    assert run(found.model.to(device), data, path, resume=found.state) == expected


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
        with pytest.raises(OSError, match=r"checkpoint\.pt"):
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
from fastvae.training import Listener, Training, read_checkpoint, train, write_checkpoint

folder, kills, epochs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
data = torch.randint(0, 256, (8, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))

class Keep(Listener):
    def __init__(self, path, model):
        self.path, self.model = path, model
    def state(self, state):
        write_checkpoint(self.path, self.model, state.epoch, state)

def run(path, epochs):
    state = None
    torch.manual_seed(1)
    model = ConvVAE((1, 4, 4), latent_dim=2, channels=(2, 3))
    if path.exists():
        found = read_checkpoint(path)
        model, state = found.model, found.state
    settings = Training(epochs=epochs, batch_size=4, learning_rate=1e-3)
    train(model, data, data[:2], settings, listeners=[Keep(path, model)], resume=state)

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


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
def test_killed_at_any_moment(tmp_path):
    """Fifty times: the file is whole each time, no finished epoch is lost, and the end is that of one that was not."""
    result = subprocess.run(
        [sys.executable, "-c", KILLS, tmp_path, "50", "3", "0"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert_same_end(read_checkpoint(tmp_path / "checkpoint.pt"), read_checkpoint(tmp_path / "whole.pt"))
