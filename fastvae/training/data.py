"""What training takes its batches from: tensors in memory, a Dataset or a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastvae.evaluation import Batch
from fastvae.training.distributed import Processes
from fastvae.training.settings import DEFAULT_BATCH_SIZE, Training

# What `train` takes, as an error says it.
EXPECTED = "a tensor [N, ...], a tuple of them, a torch.utils.data.Dataset or a DataLoader"
Data: TypeAlias = "Tensor | Sequence[Tensor] | Dataset[Any] | DataLoader[Any]"
_END = object()


def mapped(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """The function of each tensor; once of one that is both input and target."""
    given = function(batch.input)
    target = given if batch.target is batch.input else function(batch.target)
    return Batch(given, target, None if batch.condition is None else function(batch.condition))


def tensors(batch: Batch) -> list[Tensor]:
    """Each once."""
    found = [batch.input] if batch.target is batch.input else [batch.input, batch.target]
    return found if batch.condition is None else [*found, batch.condition]


def formatted(value: Tensor) -> Tensor:
    """In the channels_last format where there are four dimensions, else one after the other."""
    return value.contiguous(memory_format=torch.channels_last if value.ndim == 4 else torch.contiguous_format)


def to_channels_last(model: nn.Module) -> None:
    """Convert a model to that memory format, unless it has weights of volumes, whose format is another."""
    if all(value.ndim != 5 for value in model.state_dict().values()):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def as_batch(name: str, item: object, parts: Sequence[str | None] | None) -> Batch:
    """A tensor, or a tuple whose parts have these names, as a batch. Raises ``TypeError`` or ``ValueError``."""
    given = [item] if isinstance(item, Tensor) else item
    if not isinstance(given, tuple | list) or not all(isinstance(it, Tensor) for it in given):
        raise TypeError(f"{name} must give tensors, or tuples of them, got {_kinds(item)}")
    if parts is None and len(given) == 1:
        parts = ("input",)
    if parts is None:
        raise ValueError(
            f"{name} gives {len(given)} tensors for each sample: Training(parts=...) must say what they are, "
            'for two ("input", "target"), ("input", "condition"), or ("input", None), which leaves the second out'
        )
    if len(parts) != len(given):
        raise ValueError(f"{name} must give a tensor for each of parts={tuple(parts)}, got {len(given)}")
    named = dict(zip(parts, given, strict=True))
    return Batch(named["input"], named.get("target", named["input"]), named.get("condition"))


class Arrays:
    """Batches of tensors in memory, in an order that the training draws.

    all: [N, ...]. size: N. batch_size, count: the samples of a step of all processes, and the steps of an epoch.
    """

    ordered = True
    varying = None

    def __init__(self, samples: Batch, batch_size: int) -> None:
        self.all, self.batch_size = samples, batch_size
        self.size = len(samples.input)
        self.count = self.size // batch_size

    def whole(self) -> Iterator[Batch]:
        """All batches once, the last partial one too, for a test."""
        for first in range(0, self.size, self.batch_size):
            yield mapped(self.all, itemgetter(slice(first, first + self.batch_size)))


class Reader:
    """Makes batches of what a loader gives, and looks at the first of them."""

    def __init__(self, name: str, parts: Sequence[str | None] | None, look: Callable[[str, Batch], None]) -> None:
        self.name, self.parts = name, parts
        self._look: Callable[[str, Batch], None] | None = look

    def read(self, item: object) -> Batch:
        batch = as_batch(self.name, item, self.parts)
        if self._look is not None:
            self._look(self.name, batch)
            self._look = None
        return batch


class Whole:
    """All batches of a Dataset or a DataLoader, the last partial one too, for a test."""

    def __init__(self, reader: Reader, data: Any, batch_size: int) -> None:
        self.reader = reader
        self.loader: Any = data if isinstance(data, DataLoader) else DataLoader(data, batch_size)

    def whole(self) -> Iterator[Batch]:
        """Each once."""
        return map(self.reader.read, self.loader)


class Stream:
    """Batches that a DataLoader makes, on the CPU: one that was given, or one that goes through a Dataset in an order
    that the training draws.

    size: how many samples there are, None where that is not known. batch_size: as in `Arrays`; None where the loader
    does not say. varying: in words why its batches may differ in size; None where they do not.
    """

    def __init__(self, reader: Reader, data: Any, settings: Training, processes: Processes) -> None:
        self.reader, self.data, self.settings, self.processes = reader, data, settings, processes
        self.dataset = data.dataset if isinstance(data, DataLoader) else data
        self.size = _length(self.dataset)
        self.ordered = not isinstance(data, DataLoader) and not isinstance(data, IterableDataset)
        self.batch_size = self._batch_size()
        self.count = self._count()
        self.varying = self._varying()
        self._iterator: Iterator[object] | None = None

    def _batch_size(self) -> int | None:
        asked, processes = self.settings.batch_size, self.processes.size
        if not isinstance(self.data, DataLoader):
            return asked or DEFAULT_BATCH_SIZE
        own = self.data.batch_size
        if asked is not None and (own is None or asked != own * processes):
            raise ValueError(
                f"batch_size must be left out where a DataLoader makes the batches, of {own} samples, got {asked}"
            )
        return None if own is None else own * processes

    def _count(self) -> int:
        asked = self.settings.steps_per_epoch
        if self.ordered:
            assert self.size is not None and self.batch_size is not None
            return self.size // self.batch_size
        if asked is not None:
            return asked
        count = _length(self.data) if isinstance(self.data, DataLoader) else None
        if count is None and self.size is not None and self.batch_size is not None:
            count = self.size // self.batch_size
        if count is None:
            raise ValueError(
                f"{self.reader.name} has no length: Training(steps_per_epoch=...) must say how long an epoch is"
            )
        return count

    def _varying(self) -> str | None:
        if not isinstance(self.data, DataLoader) or self.data.drop_last:
            return None
        if self.data.batch_size is not None and self.size is not None and self.size % self.data.batch_size == 0:
            return None
        return "the last batch may be smaller (DataLoader(drop_last=True) leaves it out)"

    def begin(self, order: Tensor, done: int = 0) -> None:
        """Begin an epoch, of which so many steps are done. A stream without a length goes on where it is."""
        if self.ordered:
            assert self.batch_size is not None
            batches = torch.split(order[: self.count * self.batch_size], self.batch_size)[done:]
            chosen = (self.processes.part(batch).tolist() for batch in batches)
            # A generator of its own: a loader draws a seed when it begins, which would be other noise for the steps.
            loader: Any = DataLoader(self.dataset, batch_sampler=chosen, generator=torch.Generator())
            self._iterator = iter(loader)
        elif self._iterator is None or self.settings.steps_per_epoch is None:
            self._iterator = iter(self._loader())

    def _loader(self) -> Any:
        if isinstance(self.data, DataLoader):
            return self.data
        assert self.batch_size is not None
        return DataLoader(self.dataset, self.batch_size // self.processes.size, drop_last=True)

    def next(self) -> Batch:
        """The batch of this process's next step; a loader that has come to its end begins again.

        Raises ``ValueError`` for one that gives none.
        """
        assert self._iterator is not None
        item = next(self._iterator, _END)
        if item is _END:
            self._iterator = iter(self._loader())
            item = next(self._iterator, _END)
        if item is _END:
            raise ValueError(f"{self.reader.name} must give at least one batch, got none")
        return self.reader.read(item)

    def end(self) -> None:
        """Let go of the loader's workers."""
        self._iterator = None


