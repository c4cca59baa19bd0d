"""What TensorBoard reads of a run."""

from __future__ import annotations

import sys

import pytest
import torch

from fastvae.models import ConvVAE
from fastvae.tensorboard import open_tensorboard
from fastvae.training import EpochMetrics


def row(epoch):
    return EpochMetrics(epoch, 4 * epoch, 20.5 / epoch, 12.25, 8.25, 21.0, 0.0246, 1.5, 0, 1e-3)


@pytest.fixture
def model():
    return ConvVAE((1, 8, 6), latent_dim=3, channels=(2,))


@pytest.fixture
def images():
    return torch.randint(0, 256, (9, 1, 8, 6), dtype=torch.uint8)


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def test_an_epoch_is_in_the_file_when_the_call_returns(model, images, tmp_path):
    """The writer is left open, as in a run that is killed."""
    board = open_tensorboard(tmp_path, model, images)
    before = torch.get_rng_state()
    for epoch in (1, 2):
        board.epoch(row(epoch))
        found = read(tmp_path)
        for events in (found.Scalars("loss"), found.Images("samples")):  # the first and the last that are written
            assert [event.step for event in events] == list(range(1, epoch + 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert [event.value for event in found.Scalars("loss")] == pytest.approx([20.5, 10.25])
    assert set(found.Tags()["scalars"]) == set(EpochMetrics._fields) - {"epoch", "step"}
    assert set(found.Tags()["histograms"]) == {"latents/mu", "latents/kl_per_dimension"}
    assert found.Histograms("latents/mu")[0].histogram_value.num == 9 * 3
    assert found.Histograms("latents/kl_per_dimension")[0].histogram_value.num == 3
    sizes = {name: (found.Images(name)[0].height, found.Images(name)[0].width) for name in found.Tags()["images"]}
    assert sizes == {"reconstructions": (2 * 8, 8 * 6), "samples": (4 * 8, 8 * 6)}
    board.close()


def test_a_run_that_goes_on_replaces_what_came_later(model, images, tmp_path):
    first = open_tensorboard(tmp_path, model, images)
    for epoch in (1, 2, 3):
        first.epoch(row(epoch))
    first.close()
    second = open_tensorboard(tmp_path, model, images, epochs=1)
    second.epoch(row(2))
    second.close()
    assert [event.step for event in read(tmp_path).Scalars("loss")] == [1, 2]


def test_colour(tmp_path):
    model = ConvVAE((3, 8, 6), latent_dim=3, channels=(2,))
    board = open_tensorboard(tmp_path, model, torch.rand(3, 3, 8, 6))
    board.epoch(row(1))
    assert read(tmp_path).Images("reconstructions")[0].width == 3 * 6
    board.close()


def test_not_installed(model, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert open_tensorboard(tmp_path, model, images) is None
    assert not list(tmp_path.iterdir())
