"""The training loop against one written out in plain PyTorch, its stop, and its silence towards the device."""

from __future__ import annotations

import itertools
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastvae
from fastvae.evaluation import Evaluation, evaluate
from fastvae.models import ConvVAE
from fastvae.training import Progress, Training, checks, train, training_step
from fastvae.training import loop as training_loop
from fastvae.training import steps as training_steps
from fastvae.training.objectives import OBJECTIVES
from listening import listener

SHAPE = (1, 8, 6)


@pytest.fixture(autouse=True)
def exact():
    """Plain PyTorch in full float32, to compare with the same; the loop does not depend on the path."""
    with fastvae.use_backend("reference"):
        yield


def small_model(device, image_shape=SHAPE, seed=1) -> ConvVAE:
    torch.manual_seed(seed)
    return ConvVAE(image_shape, latent_dim=3, channels=(4, 6)).to(device)


def images(count, device, image_shape=SHAPE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, *image_shape), dtype=torch.uint8, generator=generator).to(device)


def stop_after(steps):
    """should_stop, saying yes once it was asked ``steps`` times."""
    asked = iter(range(1, sys.maxsize))
    return lambda: next(asked) >= steps


def test_partial_batches_are_discarded_and_images_reshuffled(device):
    model = small_model(device)
    data = torch.arange(70, dtype=torch.uint8, device=device).view(-1, 1, 1, 1).expand(-1, *SHAPE).contiguous()
    batches = []
    model.register_forward_pre_hook(lambda module, inputs: batches.append(inputs[0][:, 0, 0, 0].tolist()))
    rows = train(model, data, data[:5], Training(epochs=2, batch_size=16))
    assert [len(batch) for batch in batches] == [16] * 8
    first, second = ([index for batch in epoch for index in batch] for epoch in (batches[:4], batches[4:]))
    assert len(set(first)) == len(set(second)) == 64
    assert first != sorted(first)
    assert first != second
    assert [(row.epoch, row.step) for row in rows] == [(1, 4), (2, 8)]


@pytest.mark.filterwarnings("ignore:kl_warmup is 7 epochs, of 3")
@pytest.mark.parametrize("kl_warmup", [0.0, 0.25, 1.5, 7.0])
def test_the_weight_of_the_divergence_grows(kl_warmup, device, monkeypatch):
    used, tested = [], []

    def step(*arguments, beta, **named):
        used.append(beta.item())
        return training_step(*arguments, beta=beta, **named)

    def test(*arguments, beta):
        tested.append(beta)
        return evaluate(*arguments, beta=beta)

    monkeypatch.setattr(training_steps, "training_step", step)
    monkeypatch.setattr(training_loop, "evaluate", test)
    data = images(32, device)
    train(
        small_model(device),
        data,
        data[:5],
        Training(epochs=3, batch_size=8, beta=2.0, kl_warmup=kl_warmup, graph="off"),
    )
    expected = [min(1.0, number / (4 * kl_warmup)) if kl_warmup else 1.0 for number in range(12)]
    assert used == pytest.approx([2.0 * share for share in expected])
    assert tested == [2.0] * 3


