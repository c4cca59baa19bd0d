"""The bytes and launches that are part of the contract, counted on Triton's interpreter: against the list of
operations, and against what each kernel's docstring says.
"""

from __future__ import annotations

import importlib.util
import pkgutil
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fastvae.functional as F
from contract import ONE_OF_EACH_SHAPE
from fastvae import kernels
from fastvae.kernels.elementwise import gradient_kernel
from fastvae.likelihoods import SigmoidMSE
from fastvae.operations import all_kernel_names, named, of_each_kind, operations
from traffic import Traffic, documented_bytes, measure, metered, takes_bytes

pytestmark = pytest.mark.skipif(not kernels.INTERPRETED, reason="bytes are counted on Triton's interpreter")

# And of every likelihood whose elements have an axis of their own: its bytes depend on how many numbers that has.
OPERATIONS = named([*of_each_kind(operations()), *(it for it in operations() if it.numbers_of_an_element)])
# When these words of a kernel's docstring apply, by the tensors that are read and written and the upstream gradients.
CONDITIONS = {
    "with eps": lambda names: "eps" in names,
    "without z": lambda names: "z" not in names,
    "without z_grad": lambda names: "z_grad" not in names,
    "without kl_grad": lambda names: "kl_grad" not in names,
    "with both gradients": lambda names: "target_grad" in names,
    "with gradients": lambda names: any(name.endswith("_grad") for name in names),
    "with a prior": lambda names: "prior_mu" in names,
    "with a prior and without z_grad": lambda names: "prior_mu" in names and "z_grad" not in names,
    "of three samples": lambda names: names.count("z") == 3,
    "of three samples and without kl_grad": lambda names: names.count("z_grad") > 3,  # and as the upstream gradient
}


def kernels_of(operation, direction):
    """What they say of themselves, in one line each."""
    for kernel in operation.kernels[direction]:
        module, _, name = kernel.partition(".")
        yield " ".join(getattr(importlib.import_module(f"fastvae.kernels.{module}"), name).fn.__doc__.split())


def conditions(operation, direction, target_dtype, docstring):
    read, written = operation.tensors_moved(direction)
    upstream = [f"{name}_grad" for name in operation.outputs] if direction == "backward" else []
    applying = [words for words, apply in CONDITIONS.items() if apply([*read, *written, *upstream])]
    if target_dtype is torch.uint8:
        applying.append("with a uint8 target")
    return [words for words in applying if re.search(rf"\d {words}[,)]", docstring)]


def assert_moves(traffic, elements, reads, writes, launches=1, further=0.0):
    """Every byte of the formula, and at most 5 % of it for sums, tickets, seeds and scalar arguments."""
    allowed = 0.05 * (reads + writes) + further
    assert reads <= traffic.loaded / elements <= reads + allowed
    assert writes <= traffic.stored / elements <= writes + allowed
    assert traffic.launches == launches


def cases():
    """Those of a few likelihoods always, the others with --slow. A dtype changes sizes alone, so one has bfloat16."""
    for operation in OPERATIONS.values():
        marks = () if operation.likelihood in ONE_OF_EACH_SHAPE else pytest.mark.slow
        yield pytest.param(operation, torch.float32, None, marks=marks)
        if operation.likelihood in (None, SigmoidMSE()):
            yield operation, torch.bfloat16, None
        if takes_bytes(operation):
            yield pytest.param(operation, torch.float32, torch.uint8, marks=marks)


@pytest.mark.parametrize(
    ("operation", "dtype", "target_dtype"), list(cases()), ids=lambda it: getattr(it, "name", str(it))
)
def test_bytes_and_launches_of_every_operation(operation, dtype, target_dtype, triton_backend):
    for direction, (traffic, elements) in measure(operation, dtype, target_dtype).items():
        reads, writes = operation.bytes_per_element(direction, dtype, target_dtype)
        # A tile of 16 rows reads a number of each column, and leaves a sum of it, which is read again.
        further = 8 / 16 if "column" in operation.smaller.values() else 0.0
        assert_moves(traffic, elements, reads, writes, len(operation.kernels[direction]), further)
        docstrings = list(kernels_of(operation, direction))
        if operation.numbers_of_an_element:  # on which the kernel's bytes depend
            assert all("Bytes: parameters and target are read once" in docstring for docstring in docstrings)
            continue
        each = [
            documented_bytes(docstring, *conditions(operation, direction, target_dtype, docstring))
            for docstring in docstrings
        ]
        read, written = (sum(numbers) for numbers in zip(*each, strict=True))
        if operation.likelihood and not operation.long_rows:
            assert all("4 more of each for each further parameter" in docstring for docstring in docstrings)
            further = 4 * (len(operation.likelihood.parameters) - 1 - len(operation.smaller))
            read, written = read + further, written + further * (written > 0)
        assert (read, written) == operation.bytes_per_element(direction, torch.float32, target_dtype), direction


