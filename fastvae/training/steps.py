"""The steps of an epoch: one after the other, or on a CUDA device several at a time as one captured graph."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastvae import random
from fastvae.backend import backend_for
from fastvae.evaluation import Batch
from fastvae.models import VAE
from fastvae.training.average import MovingAverage
from fastvae.training.data import Arrays, Stream, formatted, mapped, tensors
from fastvae.training.distributed import Processes
from fastvae.training.graphs import GraphError, capture, on_side_stream
from fastvae.training.settings import DEFAULT_SAMPLES, Training
from fastvae.training.step import training_step

# A replay costs the host one launch, and the device two fills of the generator's state and two copies, whatever the
# number of steps. Of these numbers the one is taken that leaves the fewest steps of an epoch over: 13 divides MNIST's
# 468. Not yet measured on a GPU.
_STEPS_PER_GRAPH = range(16, 7, -1)


class Steps:
    """The steps of an epoch on shuffled data.

    With a graph, the first steps run as they are, for nothing may be compiled or allocated for the first time while a
    graph is captured; the next ones are captured, and from then on replayed. What changes between replays lies in
    tensors that the graph reads: which samples, beta, and the state of the generator. Other numbers of the optimizer,
    like the betas that some schedules move, are part of the graph: it is captured again when one of them has changed.
    The model's device must be the current one.

    settings: graph "auto": without a graph from where a capture fails, which is a warning; "on": a capture that fails
    raises `GraphError`.

    Data on the CPU, for a model that is elsewhere, are brought there as many as run at a time. Of a stream, batches of
    another shape than the first run as they are.

    beta: the weight of the divergence, which may be written to. order: [N], the samples of this epoch, on the data's
    device; empty where a DataLoader orders them. history: [steps, 3 + P], of each of its steps the loss, reconstruction
    and kl, and the norms of the gradients of the P parameters before they are clipped, on the model's device. (In a
    graph these norms are 0, unless they are needed: they would be more nodes in each step.)
    """

    def __init__(
        self,
        model: VAE,
        optimizer: Optimizer,
        data: Arrays | Stream,
        settings: Training,
        *,
        average: MovingAverage | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.model, self.optimizer, self.settings, self.average = model, optimizer, settings, average
        self.data, self.count = data, data.count
        self.device = device = next(model.parameters()).device
        self.beta = torch.tensor(settings.beta, device=device)
        self.processes = Processes(device) if processes is None else processes
        self._graph = graph = settings.graph
        self._norms = graph == "off" or settings.clip_norm is not None or settings.skip_nonfinite
        self._model = self.processes.wrap(model)
        self.at_a_time = 1
        if graph != "off":
            self.at_a_time = min(
                (k for k in _STEPS_PER_GRAPH if k <= self.count), key=lambda k: self.count % k, default=1
            )
        columns = 3 + sum(parameter.requires_grad for parameter in model.parameters())
        self.history = torch.zeros(self.count, columns, device=device)
        self.order = torch.empty(0, dtype=torch.int64, device=self.data_device)
        # The samples of one step of this process, and of those that run at a time.
        self._samples = 0 if data.batch_size is None else data.batch_size // self.processes.size
        block = self.at_a_time * self._samples
        # What the graph reads and writes; plain steps use order and history themselves.
        self._indices = torch.empty(block, dtype=torch.int64, device=device)
        self._found = torch.zeros(self.at_a_time, columns, device=device)
        # The samples that the steps take from: all, or those that were brought for these steps. None: made when the
        # first batches of a stream come.
        self._source: Batch | None = None
        if isinstance(data, Arrays):
            self._source = data.all
            if self.data_device != device:
                self._source = mapped(data.all, lambda part: formatted(part[:block].to(device)))
        self._copied = [torch.cuda.Event() for _ in range(2 * (device.type == "cuda"))]  # type: ignore[no-untyped-call]
        self._in_float32 = next(model.parameters()).dtype is torch.float32
        self._warm = False
        self._replay: Callable[[], None] | None = None
        self._captured_numbers: list[dict[str, Any]] = []  # of the optimizer, as they are in the graph

    @property
    def data_device(self) -> torch.device:
        """Where the data are; the CPU of what is loaded."""
        return self.data.all.input.device if isinstance(self.data, Arrays) else torch.device("cpu")

    def shuffle(self) -> None:
        """Begin an epoch."""
        if self.data.ordered:
            self.order = torch.randperm(self.data.size or 0, device=self.device).to(self.data_device)
        self.go_on(0)

    def go_on(self, done: int) -> None:
        """Begin an epoch, of which so many steps are done, in the order that it has."""
        if isinstance(self.data, Stream):
            self.data.begin(self.order, done)

    def run(self, first: int) -> int:
        """Run the epoch's steps from number `first`, as many as run at a time; returns how many."""
        count = self.at_a_time if first + self.at_a_time <= self.count else 1
        found = self.history[first : first + count]
        plain = self._graph == "off" or count < self.at_a_time
        if isinstance(self.data, Stream):
            batches = [self.data.next() for _ in range(count)]
            if plain or not self._fit(batches):
                for row, batch in zip(found, batches, strict=True):
                    self._step(mapped(batch, lambda part: part.to(self.device, non_blocking=True)), row)
                return count
            indices = self._bring(batches)
        else:
            size = self.data.batch_size
            indices = self.order[first * size : (first + count) * size]
            if self._source is not self.data.all:
                chosen = self.processes.part(indices)  # several processes run one step at a time
                indices = self._bring([mapped(self.data.all, lambda part: part[chosen])])
        if plain:
            self._take(indices, found)
            return count
        # The steps before a capture use what the graph will use, so that every kernel that runs under capture is
        # compiled and loaded before: Triton compiles for the alignment of a tensor, and torch draws the seed with its
        # own kernel.
        self._indices.copy_(indices)
        if not self._warm:
            with random.by_pointer():
                on_side_stream(lambda: self._take(self._indices, self._found), self.device)
            self._warm = True
        elif not self._replayed():
            self._take(self._indices, self._found)
        found.copy_(self._found)
        return count

    def release(self) -> None:
        """Give the graph's memory back, the gradients in it included, and end what loads data."""
        self._forget()
        if isinstance(self.data, Stream):
            self.data.end()

    def _forget(self) -> None:
        """The graph, and the gradients in it."""
        self._replay = None
        self.optimizer.zero_grad()

    def _fit(self, batches: list[Batch]) -> bool:
        """Whether all batches of a stream have the shapes and dtypes that the graph reads: those of the first ones."""
        if self._source is None and len(batches[0].input) == self._samples:
            self._source = mapped(
                batches[0],
                lambda part: formatted(part.new_empty(len(self._indices), *part.shape[1:], device=self.device)),
            )
        return self._source is not None and all(
            len(batch.input) == self._samples
            and [(part.shape[1:], part.dtype) for part in tensors(batch)]
            == [(part.shape[1:], part.dtype) for part in tensors(self._source)]
            for batch in batches
        )

    def _bring(self, batches: list[Batch]) -> Tensor:
        """Bring samples to the device, one batch behind the other; returns where they now are in `_source`."""
        assert self._source is not None
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            # Pinned, so that the copy does not wait for the steps that are queued; but the host waits for the copy
            # before the last one, so that no more than two of these blocks are held.
            self._copied[0].synchronize()
        first = 0
        for batch in batches:
            last = first + len(batch.input)
            for place, part in zip(tensors(self._source), tensors(batch), strict=True):
                if on_cuda and part.device.type == "cpu" and not part.is_pinned():
                    part = part.pin_memory()
                place[first:last].copy_(part, non_blocking=True)
            first = last
        if on_cuda:
            self._copied[0].record()
            self._copied.reverse()
        return torch.arange(first, device=self.device)

    def _take(self, indices: Tensor, found: Tensor) -> None:
        """A step for each row of `found`."""
        resident = isinstance(self.data, Arrays) and self._source is self.data.all
        size = self.data.batch_size if resident else self._samples
        assert size is not None
        for row, chosen in zip(found, torch.split(indices, size), strict=True):
            self._step(self._gathered(self.processes.part(chosen) if resident else chosen), row)

    def _step(self, batch: Batch, row: Tensor) -> None:
        """A step on a batch that is on the device; `row` takes what `history` holds of it."""
        batch = mapped(batch, formatted)
        values = training_step(
            self._model,
            self.optimizer,
            batch.input,
            beta=self.beta,
            autocast_dtype=self.settings.autocast_dtype,
            clip_norm=self.settings.clip_norm,
            skip_nonfinite=self.settings.skip_nonfinite,
            gradient_norms=row[3:] if self._norms else None,
            batch_offset=self.processes.offset(len(batch.input)),
            free_bits=self.settings.free_bits,
            target=batch.target,
            condition=batch.condition,
            objective=self.settings.objective,
            samples=self.settings.samples or DEFAULT_SAMPLES,
            dataset_size=self.data.size or 0,
        )
        torch.stack(values, out=row[:3])
        if self.average is not None:
            self.average.update(self.model)

    def _gathered(self, indices: Tensor) -> Batch:
        """These samples of `_source`."""
        source = self._source
        assert source is not None
        # The kernel reads bytes as t / 255, and writes float32. Other likelihoods than those of such targets read bytes
        # as they are, and so does a model of another dtype, which converts them itself.
        of_bytes = source.target is source.input and source.input.dtype is torch.uint8
        as_they_are = (of_bytes and self.model.likelihood.target != "unit") or not self._in_float32
        if backend_for(source.input).name != "triton" or as_they_are:
            return mapped(source, lambda part: part[indices])
        from fastvae.kernels.batch import gather_batch

        given: Tensor = gather_batch(source.input, indices)
        target = given if source.target is source.input else source.target[indices]
        return Batch(given, target, None if source.condition is None else source.condition[indices])

    def _replayed(self) -> bool:
        """Run the steps as a graph, which is captured first if there is none with the optimizer's numbers of now.

        False where the capture failed: nothing has run, and nothing will be captured any more.
        """
        numbers = _numbers(self.optimizer)
        if self._replay is not None and _same(numbers, self._captured_numbers):
            self._replay()
            return True
        self._forget()  # so that the gradients are allocated in the graph
        try:
            replay = capture(lambda: self._take(self._indices, self._found), self.device)
            # A graph without work is no error to CUDA. No step has this reconstruction.
            self._found[:, 1] = -math.inf
            replay()
            if self._found[:, 1].isneginf().any():
                raise RuntimeError("the captured graph is empty")
        except Exception as error:
            self._forget()
            cause = f"{type(error).__name__}: {error}"
            if self._graph == "on":
                raise GraphError(f"the capture of a CUDA graph failed: {cause}") from error
            warnings.warn(f"training goes on without a CUDA graph, whose capture failed: {cause}", stacklevel=3)
            self._graph = "off"
            return False
        self._replay, self._captured_numbers = replay, numbers
        return True


def _numbers(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Of each group all but its parameters."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def _same(numbers: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """A tensor is the same if it is that tensor, because a graph reads what is in it."""
    return all(
        value is other[name] if isinstance(value, Tensor) else value == other[name]
        for group, other in zip(numbers, others, strict=True)
        for name, value in group.items()
    )