@pytest.mark.parametrize(("image_shape", "as_bytes"), [(SHAPE, True), ((3, 7, 5), True), (SHAPE, False)])
def test_equals_a_loop_in_plain_pytorch(device, image_shape, as_bytes):
    data = images(40, device, image_shape)
    test = images(5, device, image_shape)
    if not as_bytes:
        data, test = data.float() / 255, test.float() / 255
    model = small_model(device, image_shape)
    expected_model = small_model(device, image_shape)
    torch.manual_seed(3)
    rows = train(model, data, test, Training(epochs=3, batch_size=16, learning_rate=0.01, beta=0.7, precision="fp32"))

    torch.manual_seed(3)
    parameters = list(expected_model.parameters())
    first, second = [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters]
    step = 0
    for row in rows:
        order = torch.randperm(40, device=device)
        sums = torch.zeros(3)
        for start in (0, 16):
            x = data[order[start : start + 16]]
            x = x.float() / 255 if as_bytes else x
            mu, logvar = expected_model.encode(x).chunk(2, 1)
            z = mu + (logvar / 2).exp() * torch.randn_like(mu)
            y = expected_model.decode(z).sigmoid()
            reconstruction = 0.5 * (y - x).square().sum() / 16
            kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum() / 16
            loss = reconstruction + 0.7 * kl
            gradients = torch.autograd.grad(loss, parameters)
            step += 1
            with torch.no_grad():
                for parameter, m, v, gradient in zip(parameters, first, second, gradients, strict=True):
                    m.mul_(0.9).add_(gradient, alpha=0.1)
                    v.mul_(0.999).add_(gradient.square(), alpha=0.001)
                    corrected = (v / (1 - 0.999**step)).sqrt() + 1e-8
                    parameter.sub_(0.01 / (1 - 0.9**step) * m / corrected)
            sums += torch.stack([loss, reconstruction, kl]).detach().cpu()
        assert row.step == step
        assert (row.loss, row.reconstruction, row.kl) == pytest.approx((sums / 2).tolist(), rel=1e-4)
        assert row.loss == pytest.approx(row.reconstruction + 0.7 * row.kl, rel=1e-5)


def test_rows_hold_the_evaluation_of_the_model_at_that_moment(device):
    model, test = small_model(device), images(9, device)
    evaluations = []
    rows = train(
        model,
        images(32, device),
        test,
        Training(epochs=2, batch_size=16, learning_rate=0.01, beta=3.0),
        listeners=[listener(epoch=lambda row: evaluations.append(evaluate(model, test, beta=3.0)))],
    )
    assert [Evaluation(row.test_loss, row.test_mse) for row in rows] == evaluations
    assert evaluations[0] != evaluations[1]


def test_testing_does_not_disturb_training(device):
    """The same random numbers reach the model whatever is tested between the epochs."""
    losses = []
    for count in (1, 600):
        model = small_model(device)
        torch.manual_seed(3)
        rows = train(model, images(32, device), images(count, device), Training(epochs=2, batch_size=16))
        losses.append([row.loss for row in rows])
    assert losses[0] == losses[1]


def test_beta_weights_the_divergence(device):
    kl = []
    for beta in (0.0, 20.0):
        model = small_model(device)
        kl.append(
            train(model, images(64, device), images(5, device), Training(epochs=5, batch_size=8, beta=beta))[-1].kl
        )
    assert kl[1] < 0.5 * kl[0]


@pytest.mark.parametrize(("steps", "expected"), [(1, [(1, 1)]), (3, [(1, 3)]), (6, [(1, 4), (2, 5)])])
def test_stop_ends_after_the_current_step(device, steps, expected):
    """Asked after each of 4 steps and after the epoch; the 6th time is after the first step of the second epoch."""
    model, reports = small_model(device), []
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    rows = train(
        model,
        images(64, device),
        images(5, device),
        Training(epochs=3, batch_size=16),
        listeners=[listener(should_stop=stop_after(steps), progress=reports.append)],
    )
    assert [(row.epoch, row.step) for row in rows] == expected
    assert len(calls) == expected[-1][1]
    assert reports[-1].step == expected[-1][1]
    assert reports[-1].total_steps == 12


def test_stop_between_epochs(device):
    rows = train(
        small_model(device),
        images(64, device),
        images(5, device),
        Training(epochs=3, batch_size=16),
        listeners=[listener(should_stop=stop_after(5))],
    )
    assert [(row.epoch, row.step) for row in rows] == [(1, 4)]


