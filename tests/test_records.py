"""What a run writes and shows besides its figures, and how Ctrl-C ends it."""

from __future__ import annotations

import builtins
import csv
import os
import signal
import sys

import pytest
import torch

import fastvae
from fastvae import files, plots
from fastvae.models import ConvVAE
from fastvae.training import EpochMetrics, Progress, display, make_display, stop_on_interrupt
from fastvae.training.checkpoint import write_checkpoint
from fastvae.training.records import versions, write_metrics, write_summary

ROW = EpochMetrics(1, 46, 20.5, 12.25, 8.25, 21.0, 0.0246, 1.5, 0, 1e-3)


def test_metrics_are_rewritten_whole(tmp_path):
    path = tmp_path / "metrics.csv"
    write_metrics(path, [])
    header = "epoch,step,loss,reconstruction,kl,test_loss,test_mse,seconds,skipped,learning_rate"
    assert path.read_text() == header + "\n"
    write_metrics(path, [ROW, ROW._replace(epoch=2, step=92, loss=1 / 3)])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert ",".join(rows[0]) == header
    assert {name: float(value) for name, value in rows[0].items()} == ROW._asdict()
    assert rows[1]["epoch"] == "2"
    assert float(rows[1]["loss"]) == pytest.approx(1 / 3, rel=1e-6)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("pixels", [8, 280])
def test_nothing_is_written_to_a_full_disk(pixels, tmp_path, monkeypatch):
    """/dev/full refuses every byte, when it is written or when it is flushed: an OSError, and what was there stays."""

    def full(path, mode):
        return builtins.open("/dev/full", "wb")

    for write, name in (
        (lambda path: write_metrics(path, [ROW]), "metrics.csv"),
        (lambda path: write_summary(path, {"loss": 1.0}), "summary.json"),
        (lambda path: write_checkpoint(path, ConvVAE((1, pixels, pixels), 2, (2,)), 1), "checkpoint.pt"),
        (lambda path: plots.plot_losses(path, [ROW]), "loss.png"),
    ):
        path = tmp_path / name
        path.write_text("before")
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device"):
            if name == "checkpoint.pt":
                path.unlink()  # else the copy of it would fail first
            patch.setattr(files, "open", full, raising=False)
            write(path)
        assert not path.exists() if name == "checkpoint.pt" else path.read_text() == "before"


def test_checkpoint_restores_the_model(tmp_path, device):
    model = ConvVAE((3, 7, 5), latent_dim=3, channels=(4, 6)).to(device, memory_format=torch.channels_last)
    write_checkpoint(tmp_path / "checkpoint.pt", model, 7)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(value.device.type == "cpu" for value in saved["model"].values())
    restored = ConvVAE(**saved["settings"]).to(device)
    restored.load_state_dict(saved["model"])
    x = torch.rand(4, 3, 7, 5, device=device)
    torch.testing.assert_close(restored.reconstruct(x, deterministic=True), model.reconstruct(x, deterministic=True))
    assert saved["epoch"] == 7


def test_load(tmp_path, device):
    """From the file and from its folder."""
    model = ConvVAE((1, 7, 5), latent_dim=3, channels=(4,)).to(device)
    write_checkpoint(tmp_path / "checkpoint.pt", model, 1)
    x = torch.rand(4, 1, 7, 5)
    expected = model.reconstruct(x.to(device), deterministic=True).cpu()
    for path in (tmp_path, str(tmp_path / "checkpoint.pt")):
        loaded = fastvae.load(path)
        assert not loaded.training
        torch.testing.assert_close(loaded.reconstruct(x, deterministic=True), expected)
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.pt"):
        fastvae.load(tmp_path.parent)
    (tmp_path / "other.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"other\.pt is not a checkpoint of fastvae"):
        fastvae.load(tmp_path / "other.pt")


def test_versions_are_those_installed():
    found = versions()
    assert found["torch"] == torch.__version__
    assert found["fastvae"] == fastvae.__version__
    assert found["python"] == sys.version.split()[0]


def test_lines_for_what_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    shown = make_display(2)
    assert isinstance(shown, display.Lines)
    shown.progress(Progress(1, 10, 92, 30.0, 25.0, 5.0))
    assert capsys.readouterr().out == ""
    shown.began -= 10.0
    shown.epoch(ROW)
    assert capsys.readouterr().out == (
        "epoch 1/2, step 46: loss 20.50, reconstruction 12.25, KL 8.25, test loss 21.00, test mse 0.0246, "
        "4.6 steps/s, 10 s left\n"
    )
    monkeypatch.setattr(display, "_LINE_SECONDS", 0.0)
    shown.progress(Progress(2, 50, 92, 30.0, 25.0, 5.0))
    assert "epoch 2/2, step 50: loss 30.00" in capsys.readouterr().out
    shown.progress(Progress(2, 50, 92, 30.0, 25.0, 5.0, skipped=3))
    assert "KL 5.00, 3 skipped, " in capsys.readouterr().out
    shown.close()


def test_time_left_of_a_run_that_goes_on(capsys, monkeypatch):
    """The 36 steps of the earlier run took none of the 10 seconds."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    shown = make_display(2, first_step=36)
    shown.progress(Progress(1, 37, 92, 30.0, 25.0, 5.0))
    shown.began -= 10.0
    shown.epoch(ROW)
    assert "1.0 steps/s, 46 s left" in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    bar = make_display(2, first_step=36)
    bar.progress(Progress(1, 46, 92, 30.0, 25.0, 5.0))
    assert (bar.bar.initial, bar.bar.n) == (36, 46)
    bar.close()


def test_a_bar_for_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = make_display(2)
    assert isinstance(shown, display.Bar)
    shown.progress(Progress(1, 46, 92, 30.0, 25.0, 5.0))
    shown.progress(Progress(2, 92, 92, 20.0, 15.0, 5.0))
    assert shown.bar.n == shown.bar.total == 92
    shown.epoch(ROW)
    shown.close()
    text = capsys.readouterr().out
    last = text.rstrip().split("\r")[-1]
    for part in ("epoch 2/2", "steps/s", "left", "loss 20.0", "reconstruction 15.0", "KL 5.0"):
        assert part in last


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("columns", "expected"), [(0, display.Lines), (80, display.Bar)])
def test_a_terminal_without_a_width_shows_lines(columns, expected, monkeypatch):
    """tqdm would show nothing there."""
    import fcntl
    import struct
    import termios

    controlling, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert isinstance(make_display(2), expected)
    os.close(controlling)


def test_lines_where_tqdm_is_missing(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert isinstance(make_display(2), display.Lines)


def test_silence_when_quiet(capsys):
    shown = make_display(2, quiet=True)
    shown.progress(Progress(1, 46, 92, 30.0, 25.0, 5.0))
    shown.epoch(ROW)
    shown.close()
    assert capsys.readouterr().out == ""


def test_interrupts(capfd):
    """The first sets a flag, the second interrupts, and afterwards the handler is the one from before."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_on_interrupt() as interrupt:
        assert not interrupt.should_stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.should_stop()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "Ctrl-C again aborts" in capfd.readouterr().err
