"""The launches that are part of the contract.

Counted are Triton launches plus every dispatched aten operation that is neither a view nor an allocation, without the
fill that makes the root gradient. On CUDA a draw of noise is no operation at all; a CPU generator has no offset, so
there it is one draw of two integers, which is counted apart.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fastvae.functional as F
from contract import ONE_OF_EACH_SHAPE
from eager_cost import FREE
from fastvae.operations import Spec, of_each_kind, operations


class Counted(TorchDispatchMode):
    """Everything that runs between enter and exit, by name; "triton" is the number of Triton launches."""

    def __init__(self, launches):
        super().__init__()
        self.launches = launches
        self.operations: Counter[str] = Counter()

    def __enter__(self):
        self.before = self.launches.count
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in FREE:
            self.operations[name] += 1
        return function(*args, **(kwargs or {}))

    def __exit__(self, *error):
        super().__exit__(*error)
        triton = self.launches.count - self.before
        if triton:
            self.operations["triton"] = triton

    def without_draw(self, device) -> dict[str, int]:
        """The count on a device whose generator has an offset."""
        counted = dict(self.operations)
        if device.type == "cpu":
            assert counted.pop("randint") == 1
        assert "randint" not in counted
        return counted


@pytest.fixture(autouse=True)
def existing_ticket(device):
    """The counter of long sums and the zero under by-value noise are made once per device and stream, by one fill each;
    every later launch finds them.
    """
    from fastvae.kernels.launch import ticket, zero

    ticket(device)
    zero(device)


def leaf(*shape, device, memory_format=torch.contiguous_format):
    return torch.randn(shape, device=device).to(memory_format=memory_format).requires_grad_()


LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "operation",
    [
        pytest.param(it, marks=() if it.likelihood in ONE_OF_EACH_SHAPE else pytest.mark.slow)
        for it in of_each_kind(operations())
    ],
    ids=lambda operation: operation.name,
)
def test_launches_of_every_operation(operation, layout, device, triton_backend):
    def dense(tensor):
        return tensor.contiguous(memory_format=LAYOUTS[layout]) if tensor.ndim == 4 else tensor

    if "column" in operation.smaller.values() and layout == "channels_last":
        pytest.skip("a number for each column of an image is copied where columns are not innermost")
    shape = (2, 4, 6, 5) if operation.likelihood is None else (2, 3, 40, 40)  # images of several programs
    shape = (2, 5000) if operation.long_rows else shape
    tensors = operation.inputs(Spec(shape, layout=dense, device=device))
    by_default = operation.options.get("free_bits") or not operation.reductions
    for reduction in (None,) if by_default else operation.reductions:
        options = {} if reduction is None else {"reduction": reduction}
        with Counted(triton_backend) as forward:
            outputs = operation(F, *tensors, **options)
        counted = forward.without_draw(device) if operation.draws_noise else dict(forward.operations)
        assert counted["triton"] == len(operation.kernels["forward"])
        assert sum(counted.values()) == operation.launches["forward"]
        if operation.backward is not None:
            roots = outputs[: operation.roots]
            leaves, upstream = [t for t in tensors if t.requires_grad], [torch.ones_like(root) for root in roots]
            with Counted(triton_backend) as backward:
                torch.autograd.grad(roots, leaves, upstream)
            assert dict(backward.operations) == {"triton": operation.launches["backward"]}


def test_sample_kl_of_chunked_halves_copies_nothing(device, triton_backend):
    mu, logvar = torch.randn(6, 8, device=device).chunk(2, 1)
    with Counted(triton_backend) as forward:
        F.gaussian_sample_kl(mu, logvar)
    assert forward.without_draw(device) == {"triton": 1}


def test_a_weight_on_the_device_costs_nothing(device, triton_backend):
    logits, target = torch.randn(2, 8, 1, 28, 28, device=device)
    kl, beta = torch.rand(8, device=device), torch.tensor(0.5, device=device)
    with Counted(triton_backend) as counted:
        F.elbo_value_and_grad(logits, target, kl, beta=beta)
    assert dict(counted.operations) == {"triton": 1}


def training_step(device):
    """The encoder's output and the decoder's, as far as the ELBO sees them: z and logits carry the decoder's
    gradients.
    """
    moments = leaf(16, 32, device=device)
    logits = leaf(16, 1, 28, 28, device=device)
    target = torch.rand(16, 1, 28, 28, device=device)
    return moments, logits, target


def test_a_training_step_is_four_launches(device, triton_backend):
    moments, logits, target = training_step(device)
    z_grad, root = torch.randn(16, 16, device=device), torch.ones((), device=device)
    with Counted(triton_backend) as step:
        z, kl = F.gaussian_sample_kl_packed(moments)
        loss = F.elbo_loss(logits, target, kl).loss
        torch.autograd.backward((loss, z), (root, z_grad))
    assert step.without_draw(device) == {"triton": 4}
    assert moments.grad is not None and logits.grad is not None


def test_a_training_step_with_value_and_grad_is_three_launches(device, triton_backend):
    moments, logits, target = training_step(device)
    z_grad = torch.randn(16, 16, device=device)
    with Counted(triton_backend) as step:
        z, kl = F.gaussian_sample_kl_packed(moments)
        _, (logits_grad, kl_grad) = F.elbo_value_and_grad(logits, target, kl)
        # logits_grad goes on into the decoder, whose gradient z_grad stands for.
        torch.autograd.grad((kl, z), moments, (kl_grad, z_grad))
    assert step.without_draw(device) == {"triton": 3}
    assert logits_grad.shape == logits.shape


def test_the_reference_takes_many_more(device):
    """The count itself counts: the same step in eager PyTorch."""
    moments, logits, target = training_step(device)
    with Counted(type("NoLaunches", (), {"count": 0})) as step:
        z, kl = (
            F.gaussian_sample_kl_packed(moments) if device.type == "cpu" else F.gaussian_sample_kl(*moments.chunk(2, 1))
        )
        loss = F.elbo_loss(logits, target, kl).loss
        torch.autograd.backward((loss, z), (torch.ones((), device=device), torch.randn(16, 16, device=device)))
    assert sum(step.operations.values()) > 35


def test_an_odd_layout_is_copied_once_per_tensor(device, triton_backend):
    """Neither mu nor logvar of a transposed encoder has its batch outermost: one copy each, and one for each
    gradient's strides.
    """
    mu, logvar = leaf(4, 6, device=device).t(), leaf(4, 6, device=device).t()
    with Counted(triton_backend) as forward:
        F.gaussian_kl(mu, logvar)
    assert dict(forward.operations) == {"triton": 1, "copy_": 2}