def test_metrics_of_an_unfinished_epoch_are_of_its_steps(device):
    data, test = images(64, device), images(5, device)
    model = small_model(device)
    torch.manual_seed(3)
    (row,) = train(
        model, data, test, Training(epochs=2, batch_size=16), listeners=[listener(should_stop=stop_after(2))]
    )

    model = small_model(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    torch.manual_seed(3)
    order = torch.randperm(64, device=device)
    losses = [training_step(model, optimizer, data[order[start : start + 16]]).loss.item() for start in (0, 16)]
    assert row.step == 2
    assert row.loss == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert row.loss == pytest.approx(row.reconstruction + row.kl, rel=1e-5)


def test_progress_covers_the_steps_since_the_last_report(device, monkeypatch):
    monkeypatch.setattr(training_loop, "_REPORT_SECONDS", 0.0)
    reports: list[Progress] = []
    rows = train(
        small_model(device),
        images(64, device),
        images(5, device),
        Training(epochs=2, batch_size=16),
        listeners=[listener(progress=reports.append)],
    )
    assert [(report.epoch, report.step) for report in reports] == [((step + 3) // 4, step) for step in range(1, 9)]
    for row in rows:
        losses = [report.loss for report in reports if report.epoch == row.epoch]
        assert row.loss == pytest.approx(sum(losses) / 4, rel=1e-5)
        assert len(set(losses)) == 4


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device, and what a CUDA graph cannot capture: besides that, a tensor of
    Python's numbers, which comes from the host.
    """

    OPERATIONS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal", "aten.masked_select")
    OPERATIONS += ("aten.lift_fresh",)

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        result = func(*args, **(kwargs or {}))
        by_mask = name == "aten.index" and any(i is not None and i.dtype is torch.bool for i in args[1])
        between_devices = name == "aten._to_copy" and result.device != args[0].device
        if name in self.OPERATIONS or by_mask or between_devices:
            self.counts[name] += 1
        return result


@pytest.fixture
def reads(monkeypatch):
    """The reads of a call, those that do not pass the dispatcher on a CPU included."""
    counts = Counter()
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, original=original, name=name, **kwargs):
            counts[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)

    def count(call) -> Counter:
        counts.clear()
        with Reads() as mode:
            call()
        return counts + mode.counts

    return count


def test_reads_are_seen(reads, device):
    x = torch.ones(2, device=device)
    reading = x.sum().item, x.tolist, lambda: bool(x.sum()), lambda: float(x.sum()), lambda: x[x > 0], x.nonzero
    for call in (*reading, lambda: torch.tensor([1.0, 2.0], device=device)):
        assert reads(call).total() > 0


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_step_reads_from_the_device(device, reads, objective, backend):
    """Three steps read as often as one: after the epoch, not in it."""
    counts = []
    settings = Training(epochs=1, batch_size=4, objective=objective)
    for steps in (1, 3):
        model, data, test = small_model(device), images(4 * steps, device), images(5, device)
        with fastvae.use_backend(backend):
            counts.append(reads(lambda model=model, data=data, test=test: train(model, data, test, settings)))
    assert counts[0] == counts[1]
    assert counts[0]["tolist"] == 2  # the means of the epoch, and of the test


def test_a_step_takes_three_launches(device, triton_backend):
    """Sample and divergence; loss with its gradient; the sampler's backward. And a loop runs on the fused path."""
    model = small_model(device)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    before = triton_backend.count
    training_step(model, optimizer, images(4, device), beta=torch.tensor(1.0, device=device))
    assert triton_backend.count - before == 3
    (row,) = train(model, images(8, device), images(5, device), Training(epochs=1, batch_size=4))
    assert row.step == 2
    assert row.loss == pytest.approx(row.reconstruction + row.kl, rel=1e-5)


def test_a_step_needs_no_values():
    """It runs on tensors that have none, where a read is an error."""
    with FakeTensorMode():
        model = ConvVAE(SHAPE, latent_dim=3, channels=(4, 6))
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        data = torch.zeros(8, *SHAPE, dtype=torch.uint8)
        batch = data[torch.randperm(8)[:4]]
        values = training_step(model, optimizer, batch, beta=torch.tensor(1.0))
        assert values.loss.shape == ()
        with pytest.raises(DataDependentOutputException):
            values.loss.item()


def test_the_loss_stays_finite_or_training_ends(device):
    kept = []
    with pytest.raises(FloatingPointError, match=r"training diverged: at step \d, in epoch 1, the loss is (nan|inf) "):
        train(
            small_model(device),
            images(64, device),
            images(5, device),
            Training(epochs=3, batch_size=8, learning_rate=1e4),
            listeners=[listener(state=kept.append)],
        )
    assert not kept


def poison(model, step, name):
    """Put NaN into a parameter when training comes to that step, counted from 1."""
    calls = itertools.count(1)

    def hook(module, inputs):
        if module.training and next(calls) == step:
            with torch.no_grad():
                dict(model.named_parameters())[name].view(-1)[0] = float("nan")

    model.register_forward_pre_hook(hook)


def test_the_step_that_was_not_finite_is_named(device):
    """In the second epoch of 4 steps; the state of the first is kept."""
    model, kept = small_model(device), []
    poison(model, 7, "decoder.logits.bias")
    with pytest.raises(FloatingPointError, match=r"at step 7, in epoch 2, the loss is nan \(reconstruction nan, kl \d"):
        train(
            model,
            images(32, device),
            images(5, device),
            Training(epochs=3, batch_size=8, graph="off"),
            listeners=[listener(state=kept.append)],
        )
    assert [len(state.rows) for state in kept] == [1]


def test_an_update_that_was_not_finite_is_named(device, monkeypatch):
    """The last of an epoch: its loss came before it."""
    model, kept = small_model(device), []

    def break_it(*arguments, **named):
        with torch.no_grad():
            model.encoder.moments.bias[0] = float("nan")
        return evaluate(*arguments, **named)

    monkeypatch.setattr(training_loop, "evaluate", break_it)
    with pytest.raises(
        FloatingPointError, match=r"after step 4, at the end of epoch 1, .* not finite: encoder\.moments"
    ):
        train(
            model,
            images(32, device),
            images(5, device),
            Training(epochs=3, batch_size=8),
            listeners=[listener(state=kept.append)],
        )
    assert not kept


def call(arguments):
    """Train with arguments of `train` and of `Training`."""
    arguments = {"model": small_model("cpu"), **arguments}
    named = {name: arguments.pop(name) for name in ("model", "data", "test_data", "resume") if name in arguments}
    train(**named, settings=Training(**arguments))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be a positive integer, got 0"),
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"batch_size": 21}, "batch_size must be 1 to 20, the number of training samples, got 21"),
        ({"learning_rate": 0.0}, "learning_rate must be a positive number, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive number, got nan"),
        ({"learning_rate": float("inf")}, "learning_rate must be a positive number, got inf"),
        ({"beta": -0.1}, "beta must be a number that is not negative, got -0.1"),
        ({"beta": float("nan")}, "beta must be a number that is not negative, got nan"),
        ({"kl_warmup": -1}, "kl_warmup must be a number that is not negative, got -1"),
        ({"kl_warmup": float("inf")}, "kl_warmup must be a number that is not negative, got inf"),
        ({"beta": 10**400}, "beta must be a number that is not negative, got inf"),
        ({"data": torch.zeros(20)}, r"data must have shape \[N, ...\], got \[20\]"),
        ({"data": images(20, "cpu")[0]}, r"batch_size must be 1 to 1, the number of training samples, got 4"),
        ({"test_data": images(0, "cpu")}, "test_data must hold at least one sample"),
        (
            {"data": images(20, "cpu").to("meta")},
            "data must be on the model's device, cpu, or the CPU, got meta",
        ),
        ({"data": images(20, "cpu", (1, 6, 8))}, r"x must have shape \[B, 1, 8, 6\], got"),
    ],
)
def test_errors_name_argument_value_and_expectation(changes, message):
    arguments = {"data": images(20, "cpu"), "test_data": images(5, "cpu"), "epochs": 1, "batch_size": 4}
    with pytest.raises(ValueError, match=message):
        call(arguments | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": images(20, "cpu").numpy()}, "data must be a tensor .* or a DataLoader, got numpy.ndarray"),
        ({"test_data": None}, "test_data must be a tensor .* got None"),
        ({"data": (images(20, "cpu"), 3)}, "data must give tensors, .* got tuple of torch.Tensor, builtins.int"),
        (
            {"data": images(20, "cpu").double() / 255},
            r"data must be uint8 \(read as x / 255\) or of the model's dtype, torch.float32, got torch.float64",
        ),
        ({"test_data": images(5, "cpu").long()}, "test_data must be uint8 .* got torch.int64"),
        ({"model": torch.nn.Linear(3, 3)}, "model must be a fastvae.models.VAE, got torch.nn.modules.linear.Linear"),
        ({"model": None}, "model must be a fastvae.models.VAE, got None"),
        ({"epochs": 1.5}, "epochs must be a positive integer, got 1.5"),
        ({"batch_size": "4"}, "batch_size must be a positive integer, got '4'"),
        ({"learning_rate": "1e-3"}, "learning_rate must be a positive number, got '1e-3'"),
        ({"resume": "checkpoint.pt"}, "resume must be a TrainingState, .* got builtins.str"),
    ],
)
def test_what_is_something_else(changes, message):
    arguments = {"data": images(20, "cpu"), "test_data": images(5, "cpu"), "epochs": 1, "batch_size": 4}
    with pytest.raises(TypeError, match=message):
        call(arguments | changes)