def test_every_kernel_is_of_an_operation_in_the_list():
    modules = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    assert len(modules) > 5
    every = {
        name
        for module in modules
        for name in vars(importlib.import_module(f"fastvae.kernels.{module}"))
        if name.endswith("_kernel")
    }
    listed = {name.split(".")[1] for name in all_kernel_names()}
    # score_kernel is of a density as a function of z: test_general_posterior.py.
    assert every == listed | {"score_kernel", "gather_batch_kernel"}


def test_only_active_lanes_are_counted(triton_backend):
    """Event sizes that fill no tile move no more bytes."""
    logits, target = torch.randn(3, 700), torch.rand(3, 700)
    with metered() as traffic:
        F.sigmoid_mse_loss(logits, target, reduction="none")
    assert traffic == Traffic(loaded=8 * 3 * 700, stored=4 * 3, launches=1)


def test_nothing_is_counted_outside_of_the_meter(triton_backend):
    logits, target = torch.randn(2, 8), torch.rand(2, 8)
    with metered() as traffic:
        pass
    F.sigmoid_mse_loss(logits, target)
    assert traffic == Traffic()


# What follows shows that the checks can fail.


@pytest.mark.parametrize(
    "traffic",
    [
        Traffic(loaded=8000, stored=0, launches=2),
        Traffic(loaded=8500, stored=0, launches=1),
        Traffic(loaded=7999, stored=0, launches=1),
        Traffic(loaded=8000, stored=500, launches=1),
    ],
    ids=["a launch too many", "read too much", "read too little", "written too much"],
)
def test_other_traffic_fails(traffic):
    assert_moves(Traffic(loaded=8300, stored=300, launches=1), 1000, 8, 0)
    with pytest.raises(AssertionError):
        assert_moves(traffic, 1000, 8, 0)


def test_a_planted_wasteful_load_fails(tmp_path, monkeypatch, triton_backend):
    """In a copy of the kernels of which one reads its logits twice."""
    source = Path(kernels.elementwise.__file__).read_text()
    line = "    terms = tl.where(inside, value, 0.0)\n"
    assert source.count(line) == 1
    again = "    value += 0.0 * tl.load(parameter_ptrs[0] + base + offsets, mask=inside, other=0.0).to(tl.float32)\n"
    path = tmp_path / "wasteful.py"
    path.write_text(source.replace(line, again + line))
    specification = importlib.util.spec_from_file_location("fastvae.kernels.wasteful", path)
    wasteful = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(wasteful)

    operation = OPERATIONS["sigmoid_mse_loss"]
    sound, elements = measure(operation, torch.float32)["forward"]
    assert_moves(sound, elements, 8, 0)
    monkeypatch.setattr(kernels.likelihood, "value_kernel", wasteful.value_kernel)
    wasted, _ = measure(operation, torch.float32)["forward"]
    with pytest.raises(AssertionError):
        assert_moves(wasted, elements, 8, 0)
    assert_moves(wasted, elements, 12, 0)


def test_a_wrong_docstring_fails():
    right = gradient_kernel.fn.__doc__
    assert documented_bytes(right) == (8, 4)
    assert documented_bytes(right.replace("reads 8", "reads 4")) == (4, 4)
    assert documented_bytes(right, "with a uint8 target") == (5, 4)
    with pytest.raises(ValueError, match="does not say what is read and written with eps"):
        documented_bytes(right, "with eps")
    with pytest.raises(ValueError, match="no sentence"):
        documented_bytes(right.replace("Bytes per float32 element", "Bytes"))
