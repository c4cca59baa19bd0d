"""Which path a call takes and why, and what importing fastvae costs. What depends on the process runs in a new one."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import fastvae
import fastvae.functional as F
from fastvae import backend
from fastvae.operations import operations
from pairs import PAIRWISE

CPU = torch.device("cpu")


def stand_in(device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `backend_for` looks at, of a device that need not exist."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)  # type: ignore[return-value]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch):
    """Set the compute capability of CUDA devices."""

    def set_capability(major: int, minor: int, hip: str | None = None) -> None:
        properties = SimpleNamespace(major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.version, "hip", hip)

    return set_capability


# ------------------------------------------------------------------------------------------------------- the choice


def test_a_backend_is_a_name_and_a_reason() -> None:
    choice = fastvae.backend_for(torch.zeros(1))
    assert choice == ("reference", "CPU tensors run plain PyTorch") == (choice.name, choice.reason)
    assert str(choice) == "reference (CPU tensors run plain PyTorch)"


@pytest.mark.parametrize(("major", "minor"), [(8, 0), (8, 9), (9, 0), (10, 0)])
def test_auto_takes_triton_on_cards_of_capability_8_and_newer(card, major, minor) -> None:
    card(major, minor)
    assert fastvae.backend_for(stand_in("cuda:0")) == ("triton", "CUDA tensors run fused kernels")


@pytest.mark.parametrize(("major", "minor"), [(7, 5), (7, 0), (6, 1)])
def test_auto_takes_the_reference_on_older_cards(card, major, minor) -> None:
    card(major, minor)
    reason = f"compute capability {major}.{minor} is below the supported 8.0"
    assert fastvae.backend_for(stand_in("cuda:0")) == ("reference", reason)
    with fastvae.use_backend("triton"), pytest.raises(RuntimeError, match=reason):
        fastvae.backend_for(stand_in("cuda:0"))


def test_amd_cards_have_no_capability_to_ask_for(card) -> None:
    card(0, 0, hip="6.4")
    assert fastvae.backend_for(stand_in("cuda:0")).name == "triton"


def test_float64_is_a_reference_call(card) -> None:
    card(9, 0)
    reason = "float64 is computed by the reference path only"
    assert fastvae.backend_for(stand_in("cuda:0", torch.float64)) == ("reference", reason)
    for tensor in (stand_in("cuda:0", torch.float64), torch.zeros(1, dtype=torch.float64)):
        with fastvae.use_backend("triton"), pytest.raises(RuntimeError, match=reason):
            fastvae.backend_for(tensor)


def test_torch_compile_is_left_what_it_fuses_itself(card, monkeypatch) -> None:
    card(9, 0)
    tensor = stand_in("cuda:0")
    assert backend.choose(tensor, inductor_fuses=True).name == "triton"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    reason = "torch.compile fuses this operation with its neighbours"
    assert backend.choose(tensor, inductor_fuses=True) == ("reference", reason)
    assert backend.choose(tensor, inductor_fuses=False).name == "triton"
    with fastvae.use_backend("triton"):
        assert backend.choose(tensor, inductor_fuses=True) == ("triton", "asked for")


def test_which_operations_torch_compile_fuses_itself(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(
        "fastvae.functional.checks.choose",
        lambda tensor, inductor_fuses: asked.append(inductor_fuses) or backend.Backend("reference", "a test"),
    )
    x, kl = torch.zeros(2, 4), torch.zeros(2)
    F.gaussian_sample(x, x), F.gaussian_kl(x, x), F.gaussian_sample_kl(x, x), F.gaussian_sample_kl_packed(x)
    assert asked == [False] * 4
    asked.clear()
    F.sigmoid_mse_loss(x, x), F.elbo_loss(x, x, kl), F.elbo_value_and_grad(x, x, kl)
    assert asked == [True] * 3


@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
def test_other_devices_run_the_reference(device) -> None:
    reason = f"device type '{device}' has no Triton path"
    assert fastvae.backend_for(stand_in(device)) == ("reference", reason)
    with fastvae.use_backend("triton"), pytest.raises(RuntimeError, match=reason):
        fastvae.backend_for(stand_in(device))


def test_an_operation_on_meta_tensors_runs() -> None:
    logits = torch.zeros(2, 3, device="meta")
    assert F.sigmoid_mse_loss(logits, logits, reduction="none").shape == (2,)


def test_triton_not_installed(card, monkeypatch) -> None:
    card(9, 0)
    monkeypatch.setattr(backend, "_TRITON_INSTALLED", False)
    reason = "Triton is not installed (pip install triton)"
    assert fastvae.backend_for(stand_in("cuda:0")) == ("reference", reason)


def test_asked_for(triton_backend, device) -> None:
    tensor = torch.zeros(2, 3, device=device)
    assert fastvae.backend_for(tensor) == ("triton", "asked for")
    before = triton_backend.count
    F.sigmoid_mse_loss(tensor, tensor)
    assert triton_backend.count == before + 1
    with fastvae.use_backend("reference"):
        assert fastvae.backend_for(tensor) == ("reference", "asked for")
        F.sigmoid_mse_loss(tensor, tensor)
    assert triton_backend.count == before + 1


# --------------------------------------------------------------------------------------------------------- use_backend


def asked_for() -> str:
    """The backend asked for, as seen from outside: by what becomes of a float64 tensor on the CPU."""
    try:
        reason = fastvae.backend_for(torch.zeros(1, dtype=torch.float64)).reason
    except RuntimeError:
        return "triton"
    return "reference" if reason == "asked for" else "auto"


def test_use_backend_nests_and_restores() -> None:
    assert asked_for() == "auto"
    with fastvae.use_backend("triton"):
        assert asked_for() == "triton"
        with fastvae.use_backend("reference"):
            assert asked_for() == "reference"
            with fastvae.use_backend("auto"):
                assert asked_for() == "auto"
            assert asked_for() == "reference"
        assert asked_for() == "triton"
    assert asked_for() == "auto"


def test_use_backend_restores_after_an_exception() -> None:
    with pytest.raises(KeyError), fastvae.use_backend("reference"):
        raise KeyError
    assert asked_for() == "auto"


def test_use_backend_takes_effect_on_entry_and_can_be_used_again() -> None:
    choice = fastvae.use_backend("reference")
    assert asked_for() == "auto"
    for _ in range(2):
        with choice:
            assert asked_for() == "reference"
        assert asked_for() == "auto"


def test_use_backend_can_be_entered_while_it_is_entered() -> None:
    choice = fastvae.use_backend("reference")
    try:
        with choice:
            with choice:
                assert asked_for() == "reference"
            assert asked_for() == "reference"
        assert asked_for() == "auto"
    finally:
        backend._requested[:] = ["auto"]


def test_blocks_of_two_threads_need_not_be_nested() -> None:
    first, second = fastvae.use_backend("triton"), fastvae.use_backend("reference")
    first.__enter__()
    second.__enter__()
    assert asked_for() == "reference"
    first.__exit__(None, None, None)
    assert asked_for() == "reference"
    second.__exit__(None, None, None)
    assert asked_for() == "auto"


def test_four_threads_launch_at_once(device, triton_backend) -> None:
    """Triton's interpreter keeps where it is in globals of its own: one launch at a time there."""
    cases = [(torch.randn(3, 2500, device=device), torch.rand(3, 2500, device=device)) for _ in range(4)]
    expected = [F.sigmoid_mse_loss(*case, reduction="none") for case in cases]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(2):
            losses = list(threads.map(lambda case: F.sigmoid_mse_loss(*case, reduction="none"), cases))
            assert all(map(torch.equal, losses, expected))


