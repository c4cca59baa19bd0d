"""What is done to gradients, learning rate and weights in training, and when it ends by itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

import fastvae
from fastvae.evaluation import evaluate
from fastvae.models import ConvVAE
from fastvae.training import EpochMetrics, MovingAverage, Training, best_epoch, train, training_step
from fastvae.training import loop as training_loop
from fastvae.training.gradients import limit_gradients
from listening import listener

SHAPE = (1, 8, 6)
NAMES = [name for name, _ in ConvVAE(SHAPE, latent_dim=3, channels=(4, 6)).named_parameters()]


@pytest.fixture(autouse=True)
def plain():
    """The loop does not depend on the path."""
    with fastvae.use_backend("reference"):
        yield


def small_model(device) -> ConvVAE:
    torch.manual_seed(1)
    return ConvVAE(SHAPE, latent_dim=3, channels=(4, 6)).to(device)


def images(count, device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=generator).to(device)


def run(model, device, *, average=None, listeners=(), resume=None, **settings):
    """Four steps an epoch, from one seed."""
    torch.manual_seed(3)
    settings = Training(**({"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "graph": "off"} | settings))
    data, test = images(32, device), images(7, device)
    return train(model, data, test, settings, average=average, listeners=listeners, resume=resume)


def spoil(model, steps, name="encoder.conv1.weight", value=float("nan")):
    """Put a value into a gradient of these backward passes, counted from 1; returns the list of passes."""
    passes = []

    def hook(gradient):
        passes.append(None)
        return gradient.clone().index_fill_(0, torch.tensor([0], device=gradient.device), value) if (
            len(passes) in steps
        ) else gradient  # fmt: skip

    dict(model.named_parameters())[name].register_hook(hook)
    return passes


# ------------------------------------------------------------------------------------------------------------- clipping


def test_gradients_are_clipped_to_a_norm(device):
    """The norms written are those before; the update sees what torch's own clipping makes of them."""
    torch.manual_seed(0)
    gradients = [torch.randn(3, 4, device=device), 100 * torch.randn(5, device=device)]
    for clip_norm in (2.0, 1e6):
        ours, theirs = ([nn.Parameter(torch.zeros_like(it)) for it in gradients] for _ in range(2))
        for parameters in (ours, theirs):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
        norms = torch.zeros(3, device=device)
        limit_gradients(SGD(ours), clip_norm=clip_norm, norms=norms)
        total = nn.utils.clip_grad_norm_(theirs, clip_norm)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.grad, b.grad)
        assert torch.allclose(norms, torch.stack([*(it.norm() for it in gradients), torch.zeros((), device=device)]))
        assert (total > clip_norm) == (not torch.equal(ours[0].grad, gradients[0]))


def test_training_clips(device, monkeypatch):
    """Adam sees gradients of that norm; a bound that is never reached changes nothing, bit for bit."""
    seen = []

    class Watched(Adam):
        def step(self):
            gradients = [it.grad for group in self.param_groups for it in group["params"]]
            seen.append(torch.linalg.vector_norm(torch.stack([it.norm() for it in gradients])).item())
            super().step()

    monkeypatch.setattr(training_loop, "Adam", Watched)
    plain, clipped, loose = (small_model(device) for _ in range(3))
    run(plain, device)
    largest, smallest = max(seen), min(seen)
    seen.clear()
    run(clipped, device, clip_norm=0.5 * smallest)
    assert seen == pytest.approx([0.5 * smallest] * 8, rel=1e-4)
    run(loose, device, clip_norm=2 * largest)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), loose.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------------------- schedule


