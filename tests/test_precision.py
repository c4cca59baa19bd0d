"""The arithmetic that training sets, and what is left of it afterwards."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastvae.models import ConvVAE
from fastvae.training import Training, train
from fastvae.training.precision import arithmetic

SHAPE = (1, 8, 6)


def images(count, device):
    return torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, device=device)


def small(device):
    torch.manual_seed(0)
    return ConvVAE(SHAPE, latent_dim=3, channels=(4, 6)).to(device)


PLACES = [(kind, part) for kind in ("cuda", "mkldnn") for part in ("all", "conv", "rnn", "matmul")]


def settings():
    """Of torch, what holds for convolutions and matrix products."""
    return (
        {place: torch._C._get_fp32_precision_getter(*place) for place in [("generic", "all"), *PLACES]},
        torch.backends.cudnn.benchmark,
    )


@pytest.mark.parametrize(("precision", "expected"), [("fp32", "highest"), ("tf32", "high"), ("bf16", "high")])
def test_precision_is_set_in_training_only(precision, expected, device):
    data = images(16, device)
    seen, dtypes = [], []
    model = small(device)

    def look(module, inputs, output):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        dtypes.append(output.dtype)

    model.decoder.register_forward_hook(look)
    before = settings()
    rows = train(model, data, data[:4], Training(epochs=1, batch_size=8, precision=precision, graph="off"))
    assert settings() == before
    assert set(seen) == {(expected, precision != "fp32")}
    # Two steps, and the evaluation, which is not under autocast.
    assert dtypes[:2] == 2 * [torch.bfloat16 if precision == "bf16" else torch.float32]
    assert set(dtypes[2:]) == {torch.float32}
    assert all(parameter.dtype is torch.float32 for parameter in model.parameters())
    assert rows[0].loss > 0


def set_nothing():
    pass


def set_matmul():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def set_cudnn():
    torch.backends.cudnn.fp32_precision = "ieee"


def set_convolutions():
    torch.backends.cudnn.conv.fp32_precision = "ieee"


def set_all():
    torch.backends.fp32_precision = "tf32"


def set_all_exact():
    torch.backends.fp32_precision = "ieee"


def set_onednn():
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def set_older():
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = False


def outcome() -> list[object]:
    """What holds, and what would hold if what is above, or beside, were set later."""
    found: list[object] = [settings()]
    for place in [("cuda", "all"), ("mkldnn", "all"), ("generic", "all")]:
        for value in ("ieee", "tf32"):
            torch._C._set_fp32_precision_setter(*place, value)
            found.append(settings())
    for value in ("ieee", "tf32"):
        for place in PLACES:
            torch._C._set_fp32_precision_setter(*place, value)
        for older in (torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32):
            try:
                found.append(older())
            except RuntimeError:  # it contradicts the newer one
                found.append(None)
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
@pytest.mark.parametrize(
    "change",
    [set_nothing, set_matmul, set_cudnn, set_convolutions, set_all, set_all_exact, set_onednn, set_older],
    ids=lambda it: it.__name__,
)
def test_whatever_was_set_is_as_it_was(change):
    """By torch's newer settings or its older ones. Each in a process of its own: torch cannot put back its defaults."""
    outcomes = []
    for precision in (None, "fp32", "tf32"):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                change()
                if precision is not None:
                    with arithmetic(precision):
                        assert torch.get_float32_matmul_precision() == ("highest" if precision == "fp32" else "high")
                        assert torch.backends.cudnn.allow_tf32 is (precision != "fp32")
                        held, _ = settings()
                        for part in ("conv", "rnn", "matmul"):
                            assert (held["cuda", part] == "tf32") is (precision != "fp32")
                os.write(writer, repr(outcome()).encode())
            except BaseException as error:
                os.write(writer, repr(error).encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            outcomes.append(pipe.read().decode())
    assert outcomes[0].startswith("[") and outcomes[0] == outcomes[1] == outcomes[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a process of its own, and CUDA does not survive a fork")
def test_torchs_defaults_stay():
    """Those for convolutions follow what is above them, though not in torch 2.11, and cannot be put back once they were
    replaced.
    """
    program = """
import torch
from fastvae.training.precision import arithmetic
{before}
torch.backends.fp32_precision = "ieee"
print(torch.backends.cudnn.conv.fp32_precision)
torch.backends.fp32_precision = "none"
with arithmetic("fp32"):
    torch.backends.cudnn.flags(enabled=False)
print(torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.allow_tf32)
"""
    untouched, found = (
        subprocess.run(
            [sys.executable, "-c", program.format(before=before)], capture_output=True, text=True, check=True
        ).stdout.split()
        for before in ("", "with arithmetic('tf32'): pass")
    )
    assert found == [untouched[0], "tf32", "True"]


def test_precision_is_set_back_after_an_error(device):
    data = images(16, device)
    before = settings()
    with pytest.raises(FloatingPointError):
        train(small(device), data, data, Training(epochs=1, batch_size=8, learning_rate=1e30, precision="fp32"))
    assert settings() == before


def test_bfloat16_trains_as_float32_does(device):
    data = images(4, device).repeat(16, 1, 1, 1)
    losses = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(1)
        rows = train(
            small(device),
            data,
            data,
            Training(epochs=10, batch_size=8, learning_rate=0.01, precision=precision, graph="off"),
        )
        losses.append(rows[-1].loss)
        assert rows[-1].loss < 0.8 * rows[0].loss
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_precision_must_be_known(device):
    data = images(8, device)
    with pytest.raises(ValueError, match="precision must be one of fp32, tf32, bf16, got 'fp8'"):
        train(small(device), data, data, Training(epochs=1, batch_size=4, precision="fp8"))
