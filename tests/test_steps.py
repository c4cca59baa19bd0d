"""The batch kernel against indexing, and the captured steps against plain ones.

Without a GPU a captured graph is stood in for by what it would replay; the GPU tests meet the real one.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

import fastvae
from fastvae import random
from fastvae.models import ConvVAE
from fastvae.training import GraphError, MovingAverage, Training, train
from fastvae.training import steps as training_steps
from fastvae.training.data import Arrays, Batch, open_data
from fastvae.training.graphs import capture
from fastvae.training.steps import Steps, training_step
from listening import listener


def images(count, shape, dtype, device):
    values = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, device=device)
    return values if dtype is torch.uint8 else (values / 255).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 7, 5), (1, 1, 1), (2, 48, 47)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gather_batch(shape, dtype, memory_format, device, triton_backend):
    from fastvae.kernels.batch import gather_batch

    source = images(11, shape, dtype, device).contiguous(memory_format=memory_format)
    before = source.clone()
    indices = torch.tensor([10, 0, 3, 3, 7], device=device)
    batch = gather_batch(source, indices)
    expected = source[indices].double()
    expected = expected / 255 if dtype is torch.uint8 else expected
    assert batch.dtype is torch.float32
    assert batch.shape == expected.shape
    assert batch.is_contiguous(memory_format=memory_format)
    # Bytes are multiplied by a rounded 1 / 255: two roundings.
    assert (batch - expected).abs().max() <= (2 * 2**-24 if dtype is torch.uint8 else 0)
    assert torch.equal(source, before)


def test_gather_batch_of_a_slice_and_of_nothing(device, triton_backend):
    from fastvae.kernels.batch import gather_batch

    source = images(12, (1, 6, 5), torch.uint8, device)
    indices = torch.tensor([2, 5], device=device)
    assert torch.equal(gather_batch(source[::2], indices), gather_batch(source, 2 * indices))
    assert gather_batch(source, indices[:0]).shape == (0, 1, 6, 5)


def test_an_index_in_the_last_of_many_images(device, triton_backend):
    """Offsets are made in 64 bits: the row is far beyond what 32 hold, in a tensor whose rows overlap."""
    from fastvae.kernels.batch import gather_batch

    storage = torch.randint(0, 256, (64,), dtype=torch.uint8, device=device)
    source = storage.as_strided((2**31 + 3, 1, 1, 4), (0, 4, 4, 1))
    batch = gather_batch(source, torch.tensor([2**31 + 2], device=device))
    assert torch.allclose(batch.view(-1), storage[:4] / 255)


def make(device, graph: bool | str, count=7 * 12, batch_size=4, seed=1, images_on=None, **settings):
    torch.manual_seed(seed)
    model = ConvVAE((1, 8, 6), latent_dim=3, channels=(4, 6)).to(device)
    optimizer = Adam(model.parameters(), lr=0.01, fused=True, capturable=device.type == "cuda")
    data = torch.randint(0, 256, (count, 1, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)).to(
        images_on or device
    )
    graph = {False: "off", True: "auto"}.get(graph, graph)
    return Steps(model, optimizer, Arrays(Batch(data, data), batch_size), Training(graph=graph, **settings))


def epochs(steps, number):
    """The history of each epoch, and the sizes in which its steps ran."""
    histories, sizes = [], []
    for _ in range(number):
        steps.shuffle()
        done = 0
        while done < steps.count:
            sizes.append(steps.run(done))
            done += sizes[-1]
        histories.append(steps.history.clone())
    return torch.stack(histories), sizes


@pytest.fixture
def stand_in(monkeypatch):
    """What a CPU can have of a CUDA graph: nothing runs at capture, everything at each replay, with the betas that the
    optimizer had at capture.
    """
    replays = []

    def capture(run, device):
        (steps,) = [cell.cell_contents for cell in run.__closure__]
        (group,) = steps.optimizer.param_groups
        frozen = group["betas"]

        def replay():
            replays.append(frozen)
            held, group["betas"] = group["betas"], frozen
            run()
            group["betas"] = held

        return replay

    if not torch.cuda.is_available():
        monkeypatch.setattr(training_steps, "capture", capture)
        monkeypatch.setattr(training_steps, "on_side_stream", lambda run, device: run())
    return replays


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real graph draws other noise on some versions of torch")
@pytest.mark.parametrize("count", [21 * 4, 23 * 4, 26 * 4, 5 * 4])
def test_captured_steps_are_the_plain_steps(count, device, stand_in):
    plain, captured = (make(device, graph, count) for graph in (False, True))
    torch.manual_seed(3)
    expected, ones = epochs(plain, 3)
    torch.manual_seed(3)
    found, sizes = epochs(captured, 3)
    assert set(ones) == {1}
    assert sum(sizes) == sum(ones)
    assert torch.equal(found[..., :3], expected[..., :3])
    for a, b in zip(plain.model.parameters(), captured.model.parameters(), strict=True):
        assert torch.equal(a, b)
    if captured.at_a_time > 1:
        graphs = sum(size == captured.at_a_time for size in sizes)
        assert len(stand_in) == graphs - 1  # the first ones ran as they are


@pytest.mark.parametrize(("count", "at_a_time"), [(468, 13), (93, 13), (16, 16), (15, 15), (7, 1), (467, 15)])
def test_as_many_steps_per_graph_as_leave_few_over(count, at_a_time, device):
    steps = make(device, True, count=count, batch_size=1)
    assert steps.at_a_time == at_a_time
    assert make(device, False, count=count, batch_size=1).at_a_time == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real graph draws other noise on some versions of torch")
def test_captured_steps_with_every_option(device, stand_in):
    plain, captured = (make(device, graph, clip_norm=2.0, skip_nonfinite=True) for graph in (False, True))
    for steps in (plain, captured):
        steps.average = MovingAverage(steps.model, 0.9)
        torch.manual_seed(3)
        epochs(steps, 3)
    assert torch.equal(plain.history, captured.history) and (plain.history[:, -1] > 0).all()
    for a, b in zip(plain.average.model.parameters(), captured.average.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert plain.average.steps == captured.average.steps == 3 * plain.count


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real graph draws other noise on some versions of torch")
@pytest.mark.parametrize("graph", [False, True])
def test_images_that_are_brought_give_the_same_steps(graph, device, stand_in):
    """From another place in memory, a group of steps at a time, and the odd steps of an epoch's end."""
    resident, brought = (make(device, graph, count=23 * 4) for _ in range(2))
    block = torch.empty_like(brought.data.all.input[: len(brought._indices)])
    source = brought._source = Batch(block, block)
    for steps in (resident, brought):
        torch.manual_seed(3)
        epochs(steps, 2)
    assert brought._source is source and len(block) < brought.data.size
    assert torch.equal(resident.history, brought.history)


