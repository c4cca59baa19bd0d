"""The settings of a training, which check themselves, and which flags are made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau

from fastvae.kinds import NON_NEGATIVE_NUMBER, POSITIVE_INTEGER, POSITIVE_NUMBER, Kind
from fastvae.training.precision import PRECISIONS

DEFAULT_BATCH_SIZE = 128  # of the reference example
DEFAULT_SAMPLES = 8  # of "iwae" and "dreg"

SAMPLED = ("iwae", "dreg")  # the objectives of several samples of a posterior
COMPARING = ("beta-tc", "mmd")  # those that compare the samples of a batch, of which there must be two
PARTS = ("input", "target", "condition")

_NORM = Kind("a positive number", float, lambda value: value > 0)  # of inf the norms are computed, and nothing is cut


class Setting(NamedTuple):
    """What is known of a field of a dataclass of settings.

    help: of its flag; without one it has no flag. kind, choices: what it must be. read: from a flag's text. flag: its
    name, where it is not the field's. metavar: what a help calls the value. several: whether the flag takes more than
    one value. exact: whether a run that goes on must have it as it was; None where it is no setting of what is trained,
    so that a run that goes on takes its own.
    """

    help: str | None = None
    kind: Kind | None = None
    choices: Sequence[str] | None = None
    read: Callable[[str], Any] | None = None
    flag: str | None = None
    metavar: str | None = None
    several: bool = False
    exact: bool | None = None


def setting(default: Any, help: str | None = None, **known: Any) -> Any:
    """A field with this default; the other arguments are those of `Setting`."""
    return dataclasses.field(default=default, metadata={"setting": Setting(help, **known)})


def settings_of(settings: Any) -> list[tuple[str, Setting]]:
    """The names of a dataclass' fields, and what is known of each."""
    return [(field.name, field.metadata["setting"]) for field in dataclasses.fields(settings)]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How `fastvae.training.train` trains.

    Args:
        epochs: how often all training data are gone through.
        batch_size: samples of a step, of all processes together; None: 128, or those of a DataLoader.
        learning_rate: Adam's.
        objective: what is minimised, see docs/objectives.md. "elbo": reconstruction + beta divergence. "beta-tc":
            reconstruction + mutual information + beta total correlation + divergence of each dimension. "mmd":
            reconstruction + a discrepancy between all samples and the prior. "iwae", "dreg": the negative bound of
            several samples, by two estimators of its gradient. The test loss is the same of the test data.
        samples: S of "iwae" and "dreg"; None: 8.
        beta: the weight of the divergence; of the total correlation or the discrepancy where the objective has it. 1
            for "iwae" and "dreg", whose bound has none.
        kl_warmup: the epochs, whole or not, in which that weight grows from 0 to beta in equal steps (Bowman et al.,
            "Generating Sentences from a Continuous Space", 2016); the steps of one graph share a weight. The test loss
            has beta from the start. More epochs than there are is a warning.
        free_bits: nats that each dimension of z may hold, in the mean over a batch, before its divergence counts
            (`fastvae.functional.gaussian_kl`); of several processes each has its own mean. The test loss has none. For
            "elbo" alone, of a model without a prior of its own.
        schedule: of the learning rate, a step after each epoch: "constant"; "cosine", to 0 over the epochs; "plateau",
            a tenth of it after 10 epochs without a better test loss; or a function that makes one of
            torch.optim.lr_scheduler's schedulers of an optimizer. A run that goes on has the one it was made with.
        clip_norm: the largest norm of all gradients together; larger ones are scaled to it.
        patience: training ends once so many epochs have passed without a smaller test loss.
        skip_nonfinite: a step whose gradient is not finite changes nothing and is counted (`EpochMetrics.skipped`).
        precision: of convolutions and matrix products, "fp32"; "tf32", where the hardware has it; or "bf16", by
            autocast. Weights and losses are float32 with each.
        graph: "on": several steps run as one CUDA graph, which only a CUDA device can; "off"; "auto": where it can, and
            where the capture fails a warning. The model must then do the same work at every step, without reading from
            the device.
        threads: of a CPU's steps; None: those with which a step takes the least time (`choose_threads`), or in a run
            that goes on those that it had. Of several processes each has those that torch has.

        parts: what each sample of the data holds, where that is more than one tensor: ("input", "target"), ("input",
            "condition") or all three, in the order of the data; None for a tensor that is left out.
        steps_per_epoch: of a stream, which has no length, or of a DataLoader.

    Raises:
        TypeError: what is no number, or no bool.
        ValueError: a value out of range. Each error names the setting, the value and what is expected.
    """

    epochs: int = setting(30, "default: 30", kind=POSITIVE_INTEGER, exact=False)
    batch_size: int | None = setting(None, "default: 128", kind=POSITIVE_INTEGER, exact=True)
    learning_rate: float = setting(
        1e-3, "Adam's learning rate, default: 1e-3", kind=POSITIVE_NUMBER, flag="lr", exact=True
    )
    objective: str = setting(
        "elbo",
        "elbo (default), beta-tc, mmd, iwae or dreg: what is minimised",
        choices=("elbo", "beta-tc", "mmd", "iwae", "dreg"),
        exact=True,
    )
    samples: int | None = setting(
        None, "of each image for --objective iwae and dreg, default: 8", kind=POSITIVE_INTEGER, metavar="S", exact=True
    )
    beta: float = setting(1.0, "weight of the divergence, default: 1.0", kind=NON_NEGATIVE_NUMBER, exact=True)
    kl_warmup: float = setting(
        0.0, "in which that weight grows from 0, default: 0", kind=NON_NEGATIVE_NUMBER, metavar="EPOCHS", exact=True
    )
    free_bits: float = setting(
        0.0,
        "that each latent dimension may hold before its divergence counts, default: 0",
        kind=NON_NEGATIVE_NUMBER,
        metavar="NATS",
        exact=True,
    )
    schedule: str | Callable[[Optimizer], LRScheduler] = setting(
        "constant",
        "of the learning rate, in steps of an epoch: constant (default); cosine: to 0 over --epochs; plateau: a tenth "
        "of it after 10 epochs without a better test loss",
        choices=("constant", "cosine", "plateau"),
        exact=True,
    )
    clip_norm: float | None = setting(
        None, "the largest norm of the gradient", kind=_NORM, metavar="NORM", exact=True
    )  # fmt: skip
    patience: int | None = setting(
        None,
        "end after so many epochs without a smaller test loss; the best epoch is kept",
        kind=POSITIVE_INTEGER,
        metavar="EPOCHS",
        exact=False,
    )
    skip_nonfinite: bool = setting(
        False, "leave out and count steps whose gradient is not finite, instead of ending", exact=True
    )
    precision: str = setting(
        "tf32", "of convolutions and matrix products, default: tf32", choices=PRECISIONS, exact=True
    )
    graph: str = setting(
        "auto", "run the steps as CUDA graphs, default: where possible", choices=("auto", "on", "off"), exact=False
    )
    threads: int | None = setting(None, kind=POSITIVE_INTEGER)
    parts: tuple[str | None, ...] | None = setting(None)
    steps_per_epoch: int | None = setting(None, kind=POSITIVE_INTEGER)

    def __post_init__(self) -> None:
        for field, (name, known) in zip(dataclasses.fields(self), settings_of(self), strict=True):
            value = getattr(self, name)
            if value is None and field.default is None:
                continue
            if known.kind is not None:
                object.__setattr__(self, name, known.kind.checked(name, value))
            elif known.choices is not None and value not in known.choices and not callable(value):
                raise ValueError(f"{name} must be one of {', '.join(known.choices)}, got {value!r}")
            elif isinstance(field.default, bool) and not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        self._check_objective()
        if self.parts is not None:
            named = [part for part in self.parts if part is not None]
            if "input" not in named or len(set(named)) < len(named) or not set(named) <= set(PARTS):
                raise ValueError(f"parts must be some of {', '.join(PARTS)}, with input, each once, got {self.parts!r}")

    def _check_objective(self) -> None:
        """Raises ``ValueError`` for settings that mean nothing for the objective."""
        sampled = self.objective in SAMPLED
        if self.samples is not None and not sampled:
            raise ValueError(
                f"samples must be left out for the objective {self.objective}, which has one, got {self.samples}"
            )
        if self.free_bits and self.objective != "elbo":
            raise ValueError(f"free_bits must be 0 for the objective {self.objective}, got {self.free_bits}")
        if sampled and (self.beta != 1 or self.kl_warmup):
            raise ValueError(
                f"beta must be 1 and kl_warmup 0 for the objective {self.objective}, because the bound of several "
                f"samples has no weight, got {self.beta} and {self.kl_warmup}"
            )

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What the model runs under autocast to."""
        return torch.bfloat16 if self.precision == "bf16" else None

    def scheduler(self, optimizer: Optimizer) -> LRScheduler | None:
        """The schedule of an optimizer's learning rate; None where it is constant."""
        if callable(self.schedule):
            return self.schedule(optimizer)
        if self.schedule == "constant":
            return None
        return CosineAnnealingLR(optimizer, self.epochs) if self.schedule == "cosine" else ReduceLROnPlateau(optimizer)