def test_a_schedule_steps_after_each_epoch(device):
    rows = run(small_model(device), device, epochs=4, schedule=lambda optimizer: CosineAnnealingLR(optimizer, 4))
    expected = [0.01 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert [row.learning_rate for row in rows] == pytest.approx(expected, rel=1e-6)


def test_a_learning_rate_of_zero_changes_nothing(device):
    """So it is the scheduler's rate that the updates take."""
    model, weights = small_model(device), []
    run(
        model,
        device,
        epochs=3,
        schedule=lambda optimizer: CosineAnnealingLR(optimizer, 1),
        listeners=[listener(epoch=lambda row: weights.append([it.detach().clone() for it in model.parameters()]))],
    )
    moved = [not all(map(torch.equal, a, b)) for a, b in itertools.pairwise(weights)]
    assert moved == [False, True]


def test_a_plateau_is_one_of_the_test_loss(device, monkeypatch):
    losses = iter([5.0, 4.0, 4.5, 4.6, 3.0])
    monkeypatch.setattr(training_loop, "evaluate", lambda *a, **k: evaluate(*a, **k)._replace(loss=next(losses)))
    rows = run(
        small_model(device), device, epochs=5,
        schedule=lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
    )  # fmt: skip
    assert [row.learning_rate for row in rows] == pytest.approx([0.01, 0.01, 0.01, 0.005, 0.0025])


# ----------------------------------------------------------------------------------------------------- moving average


def test_the_average_of_the_weights(device):
    """The plain mean of the first 1 / (1 - decay) steps, then exponential; it is what is tested."""
    weights, tested, expected, rows = [], [], [], []
    for steps in range(1, 9):
        model = small_model(device)
        average = MovingAverage(model, 0.75)
        asked = iter(range(1, 99))
        rows = run(
            model,
            device,
            epochs=1,
            batch_size=4,
            average=average,
            listeners=[listener(should_stop=lambda it=asked, end=steps: next(it) >= end)],
        )
        weights.append(model.decoder.logits.bias.item())
        weight = max(0.25, 1 / steps)
        expected.append(weights[0] if steps == 1 else expected[-1] + weight * (weights[-1] - expected[-1]))
        tested.append(average.model.decoder.logits.bias.item())
    assert tested == pytest.approx(expected, rel=1e-5)
    assert tested[3] == pytest.approx(sum(weights[:4]) / 4, rel=1e-5)
    assert rows[-1].test_loss == evaluate(average.model, images(7, device)).loss
    assert rows[-1].test_loss != evaluate(model, images(7, device)).loss
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


def test_the_average_leaves_training_as_it_was(device):
    plain, averaged = small_model(device), small_model(device)
    run(plain, device)
    run(averaged, device, average=MovingAverage(averaged, 0.9))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), averaged.parameters(), strict=True))


def test_statistics_are_those_of_training(device):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to(device)
    average = MovingAverage(model, 0.9)
    model(torch.rand(5, 2, device=device))
    average.update(model)
    assert torch.equal(average.model[1].running_mean, model[1].running_mean)
    assert average.model[1].num_batches_tracked == 1


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0, float("nan")])
def test_a_decay_lies_between_0_and_1(decay):
    with pytest.raises(ValueError, match="decay must lie between 0 and 1, got"):
        MovingAverage(small_model("cpu"), decay)


# ------------------------------------------------------------------------------------------------------ early stopping


@pytest.mark.parametrize(
    ("losses", "patience", "epochs"),
    [
        ([5, 4, 4, 4.5, 3, 2], 2, 4),  # equal is no better
        ([5, 4, 4, 3, 3.5, 3.2, 2], 2, 6),
        ([5, 6], 1, 2),
        ([5, 4, 3], 1, 3),
    ],
)
def test_training_ends_without_a_better_test_loss(losses, patience, epochs, device, monkeypatch):
    given = iter(losses)
    monkeypatch.setattr(training_loop, "evaluate", lambda *a, **k: evaluate(*a, **k)._replace(loss=next(given)))
    rows = run(small_model(device), device, epochs=len(losses), patience=patience)
    assert len(rows) == epochs
    assert best_epoch(rows) == 1 + losses.index(min(losses[:epochs]))


def test_what_ended_does_not_go_on(device, monkeypatch):
    """Unless it is given more patience."""
    kept = []
    given = iter([5.0, 6.0, 7.0])
    monkeypatch.setattr(training_loop, "evaluate", lambda *a, **k: evaluate(*a, **k)._replace(loss=next(given)))
    model = small_model(device)
    run(model, device, epochs=3, patience=1, listeners=[listener(state=kept.append)])
    assert len(run(model, device, epochs=3, patience=1, resume=kept[-1])) == 2
    assert len(run(model, device, epochs=3, patience=2, resume=kept[-1])) == 3