def test_a_model_without_anything_to_train():
    model = small_model("cpu").requires_grad_(False)
    with pytest.raises(ValueError, match="model must have a parameter that requires a gradient, got none"):
        train(model, images(20, "cpu"), images(5, "cpu"), Training(epochs=1, batch_size=4))


def test_a_compiled_model_is_a_model():
    checks.check_model(torch.compile(small_model("cpu"), backend="eager"))


def test_numbers_of_numpy_are_taken(device):
    (row,) = train(
        small_model(device),
        images(20, device),
        images(5, device),
        Training(
            epochs=np.int64(1),
            batch_size=np.int32(4),
            learning_rate=np.float32(1e-3),
            beta=np.float64(0.5),
            graph="off",
        ),
    )
    assert row.loss == pytest.approx(row.reconstruction + 0.5 * row.kl, rel=1e-5)


@pytest.mark.parametrize("beta", [-1.0, float("nan"), float("inf")])
def test_a_step_with_such_a_beta_is_refused(beta, device):
    model = small_model(device)
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match=f"beta must be a number that is not negative, got {beta}"):
        training_step(model, optimizer, images(4, device), beta=beta)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "data",
            lambda it: (it - 0.1307) / 0.3081,
            r"data hold values from -0.4\d* to 2.8\d*, expected 0 to",
        ),
        ("data", lambda it: 4 * it, r"data hold values from 0 to 4, expected 0 to 1"),
        ("test_data", lambda it: 2 * it - 1, r"test_data hold values from -1 to 1, expected 0 to 1"),
        (
            "test_data",
            lambda it: it.index_fill(0, torch.tensor(2, device=it.device), float("nan")),
            "test_data hold NaN",
        ),
    ],
    ids=["normalised", "larger", "signed", "not a number"],
)
def test_values_that_no_sigmoid_gives_are_named(name, change, message, device, recwarn, reads):
    """Once, however many steps and epochs there are, and read once."""
    given = {"data": images(32, device) / 255, "test_data": images(5, device) / 255}
    settings = Training(epochs=3, batch_size=8, learning_rate=1e-6, graph="off")
    counts = [
        reads(lambda data=data: train(small_model(device), **data, settings=settings))
        for data in ({it: (255 * value).byte() for it, value in given.items()}, given)
    ]
    assert counts[1]["tolist"] == counts[0]["tolist"] + 2  # one for each set
    assert not list(recwarn)
    train(small_model(device), **(given | {name: change(given[name])}), settings=settings)
    (warning,) = recwarn
    assert re.match(message, str(warning.message))


def test_a_warmup_that_does_not_end_is_said(device, recwarn):
    options = {"epochs": 2, "batch_size": 4, "graph": "off"}
    train(small_model(device), images(8, device), images(5, device), Training(kl_warmup=2, **options))
    assert not list(recwarn)
    train(small_model(device), images(8, device), images(5, device), Training(kl_warmup=5, **options))
    (warning,) = recwarn
    assert str(warning.message) == "kl_warmup is 5 epochs, of 2: the weight of the divergence ends below 0.4 beta"


def test_a_batch_of_all_images_is_allowed(device):
    assert (
        train(small_model(device), images(5, device), images(5, device), Training(epochs=1, batch_size=5))[0].step == 1
    )