@pytest.mark.parametrize("name", ["cuda", "Triton", "", None])
def test_use_backend_of_an_unknown_name(name) -> None:
    with pytest.raises(ValueError) as raised:
        fastvae.use_backend(name)
    assert str(raised.value) == f"name must be one of auto, reference, triton, got {name!r}"


# ---------------------------------------------------------------------------------------------------- other processes


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new process, without Triton's interpreter and a GPU unless `environment` says otherwise."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTVAE_BACKEND")}
    environment = {**inherited, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


def succeed(code: str, **environment: str) -> None:
    result = python(code, **environment)
    assert result.returncode == 0, result.stderr


def test_import_is_free() -> None:
    """Neither Triton nor CUDA is touched, nor what only models and figures need; and it takes no time beside torch."""
    succeed("""
import sys, time
import torch
by_torch = set(sys.modules)
start = time.process_time()  # what other processes do does not count
import fastvae
seconds = time.process_time() - start
own = set(sys.modules) - by_torch
heavy = {name for name in own if name.split(".")[0] in ("triton", "matplotlib", "sklearn", "tqdm", "scipy")}
assert not heavy, heavy
assert "fastvae.kernels" not in sys.modules
assert not torch.cuda.is_initialized()
assert seconds < 0.3, f"{seconds:.2f} s"
assert not {"fastvae.models", "fastvae.training", "fastvae.data"} & set(sys.modules)
assert fastvae.models.VAE and fastvae.training.train  # imported when they are asked for
""")


def test_the_environment_chooses() -> None:
    """FASTVAE_BACKEND is what use_backend overrides; CPU tensors need the interpreter, which the error says."""
    succeed(
        """
import torch, fastvae, fastvae.functional as F
x = torch.zeros(2, 3)
missing = "CPU tensors need Triton's interpreter (set TRITON_INTERPRET=1 before the first import of Triton)"
for function in (lambda: fastvae.backend_for(x), lambda: F.sigmoid_mse_loss(x, x), lambda: F.gaussian_kl(x, x)):
    try:
        function()
    except RuntimeError as error:
        assert str(error) == 'backend "triton" was asked for but cannot run: ' + missing, error
    else:
        raise AssertionError("no error")
with fastvae.use_backend("auto"):
    assert fastvae.backend_for(x) == ("reference", "CPU tensors run plain PyTorch")
with fastvae.use_backend("reference"):
    assert fastvae.backend_for(x) == ("reference", "asked for")
    assert F.sigmoid_mse_loss(x, x) == 0.75
""",
        FASTVAE_BACKEND="triton",
    )


def test_the_environment_and_the_interpreter() -> None:
    succeed(
        """
import torch, fastvae, fastvae.functional as F
x = torch.zeros(2, 3)
assert fastvae.backend_for(x) == ("triton", "asked for")
assert F.sigmoid_mse_loss(x, x) == 0.75
""",
        FASTVAE_BACKEND="triton",
        TRITON_INTERPRET="1",
    )


def test_an_unknown_name_in_the_environment() -> None:
    result = python("import fastvae", FASTVAE_BACKEND="cuda")
    assert result.returncode != 0
    message = "ValueError: environment variable FASTVAE_BACKEND must be one of auto, reference, triton, got 'cuda'"
    assert message in result.stderr


def test_without_triton() -> None:
    """Everything runs on the reference; only asking for Triton is an error, which says what to install."""
    succeed("""
import sys
sys.modules["triton"] = None  # `import triton` raises, and nothing finds it
import torch, fastvae, fastvae.functional as F
assert "fastvae.kernels" not in sys.modules
assert fastvae.backend_for(torch.zeros(1)) == ("reference", "CPU tensors run plain PyTorch")
logits, mu = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
z, kl = F.gaussian_sample_kl(mu, mu)
assert F.gaussian_sample(mu, mu).shape == F.gaussian_sample_kl_packed(torch.zeros(2, 6))[0].shape == (2, 3)
(F.elbo_loss(logits, mu, kl).loss + F.sigmoid_mse_loss(logits, mu) + F.gaussian_kl(mu, mu) + z.sum()).backward()
F.elbo_value_and_grad(logits, mu, kl)
for module in (fastvae.nn.SigmoidMSELoss(), fastvae.nn.GaussianKL()):
    module(logits, mu)
for function in (F.sigmoid_mse_loss, F.gaussian_kl, F.gaussian_sample):
    with fastvae.use_backend("triton"):
        try:
            function(logits, mu)
        except RuntimeError as error:
            expected = 'backend "triton" was asked for but cannot run: Triton is not installed (pip install triton)'
            assert str(error) == expected, error
        else:
            raise AssertionError("no error")
assert "fastvae.kernels" not in sys.modules
""")


def test_missing_kernels_are_an_import_error() -> None:
    """Never a silent fallback to the reference."""
    succeed(
        """
import sys
sys.modules["fastvae.kernels"] = None
import torch, fastvae, fastvae.functional as F
x = torch.zeros(2, 3)
for name in ("triton", "auto"):
    with fastvae.use_backend(name):
        if name == "auto":  # as on a GPU
            fastvae.functional.likelihood.takes_triton = lambda *tensors, **named: True
        try:
            F.sigmoid_mse_loss(x, x)
        except ImportError as error:
            assert "kernels" in str(error), error
        else:
            raise AssertionError("no error")
""",
        TRITON_INTERPRET="1",
    )


@pytest.mark.skipif(torch.cuda.is_available() or sys.platform == "win32", reason="forks, on Triton's interpreter")
def test_every_operation_may_be_the_first_of_a_process():
    functions = {it.function for it in operations()} | set(PAIRWISE)
    assert functions == {name for name in F.__all__ if name.islower()}
    command = [sys.executable, Path(__file__).with_name("first_calls.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "", done.stderr
