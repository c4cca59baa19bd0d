"""What the modules of this package share: the methods of one object that are exchanged, and the report of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

_REPORT = "_fastvae_report"


@dataclass(frozen=True)
class Report:
    """What `fuse` did to an object. ``str(report)`` is a text of a few lines.

    Attributes:
        host: the object's class, such as "diffusers.AutoencoderKL".
        fused: what runs on fused operations now, and which.
        kept: what stays the library's own code, and why.
        defects: where the library's number is not what its documentation says, and what it is instead.
        corrected: whether these numbers are the right ones now (``correct=True``), or still the library's.
        methods: the names of the exchanged methods.
    """

    host: str
    fused: Mapping[str, str]
    kept: Mapping[str, str] = field(default_factory=dict)
    defects: Mapping[str, str] = field(default_factory=dict)
    corrected: bool = False
    methods: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.host}: {len(self.fused)} fused, {len(self.kept)} kept"]
        state = "corrected" if self.corrected else "as the library has it"
        for word, entries in (("fused", self.fused), ("kept", self.kept), (state, self.defects)):
            lines += [f"  {word}: {name}: {text}" for name, text in entries.items()]
        return "\n".join(lines)


def class_name(host: object) -> str:
    """The package and the class, such as "diffusers.AutoencoderKL"."""
    return f"{type(host).__module__.partition('.')[0]}.{type(host).__name__}"


def exchange(host: Any, report: Report, methods: Mapping[str, Callable[..., Any]]) -> Report:
    """Let the host's methods of these names call the functions, each with the host as its first argument. The report
    is kept with the host.

    A second call replaces the first one's methods. The functions are attributes of the object, so they stand before
    the class's methods. ``copy.deepcopy`` and pickle copy them with the host, whose copy they then belong to.
    ``copy.copy`` and ``torch.nn.DataParallel`` do not: their copies call the first object, so restore it before.
    """
    restore(host)
    report = replace(report, methods=tuple(methods))
    for name in methods:
        if name in vars(host):
            raise ValueError(f"{class_name(host)}.{name} was replaced on this object by other code already")
    vars(host).update({name: partial(function, host) for name, function in methods.items()}, **{_REPORT: report})
    return report


def restore(host: Any) -> None:
    """Give the host its own methods back. Nothing happens if it is not fused."""
    report = report_of(host)
    if report is not None:
        for name in (*report.methods, _REPORT):
            del vars(host)[name]


def report_of(host: Any) -> Report | None:
    """What `exchange` did to the host, None if nothing."""
    report: Report | None = vars(host).get(_REPORT)
    return report