def open_data(
    name: str, data: object, settings: Training, processes: Processes, look: Callable[[str, Batch], None]
) -> Arrays | Stream:
    """What batches of these data are taken from; `look` looks at all samples, or at the first batch.

    Raises ``TypeError`` or ``ValueError`` for what is no data, or not enough.
    """
    if isinstance(data, DataLoader | Dataset):
        return Stream(Reader(name, settings.parts, look), data, settings, processes)
    return _arrays(name, data, settings, look)


def open_test(name: str, data: object, settings: Training, look: Callable[[str, Batch], None]) -> Arrays | Whole:
    """The same for data that are gone through once. A DataLoader has batches of its own size."""
    if isinstance(data, DataLoader | Dataset):
        return Whole(Reader(name, settings.parts, look), data, settings.batch_size or DEFAULT_BATCH_SIZE)
    return _arrays(name, data, settings, look)


def _arrays(name: str, data: object, settings: Training, look: Callable[[str, Batch], None]) -> Arrays:
    if not isinstance(data, Tensor) and not isinstance(data, tuple | list):
        raise TypeError(f"{name} must be {EXPECTED}, got {_kinds(data)}")
    samples = as_batch(name, data, settings.parts)
    lengths = [len(part) if part.ndim else 0 for part in tensors(samples)]
    if 0 in lengths:
        raise ValueError(f"{name} must hold at least one sample, got none")
    if len(set(lengths)) > 1:
        raise ValueError(f"{name} must hold tensors of as many samples, got {lengths}")
    look(name, samples)
    return Arrays(samples, settings.batch_size or DEFAULT_BATCH_SIZE)


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _kinds(value: object) -> str:
    """The type of a value, and of what is in a tuple."""
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {', '.join(_kinds(item) for item in value)}"
    kind = type(value)
    return "None" if value is None else f"{kind.__module__}.{kind.__qualname__}"