def test_no_epoch_is_the_best_of_none():
    assert best_epoch([]) == 0


def test_a_test_loss_that_is_no_number_is_never_the_best():
    rows = [EpochMetrics(epoch, epoch, 0, 0, 0, loss, 0, 0) for epoch, loss in enumerate((math.nan, 3.0, 2.0), 1)]
    assert [best_epoch(rows[:count]) for count in (1, 2, 3)] == [1, 2, 3]


def test_a_step_that_may_not_be_skipped_forgets_what_was_found_before(device):
    """The optimizer keeps found_inf, and would skip every later step."""
    model = small_model(device)
    optimizer = Adam(model.parameters(), fused=True)
    training_step(model, optimizer, images(4, device) / 255 * math.nan, skip_nonfinite=True)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    training_step(model, optimizer, images(4, device))
    assert not any(map(torch.equal, before, model.parameters()))


# ------------------------------------------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_gradient_that_was_not_finite_is_named(value, device):
    """The loss of that step is finite; the one of the next is not."""
    model, kept = small_model(device), []
    spoil(model, [6], "decoder.project.bias", value)
    with pytest.raises(FloatingPointError) as error:
        run(model, device, epochs=3, listeners=[listener(state=kept.append)])
    words = str(error.value)
    assert words.startswith("training diverged: at step 6, in epoch 2, these gradients are not finite: decoder.")
    assert f"not finite: decoder.project.bias (norm {value:g}); the loss is 1" in words
    assert "not finite by now: encoder.conv1.weight, " in words
    assert [len(state.rows) for state in kept] == [1]


def test_steps_that_are_not_finite_are_skipped(device):
    """The third changes neither weights nor Adam, and no mean; training goes on."""
    models = [small_model(device) for _ in range(2)]
    rows, states = [], []
    for model, skip in zip(models, (True, False), strict=True):
        if skip:
            spoil(model, [3])
        asked = iter(range(1, 99))
        rows += run(
            model,
            device,
            skip_nonfinite=skip,
            listeners=[
                listener(should_stop=lambda it=asked, end=3 if skip else 2: next(it) >= end, state=states.append)
            ],
        )
    assert [row.skipped for row in rows] == [1, 0]
    assert rows[0].step == 3
    assert rows[0][2:7] == pytest.approx(rows[1][2:7], rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))
    for a, b in zip(*(state.optimizer["state"].values() for state in states), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("exp_avg", "exp_avg_sq", "step"))


def test_skipped_steps_are_counted_in_epochs_and_reports(device, monkeypatch):
    monkeypatch.setattr(training_loop, "_REPORT_SECONDS", 0.0)
    model, reports = small_model(device), []
    spoil(model, [2, 5, 7])
    rows = run(
        model, device, epochs=3, skip_nonfinite=True, clip_norm=1.0, listeners=[listener(progress=reports.append)]
    )
    assert [row.skipped for row in rows] == [1, 2, 0]
    assert [report.step for report in reports if report.skipped] == [2, 5, 7]
    assert all(math.isfinite(row.loss) for row in rows)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_an_epoch_without_a_finite_step_ends_training(device):
    model, kept = small_model(device), []
    spoil(model, range(5, 9))
    with pytest.raises(FloatingPointError, match="none of the steps of epoch 2, to 8, was finite"):
        run(model, device, epochs=3, skip_nonfinite=True, listeners=[listener(state=kept.append)])
    assert len(kept) == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"clip_norm": 0.0}, "clip_norm must be a positive number, got 0.0"),
        ({"clip_norm": float("nan")}, "clip_norm must be a positive number, got nan"),
        ({"patience": 0}, "patience must be a positive integer, got 0"),
    ],
)
def test_errors(option, message):
    with pytest.raises(ValueError, match=message):
        run(small_model("cpu"), "cpu", **option)
