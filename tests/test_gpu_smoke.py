"""benchmarks/gpu_smoke.py on the interpreter: it passes, it can fail, and it leaves no operation out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastvae.functional as F
from fastvae.operations import operations

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("needs the benchmarks of the source tree", allow_module_level=True)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="benchmarks/gpu_smoke.py itself runs on a GPU")


@pytest.fixture
def gpu_smoke(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_smoke

    return gpu_smoke


@pytest.fixture
def small(gpu_smoke, monkeypatch):
    """The checks of one dtype and one small shape of each kind."""
    monkeypatch.setattr(gpu_smoke, "TURNS", gpu_smoke.TURNS[:1])
    monkeypatch.setattr(gpu_smoke, "LATENTS", (((4, 8, 6, 5), torch.channels_last),))
    monkeypatch.setattr(gpu_smoke, "IMAGES", (((2, 3, 7, 5), torch.contiguous_format),))
    return list(gpu_smoke.checks(torch.device("cpu")))


def test_every_public_operation_is_checked_and_right(gpu_smoke, small, capsys):
    names = {it.name: it.function for it in operations()} | {name: name for name in ("noise", *gpu_smoke.OBJECTIVES)}
    assert {names[name.split()[0]] for name, _ in small} == set(names.values())
    assert gpu_smoke.run(small, 0, 1) == 0
    assert capsys.readouterr().out.endswith(f"{len(small)} checks passed, 0 failed\n")


def test_each_operation_has_every_dtype_and_the_checks_fit_their_time(gpu_smoke):
    """A check compiles two kernels, for 1.6 seconds on one core."""
    from evidence_parts import SMOKE_SHARDS, Command

    names = [name.split() for name, _ in gpu_smoke.checks(torch.device("cpu"))]
    for operation in (it for it in operations() if it.computes or it.measured):
        for dtype in ("float32", "bfloat16", "float16"):
            assert any(operation.name == name[0] and dtype in name for name in names), (operation.name, dtype)
    limit = Command(Path(), None, rehearse=False).smoke(0).seconds
    assert 1.6 * len(names) / SMOKE_SHARDS < 0.6 * limit


def test_the_shards_share_the_checks(gpu_smoke, capsys):
    names = []
    checks = [(str(number), lambda number=number: names.append(number)) for number in range(7)]
    for shard in range(3):
        gpu_smoke.run(checks, shard, 3)
    assert sorted(names) == list(range(7))


@pytest.mark.parametrize(
    ("operation", "wrong"),
    [
        ("gaussian_kl", lambda result: 1.0001 * result),
        ("gaussian_sample", lambda result: result * float("nan")),
        ("sigmoid_mse_loss", lambda result: result[None]),
    ],
    ids=["off", "nan", "shape"],
)
def test_a_wrong_result_fails(gpu_smoke, small, monkeypatch, capsys, operation, wrong):
    """Of the fused path, which is the one with float32 inputs."""
    right = getattr(F, operation)

    def planted(tensor, *arguments, **options):
        result = right(tensor, *arguments, **options)
        return wrong(result) if tensor.dtype is torch.float32 else result

    monkeypatch.setattr(F, operation, planted)
    checks = [check for check in small if check[0].split()[0] == operation]
    assert gpu_smoke.run(checks, 0, 1) == len(checks) > 0
    assert "FAIL" in capsys.readouterr().out


def test_a_check_that_raises_fails_alone(gpu_smoke, capsys):
    def broken():
        raise RuntimeError("CUDA error: an illegal\nmemory access")

    assert gpu_smoke.run([("broken", broken), ("good", lambda: "fine")], 0, 1) == 1
    out = capsys.readouterr().out
    assert "broken: RuntimeError: CUDA error: an illegal memory access\n" in out
    assert "ok" in out and "1 checks passed, 1 failed" in out


def test_noise_that_repeats_or_is_not_normal_fails(gpu_smoke, monkeypatch):
    zeros = torch.zeros(64, 64)
    monkeypatch.setattr(F, "gaussian_sample", lambda mu, logvar: torch.full_like(mu, 0.5))
    with pytest.raises(AssertionError, match="two calls drew the same noise"):
        gpu_smoke.noise(zeros)
    monkeypatch.setattr(F, "gaussian_sample", lambda mu, logvar: 1.5 * torch.randn_like(mu))
    with pytest.raises(AssertionError, match="moment 2"):
        gpu_smoke.noise(zeros)
