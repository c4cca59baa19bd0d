"""Training in several processes: that of one on the whole batch, and what happens when one of them fails."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fastvae.models import ConvVAE
from fastvae.training import Training, distributed, read_checkpoint, train
from fastvae.training import loop as training_loop
from fastvae.training.distributed import Processes

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "train.py"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the processes are forked, which CUDA is not for")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of `distributed_runs.py`."""
    folder = tmp_path_factory.mktemp("runs")
    result = subprocess.run(
        [sys.executable, HERE / "distributed_runs.py", folder],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder


def result(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


def weights(folder, name):
    """All of them as one vector in float64."""
    return torch.cat([value.double().flatten() for value in result(folder, name)["weights"].values()])


def root_mean_square(values):
    return values.square().mean().sqrt().item()


def test_two_processes_train_as_one_does(runs):
    """After 16 steps. The bounds are those of rule 2: float32 in two processes is as close to float64 as it is in one,
    within a factor of 2; and what is left between two and one in float64, whose roundings are 2^-29 times as large, is
    2^-29 times that, within a factor of 2.
    """
    exact = weights(runs, "float64-1-0")
    rounding = root_mean_square(weights(runs, "float32-1-0") - exact)
    assert 0 < rounding < 1e-6
    assert root_mean_square(weights(runs, "float32-2-0") - exact) <= 2 * rounding
    assert root_mean_square(weights(runs, "float64-2-0") - exact) <= 2 * 2.0**-29 * rounding


def test_metrics_are_those_of_the_whole_batch(runs):
    one, two = (result(runs, name)["rows"] for name in ("float64-1-0", "float64-2-0"))
    assert [row["step"] for row in two] == [8, 16]
    for expected, row in zip(one, two, strict=True):
        # Kept in float32, the test's in float64.
        assert row == pytest.approx(expected, rel=2**-22)
        assert row["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-12)


@pytest.mark.parametrize("name", ["float32-2", "whole", "parts"])
def test_all_processes_end_alike(runs, name):
    """Bit for bit, though the second began with other weights and another seed; only the first one writes."""
    first, second = (result(runs, f"{name}-{rank}") for rank in (0, 1))
    assert first["rows"] == second["rows"]
    for part in ("weights", "average"):
        assert all(torch.equal(first[part][key], second[part][key]) for key in first[part])
    saved = read_checkpoint(runs / f"{name}.pt")
    assert all(torch.equal(value, first["weights"][key]) for key, value in saved.model.state_dict().items())
    assert all(torch.equal(value, first["average"][key]) for key, value in saved.average.state_dict().items())


def test_one_process_stops_all(runs):
    """The second was asked to from the first step on; they agree after 16."""
    for rank in (0, 1):
        assert [row["step"] for row in result(runs, f"stopped-{rank}")["rows"]] == [16]


def test_what_stopped_goes_on_as_if_it_had_not(runs):
    whole, parts = (result(runs, name) for name in ("whole-0", "parts-0"))
    assert parts["rows"] == whole["rows"]
    assert all(torch.equal(parts["weights"][key], value) for key, value in whole["weights"].items())
    assert all(torch.equal(parts["average"][key], value) for key, value in whole["average"].items())


def test_all_skip_a_step_that_is_not_finite_in_one(runs):
    assert [row["skipped"] for row in result(runs, "whole-0")["rows"]] == [1]


def test_all_name_a_step_that_is_not_finite_in_one(runs):
    errors = [result(runs, f"not-finite-{rank}")["error"] for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert errors[0].startswith(
        "FloatingPointError: training diverged: at step 11, in epoch 2, these gradients are not finite: decoder.logits"
    )


def test_a_killed_process_ends_the_other(runs):
    """In its second epoch, with a message, within seconds; the checkpoint of the first is whole."""
    assert not (runs / "killed-1.pt").exists()
    left = result(runs, "killed-0")
    assert left["error"].startswith("ProcessLost: another process has ended, or cannot be reached: ")
    assert left["seconds"] < 30
    assert read_checkpoint(runs / "killed.pt").epoch == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch_size": 7}, "batch_size must be a multiple of 2, the processes, got 7"),
        ({"graph": "on"}, 'graph must be "auto" or "off" where several processes train, got "on"'),
    ],
)
def test_errors(option, message, monkeypatch):
    class Two(Processes):
        def __init__(self, device):
            self.device, self.together, self.rank, self.size = device, True, 0, 2

    monkeypatch.setattr(training_loop, "Processes", Two)
    data = torch.zeros(16, 1, 8, 6, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        train(ConvVAE((1, 8, 6), 3, (4,)), data, data, Training(**{"epochs": 1, "batch_size": 8, **option}))


# ------------------------------------------------------------------------------------------------- the process group


@pytest.fixture
def launched(monkeypatch):
    """The calls that a process of torchrun's makes for NCCL, without it."""
    calls = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: calls.append("init"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroy"))
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "new_group", lambda **named: calls.append(named["backend"]) or "waiting")
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD="everyone"))
    return calls


def test_the_group_that_waits_is_made_at_the_start(launched):
    """All are there then; a process that comes to it later, when the first one is busy, waits for minutes only."""
    with distributed.process_group(torch.device("cpu")):
        assert launched == ["init", "gloo"]
        assert distributed.waiting_group() == "waiting"
        assert launched == ["init", "gloo"]
    assert launched == ["init", "gloo", "destroy"]
    assert not distributed._gloo_groups


def test_leaving_a_group_of_lost_processes_does_not_block(launched, monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(dist, "destroy_process_group", never.wait)
    monkeypatch.setattr(distributed, "_FAREWELL_SECONDS", 0.05)
    began = time.perf_counter()
    with pytest.raises(distributed.ProcessLost), distributed.process_group(torch.device("cpu")):
        raise distributed.ProcessLost("gone")
    assert time.perf_counter() - began < 5
    never.set()


def test_sigterm_ends_a_process_that_is_blocked(launched):
    """The main thread is in a call that no signal interrupts, as one of CUDA is."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 2)
        with distributed.process_group(torch.device("cpu")):
            mutex = ctypes.create_string_buffer(64)  # of pthread_mutex_t, zeros are the initial value
            lock = ctypes.CDLL(None).pthread_mutex_lock
            lock(mutex)
            os.write(writer, b"locked\n")
            lock(mutex)
        os._exit(1)
    os.close(writer)
    try:
        with open(reader) as errors:
            assert errors.readline() == "locked\n"
            time.sleep(0.1)
            os.kill(child, signal.SIGTERM)
            ready, _, _ = select.select([errors], [], [], 20)
            assert ready, "it goes on"
            assert errors.read() == "process 1: ended by SIGTERM, as torchrun does when one has failed\n"
    finally:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM


def test_signals_are_as_they_were(launched):
    def of_the_user(number, frame):
        pass

    previous = signal.signal(signal.SIGTERM, of_the_user)
    try:
        with distributed.process_group(torch.device("cpu")):
            assert signal.getsignal(signal.SIGTERM) is not of_the_user
        assert signal.getsignal(signal.SIGTERM) is of_the_user
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGTERM, previous)


# ------------------------------------------------------------------------------------------------------------ torchrun


def worker(agent: int, rank: int) -> int:
    """The process of that rank of a torchrun."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    wanted = f"LOCAL_RANK={rank}".encode()
    (found,) = [it for it in children if wanted in Path(f"/proc/{it}/environ").read_bytes().split(b"\0")]
    return int(found)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torchrun(tmp_path):
    """One writes and shows; when the other is killed it says so, and its checkpoint is whole."""
    process = subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", EXAMPLE,
            "--dataset", "digits", "--device", "cpu", "--limit", "64", "--batch-size", "32", "--epochs", "100000",
            "--out", tmp_path / "run",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("epoch 2/"):
                os.kill(worker(process.pid, 1), signal.SIGKILL)
                break
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "another process has ended" in errors or "ended by SIGTERM, as torchrun does when one has failed" in errors
    assert "processes 2, with 16 images of every batch each\n" in lines
    assert sum(line.startswith("epoch 1/") for line in lines) == 1
    found = read_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert found.epoch >= 1
    assert found.run["processes"] == 2
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) >= 3


@pytest.mark.slow
def test_torchrun_on_two_machines(tmp_path):
    """Two groups of two processes, as docs/other-loops.md starts them, here on one machine. The first process writes,
    and the other machine's folder stays absent."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2",
                "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=two", EXAMPLE,
                "--dataset", "digits", "--device", "cpu", "--limit", "64", "--batch-size", "32", "--epochs", "1",
                "--out", tmp_path / f"machine{number}",
            ],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        results = [machine.communicate(timeout=240) for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], [errors[-2000:] for _, errors in results]
    (output,) = [output for output, _ in results if "processes 4, with 8 images of every batch each" in output]
    assert output.count("epoch 1/") == 1
    (written,) = tmp_path.iterdir()
    assert read_checkpoint(written / "checkpoint.pt").run["processes"] == 4
