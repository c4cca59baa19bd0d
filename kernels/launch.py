"""Launch a kernel on a device and its current stream, and keep what Triton compiled."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from .numerics import exp

# The mode is fixed when a function is decorated, and TRITON_INTERPRET may have changed since: ask a function, not the
# environment.
INTERPRETED = not isinstance(exp, triton.JITFunction)

# The kernels' FAST: NVIDIA's approximate instructions exist neither on the interpreter nor on AMD.
FAST = not INTERPRETED and torch.version.hip is None

# The interpreter keeps which program it runs in globals of its own, so that threads must take turns.
_interpreter = threading.RLock() if INTERPRETED else nullcontext()

# By device and stream.
_tickets: dict[tuple[str, int | None, int], Tensor] = {}
_zeros: dict[tuple[str, int | None, int], Tensor] = {}
_calling = threading.local()

# The number of a form is drawn, not counted in the dict: two threads must not give one to two forms.
_forms: dict[tuple[Any, ...], int] = {}
_next_form = count()
# (compiled kernel, its constants), by kernel, device, form, and the kinds of the arguments. The interpreter makes none.
_compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` current. This costs nothing if it is current already, or is not a CUDA device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()


class Plan(NamedTuple):
    """The part of a launch that depends only on the layouts of the tensors and on the options, so that it can be
    `layout.remembered`.
    """

    programs: int
    num_warps: int
    numbers: tuple[float, ...]  # the kernel's last arguments
    constants: dict[str, Any]
    form: int  # equal where Triton compiles the same code for equal kinds of other arguments


def make_plan(programs: int, num_warps: int, *numbers: float, **constants: Any) -> Plan:
    form = num_warps, *map(_kind, numbers), *constants.items()
    return Plan(programs, num_warps, numbers, constants, _forms.setdefault(form, next(_next_form)))


def _kind(argument: Any) -> Any:
    """Equal only for arguments for which Triton compiles the same code."""
    # A launch asks this of a dozen arguments, so types are compared where that suffices: it is quicker than isinstance.
    kind = type(argument)
    if kind is float or argument is None:
        return kind
    if kind is tuple:
        return (_kind(argument[0]),) if len(argument) == 1 else tuple(map(_kind, argument))
    if kind is int:
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31, argument < 2**63
    if isinstance(argument, Tensor):
        return argument.dtype if argument.data_ptr() % 16 == 0 else (argument.dtype, "unaligned")
    return kind


def launch(kernel: Any, plan: Plan, device: torch.device, *arguments: Any) -> None:
    """Run `kernel` on the current stream of `device`, also when another device is current.

    Compiled kernels are kept, and found again by everything that Triton specialises on. Triton needs about 40 us of a
    call to find the compiled code for the arguments, and this function needs 15 us (host time up to the driver, among
    other work, on a 2.8 GHz core; triton 3.9). It omits two things that Triton does at each launch: hooks before a
    kernel runs, and a check of knobs that were changed since the compilation. Nothing is kept on AMD, because there the
    code also depends on the size of a tensor's storage.
    """
    # The function that was decorated, because the hash of what decorates it takes a lock and 1 us.
    key = kernel.fn, device.index, plan.form, *map(_kind, arguments)
    kept = _compiled.get(key)
    try:
        with on_device(device):
            if kept is not None:
                compiled, constants = kept
                compiled[(plan.programs, 1, 1)](*arguments, *plan.numbers, *constants)
                return
            options = dict(plan.constants, num_warps=plan.num_warps, enable_fp_fusion=True)
            if "FAST" in kernel.arg_names:
                options["FAST"] = FAST
            with _interpreter:
                compiled = kernel[(plan.programs,)](*arguments, *plan.numbers, **options)
    except BaseException:
        # A launch that was cut short may have drawn tickets: later launches get new ones.
        _tickets.clear()
        raise
    # Not what is still being compiled (triton.AsyncCompileMode).
    if isinstance(compiled, CompiledKernel) and torch.version.hip is None:
        names = kernel.arg_names[len(arguments) + len(plan.numbers) :]
        _compiled[key] = compiled, [options[name] for name in names]


def ticket(device: torch.device) -> Tensor:
    """int32 [1], zero: the counter by which the last program of a launch finds out that it is last
    (`tiles.drew_last_ticket`).

    There is one ticket per device and stream, because launches on one stream follow each other. During a capture each
    launch gets a new ticket, which is zeroed inside the graph, because a graph may be replayed on any stream. The same
    holds inside `fresh_tickets`.
    """
    return _kept_zero(_tickets, device, torch.int32)


def zero(device: torch.device) -> Tensor:
    """int64 [1], zero. No kernel writes it. It is kept like a ticket."""
    return _kept_zero(_zeros, device, torch.int64)


def _kept_zero(kept: dict[tuple[str, int | None, int], Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    stream = 0
    if device.type == "cuda":
        with on_device(device):
            if torch.cuda.is_current_stream_capturing():
                return torch.zeros(1, dtype=dtype, device=device)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
    if getattr(_calling, "fresh_tickets", False):
        return torch.zeros(1, dtype=dtype, device=device)
    key = (device.type, device.index, stream)
    tensor = kept.get(key)
    if tensor is None:
        tensor = kept[key] = torch.zeros(1, dtype=dtype, device=device)
    return tensor


@contextmanager
def fresh_tickets() -> Iterator[None]:
    """Each launch in this block gets a new ticket.

    torch.compile needs this: its warm-up of CUDA graphs allocates from the graph's pool, and nothing may stay allocated
    there after the call.
    """
    _calling.fresh_tickets = True
    try:
        yield
    finally:
        _calling.fresh_tickets = False
