"""The device the suite runs on, and the count of Triton launches that proves the kernels ran.

Without a GPU the kernels run on Triton's interpreter: the same tests, the same code, CPU tensors. The mode is fixed
when a kernel is decorated, so the variable is set here, before anything imports Triton.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask of cuBLAS
# Training keeps to it, so that equal seeds give equal bits; with pytest-xdist each core has a process of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import fastvae
from fastvae.operations import all_kernel_names


class Launches:
    """Triton launches so far, whoever asked for them."""

    count = 0


def _count_launches() -> None:
    """Count in Triton itself, not in fastvae, so that a call that bypasses fastvae's launcher counts too."""
    from triton.compiler import CompiledKernel
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def counted(run):
        def wrapper(self, *args, **kwargs):
            if not kwargs.get("warmup"):
                Launches.count += 1
            # The interpreter moves its arguments with torch operations of its own, which no counting mode of a test
            # should see.
            with _disable_current_modes():
                return run(self, *args, **kwargs)

        return wrapper

    for kind in (JITFunction, InterpretedFunction):
        kind.run = counted(kind.run)

    # What fastvae kept of an earlier launch does not come through JITFunction.run.
    def counted_compiled(self, grid, runner_of=CompiledKernel.__getitem__):
        runner = runner_of(self, grid)

        def wrapper(*args, **kwargs):
            Launches.count += 1
            return runner(*args, **kwargs)

        return wrapper

    CompiledKernel.__getitem__ = counted_compiled


def _make_the_interpreter_faster() -> None:
    """At every call of a Triton function the interpreter replaces the builtin functions of triton.language by its own.
    That took most of the time of a launch: it lists all members to find the builtin ones, whose names are always the
    same, and in a launch they are replaced already.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def builtins_of(package: object) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def getmembers(package: object) -> list[tuple[str, object]]:
        return [(name, getattr(package, name)) for name in builtins_of(package)]

    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": getmembers})

    @functools.cache
    def modules_of(function: Any) -> frozenset[str]:
        """What is replaced for a function: what it sees of triton.language and triton.language.core."""
        modules = (interpreter.tl, interpreter.tl.core)
        return frozenset(it.__name__ for it in function.__globals__.values() if any(it is module for module in modules))

    replaced: set[frozenset[str]] = set()  # since the launch began
    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

    def patch_once(function: Any) -> Any:
        if (modules := modules_of(function)) in replaced:
            return None  # of a function that a kernel calls; the interpreter does not look at it
        replaced.add(modules)
        return patch_lang(function)

    def launch_and_forget(self: Any, *arguments: Any, **options: Any) -> Any:
        replaced.clear()
        return launch(self, *arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_and_forget


def _let_the_interpreter_round_fma_once() -> None:
    """As a GPU does, and as the interpreter does from triton 3.9 on."""
    from triton.runtime import interpreter

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        # float64 holds the product of two float32 without rounding.
        wide = x.data.astype("float64") * y.data + z.data
        return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    if not hasattr(interpreter._interpreter, "fma_fp32"):
        interpreter.InterpreterBuilder.create_fma = create_fma


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run also the tests that take longer than ten seconds")
    parser.addoption("--shard", metavar="I/N", help="run every N-th test, from number I on")


def pytest_configure(config: pytest.Config) -> None:
    try:
        _count_launches()
        _make_the_interpreter_faster()
        _let_the_interpreter_round_fma_once()
    except ModuleNotFoundError:
        raise pytest.UsageError('the tests need Triton: pip install -e ".[test]" on Linux') from None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if shard := config.getoption("--shard"):
        first, step = map(int, shard.split("/"))
        config.hook.pytest_deselected(items=[item for k, item in enumerate(items) if k % step != first])
        items[:] = items[first::step]
    # "-m slow" asks for them by name.
    with_slow = config.getoption("--slow") or "slow" in config.getoption("markexpr")
    for marker, runs, reason in (
        ("gpu", torch.cuda.is_available(), "needs a CUDA device"),
        ("slow", with_slow, "takes long: --slow runs it"),
    ):
        for item in [] if runs else items:
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of pytest-xdist's processes
        session.config.workeroutput["launches"] = Launches.count


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    Launches.count += getattr(node, "workeroutput", {}).get("launches", 0)


def pytest_unconfigure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "Triton's interpreter"
    print(f"{Launches.count} Triton launches on {where}")


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """A fixed seed, deterministic algorithms, float32 in cuDNN, whose results tests compare with float32, and
    uninitialised memory filled with NaN, so that an output nobody wrote shows.
    """
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def compiling(*command: object) -> bytes:
    """What a Python program prints in a process of its own, in which kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = [sys.executable, *map(str, command)]
    return subprocess.run(arguments, env=environment, check=True, stdout=subprocess.PIPE).stdout


def plan_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work out at every call how a kernel is launched, so that a test can change what that follows from."""
    for module_name in {kernel.split(".")[0] for kernel in all_kernel_names()}:
        module = importlib.import_module(f"fastvae.kernels.{module_name}")
        for name, function in list(vars(module).items()):
            if name.startswith("plan_"):
                monkeypatch.setattr(module, name, getattr(function, "__wrapped__", function))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu", 0 if torch.cuda.is_available() else None)


@pytest.fixture
def on_the_device(device: torch.device) -> Iterator[None]:
    """What a test draws lies on the GPU, if there is one."""
    if device.type == "cuda":
        torch.set_default_device(device)
    yield
    torch.set_default_device(None)


@pytest.fixture
def triton_backend() -> Iterator[type[Launches]]:
    """The fused path, on the GPU or on the interpreter; fails a test in which nothing was launched."""
    before = Launches.count
    with fastvae.use_backend("triton"):
        yield Launches
    assert Launches.count > before, "no Triton kernel was launched"
