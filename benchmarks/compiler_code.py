"""Instructions and launches of a likelihood and its gradients: fastvae's kernels beside those of torch.compile.

    python benchmarks/compiler_code.py [NAME ...]

prints a table as Markdown. Needs no GPU: Inductor generates its Triton kernels for a stand-in of an H200, and both
sides are compiled for sm_90. The peers are those of `peers.py`. Inductor is given the value and its gradients as one
graph, which is the most it can fuse; of several configurations of a kernel the one with the fewest instructions counts.
Instructions are those of a whole tile for each of its elements (the "body" of `codegen.py`): without the sums over
threads, and with branches that few elements take. What Inductor has no code for is a launch of PyTorch's own kernel,
whose instructions are not counted. The mixture of logistics is left out, because torch does not trace its gradient.

It calls functions of torch 2.13 that are not public.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.compiler import ASTSource
from triton.runtime import driver

import fastvae.functional as F
from codegen import TARGETS, TOOLS, inspect
from disassembly import classify, read_sass
from fastvae.likelihoods import DiscretizedLogisticMixture
from launches import record
from peers import SUBJECTS, Subject
from stand_in import Driver

H200 = SimpleNamespace(
    name="H200",
    major=9,
    minor=0,
    total_memory=141 << 30,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
)


class Made(NamedTuple):
    instructions: float  # per element
    launches: int
    foreign: int  # those of them that are PyTorch's own kernels


@contextmanager
def on_an_h200() -> Iterator[None]:
    """PyTorch and Triton find one."""
    replaced: list[tuple[Any, str, Any]] = [
        (torch.version, "cuda", "12.8"),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "get_device_properties", lambda device=None: H200),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (CudaInterface, "get_device_properties", staticmethod(lambda device=None: H200)),
        (CudaInterface.Worker, "get_device_properties", staticmethod(lambda device=None: H200)),
        (CudaInterface.Worker, "current_device", staticmethod(lambda: 0)),
        (driver, "_active", Driver(lambda *arguments: None)),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value, create=True))
        yield


def generated(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> str:
    """The code that Inductor makes for a GPU of the function's value, and its gradients in all tensors but the last."""

    def with_gradients(*given: Tensor) -> tuple[Tensor, ...]:
        value, backward = torch.func.vjp(lambda *parameters: function(*parameters, given[-1]), *given[:-1])
        return value, *backward(torch.ones_like(value))

    # Traced and simplified on the CPU, because torch without CUDA neither differentiates nor folds on that device.
    graph = make_fx(
        torch.func.functionalize(with_gradients),
        decomposition_table=select_decomp_table(),
        tracing_mode="fake",
    )(*tensors)
    joint_graph_passes(graph)
    for node in graph.graph.nodes:
        node.meta.clear()
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with on_an_h200(), torch.no_grad(), V.set_fake_mode(mode):
        with mode:
            fakes = [torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda") for tensor in tensors]
            FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*fakes)
        post_grad_passes(graph, is_inference=True)
        lowering = GraphLowering(graph, example_inputs=fakes, shape_env=mode.shape_env)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*fakes)
            return str(lowering.codegen()[0].value)


def kernels(code: str, folder: Path) -> Iterator[Any]:
    """The Triton kernels of generated code, not compiled yet."""
    for name, source in re.findall(r"async_compile\.triton\('(\w+)', '''\n(.*?)'''", code, re.DOTALL):
        path = folder / f"{name}.py"
        path.write_text(source.replace("triton_helpers.set_driver_to_gpu()", ""))
        spec = spec_from_file_location(f"{folder.name}.{name}", path)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        yield getattr(module, name)


def body(kernel: Any, configuration: Any, folder: Path) -> float:
    """Instructions of a whole tile for each of its elements."""
    meta = kernel.triton_meta
    names = list(meta["signature"])
    constants = {name: value for name, value in (meta["constants"] | configuration.kwargs).items() if name in names}
    source = ASTSource(
        kernel.fn,
        {name: "constexpr" if name in constants else kind for name, kind in meta["signature"].items()},
        {(names.index(name),): value for name, value in constants.items()},
        dict(meta["configs"][0]),
    )
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    compiled = triton.compile(source, target=TARGETS["sm_90"], options=options)
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    command = [TOOLS / "nvdisasm", "-c", "-gi", path]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tile = prod(size for name, size in configuration.kwargs.items() if name.endswith("BLOCK"))
    parts = classify(read_sass(sass), compiled.asm["ttgir"], tile, set())
    count = sum(part in ("body", "tails") for _, part in parts)
    return count * 32 * configuration.num_warps / tile


def of_inductor(subject: Subject, folder: Path) -> Made:
    tensors = inputs(subject)
    code = generated(lambda *given: subject.peer(*given).sum() / len(given[-1]), tensors)
    with on_an_h200():
        all_kernels = list(kernels(code, folder))
        total = 0.0
        for kernel in all_kernels:
            # One that adds up what programs have left goes through few elements.
            if prod(kernel.size_hints.values()) >= tensors[-1].numel() / 2:
                total += min(body(kernel, configuration, folder) for configuration in kernel.configs)
    foreign = len(re.findall(r"= torch\.ops\.aten\.\w+\.\w+\(|extern_kernels\.\w+\(", code))
    return Made(total, len(re.findall(r"^ +triton_\w+\.run\(", code, re.MULTILINE)) + foreign, foreign)


def inputs(subject: Subject) -> list[Tensor]:
    *parameters, target = subject.likelihood.draw(subject.shape, torch.Generator().manual_seed(0))
    named = zip(subject.likelihood.parameters, parameters, strict=True)
    return [*(x[0].clone() if name in subject.smaller else x for name, x in named), target]


def of_fastvae(subject: Subject) -> tuple[Made, Made]:
    """With autograd, and at once."""
    *parameters, target = (tensor.requires_grad_() for tensor in inputs(subject))
    target = target.detach()
    likelihood, losses = subject.likelihood, []
    launches = record(lambda: losses.append(F.negative_log_likelihood(tuple(parameters), target, likelihood)))
    launches += record(lambda: torch.autograd.grad(losses[0], parameters))
    kl = torch.zeros(len(target))
    at_once = record(lambda: F.elbo_value_and_grad(tuple(parameters), target, kl, likelihood=likelihood))
    found = []
    for each in (launches, at_once):
        codes = [inspect(launch, TARGETS["sm_90"]) for launch in each]
        found.append(Made(sum(code.body + code.tails for code in codes), len(each), 0))
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only these, such as Poisson()")
    names = parser.parse_args().names
    torch.distributions.Distribution.set_default_validate_args(False)  # which reads the values
    print("| likelihood | instructions per element: torch.compile | fastvae | at once | launches | fastvae | at once |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for subject in SUBJECTS:
        if subject.likelihood == DiscretizedLogisticMixture() or (names and subject.name not in names):
            continue
        with tempfile.TemporaryDirectory() as folder:
            peer = of_inductor(subject, Path(folder))
        each = (peer, *of_fastvae(subject))
        instructions = " | ".join(f"{it.instructions:.0f}{' + ' * bool(it.foreign)}" for it in each)
        launches = " | ".join(
            f"{it.launches}, {it.foreign} of them PyTorch's own" if it.foreign else f"{it.launches}" for it in each
        )
        print(f"| `{subject.name}` | {instructions} | {launches} |", flush=True)


if __name__ == "__main__":
    main()
