"""`pytest benchmarks/ --benchmark`: times every provider of every case, and writes a page, a figure and JSON.

Without --benchmark each case runs once, at a small size, and is compared with float64. This tests the benchmarks
themselves.

pytest-benchmark finishes timing one test before it starts the next. Here the first test of a case times all providers
alternately, and each test passes its provider's times to pytest-benchmark. The options of pytest-benchmark
(--benchmark-json, --benchmark-compare, --benchmark-histogram, --benchmark-columns, ...) therefore work as usual.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take three quarters of the card

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # for the smoke test; before anything imports Triton

from cases import Case, headline, matrix
from devices import CPU, CUDA
from measure import Measurement, count_launches, measure
from providers import PROVIDERS, OperationSubject
from report import describe_run, markdown, write
from training_step import TrainingSubject

CASES_PER_PART = 24
BUDGET = 4.0  # seconds of timing per case
# Seconds that a case takes beside its timing, estimated for an H200 machine of 16 cores: to compile, and what
# max-autotune's search adds. They decide only what is left out when time runs short.
COMPILATION, SEARCH = 6.0, 20.0
LAUNCH_COUNT = 2.0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastvae")
    group.addoption("--benchmark", action="store_true", help="measure; without it each benchmark runs once, small")
    group.addoption(
        "--part", type=int, metavar="N", help=f"measure part N, from 1, of the full matrix: {CASES_PER_PART} cases each"
    )
    group.addoption(
        "--limit",
        type=float,
        default=420.0,
        metavar="SECONDS",
        help="be done in about this time: where it runs short, cases go without compile-max-autotune (default: 420)",
    )
    group.addoption(
        "--report", type=Path, default=Path("benchmark-results"), metavar="DIR", help="default: benchmark-results"
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--benchmark"):
        if config.getoption("--part") is not None:
            raise pytest.UsageError("--part needs --benchmark")
        config.option.benchmark_disable = True
        return
    part, parts = config.getoption("--part"), -(-len(list(matrix("cuda"))) // CASES_PER_PART)
    if part is not None and not 1 <= part <= parts:
        raise pytest.UsageError(f"--part must be 1 to {parts}, got {part}")
    config.option.benchmark_disable = False
    # The time to the first result is that of a user who compiles for the first time.
    caches = tempfile.TemporaryDirectory(prefix="fastvae-benchmark-", ignore_cleanup_errors=True)
    config.add_cleanup(caches.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(caches.name, "inductor")
    os.environ["TRITON_CACHE_DIR"] = os.path.join(caches.name, "triton")


class Session:
    """The device, and what has been measured on it: every case once, however many tests ask."""

    def __init__(self, folder: Path, planned: int, limit: float) -> None:
        self.began = time.monotonic()
        self.folder = folder
        self.planned = planned  # cases
        self.limit = limit
        self.device = CUDA() if torch.cuda.is_available() else CPU()
        self.run = describe_run(self.device, self.device.copy_bandwidth())
        self._measured: dict[str, dict[str, Measurement]] = {}
        self._subjects: list[Any] = []

    def measured(self, subject: Any) -> dict[str, Measurement]:
        name = str(subject)
        if name not in self._measured:
            names = [it for it in subject.providers if self.device.name == "cuda" or PROVIDERS[it].on_cpu]
            left = self.planned - len(self._measured)
            if not self._has_time(left * (BUDGET + COMPILATION + LAUNCH_COUNT) + SEARCH):
                names = [it for it in names if it != "compile-max-autotune"]
            self._subjects.append(subject)
            self._measured[name] = measure(subject, self.device, names, BUDGET)
            self.run["cells"].append(
                {
                    "case": name,
                    **(subject.case.as_dict() if isinstance(subject, OperationSubject) else {}),
                    "compulsory_bytes": subject.compulsory_bytes,
                    "providers": {it: found.as_dict() for it, found in self._measured[name].items()},
                }
            )
            write(self.folder, self.run)  # after every case, so that a run that is cut short leaves what it has
        return self._measured[name]

    def count_launches(self) -> None:
        """Of all that has been timed; at the end, see `CUDA.launches`."""
        if not isinstance(self.device, CUDA):
            return
        for subject, cell in zip(self._subjects, self.run["cells"], strict=True):
            if not self._has_time(LAUNCH_COUNT):
                break
            found = cell["providers"]
            names = [it for it in found if PROVIDERS[it].is_torch and not PROVIDERS[it].base]
            names = [it for it in names if not found[it]["failure"]]
            for name, count in count_launches(subject, self.device, names).items():
                found[name]["launches"] = count
        write(self.folder, self.run)

    def _has_time(self, seconds: float) -> bool:
        return time.monotonic() - self.began + seconds < self.limit

    def not_measured(self) -> str | None:
        """What this machine cannot do."""
        if self.device.name == "cuda":
            return None
        missing = ", ".join(name for name, provider in PROVIDERS.items() if not provider.on_cpu)
        return f"No CUDA device, so not measured: {missing}; GPU times, host times, launches, memory."


SESSION = pytest.StashKey[Session]()
PLANNED = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What says most comes first, in case time runs short; the training step, which takes longest, comes last."""
    if config.getoption("--benchmark") and config.getoption("--part") is None:
        ranks = {str(case): rank for rank, case in enumerate(headline(_sizes(config)))}
        items.sort(key=lambda item: ranks.get(_case_of(item), len(ranks)))


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[PLANNED] = len({_case_of(item) for item in session.items})