def from_a_stream(device, graph, data, batch_size=4, **settings):
    """Steps on what `open_data` makes of a Dataset or a DataLoader."""
    steps = make(device, graph)
    asked = None if isinstance(data, DataLoader) else batch_size
    settings = replace(steps.settings, batch_size=asked, **settings)
    stream = open_data("data", data, settings, steps.processes, lambda name, batch: None)
    return Steps(steps.model, steps.optimizer, stream, settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real graph draws other noise on some versions of torch")
@pytest.mark.parametrize("kind", ["Dataset", "DataLoader", "of two sizes"])
def test_captured_steps_of_a_stream_are_the_plain_steps(kind, device, stand_in):
    """And those on the tensor. Batches of another size run as they are, and so do all that would run with them."""
    data = make(device, False, count=21 * 4 + 3).data.all.input
    sizes = [4, 4, 4, 3, *[4] * 18]
    samplers = torch.arange(sum(sizes)).split(sizes)
    given = {
        "Dataset": TensorDataset(data),
        "DataLoader": DataLoader(data, 4, drop_last=True, generator=torch.Generator()),
        "of two sizes": DataLoader(data, batch_sampler=[it.tolist() for it in samplers], generator=torch.Generator()),
    }[kind]
    plain, captured = (from_a_stream(device, graph, given) for graph in (False, True))
    if kind == "of two sizes":  # it says no batch size, so that train would run it without a graph
        captured._samples, captured._indices = 4, torch.empty(4 * captured.at_a_time, dtype=torch.int64, device=device)
    resident = make(device, False, count=21 * 4 + 3)
    histories = []
    for steps in (plain, captured, resident):
        torch.manual_seed(3)
        histories.append(epochs(steps, 3)[0][..., :3])
    assert torch.equal(histories[0], histories[1])
    assert torch.equal(histories[0], histories[2]) is (kind == "Dataset")
    groups = 3 * (captured.count // captured.at_a_time)
    assert captured.at_a_time > 1
    assert len(stand_in) == groups - (4 if kind == "of two sizes" else 1)  # of each epoch the first group was odd


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("kind", ["Dataset", "DataLoader"])
def test_a_stream_gives_the_same_steps_on_a_gpu(kind, pinned, device):
    """With a graph; what is loaded is what is trained on."""
    data = images(128 * 23, (1, 8, 6), torch.uint8, torch.device("cpu"))
    loader = DataLoader(data, 128, drop_last=True, pin_memory=pinned, generator=torch.Generator())
    given = TensorDataset(data) if kind == "Dataset" else loader
    plain, captured = (from_a_stream(device, graph, given, 128) for graph in (False, True))
    losses = []
    for steps in (plain, captured):
        torch.manual_seed(3)
        losses.append(epochs(steps, 4)[0][-1, :, :3].mean(0))
        steps.release()
    assert captured._source is not None and captured._source.input.is_cuda
    assert torch.allclose(*losses, rtol=0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_images_on_the_cpu_give_the_same_steps(graph, device):
    resident = make(device, graph, count=128 * 23, batch_size=128)
    brought = make(device, graph, count=128 * 23, batch_size=128, images_on="cpu")
    for steps in (resident, brought):
        torch.manual_seed(3)
        epochs(steps, 2)
    assert brought._source.input.is_cuda and not brought.data.all.input.is_cuda
    assert torch.equal(resident.history, brought.history)


def test_the_gradients_norms_cost_a_graph_nothing_unless_they_are_needed(device, stand_in):
    captured, clipped = make(device, True), make(device, True, clip_norm=1.0)
    for steps in (captured, clipped):
        epochs(steps, 1)
    assert not captured.history[:, 3:].any() and clipped.history[:, 3:].any(1).all()


def test_free_bits_in_steps(device):
    """Few change nothing; with many, each of the 3 dimensions counts as so many, and training goes another way."""
    plain, some, many = (make(device, False, count=8 * 4, free_bits=bits) for bits in (0.0, 1e-6, 7.0))
    for steps in (plain, some, many):
        torch.manual_seed(3)
        epochs(steps, 1)
    assert torch.allclose(some.history[:, :3], plain.history[:, :3], rtol=1e-4)
    assert torch.allclose(many.history[:, 2], torch.full((8,), 21.0, device=device))
    assert not torch.allclose(many.history[1:, 1], plain.history[1:, 1], rtol=1e-4)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_what_is_frozen_takes_no_gradient(part, device):
    """With a frozen encoder the divergence requires no gradient at all."""
    model = ConvVAE((1, 8, 6), latent_dim=3, channels=(4, 6)).to(device)
    frozen = set(getattr(model, part).requires_grad_(False).parameters())
    optimizer = Adam(model.parameters(), lr=0.01)
    training_step(model, optimizer, images(4, (1, 8, 6), torch.uint8, device))
    assert all((parameter.grad is None) == (parameter in frozen) for parameter in model.parameters())


def fails_in_a_capture(run, device):
    raise ValueError("this read from the device")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the failure is planted in a stand-in")
@pytest.mark.parametrize(
    ("capture", "cause"),
    [
        (fails_in_a_capture, "ValueError: this read from the device"),
        (lambda run, device: lambda: None, "RuntimeError: the captured graph is empty"),
    ],
)
def test_training_goes_on_where_capture_fails(capture, cause, device, stand_in, monkeypatch):
    """With the steps it would have had, and the first cause; unless a graph was asked for."""
    plain, captured, demanded = make(device, False), make(device, True), make(device, "on")
    torch.manual_seed(3)
    expected, _ = epochs(plain, 2)
    monkeypatch.setattr(training_steps, "capture", capture)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match=f"goes on without a CUDA graph.*: {cause}"):
        found, _ = epochs(captured, 2)
    assert torch.equal(found[..., :3], expected[..., :3])
    try:
        raise KeyError("of the program that trains once more")
    except KeyError:
        with pytest.raises(GraphError, match=f"capture of a CUDA graph failed: {cause}"):
            epochs(demanded, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real graph draws other noise on some versions of torch")
def test_numbers_that_a_schedule_moves_are_captured_again(device, stand_in):
    """OneCycleLR and CyclicLR give the optimizer other betas at every step."""
    plain, captured = (make(device, graph) for graph in (False, True))
    for steps in (plain, captured):
        schedule = torch.optim.lr_scheduler.OneCycleLR(steps.optimizer, max_lr=0.01, total_steps=4)
        torch.manual_seed(3)
        for _ in range(3):
            epochs(steps, 1)
            schedule.step()
    assert len(set(stand_in)) == 3
    for a, b in zip(plain.model.parameters(), captured.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_steps_before_a_capture_use_what_the_graph_uses(device, stand_in, monkeypatch):
    """The same buffers, whose alignment a kernel is compiled for, and the same draw of a seed."""
    taken = []

    def take(steps, indices, found):
        taken.append((indices.data_ptr(), found.data_ptr(), random._wanted_by_pointer))

    monkeypatch.setattr(Steps, "_take", take)
    steps = make(device, True, count=14 * 3 + 1, batch_size=3)
    epochs(steps, 1)
    assert taken[0] == (steps._indices.data_ptr(), steps._found.data_ptr(), True)
    assert not random._wanted_by_pointer


CUDA = torch.device("cuda", 0)


class Machine:
    """Stands in for torch.cuda: two devices, of which the first one captured before, and what a failed capture leaves
    in torch 2.11.
    """

    def __init__(self, monkeypatch, fails=None):
        self.fails, self.closed, self.released, self.replays = fails, [], [], 0
        self.streams, self.captured_on, self.generators = [], [], []
        cuda = torch.cuda
        for number in range(2):
            self.generators.append(SimpleNamespace(device=torch.device("cuda", number), state="before"))
            self.generators[-1].clone_state = lambda it=self.generators[-1]: ("clone of", it.state)
            self.generators[-1].graphsafe_set_state = lambda state, it=self.generators[-1]: setattr(it, "state", state)
        monkeypatch.setattr(cuda, "default_generators", self.generators)
        monkeypatch.setattr(cuda, "graph_pool_handle", lambda: (0, 7))
        monkeypatch.setattr(cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
        monkeypatch.setattr(cuda, "Stream", lambda device=CUDA: SimpleNamespace(device=device))
        monkeypatch.setattr(cuda, "current_stream", lambda device: SimpleNamespace(device=device))
        monkeypatch.setattr(cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(cuda, "graph", self.graph)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *it: self.closed.append(it), raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *it: self.released.append(it), raising=False)

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream=None, capture_error_mode):
        device = CUDA if stream is None else stream.device
        self.captured_on.append(device)
        self.generators[device.index].state = "capturing"
        try:
            yield
        finally:
            if self.fails is not None:
                raise self.fails
            self.generators[device.index].state = "after"


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for torch.cuda")
def test_a_capture_is_on_the_models_device(monkeypatch):
    machine = Machine(monkeypatch)
    assert capture(lambda: None, torch.device("cuda", 1)) == "replay"
    assert machine.captured_on == [torch.device("cuda", 1)]
    assert machine.generators[1].state == "after" and not machine.released


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for torch.cuda")
def test_a_failed_capture_leaves_generator_and_memory_as_they_were(monkeypatch):
    machine = Machine(monkeypatch, fails=RuntimeError("previous error during capture"))
    with pytest.raises(RuntimeError, match="previous error"):
        capture(lambda: None, torch.device("cuda", 1))
    assert [it.state for it in machine.generators] == ["before", ("clone of", "before")]
    assert machine.closed == machine.released == [(1, (0, 7))]


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for torch.cuda")
def test_what_broke_a_capture_is_raised_and_not_what_its_end_raises(monkeypatch):
    """The end of a capture that was broken raises too. What was handled on the way is no cause."""
    Machine(monkeypatch, fails=RuntimeError("previous error during capture"))

    def broken():
        try:
            raise KeyError("handled")
        except KeyError:
            raise ValueError("this read from the device")  # noqa: B904

    with pytest.raises(ValueError, match="this read from the device"):
        training_steps.capture(broken, torch.device("cuda", 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for torch.cuda")
def test_memory_of_a_capture_that_ended_is_the_graphs_to_release(monkeypatch):
    """The pool is closed then, and closing it once more is an error."""
    machine = Machine(monkeypatch, fails=RuntimeError("of what was captured"))

    def closed(*arguments):
        raise RuntimeError("not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", closed, raising=False)
    with pytest.raises(RuntimeError, match="of what was captured"):
        capture(lambda: None, torch.device("cuda", 1))
    assert not machine.released


def test_every_epoch_shuffles_anew(device):
    steps = make(device, False)
    steps.shuffle()
    first = steps.order.clone()
    steps.shuffle()
    assert not torch.equal(first, steps.order)


def test_graph_on_needs_a_cuda_device():
    data = torch.zeros(8, 1, 8, 6, dtype=torch.uint8)
    model = ConvVAE((1, 8, 6), latent_dim=3, channels=(4, 6))
    with pytest.raises(ValueError, match='graph="on" needs a CUDA device, got cpu'):
        train(model, data, data, Training(epochs=1, batch_size=4, graph="on"))
    with pytest.raises(ValueError, match="graph must be"):
        train(model, data, data, Training(epochs=1, batch_size=4, graph="yes"))


# ---------------------------------------------------------------------------------------------------------- on a GPU


def small():
    torch.manual_seed(0)
    return ConvVAE((1, 8, 6), latent_dim=3, channels=(4, 6))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_real_graph_trains(backend, device):
    """It trains as plain steps do, repeats from a seed bit for bit, and draws new noise at every step."""
    with fastvae.use_backend(backend):
        results = []
        for graph, seed in ((False, 3), (True, 3), (True, 3), (True, 4)):
            steps = make(device, graph, count=128 * 26, batch_size=128)
            torch.manual_seed(seed)
            results.append(epochs(steps, 4)[0][..., :3])
            steps.release()
    plain, first, again, other = results
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.isfinite(first).all()
    assert torch.allclose(first[-1].mean(0), plain[-1].mean(0), rtol=0.03)


@pytest.mark.gpu
def test_beta_changes_between_replays(device):
    with fastvae.use_backend("triton"):
        steps = make(device, True)
        epochs(steps, 1)
        steps.beta.fill_(0.0)
        history, _ = epochs(steps, 1)
    assert torch.equal(history[0, :, 0], history[0, :, 1])


@pytest.mark.gpu
def test_a_real_graph_with_every_option(device):
    """The rate that the graph takes is the scheduler's, and steps that are not finite are skipped in it."""
    steps = make(device, True, count=128 * 26, batch_size=128, clip_norm=1.0, skip_nonfinite=True)
    steps.average = MovingAverage(steps.model, 0.9)
    rate = steps.optimizer.param_groups[0]["lr"] = torch.tensor(0.01, device=device)
    epochs(steps, 2)
    assert steps.average.steps == 52
    before = [parameter.detach().clone() for parameter in steps.model.parameters()]
    rate.zero_()
    history, _ = epochs(steps, 1)
    assert all(map(torch.equal, before, steps.model.parameters()))
    assert (history[0, :, -1] > 0).all()
    rate.fill_(0.01)
    steps.beta.fill_(float("nan"))
    history, _ = epochs(steps, 1)
    assert all(map(torch.equal, before, steps.model.parameters()))
    assert history.isnan().any(2).all()
    steps.beta.fill_(1.0)
    epochs(steps, 1)
    assert not all(map(torch.equal, before, steps.model.parameters()))
    steps.release()


@pytest.mark.gpu
def test_a_schedule_on_a_gpu_goes_on(device):
    """The rate is a tensor there, and stays the one that the graph reads."""
    data = images(640, (1, 8, 6), torch.uint8, device)

    def schedule(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)

    kept = []
    model = small().to(device)
    settings = Training(epochs=4, batch_size=32, graph="on", schedule=schedule)
    whole = train(small().to(device), data, data[:64], settings)
    train(model, data, data[:64], replace(settings, epochs=2), listeners=[listener(state=kept.append)])
    parts = train(model, data, data[:64], settings, resume=kept[-1])
    assert [row.learning_rate for row in parts] == [row.learning_rate for row in whole]
    assert len({row.learning_rate for row in parts}) == 4


@pytest.mark.gpu
def test_train_with_a_graph(device):
    data = torch.randint(0, 256, (640, 1, 8, 6), dtype=torch.uint8, device=device)
    model = ConvVAE((1, 8, 6), latent_dim=3, channels=(4, 6)).to(device)
    rows = train(model, data, data[:64], Training(epochs=3, batch_size=32, graph="on"))
    assert rows[-1].step == 60
    assert rows[-1].loss < rows[0].loss
