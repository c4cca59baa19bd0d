"""Everything that only a GPU can show, in one command that fits into eight minutes.

    python benchmarks/gpu_evidence.py --out DIR [--data-dir MNIST] [--minutes 7] [--only NAME ...] [--skip NAME ...]

Each part is a separate process with a time limit, so that a failure costs one part. Parts without timing run together,
and timed parts run alone. The most important parts come first: every operation against float64, training on MNIST,
NCCL, the headline benchmarks, compute-sanitizer and the tests on the device. Then follow more seeds, the training step
beside its rivals, hardware counters, host time and races. --minutes limits one invocation. The same command again
continues: parts that passed with these sources are kept, and the others run again, beginning with the tests that
failed. --only and --skip choose parts by words of their names.

These files in DIR are written after each part, each atomically: summary.md, to read; evidence.tgz, with everything else
(the output of each part, the benchmarks, and train.py's files without its checkpoints); evidence.json, from which the
next invocation continues. --deliver DIR also copies the first two there. Each result names the sources that it comes
from. If a tool is absent or fails, this is recorded, and never counts as a pass.

On a bare machine of 16 cores that was lent for minutes, without a network, with MNIST's files in .mnist/ and $OUT as
the folder that is brought back (.evidence/ is ignored by git and stays, or is carried, between two commands):

    python3 -m pip install -q --no-index --no-build-isolation --no-deps -e . || export PYTHONPATH=$PWD;
    python3 benchmarks/gpu_evidence.py --out .evidence --deliver $OUT --data-dir .mnist

and after repairs, in what is left of the time (a warm machine, 5 minutes; --minutes says how much):

    python3 benchmarks/gpu_evidence.py --out .evidence --deliver $OUT --data-dir .mnist --minutes 5
    --only smoke failed seeds step counters host race

Without a GPU, --rehearse runs every part small on the CPU and the interpreter, to try the command itself.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch

from evidence_output import COUNTERS
from evidence_parts import COUNTED_ELEMENTS, FIRST_MINUTES, Stage, stages
from evidence_process import Part, Result, Running
from fastvae.files import replacing
from fastvae.training import versions
from report import commit, sources

HERE = Path(__file__).parent
FILES = ("summary.md", "evidence.tgz", "evidence.json")
SHORTEST = 20.0  # seconds in which a part can do something


class Evidence:
    """What is known so far, and the files that say it."""

    def __init__(self, out: Path, device: str, deliver: Path | None = None) -> None:
        self.out, self.deliver = out, deliver
        self.sources = sources()
        self.state: Result = {"device": device, "versions": versions(), "parts": {}}
        path = out / "evidence.json"
        if path.exists():
            before = json.loads(path.read_text())
            # fastvae's own version is unknown where it is found by its path alone.
            same = (
                before["versions"].get(name) == self.state["versions"][name] for name in ("torch", "triton", "python")
            )
            if before["device"] == device and all(same):
                self.state["parts"] = before["parts"]
            else:
                print(f"{out} holds evidence of another device or version: starting anew")
                for name in FILES:
                    (out / name).unlink(missing_ok=True)

    def passed(self, name: str) -> bool:
        found = self.state["parts"].get(name, {})
        return found.get("status") == "passed" and found.get("sources") == self.sources

    def failed_tests(self) -> list[str]:
        """The names of the tests that failed when all ran."""
        parts = self.state["parts"]
        return sorted(
            {
                it
                for name in ("graphs and streams", "tests", "more tests")
                for it in parts.get(name, {}).get("failures", [])
            }
        )

    def leave(self, name: str) -> None:
        """No time was left for this part. What an earlier invocation found stays."""
        if name not in self.state["parts"]:
            self.record(name, "not run", 0.0, {}, "no time was left: run the command again")

    def record(self, name: str, status: str, seconds: float, result: Result, log: str) -> None:
        self.state["parts"][name] = {
            "status": status,
            "seconds": round(seconds, 1),
            "sources": self.sources,
            "commit": commit(),
            "log": log,
            **result,
        }
        print(f"{name}: {status}, {seconds:.0f} s", flush=True)
        self.write()

    def write(self) -> None:
        self._write("summary.md", lambda file: file.write(summary(self.state, self.out).encode()))
        self._write("evidence.json", lambda file: file.write((json.dumps(self.state, indent=1) + "\n").encode()))
        self._write("evidence.tgz", self._pack)

    def _write(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        with replacing(self.out / name) as file:
            write(file)
        if self.deliver is not None and name != "evidence.json":  # which evidence.tgz holds
            with replacing(self.deliver / name) as file:
                file.write((self.out / name).read_bytes())

    def _pack(self, file: BinaryIO) -> None:
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            for path in sorted(self.out.rglob("*")):
                # A run's checkpoints are large, and show nothing; names with a dot in front are being written.
                hidden = path.name.startswith(".") or path.suffix == ".pt" or path.name == "evidence.tgz"
                if path.is_file() and not hidden:
                    with suppress(OSError):  # a part that is running has just removed it
                        _add(archive, path.relative_to(self.out).as_posix(), path.read_bytes())
            log = "".join(f"==== {name}: {it['status']}\n{it['log']}\n" for name, it in self.state["parts"].items())
            _add(archive, "log.txt", log.encode())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """From memory, because a file that is replaced while it is read ends the archive."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime = len(content), int(time.time())
    archive.addfile(entry, io.BytesIO(content))