def _case_of(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)  # none: a test of something else in the same run
    return str(callspec.params.get("subject")) if callspec else ""


def _sizes(config: pytest.Config) -> str:
    if not config.getoption("--benchmark"):
        return "smoke"
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each provider of each case, those of a case together."""
    if "subject" not in metafunc.fixturenames:
        return
    timed, on_gpu = metafunc.config.getoption("--benchmark"), torch.cuda.is_available()
    pairs = [
        (subject, name)
        for subject in _subjects(metafunc.module, metafunc.config)
        for name in subject.providers
        if on_gpu or PROVIDERS[name].on_cpu or (not timed and name == "fused")  # on the interpreter
    ]
    if not timed:
        pairs = [pair for pair in pairs if _in_smoke(*pair)]
    metafunc.parametrize(
        ("subject", "provider"),
        [pytest.param(*pair, marks=pytest.mark.benchmark(group=str(pair[0]), timer=_recorded)) for pair in pairs],
        ids=[f"{subject}-{name}" for subject, name in pairs],
    )


def _subjects(module: Any, config: pytest.Config) -> list[Any]:
    """The cases of the module's FAMILY; the training step where it has none."""
    timed, part = config.getoption("--benchmark"), config.getoption("--part")
    sizes = _sizes(config)
    if not hasattr(module, "FAMILY"):
        if not timed:
            return [TrainingSubject(batch_size=16, judged_steps=10)]
        return [] if part and part != 1 else [TrainingSubject()]
    chosen: list[Case] = headline(sizes)
    if part is not None:
        chosen = list(matrix(sizes))[(part - 1) * CASES_PER_PART : part * CASES_PER_PART]
    return [OperationSubject(case) for case in chosen if case.operation in module.FAMILY]


def _in_smoke(subject: Any, name: str) -> bool:
    """One compiled case of each operation is enough to run the code; a graph is made by timing alone; JAX makes more
    steps in one call than the smoke run judges.
    """
    if not name.startswith("compile"):
        return PROVIDERS[name].is_torch and not PROVIDERS[name].base
    return name == "compile" and isinstance(subject, OperationSubject) and subject.case.regime == "launch"


class _Recorded:
    """A clock for pytest-benchmark that shows times taken before: 0 when a round starts, its time when it ends."""

    def __init__(self) -> None:
        self._durations: Iterator[float] = iter(())
        self._running = False

    def load(self, durations: list[float]) -> None:
        self._durations, self._running = iter(durations), False

    def __call__(self) -> float:
        self._running = not self._running
        return 0.0 if self._running else next(self._durations)


_recorded = _Recorded()


@pytest.fixture
def run(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Any, str], None]:
    """What each benchmark does: hand its measurement to pytest-benchmark; without --benchmark, run once."""

    def once(subject: Any, provider: str) -> None:
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        try:
            subject.prepare(device, lambda _: 1)
            call = subject.build(provider)
            call(0)
            complaint = subject.complaint(provider, call)
        finally:
            subject.release()
        assert complaint is None, complaint

    def feed(subject: Any, provider: str) -> None:
        session = request.config.stash.get(SESSION, None)
        if session is None:
            config = request.config
            session = Session(config.getoption("--report"), config.stash[PLANNED], config.getoption("--limit"))
            config.stash[SESSION] = session
        measurement = session.measured(subject).get(provider)
        if measurement is None:
            benchmark.skipped = True
            pytest.skip(f"left out, to be done within --limit {session.limit:g}")
        if measurement.failure:
            benchmark.skipped = True
            pytest.fail(f"FAIL: {measurement.failure}", pytrace=False)
        benchmark.extra_info.update(measurement.as_dict())
        _recorded.load(measurement.call)
        benchmark.pedantic(lambda: None, rounds=len(measurement.call))

    def choose(subject: Any, provider: str) -> None:
        if benchmark.enabled:
            feed(subject, provider)
        else:
            benchmark.pedantic(once, args=(subject, provider))

    return choose


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    measured = session.config.stash.get(SESSION, None)
    if measured is not None and exitstatus != pytest.ExitCode.INTERRUPTED:
        measured.count_launches()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash.get(SESSION, None)
    if session is None:
        return
    missing = session.not_measured()
    if missing:
        terminalreporter.write_line(missing)
    terminalreporter.section("fastvae benchmarks")
    terminalreporter.write_line(markdown(session.run))
    terminalreporter.write_line(f"written to {session.folder}: benchmarks.json, benchmarks.md, benchmarks.png")
