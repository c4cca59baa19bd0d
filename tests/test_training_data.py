"""Training on whatever holds samples: tensors of any rank, Datasets, DataLoaders, targets and conditions."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fastvae
import fastvae.functional as F
from fastvae.evaluation import evaluate
from fastvae.likelihoods import Laplace
from fastvae.models import VAE, VAEOutput
from fastvae.training import Training, train, training_step
from fastvae.training.data import open_data
from fastvae.training.loop import _resolved
from listening import listener

WIDTH, CLASSES = 6, 3


@pytest.fixture(autouse=True)
def plain():
    """The loop does not depend on the path."""
    with fastvae.use_backend("reference"):
        yield


def table_model(device="cpu", inputs=WIDTH) -> VAE:
    torch.manual_seed(1)
    return VAE(nn.Linear(inputs, 4), nn.Linear(2, WIDTH), 2, Laplace(2.0)).to(device)


def signal_model() -> VAE:
    encoder = nn.Sequential(nn.Conv1d(2, 3, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(6, 4))
    return VAE(encoder, nn.Sequential(nn.Linear(2, 16), nn.Unflatten(1, (2, 8))), 2)


def volume_model() -> VAE:
    encoder = nn.Sequential(nn.Conv3d(1, 2, 2, 2), nn.Flatten(), nn.Linear(8, 4))
    return VAE(encoder, nn.Sequential(nn.Linear(2, 32), nn.Unflatten(1, (1, 4, 2, 4))), 2)


def rows(count, device="cpu"):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(2)).to(device)


SMALL = Training(epochs=2, batch_size=4, learning_rate=0.01, graph="off")


def timeless(found):
    return [row._replace(seconds=0.0) for row in found]


def same_weights(first, second):
    return all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


class Rows(Dataset):
    """Samples of a tensor, or tuples of several, with some noise from the default generator added to the first."""

    def __init__(self, *tensors, noise=0.0):
        self.tensors, self.noise, self.read = tensors, noise, []

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, index):
        self.read.append(index)
        first, *others = (tensor[index] for tensor in self.tensors)
        if self.noise:
            first = first + self.noise * torch.randn(first.shape)
        return (first, *others) if others else first


class Endless(IterableDataset):
    """Rows of 0, of 1, and so on."""

    def __init__(self, end=10**9):
        self.end = end

    def __iter__(self):
        return (torch.full((WIDTH,), float(number)) for number in range(self.end))


# -------------------------------------------------------------------------------------------------- tensors of any rank


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("make", "shape"), [(signal_model, (2, 8)), (volume_model, (1, 4, 2, 4)), (table_model, (WIDTH,))]
)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_tensors_of_any_rank(make, shape, dtype, backend, device):
    data = torch.randint(0, 256, (10, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    data = (data if dtype is torch.uint8 else data / 255).to(device)
    torch.manual_seed(0)
    with fastvae.use_backend(backend):
        model = make().to(device)
        found = train(model, data[:8], data[8:], SMALL)
        assert found[-1].step == 4
        assert found[-1].test_loss == pytest.approx(evaluate(model, data[8:]).loss, rel=1e-6)


@pytest.mark.parametrize(("dtype", "backend"), [(torch.float64, "reference"), (torch.bfloat16, "triton")])
def test_models_of_other_dtypes_train_on_bytes_and_on_their_own(dtype, backend, device):
    data = torch.randint(0, 256, (8, 2, 8), dtype=torch.uint8, device=device)
    with fastvae.use_backend(backend):
        for given in (data, data.to(dtype) / 255):
            assert train(signal_model().to(device, dtype), given, given, SMALL)[-1].step == 4


# ------------------------------------------------------------------------------------------------- Datasets and loaders


def test_a_dataset_trains_as_its_tensor_does():
    """The same order and noise, bit for bit; the samples that whole batches leave over are not read."""
    data, test = rows(10), rows(3)
    ends = []
    for given, tested in ((data, test), (Rows(data), Rows(test)), (TensorDataset(data), TensorDataset(test))):
        model = table_model()
        torch.manual_seed(3)
        ends.append((timeless(train(model, given, tested, SMALL)), model))
    for found, model in ends[1:]:
        assert same_weights(model, ends[0][1])
        for row, expected in zip(found, ends[0][0], strict=True):
            assert row == pytest.approx(expected, rel=1e-6)
    dataset = Rows(data)
    train(table_model(), dataset, test, dataclasses.replace(SMALL, epochs=1))
    assert len(set(dataset.read)) == len(dataset.read) == 8


def test_a_loader_makes_the_batches():
    """In its own order and of its own sizes, each pass anew."""
    data = rows(10)
    model, expected = table_model(), table_model()
    torch.manual_seed(3)
    settings = dataclasses.replace(SMALL, batch_size=None)
    loader = DataLoader(data, 4, generator=torch.Generator())
    found = train(model, loader, DataLoader(rows(5), 2), settings)
    assert [row.step for row in found] == [3, 6]
    torch.manual_seed(3)
    optimizer = torch.optim.Adam(expected.parameters(), lr=0.01, fused=True)
    losses = [training_step(expected, optimizer, batch).loss.item() for _ in range(2) for batch in data.split(4)]
    assert [row.loss for row in found] == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3], rel=1e-5)
    assert same_weights(model, expected)
    assert found[-1].test_loss == pytest.approx(evaluate(model, rows(5)).loss, rel=1e-5)


def test_workers_and_a_default_batch_size():
    found = train(table_model(), DataLoader(Rows(rows(8)), 4, num_workers=1), rows(3), Training(epochs=1))
    assert found[-1].step == 2


def test_a_test_with_a_loader_does_not_disturb_training():
    ends = []
    for test in (rows(4), DataLoader(Rows(rows(4), noise=1.0), 2, shuffle=True), Endless(3)):
        model = table_model()
        torch.manual_seed(3)
        train(model, rows(8), test, SMALL)
        ends.append(model)
    assert same_weights(ends[0], ends[1]) and same_weights(ends[0], ends[2])


def test_a_stream_goes_on_where_it_is():
    """Epochs of as many steps as are asked for; a stream that ends begins again."""
    for end, expected in ((10**9, [0, 4, 8, 12]), (11, [0, 4, 0, 4])):
        model, seen = table_model(), []
        model.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0][0, 0].item()))
        settings = dataclasses.replace(SMALL, steps_per_epoch=2)
        found = train(model, Endless(end), rows(3), settings)
        assert [row.step for row in found] == [2, 4]
        assert seen[:4] == expected


@pytest.mark.parametrize("as_loader", [False, True])
@pytest.mark.parametrize("stop_after", [2, 3])
def test_a_run_on_a_dataset_goes_on(as_loader, stop_after):
    """Bit for bit, augmentation included: of a Dataset in the middle of an epoch too, of a loader between two."""
    settings = dataclasses.replace(SMALL, epochs=3, batch_size=None if as_loader else 4)

    def data():
        dataset = Rows(rows(8), noise=0.1)
        return DataLoader(dataset, 4, shuffle=True) if as_loader else dataset

    whole, model, kept, asked = table_model(), table_model(), [], iter(range(1, 99))
    torch.manual_seed(3)
    expected = train(whole, data(), rows(3), settings)
    torch.manual_seed(3)
    stopping = listener(should_stop=lambda: next(asked) >= stop_after + stop_after // 3, state=kept.append)
    train(model, data(), rows(3), settings, listeners=[stopping])
    assert len(kept[-1].history) == (1 if stop_after == 3 else 0)
    torch.manual_seed(99)
    found = train(model, data(), rows(3), settings, resume=kept[-1])
    assert [row.step for row in found] == [row.step for row in expected]
    if not as_loader or stop_after == 2:
        assert timeless(found) == timeless(expected)
        assert same_weights(model, whole)


def test_the_state_of_other_data_is_refused():
    kept = []
    train(table_model(), Rows(rows(8)), rows(3), SMALL, listeners=[listener(state=kept.append)])
    with pytest.raises(ValueError, match="resume must be a state of 9 images in batches of 4, got 8"):
        train(table_model(), Rows(rows(9)), rows(3), SMALL, resume=kept[-1])


# --------------------------------------------------------------------------------------------- targets and conditions


class Conditional(VAE):
    """Encoder and decoder are given the class too."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(nn.Linear(WIDTH + CLASSES, 4), nn.Linear(2 + CLASSES, WIDTH), 2, Laplace(2.0))
        self.seen = []

    def encode(self, x, condition):
        self.seen.append((x, condition))
        return self.encoder(torch.cat([x, one_hot(condition, CLASSES).to(x)], 1))

    def decode(self, z, condition):
        return self.decoder(torch.cat([z, one_hot(condition, CLASSES).to(z)], 1))

    def forward(self, x, batch_offset=None, free_bits=0.0, condition=None):
        z, kl = F.gaussian_sample_kl_packed(self.encode(x, condition))
        return VAEOutput(self.decode(z, condition), z, kl)


