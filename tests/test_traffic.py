"""The bytes and launches that are part of the contract, counted on Triton's interpreter: against the table below, and
against what each kernel's docstring says.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fastvae
import fastvae.autograd.reconstruction
import fastvae.functional as F
from fastvae import kernels
from fastvae.kernels.dimensions import dimensions_backward_kernel, dimensions_forward_kernel
from fastvae.kernels.elbo import elbo_backward_kernel, elbo_forward_kernel
from fastvae.kernels.gaussian import gaussian_backward_kernel, gaussian_forward_kernel
from fastvae.kernels.reconstruction import sigmoid_mse_backward_kernel, sigmoid_mse_forward_kernel
from traffic import Traffic, documented_bytes, formula_bytes, metered, operations

pytestmark = pytest.mark.skipif(not kernels.INTERPRETED, reason="bytes are counted on Triton's interpreter")

# Per float32 element: bytes (read, written), the kernel, and the words of its docstring that apply.
READS_AND_WRITES = {
    "gaussian_sample forward": (8, 4, gaussian_forward_kernel, ()),
    "gaussian_sample backward": (8, 8, gaussian_backward_kernel, ("without kl_grad",)),
    "gaussian_kl forward": (8, 0, gaussian_forward_kernel, ("without z",)),
    "gaussian_kl backward": (8, 8, gaussian_backward_kernel, ("without z_grad",)),
    "gaussian_sample_kl forward": (8, 4, gaussian_forward_kernel, ()),
    "gaussian_sample_kl backward": (12, 8, gaussian_backward_kernel, ()),
    "gaussian_sample_kl_packed forward": (8, 4, gaussian_forward_kernel, ()),
    "gaussian_sample_kl_packed backward": (12, 8, gaussian_backward_kernel, ()),
    "gaussian_sample_kl_packed eps forward": (12, 4, gaussian_forward_kernel, ("with eps",)),
    "gaussian_sample_kl_packed eps backward": (16, 8, gaussian_backward_kernel, ("with eps",)),
    "gaussian_sample_kl dimensions forward": (8, 4, dimensions_forward_kernel, ()),
    "gaussian_sample_kl dimensions backward": (12, 8, dimensions_backward_kernel, ()),
    "sigmoid_mse_loss forward": (8, 0, sigmoid_mse_forward_kernel, ()),
    "sigmoid_mse_loss backward": (8, 4, sigmoid_mse_backward_kernel, ()),
    "sigmoid_mse_loss both gradients forward": (8, 0, sigmoid_mse_forward_kernel, ()),
    "sigmoid_mse_loss both gradients backward": (8, 8, sigmoid_mse_backward_kernel, ("with both gradients",)),
    "elbo_loss forward": (8, 0, elbo_forward_kernel, ("without gradients",)),
    "elbo_loss backward": (8, 4, elbo_backward_kernel, ()),
    "elbo_loss both gradients forward": (8, 0, elbo_forward_kernel, ("without gradients",)),
    "elbo_loss both gradients backward": (8, 8, elbo_backward_kernel, ("with both gradients",)),
    "elbo_value_and_grad forward": (8, 4, elbo_forward_kernel, ()),
}
# A uint8 target is one byte of the four.
READS_WITH_UINT8_TARGET = 5


def assert_moves(traffic, elements, reads, writes):
    """Every byte of the formula, and at most 5 % of it for sums, tickets, seeds and scalar arguments."""
    allowed = 0.05 * (reads + writes)
    assert reads <= traffic.loaded / elements <= reads + allowed
    assert writes <= traffic.stored / elements <= writes + allowed
    assert traffic.launches == 1


def directions(operation):
    for direction, traffic, formula in zip(
        ("forward", "backward"), operation.measure(), (operation.forward, operation.backward), strict=True
    ):
        if traffic is not None:
            yield f"{operation.name} {direction}", traffic, formula


@pytest.mark.parametrize(
    ("dtype", "target_dtype"), [(torch.float32, None), (torch.float32, torch.uint8), (torch.bfloat16, None)], ids=str
)
def test_bytes_and_launches_of_every_operation(dtype, target_dtype, triton_backend):
    seen = set()
    for operation in operations(dtype, target_dtype):
        for name, traffic, formula in directions(operation):
            reads, writes, kernel, conditions = READS_AND_WRITES[name]
            seen.add(name)
            if target_dtype is torch.uint8:
                reads, conditions = READS_WITH_UINT8_TARGET, (*conditions, "with a uint8 target")
            assert documented_bytes(kernel.fn.__doc__, *conditions) == (reads, writes), name
            share = dtype.itemsize / 4
            assert formula_bytes(formula, dtype, target_dtype) == (reads + writes) * share, name
            assert_moves(traffic, operation.elements, reads * share, writes * share)
    if target_dtype is None:
        assert seen == set(READS_AND_WRITES)


def test_every_kernel_is_in_the_table():
    named = {entry[2] for entry in READS_AND_WRITES.values()}
    for module in (kernels.elbo, kernels.gaussian, kernels.reconstruction):
        assert {value for name, value in vars(module).items() if name.endswith("_kernel")} <= named


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
    source = Path(kernels.reconstruction.__file__).read_text()
    line = "    terms = tl.where(inside, error * error, 0.0)\n"
    assert source.count(line) == 1
    again = "    error += 0.0 * tl.load(logits_ptr + base + offsets, mask=inside, other=0.0).to(tl.float32)\n"
    path = tmp_path / "wasteful.py"
    path.write_text(source.replace(line, again + line))
    specification = importlib.util.spec_from_file_location("fastvae.kernels.wasteful", path)
    wasteful = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(wasteful)

    operation = next(operation for operation in operations(torch.float32) if operation.name == "sigmoid_mse_loss")
    sound, _ = operation.measure()
    assert_moves(sound, operation.elements, 8, 0)
    monkeypatch.setattr(fastvae.autograd.reconstruction, "kernels", wasteful)
    wasted, _ = operation.measure()
    with pytest.raises(AssertionError):
        assert_moves(wasted, operation.elements, 8, 0)
    assert_moves(wasted, operation.elements, 12, 0)


def test_a_wrong_docstring_fails():
    right = sigmoid_mse_forward_kernel.fn.__doc__
    assert documented_bytes(right) == (8, 0)
    assert documented_bytes(right.replace("reads 8", "reads 4")) == (4, 0)
    assert documented_bytes(right, "with a uint8 target") == (5, 0)
    with pytest.raises(ValueError, match="does not say what is read and written with eps"):
        documented_bytes(right, "with eps")
    with pytest.raises(ValueError, match="no sentence"):
        documented_bytes(right.replace("Bytes per float32 element", "Bytes"))
