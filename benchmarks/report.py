"""The results of a benchmark run: benchmarks.json, benchmarks.md and benchmarks.png, each written atomically.

python benchmarks/report.py DIR    # writes the page and the figure again, from DIR/benchmarks.json
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devices import CPU
from fastvae.files import replacing
from fastvae.training import versions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cell = dict[str, Any]  # a case with the measurements of all its providers
Run = dict[str, Any]

FUSED = {
    "fused": ("eager", "compile", "compile-max-autotune", "compile-nchw"),
    "fused-graph": ("compile-graph", "compile-nchw-graph"),
}
# Two operations that between them are the whole ELBO path of a training loop.
PLOTTED = {
    "gaussian_sample_kl_packed": "sample + KL, forward and backward",
    "elbo_value_and_grad": "loss with its gradient",
}
# In the order of the tables. A provider and its graph have one color; the graph is dashed.
COLORS = {
    "textbook": "C5",
    "eager": "C7",
    "compile": "C0",
    "compile-max-autotune": "C9",
    "compile-graph": "C0",
    "compile-nchw": "C2",
    "compile-nchw-graph": "C2",
    "fused": "C3",
    "fused-graph": "C3",
    "jax": "C4",
}


def describe_run(device: CPU, copy_bandwidth: float) -> Run:
    """What every result depends on, with no result yet."""
    return {
        "device": device.description,
        "device_type": device.name,
        "versions": versions(),
        "commit": commit(),
        "sources": sources(),
        "copy_bandwidth": copy_bandwidth,
        "cells": [],
    }


def commit() -> str | None:
    """Of this source tree; "-dirty" where files differ from it. None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def sources() -> str:
    """Of the code that a result depends on, as 12 hexadecimal digits. Unlike the commit it is known without git, and
    tells one uncommitted state from another.
    """
    root = Path(__file__).parents[1]
    files = [root / "pyproject.toml"]
    for folder in ("benchmarks", "examples", "fastvae", "kernels", "tests"):
        files += (root / folder).rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def write(folder: Path, run: Run) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "benchmarks.json") as file:
        file.write((json.dumps(run, indent=1) + "\n").encode())
    with replacing(folder / "benchmarks.md") as file:
        file.write(markdown(run).encode())
    plot(folder / "benchmarks.png", run)


def markdown(run: Run) -> str:
    found = run["versions"]
    lines = [
        "# Benchmarks",
        "",
        f"{run['device']}; torch {found['torch']}, triton {found['triton']}, fastvae {found['fastvae']}, "
        f"commit {run['commit'] or 'unknown'}, sources {run['sources']}. "
        f"Copying memory moves {run['copy_bandwidth'] / 1e9:,.0f} GB/s here, "
        "bytes read and written.",
        "",
        *_call_table(run),
        *(_device_table(run) if run["device_type"] == "cuda" else []),
        *_cost_table(run),
        *_losses(run),
    ]
    return "\n".join(lines) + "\n"


def _providers(run: Run) -> list[str]:
    return [name for name in COLORS if any(name in cell["providers"] for cell in run["cells"])]


def _call_table(run: Run) -> Iterable[str]:
    names = _providers(run)
    yield "## Time of a call"
    yield ""
    yield "Microseconds per call in a loop of calls, median of the rounds, with half the distance of the quartiles; "
    yield "in a graph, per call of a replayed graph. Lower is better; the fastest is bold."
    yield ""
    yield f"| case | {' | '.join(names)} |"
    yield f"|---|{'---:|' * len(names)}"
    for cell in run["cells"]:
        found = cell["providers"]
        times = {name: _median(found.get(name), "call") for name in names}
        best = min((time for time in times.values() if time is not None), default=None)
        entries = []
        for name in names:
            if name not in found:
                entries.append("")
            elif times[name] is None:
                entries.append("FAIL" if found[name]["failure"] else "")
            else:
                low, _, high = found[name]["call_seconds"]
                text = f"{_figure(times[name] * 1e6)} ± {_figure((high - low) / 2 * 1e6)}"
                entries.append(f"**{text}**" if times[name] == best else text)
        yield f"| {cell['case']} | {' | '.join(entries)} |"
    yield ""
    for cell in run["cells"]:
        for name, result in cell["providers"].items():
            if result["failure"]:
                yield f"- FAIL: {cell['case']}, {name}: {result['failure']}"
            elif result["uncaptured"]:
                yield f"- no graph: {cell['case']}, {name}: {result['uncaptured']}"
    yield ""


def _device_table(run: Run) -> Iterable[str]:
    yield "## Time on the device"
    yield ""
    yield "Microseconds of GPU time per call in a replayed graph, inputs not in the cache; GB/s are the compulsory "
    yield "bytes over that time, and the percentage is of the copy's."
    yield ""
    names = [name for name in _providers(run) if not name.endswith("-graph")]
    names = [name for name in names if any(_median(cell["providers"].get(name), "gpu") for cell in run["cells"])]
    yield f"| case | compulsory bytes | {' | '.join(names)} |"
    yield f"|---|---:|{'---:|' * len(names)}"
    for cell in run["cells"]:
        entries = []
        for name in names:
            result = cell["providers"].get(name)
            time = _median(result, "gpu")
            if result is None or time is None:
                entries.append("")
            elif result["bytes_per_second"] is None:
                entries.append(_figure(time * 1e6))
            else:
                rate = result["bytes_per_second"]
                share = rate / run["copy_bandwidth"]
                entries.append(f"{_figure(time * 1e6)} ({rate / 1e9:,.0f} GB/s, {share:.0%})")
        compulsory = cell["compulsory_bytes"]
        yield f"| {cell['case']} | {f'{compulsory:,}' if compulsory else ''} | {' | '.join(entries)} |"
    yield ""