def of_classes(device="cpu"):
    """The mean of a row is about its class."""
    classes = torch.arange(24, device=device) % CLASSES
    return classes[:, None] + 0.1 * rows(24, device), classes


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("kind", ["tensors", "Dataset", "DataLoader"])
def test_each_sample_comes_with_its_condition(kind, backend, device):
    """In training and in the test."""
    data = of_classes(device)
    loaded = TensorDataset(*(it.cpu() for it in data))
    given = {"tensors": data, "Dataset": loaded, "DataLoader": DataLoader(loaded, 8, shuffle=True)}[kind]
    model = Conditional().to(device)
    settings = Training(epochs=1, batch_size=None if kind == "DataLoader" else 8, parts=("input", "condition"))
    with fastvae.use_backend(backend):
        train(model, given, given, settings)
    assert len(model.seen) == 6
    assert all(torch.equal(x.mean(1).round().long(), condition) for x, condition in model.seen)


def test_a_conditional_model_learns():
    data = of_classes()
    settings = Training(epochs=30, batch_size=8, learning_rate=0.03, parts=("input", "condition"))
    found = train(Conditional(), data, data, settings)
    assert found[-1].test_mse < 0.2 * found[0].test_mse


def test_all_of_a_test_counts():
    """The last partial batch too."""
    model, test = table_model(), rows(7)
    settings = dataclasses.replace(SMALL, parts=("input", "target"))
    found = train(model, (rows(8), rows(8)), (test, test), settings)
    assert found[-1].test_mse == pytest.approx(evaluate(model, test).mse, rel=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("kind", ["tensors", "DataLoader"])
def test_a_target_of_its_own(kind, backend, device):
    """A step's loss is of the target, and so is the test's."""
    noisy, clean = rows(8, device), 3 + rows(8, device)
    model = table_model(device)
    data = (clean, noisy) if kind == "tensors" else DataLoader(TensorDataset(clean.cpu(), noisy.cpu()), 8)
    settings = Training(epochs=1, batch_size=None if data is not None and kind == "DataLoader" else 8)
    settings = dataclasses.replace(settings, parts=("target", "input"), learning_rate=1e-30, graph="off")
    with fastvae.use_backend(backend):
        (row,) = train(model, data, data, settings)
    mu, logvar = model.encode(noisy).chunk(2, 1)
    expected = (model.decode(mu) - clean).square()
    assert row.test_mse == pytest.approx(expected.mean().item(), rel=1e-5)
    assert row.reconstruction > 0.9 * F.negative_log_likelihood(model.decode(mu), clean, model.likelihood).item()
    assert row.kl == pytest.approx(F.gaussian_kl(mu, logvar).item(), rel=1e-5)


def test_a_part_that_is_left_out():
    """Of images with labels, as torchvision's sets have them."""
    data, labels = rows(8), torch.arange(8)
    ends = []
    for given, parts in ((data, None), ((data, labels), ("input", None)), (Rows(data, labels), ("input", None))):
        model = table_model()
        torch.manual_seed(3)
        train(model, given, given, dataclasses.replace(SMALL, parts=parts))
        ends.append(model)
    assert same_weights(ends[0], ends[1]) and same_weights(ends[0], ends[2])


# ----------------------------------------------------------------------------------------------- what runs as a graph


def test_how_steps_run_is_said():
    said = []
    train(table_model(), rows(8), rows(3), SMALL, listeners=[listener(begin=said.append)])
    assert said == ["one at a time, because only a CUDA device has graphs, and the model is on cpu"]


def unseen(name, batch):
    """Looks at no batch."""


def resolved(data, graph="auto", together=False):
    processes = SimpleNamespace(device=torch.device("cuda", 0), together=together, size=2 if together else 1)
    settings = Training(graph=graph, batch_size=None if isinstance(data, DataLoader) else 4)
    if isinstance(data, Endless) or isinstance(getattr(data, "dataset", None), Endless):
        settings = dataclasses.replace(settings, steps_per_epoch=3)
    return _resolved(settings, open_data("data", data, settings, processes, unseen), processes)[1]


def test_graphs_are_for_batches_of_one_size():
    data = rows(10)
    varying = DataLoader(data, 4)
    for fixed in (data, Rows(data), DataLoader(data, 4, drop_last=True), DataLoader(data, 5), Endless()):
        assert resolved(fixed) is None
    assert resolved(data, "off") == 'graph is "off"'
    assert resolved(data, together=True) == "several processes train"
    why = "the last batch may be smaller (DataLoader(drop_last=True) leaves it out)"
    assert resolved(varying) == resolved(DataLoader(Endless(), 4)) == why
    with pytest.raises(ValueError, match='graph="on" needs batches of one size: the last batch may be smaller'):
        resolved(varying, "on")


def test_processes_share_the_batches_of_a_dataset():
    """All have the order; of a loader, whose sampler shares the samples out, a batch is a part of the step's."""
    found = []
    for rank in (0, 1):
        processes = SimpleNamespace(size=2, part=lambda it, rank=rank: it.chunk(2)[rank])
        stream = open_data("data", Rows(torch.arange(10)), SMALL, processes, unseen)
        stream.begin(torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7]))
        found.append([stream.next().input.tolist() for _ in range(2)])
    assert found == [[[3, 1], [5, 9]], [[4, 0], [2, 6]]]
    assert open_data("data", DataLoader(rows(8), 3), Training(), processes, unseen).batch_size == 6


