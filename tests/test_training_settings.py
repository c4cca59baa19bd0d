"""Settings that check themselves, the flags that are made from them, and listeners."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, ReduceLROnPlateau

from fastvae import program
from fastvae.kinds import FRACTION, POSITIVE_INTEGER
from fastvae.models import ConvVAE
from fastvae.training import EpochMetrics, Listener, Training, TrainingState, train
from fastvae.training import run as training_run
from fastvae.training.run import Checkpoints, Records, Resumed, RunSettings, check_run, how_it_ended, take_over
from fastvae.training.settings import setting, settings_of


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be a positive integer, got 0"),
        ({"epochs": True}, TypeError, "epochs must be a positive integer, got True"),
        ({"epochs": None}, TypeError, "epochs must be a positive integer, got None"),
        ({"free_bits": -1e-9}, ValueError, "free_bits must be a number that is not negative, got -1e-09"),
        ({"beta": torch.zeros(2)}, TypeError, "beta must be a number that is not negative, got tensor"),
        ({"schedule": "step"}, ValueError, "schedule must be one of constant, cosine, plateau, got 'step'"),
        ({"graph": True}, ValueError, "graph must be one of auto, on, off, got True"),
        ({"skip_nonfinite": 1}, TypeError, "skip_nonfinite must be True or False, got 1"),
        ({"threads": 0}, ValueError, "threads must be a positive integer, got 0"),
    ],
)
def test_settings_check_themselves(changes, error, message):
    with pytest.raises(error, match=message):
        Training(**changes)
    with pytest.raises(error, match=message):
        dataclasses.replace(Training(), **changes)


def test_settings_are_numbers_of_python():
    settings = Training(epochs=torch.tensor(3), beta=torch.tensor(0.5), learning_rate=1)
    assert (settings.epochs, settings.beta, settings.learning_rate) == (3, 0.5, 1.0)
    assert (type(settings.epochs), type(settings.learning_rate)) == (int, float)
    assert settings == Training(epochs=3, beta=0.5, learning_rate=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.epochs = 4


def test_schedules():
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    assert Training().scheduler(optimizer) is None
    cosine = Training(epochs=7, schedule="cosine").scheduler(optimizer)
    assert isinstance(cosine, CosineAnnealingLR) and cosine.T_max == 7
    assert isinstance(Training(schedule="plateau").scheduler(optimizer), ReduceLROnPlateau)
    assert isinstance(Training(schedule=lambda it: ExponentialLR(it, 0.5)).scheduler(optimizer), ExponentialLR)


def test_what_is_no_setting_and_no_listener():
    data = torch.zeros(4, 1, 4, 4, dtype=torch.uint8)
    model = ConvVAE((1, 4, 4), 2, channels=(2,))
    for wrong, message in (
        ({"settings": [2]}, r"settings must be a fastvae.training.Training, got builtins.list"),
        ({"listeners": [print]}, r"listeners must be objects of fastvae.training.Listener, got builtins.builtin_"),
        ({"listeners": Listener()}, r"listeners must be a sequence of .*Listener, got fastvae.training.listener.L"),
    ):
        with pytest.raises(TypeError, match=message):
            train(model, data, data, **wrong)


# --------------------------------------------------------------------------------------------------------------- flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(Training):
    share: float | None = setting(None, "a share", kind=FRACTION, exact=True)
    folder: Path | None = setting(None, "", read=Path, flag="place", exact=False)
    loud: bool = setting(False, "", exact=None)
    hidden: int = setting(3, kind=POSITIVE_INTEGER)


def parse(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    return program.parse_settings(program.Parser("A program.\n\nIts end."), Flags)


def test_flags_are_made_from_the_fields(monkeypatch, capsys):
    settings, given = parse(monkeypatch, "--lr", 0.5, "--place", "/a", "--loud", "--share", 0.25, "--kl-warmup", 2)
    assert settings == Flags(learning_rate=0.5, folder=Path("/a"), loud=True, share=0.25, kl_warmup=2.0)
    assert given == {"learning_rate", "folder", "loud", "share", "kl_warmup"}
    values = program.flag_values(settings)
    assert values["lr"] == 0.5 and values["place"] == "/a" and values["loud"] is True
    assert not {"hidden", "threads", "learning_rate"} & values.keys()
    assert "loud" not in program.flag_values(settings, of_the_run=True)
    assert parse(monkeypatch) == (Flags(), set())
    with pytest.raises(program.UserError, match="argument --share: must be a number between 0 and 1, got '1'"):
        parse(monkeypatch, "--share", 1)
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--help")
    words = " ".join(capsys.readouterr().out.split())
    assert "--lr LR" in words and "--share SHARE a share" in words and "--hidden" not in words


def test_every_setting_of_a_run_says_whether_it_may_change():
    """A new flag is refused, or taken over, by a run that goes on; or it is of no run."""
    free = {name for name, known in settings_of(RunSettings) if known.exact is None}
    assert free == {"threads", "parts", "steps_per_epoch", "out", "resume", "quiet"}


# ------------------------------------------------------------------------------------------------------------ a run


def row(epoch, test_loss):
    return EpochMetrics(epoch, 4 * epoch, 20.5, 12.25, 8.25, test_loss, 0.02, 1.5)


def state(*losses, unfinished=0):
    rows = [row(number, loss) for number, loss in enumerate(losses, 1)]
    return TrainingState(rows, 1.0, torch.empty(0), torch.zeros(unfinished, 3), {}, [])


def test_records_go_on_with_the_rows_before(tmp_path):
    before = [row(1, 5.0)]
    records = Records(tmp_path / "metrics.csv", before)
    records.epoch(row(2, 4.0))
    assert [line.split(",")[0] for line in (tmp_path / "metrics.csv").read_text().splitlines()] == ["epoch", "1", "2"]
    assert len(before) == 1


def test_checkpoints(monkeypatch, tmp_path):
    """Every second epoch, the best ones, and the last at the end, each once."""
    written = []
    monkeypatch.setattr(
        training_run, "write_checkpoint", lambda path, model, epoch, state, run, **_: written.append((path.name, epoch))
    )
    kept = Checkpoints(tmp_path, None, {}, every=2, patience=3)
    for given in (state(5.0), state(5.0, 4.0), state(5.0, 4.0, 6.0), state(5.0, 4.0, 6.0, unfinished=2)):
        kept.state(given)
    usual, best = "checkpoint.pt", "checkpoint.best.pt"
    assert written == [(best, 1), (usual, 2), (best, 2), (usual, 4)]
    kept.finish()
    assert len(written) == 4
    kept.state(state(5.0, 4.0, 6.0))
    kept.finish()
    assert written[4:] == [(usual, 3)]


def test_how_a_run_ended():
    settings = Training(epochs=3, patience=1)
    rows = [row(1, 5.0), row(2, 6.0)]
    assert how_it_ended(rows, settings, 4) == "patience"
    assert how_it_ended(rows, Training(epochs=3), 4) == "interrupted"
    assert how_it_ended([rows[0], rows[1]._replace(step=7)], settings, 4) == "interrupted"
    assert how_it_ended([*rows, row(3, 7.0)], settings, 4) == "epochs"


def test_a_run_that_does_not_fit_is_refused():
    images, model = torch.zeros(8, 1, 4, 4), ConvVAE((1, 4, 4), 2, channels=(2,))
    alone = training_run.Processes(torch.device("cpu"))
    settings = RunSettings(batch_size=4, epochs=2)
    before = Resumed(model, state(5.0, unfinished=1), {"images": 8, "processes": None})
    assert before.step(8, settings) == 3
    check_run(settings, images, alone, before)
    for changed, message in (
        (before._replace(run={"images": 9, "processes": None}), "there were 9 training images, there are 8"),
        (before._replace(model=ConvVAE((1, 5, 4), 2, channels=(2,))), "were 4 x 5 pixels, grayscale, they are 4 x 4"),
        (before._replace(state=state(5.0, 4.0, unfinished=1)), "5 steps were done, --epochs 2 is 4"),
    ):
        with pytest.raises(program.UserError, match=message):
            check_run(settings, images, alone, changed)
    with pytest.raises(program.UserError, match="--graph on needs a CUDA device"):
        check_run(dataclasses.replace(settings, graph="on"), images, alone, None)


def test_settings_are_taken_over(tmp_path):
    model = ConvVAE((1, 4, 4), 2, channels=(2,))
    kept = RunSettings(learning_rate=0.5, data_dir=Path("/data"), seed=3, epochs=9)
    values = program.flag_values(kept, of_the_run=True)
    Checkpoints(tmp_path, model, values).state(state(5.0))
    settings, resumed = take_over(RunSettings(epochs=11, quiet=True), {"epochs", "quiet"}, tmp_path)
    assert settings == dataclasses.replace(kept, epochs=11, quiet=True, out=tmp_path)
    assert resumed.run == values and resumed.state.epoch == 1
    with pytest.raises(program.UserError, match=r"--lr was 0.5 in .*, got 0.1"):
        take_over(RunSettings(learning_rate=0.1), {"learning_rate"}, tmp_path)
    Checkpoints(tmp_path, model, {name: value for name, value in values.items() if name != "ema"}).state(state(5.0))
    with pytest.raises(program.UserError, match="is of an older fastvae, without --ema"):
        take_over(RunSettings(), set(), tmp_path)