def _cost_table(run: Run) -> Iterable[str]:
    on_gpu = run["device_type"] == "cuda"
    yield "## What else it costs"
    yield ""
    yield "First result: seconds until the first result, compilation included."
    if on_gpu:
        yield "Host: microseconds to launch a call. Launches: kernels, fills and copies of a call. Memory: the most "
        yield "that a call allocates, its results included."
    yield ""
    header = ["case", "provider", "first result", *(["host", "launches", "memory"] if on_gpu else [])]
    yield f"| {' | '.join(header)} |"
    yield f"|---|---|{'---:|' * (len(header) - 2)}"
    for cell in run["cells"]:
        for name, result in cell["providers"].items():
            if result["failure"] or name.endswith("-graph"):
                continue
            row = [cell["case"], name, _optional(result["first_seconds"], "{:.2f} s")]
            if on_gpu:
                host = _median(result, "host")
                row.append("" if host is None else f"{_figure(host * 1e6)}")
                row.append(_optional(result["launches"], "{}"))
                row.append(_optional(result["extra_bytes"], "{:,} B"))
            yield f"| {' | '.join(row)} |"
    yield ""


def _losses(run: Run) -> Iterable[str]:
    yield "## Where fastvae loses"
    yield ""
    compared = False
    lost = []
    for cell in run["cells"]:
        found = cell["providers"]
        for name, rivals in FUSED.items():
            own = _median(found.get(name), "call")
            if found.get(name, {}).get("failure"):
                lost.append(f"- {cell['case']}: {name} failed")
            if own is None:
                continue
            for rival in rivals:
                time = _median(found.get(rival), "call")
                compared = compared or time is not None
                if time is not None and own > time:
                    lost.append(f"- {cell['case']}: {name} takes {own / time:.2f} times as long as {rival}")
    if lost:
        yield from lost
    elif compared:
        yield "Nowhere in this run."
    else:
        yield "Not known: this machine has no CUDA device, so fastvae's kernels were not timed."


def plot(path: Path, run: Run) -> None:
    """Time against size, for each provider; the memory's floor; where launches and where bytes decide."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 5.0), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (operation, title) in zip(panels, PLOTTED.items(), strict=True):
        _plot_operation(axes, run, operation, title)
    # One legend for both panels, either of which may lack some.
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{run['device']}, float32, torch {run['versions']['torch']}")
    with replacing(path) as file:
        figure.savefig(file, format="png")


def _plot_operation(axes: Axes, run: Run, operation: str, title: str) -> None:
    cells = [
        cell
        for cell in run["cells"]
        if cell.get("operation") == operation
        and cell["dtype"] == "float32"
        and not cell["channels_last"]
        and cell["unit_gradient"]
        and cell["backward"] == (operation != "elbo_value_and_grad")
    ]
    cells.sort(key=lambda cell: cell["elements"])
    axes.set_title(title)
    axes.set_xlabel("elements of the logits" if "elbo" in operation else "elements of z")
    axes.set_ylabel("time per call (less is better)")
    if not cells:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
        return
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda seconds, _: _in_words(seconds))
    times = []
    for name in _providers(run):
        points = [(cell["elements"], _median(cell["providers"].get(name), "call")) for cell in cells]
        points = [(size, time) for size, time in points if time is not None]
        if points:
            sizes, measured = zip(*points, strict=True)
            times += measured
            width = 2.5 if name.startswith("fused") else 1.5
            style = "--" if name.endswith("-graph") else "-"
            axes.plot(sizes, measured, style, marker="o", color=COLORS[name], label=name, linewidth=width)
    if not times:
        return
    bytes_per_element = cells[0]["compulsory_bytes"] / cells[0]["elements"]
    low, high = cells[0]["elements"] / 2, cells[-1]["elements"] * 2

    def floor(size: float) -> float:
        return size * bytes_per_element / run["copy_bandwidth"]

    ends = [low, high], [floor(low), floor(high)]
    axes.plot(*ends, ":", color="black", linewidth=1.5, label="floor: bytes / copy bandwidth")
    # Where the bytes alone take as long as the fastest small call, launching no longer decides.
    crossing = min(max(min(times) / floor(1.0), low), high)
    axes.axvspan(low, crossing, color="0.93", zorder=0)
    for start, end, words in ((low, crossing, "launch-bound"), (crossing, high, "bandwidth-bound")):
        if end > 8 * start:  # else the words do not fit
            axes.text(math.sqrt(start * end), 0.97, words, **_LABEL, transform=axes.get_xaxis_transform())
    axes.set_xlim(low, high)
    axes.set_ylim(min(times) / 3, max(times) * 4)
    axes.grid(alpha=0.3)


_LABEL: dict[str, Any] = {"ha": "center", "va": "top", "color": "0.35", "fontsize": 9}


def _median(result: Cell | None, kind: str) -> float | None:
    quartiles = result and result[f"{kind}_seconds"]
    return quartiles[1] if quartiles else None


def _figure(value: float) -> str:
    """Three digits."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def _optional(value: Any, text: str) -> str:
    return "" if value is None else text.format(value)


def _in_words(seconds: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit:
            return f"{seconds / unit:g} {name}"
    return f"{seconds / 1e-9:g} ns"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write(folder, json.loads((folder / "benchmarks.json").read_text()))