# ------------------------------------------------------------------------------------------------------------- errors


class Nothing(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("data", "changes", "error", "message"),
    [
        ((rows(8), rows(8)), {}, ValueError, r'data gives 2 tensors .*Training\(parts=...\).*"condition"'),
        (Rows(rows(8), rows(8)), {}, ValueError, r'data gives 2 tensors .*\("input", None\), which leaves'),
        (rows(8), {"parts": ("input", "target")}, ValueError, r"for each of parts=\('input', 'target'\), got 1"),
        ((rows(8), rows(7)), {"parts": ("input", None)}, None, None),
        ((rows(8), rows(7)), {"parts": ("input", "target")}, ValueError, r"as many samples, got \[8, 7\]"),
        (rows(8).double(), {}, TypeError, "data must be uint8 .* torch.float32, got torch.float64"),
        (Rows(rows(8).double()), {}, TypeError, "data must be uint8 .* torch.float32, got torch.float64"),
        (rows(8).to("meta"), {}, ValueError, "data must be on the model's device, cpu, or the CPU, got meta"),
        (Rows(rows(3)), {}, ValueError, "batch_size must be 1 to 3, the number of training samples, got 4"),
        (Endless(), {}, ValueError, r"data has no length: Training\(steps_per_epoch=...\) must say"),
        (DataLoader(Endless(), 4), {"batch_size": None}, ValueError, r"data has no length: Training\(steps_per_epoch"),
        (DataLoader(rows(8), 2), {}, ValueError, "batch_size must be left out .* the batches, of 2 samples, got 4"),
        (DataLoader(rows(3), 4, drop_last=True), {"batch_size": None}, ValueError, "data must give at least one batch"),
        (Nothing(), {"steps_per_epoch": 2}, ValueError, "data must give at least one batch, got none"),
        (rows(8), {"steps_per_epoch": 3}, ValueError, "steps_per_epoch must be None for 8 samples, got 3"),
        ("digits", {}, TypeError, "data must be a tensor .*, a tuple of them, .* or a DataLoader, got builtins.str"),
        (Rows(["a", "b", "c", "d"]), {}, TypeError, "data must give tensors, or tuples of them, got list of builtins"),
        (DataLoader([{"x": 1.0}] * 4), {"batch_size": None}, TypeError, "data must give tensors, .* got builtins.dict"),
    ],
)  # fmt: skip
def test_errors_name_what_would_do(data, changes, error, message):
    settings = dataclasses.replace(SMALL, **changes)
    if error is None:
        train(table_model(), data, rows(3) if settings.parts is None else (rows(3), rows(3)), settings)
        return
    with pytest.raises(error, match=message):
        train(table_model(), data, data if isinstance(data, tuple) else rows(3), settings)


@pytest.mark.parametrize("parts", [("target",), ("input", "input"), ("input", "label")])
def test_parts_are_known(parts):
    with pytest.raises(ValueError, match="parts must be some of input, target, condition, with input, each once, got"):
        Training(parts=parts)


def test_values_of_the_first_batch_are_looked_at():
    """Of a loader no more is known."""
    with pytest.warns(UserWarning, match="data hold values from 3 to 3, expected 0 to 1"):
        train(signal_model(), DataLoader(torch.full((8, 2, 8), 3.0), 4), torch.rand(2, 2, 8), Training(epochs=1))