def run_stage(stage: Sequence[Part], evidence: Evidence, deadline: float) -> None:
    """Run these parts together, and record each as it ends."""
    with tempfile.TemporaryDirectory() as folder:
        running: list[Running] = []
        try:
            for part in stage:
                left = deadline - time.monotonic()
                if not part.available():
                    evidence.record(part.name, "absent", 0.0, {"tool": part.tool}, f"{part.tool} is not installed")
                elif left < min(part.seconds, SHORTEST):
                    evidence.leave(part.name)
                else:
                    running.append(Running(part, Path(folder), left))
            while running:
                for it in [it for it in running if it.finished()]:
                    running.remove(it)
                    evidence.record(it.part.name, *it.result())
                time.sleep(0.2)
        finally:
            for it in running:
                it.stop()


def summary(state: Result, out: Path) -> str:
    """The page that is committed with the results."""
    found = state["versions"]
    lines = [
        f"# Evidence: {state['device']}",
        "",
        f"torch {found['torch']}, triton {found['triton']}, Python {found['python']}, fastvae {found['fastvae']}. "
        "Made by `python benchmarks/gpu_evidence.py`.",
        "",
        "| part | result | seconds | found | sources |",
        "|---|---|---:|---|---|",
    ]
    for name, it in state["parts"].items():
        where = it["sources"] + (f" ({it['commit']})" if it["commit"] else "")
        lines.append(f"| {name} | {it['status']} | {it['seconds']:.0f} | {_found(it)} | {where} |")
    counters = state["parts"].get("counters", {}).get("kernels")
    if counters:
        names = list(COUNTERS.values())
        lines += ["", f"## Hardware counters, {COUNTED_ELEMENTS:,} elements", ""]
        lines += [f"| kernel | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
        lines += [f"| {it} | {' | '.join(values.get(name, '') for name in names)} |" for it, values in counters.items()]
    epochs = [it for name, it in state["parts"].items() if name.startswith("epochs") and "steps" in it]
    if epochs:
        lines += ["", f"## {epochs[0]['epochs']} epochs of {epochs[0]['dataset']}, {epochs[0]['steps']:,} steps", ""]
        lines += [
            "| provider | seconds | steps/s | training loss | test loss | test mse |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for it in epochs:
            speed = f"{it['seconds_of_training']:.2f} | {it['steps_per_second']:,.0f}"
            quality = f"{it['final_loss']:.2f} | {it['test_loss']:.2f} | {it['test_mse']:.4f}"
            lines.append(f"| {it['provider']} | {speed} | {quality} |")
        lines += ["", *against_reference(epochs)]
    for page in sorted((out / "benchmarks").glob("*/benchmarks.md")):
        nested = ("\n" + page.read_text()).replace("\n#", "\n##").strip()
        figure = page.with_suffix(".png").relative_to(out).as_posix()
        lines += ["", f"![time against size]({figure})", "", nested]
    return "\n".join(lines) + "\n"


def against_reference(epochs: Sequence[Result]) -> Iterator[str]:
    """Whether what was trained with several seeds came to the losses of eager PyTorch in float32."""
    reference = json.loads((HERE / "reference_losses.json").read_text())
    same = [it for it in epochs if all(it[key] == reference[key] for key in ("dataset", "epochs", "steps"))]
    losses = reference["final_losses"]
    lowest, highest = min(losses), max(losses)
    for it in same:
        own = it["final_losses"]
        mean = sum(own) / len(own)
        verdict = "inside" if lowest <= mean <= highest else "OUTSIDE"
        yield (
            f"{it['provider']}: final training loss {mean:.3f} (mean of {len(own)}: {min(own):.3f} to {max(own):.3f}), "
            f"{verdict} of the {lowest:.3f} to {highest:.3f} of {len(losses)} seeds of eager PyTorch in float32.  "
        )


def _found(result: Result) -> str:
    """A part's findings in a few words."""
    if "kernels" in result:
        return f"{len(result['kernels'])} kernels"
    if "provider" in result:
        return f"final loss {result['final_loss']:.2f}"
    lists = {name: value for name, value in result.items() if isinstance(value, list)}
    hidden = ("status", "seconds", "sources", "commit", "log", "exit_code", *lists)
    words = [f"{value} {name}" for name, value in result.items() if name not in hidden]
    words += [f"{name}: {'; '.join(map(str, value[:5]))}" for name, value in lists.items() if value]
    return ", ".join(words).replace("|", "/").replace("\n", " ")


def chosen(stages: Sequence[Stage], only: Sequence[str] | None, skip: Sequence[str]) -> list[Stage]:
    """The parts whose names contain one of the words of `only` and none of those of `skip`."""
    names = [part.name for stage in stages for part in stage]
    for word in (*(only or ()), *skip):
        if word != "failed" and not any(word in name for name in names):
            raise ValueError(f"no part is called {word!r}; the parts are {', '.join(names)}")

    def wanted(part: Part) -> bool:
        asked = only is None or any(word in part.name for word in only)
        return asked and not any(word in part.name for word in skip)

    return [kept for stage in stages if (kept := [part for part in stage if wanted(part)])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--deliver", type=Path, metavar="DIR", help="where summary.md and evidence.tgz go as well")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="MNIST's files; without them, small digits")
    parser.add_argument("--minutes", type=float, default=FIRST_MINUTES, help=f"default: {FIRST_MINUTES}")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="parts whose names contain one of these words")
    parser.add_argument("--skip", nargs="+", metavar="NAME", default=[], help="parts to leave out, likewise")
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU: what it prints is no evidence")
    settings = parser.parse_args()
    deadline = time.monotonic() + 60 * settings.minutes
    if settings.rehearse:
        device = "a rehearsal on a CPU"
    elif torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        parser.error("there is no CUDA device (--rehearse tries the command without one)")
    out = settings.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if settings.deliver is not None:
        settings.deliver.mkdir(parents=True, exist_ok=True)
    evidence = Evidence(out, device, settings.deliver)
    data = settings.data_dir.resolve() if settings.data_dir else None
    try:
        todo = chosen(stages(out, data, settings.rehearse, evidence.failed_tests()), settings.only, settings.skip)
    except ValueError as error:
        parser.error(str(error))
    todo = [[part for part in stage if not evidence.passed(part.name)] for stage in todo]
    try:
        for stage in todo:
            run_stage(stage, evidence, deadline)
    except KeyboardInterrupt:
        print("stopped; what was found is written, and the same command goes on from there")
        return 130
    evidence.write()
    print((out / "summary.md").read_text())
    # Last, because a reader far away may see only the end of what is printed.
    parts = evidence.state["parts"]
    for name, it in parts.items():
        print(f"{it['status']:9} {it['seconds']:4.0f} s  {name}: {_found(it)[:200]}")
    wanting = [name for name, it in parts.items() if it["status"] != "passed"]
    print(f"not passed: {', '.join(wanting)}" if wanting else "everything passed")
    return 1 if wanting else 0


if __name__ == "__main__":
    sys.exit(main())
