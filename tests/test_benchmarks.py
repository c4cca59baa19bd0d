"""The benchmarks: that wrong results are noticed, that every line of the path for a GPU runs, what the report says.

The GPU is a stand-in here. Each attribute of torch.cuda that is used must exist in the real one and take these
arguments, so that a name or an argument that only a GPU would have tried cannot be wrong.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import math
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("needs the benchmarks of the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
# ruff: noqa: E402  # what is imported now need not be there
import devices
import measure
import report
import training_step
from cases import GAUSSIAN, OPERATIONS, SHAPES, Case, headline, matrix
from devices import CUDA, quartiles
from fastvae.kernels import INTERPRETED
from judge import complaint
from providers import BUILDERS, PROVIDERS, OperationSubject

CPU = torch.device("cpu")
PACKED = Case("gaussian_sample_kl_packed", "bandwidth", True, sizes="smoke")
# Bytes that a float32 element of some operations costs at least, forward and backward: what is read and written once.
BYTES = {
    "gaussian_sample": (8 + 4, 4 + 4 + 8),  # mu, logvar, z; logvar, the gradient of z, two gradients
    "gaussian_kl": (8, 8 + 8),
    "gaussian_sample_kl_packed": (8 + 4, 8 + 4 + 8),
    "sigmoid_mse_loss": (8, 8 + 4),
    "elbo_value_and_grad": (8 + 4, None),
}


# ----------------------------------------------------------------------------------------------------------- the cases


@pytest.mark.parametrize("sizes", SHAPES)
def test_the_matrix_and_its_headline(sizes):
    every, chosen = list(matrix(sizes)), headline(sizes)
    assert len(set(every)) == len({str(case) for case in every}) == len(every)
    assert len(set(chosen)) == len(chosen) <= 15  # 16 with the training step
    assert set(chosen) <= set(every)
    for case in (case for case in every if case.operation in BYTES):
        forward, backward = BYTES[case.operation]
        per_element = (forward + backward if case.backward else forward) / (2 if case.dtype == "bfloat16" else 1)
        assert case.compulsory_bytes == per_element * case.elements
        assert not (case.backward and backward is None)
    if sizes == "cuda":
        assert all(case.elements >= 64_000_000 for case in every if case.regime == "bandwidth")
    json.dumps([case.as_dict() for case in every])


def test_inputs():
    for case in matrix("smoke"):
        first, same, other = (case.inputs(CPU, seed) for seed in (0, 0, 1))
        assert len(first.leaves) == (sum(name != "target" for name in first_names(case)) if case.backward else 0)
        for a, b, c in zip(first.tensors, same.tensors, other.tensors, strict=True):
            assert torch.equal(a, b)
            assert a.ndim == 1 or not torch.equal(a, c)  # the divergences are a constant
        if case.channels_last:
            images = [tensor for tensor in (*first.tensors, *first.upstream) if tensor.ndim == 4]
            assert images
            for tensor in images:
                assert tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
        if case.backward and case.operation != "gaussian_sample":
            assert (first.upstream[-1] == 1) == case.unit_gradient
        assert first.bytes == sum(tensor.nbytes for tensor in first.tensors)
        assert first.tensors[0].shape == case.shape or case.operation in GAUSSIAN


def first_names(case):
    return OPERATIONS[case.operation].arguments


# ----------------------------------------------------------------------------------------------------------- the judge


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("provider", ["eager", "fused"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_right_results_pass(operation, provider, dtype, device):
    directions = [False] if OPERATIONS[operation].backward is None else [False, True]
    for case in (Case(operation, "medium", backward, dtype, sizes="smoke") for backward in directions):
        inputs = case.inputs(device, 0)
        assert complaint(case, inputs, BUILDERS[provider](case)(inputs)) is None


def scaled(index, factor):
    def plant(results, inputs):
        results[index] = results[index] * factor

    return plant


def unwritten(index, value):
    def plant(results, inputs):
        results[index] = results[index].detach().clone()
        results[index].flatten(1)[-1:, -64:] = value  # a block of the last row

    return plant


def noise_of(function):
    """z with other noise, and the gradients that belong to it."""

    def plant(results, inputs):
        mu, logvar = inputs.tensors[0].detach().double().chunk(2, 1)
        deviation = torch.exp(0.5 * logvar)
        dtype = results[0].dtype
        z = (mu + deviation * function((results[0].detach() - mu) / deviation)).to(dtype)
        z_grad, kl_grad = inputs.upstream[0].double(), inputs.upstream[1].double() / len(mu)
        logvar_grad = 0.5 * (z_grad * (z - mu) + kl_grad * torch.expm1(logvar))
        results[0] = z
        results[2] = torch.cat((z_grad + kl_grad * mu, logvar_grad), 1).to(dtype)

    return plant


def reshaped(index):
    def plant(results, inputs):
        results[index] = results[index].unsqueeze(0)

    return plant


def stale(results, inputs):
    """The second half of the packed gradient holds what another call left there."""
    results[2] = results[2].clone()
    mu_grad, logvar_grad = results[2].chunk(2, 1)
    logvar_grad.copy_(mu_grad)


def half_factor(results, inputs):
    results[2] = results[2].clone()
    results[2].chunk(2, 1)[1].mul_(1.05)


def wrong_dtype(results, inputs):
    results[0] = results[0].half()


NOISY_ERRORS = {
    "none": (lambda results, inputs: None, None),
    "the same noise, written anew": (noise_of(lambda noise: noise), None),
    "a factor in one gradient": (half_factor, "the gradient of logvar"),
    "a stale half": (stale, "the gradient of logvar"),
    "a gradient's block of zeros": (unwritten(2, 0.0), "the gradient of"),
    "a gradient's block of NaN": (unwritten(2, math.nan), "the gradient of"),
    "z with a NaN": (unwritten(0, math.nan), "the noise has mean"),
    "noise of variance 1.21": (noise_of(lambda noise: 1.1 * noise), "variance"),
    "noise of mean 0.1": (noise_of(lambda noise: noise + 0.1), "mean"),
    "z = mu": (noise_of(lambda noise: 0.0 * noise), "variance"),
    "a divergence off by 1e-4": (scaled(1, 1 + 1e-4), "the divergence"),
    "a divergence of NaN": (scaled(1, math.nan), "the divergence"),
    "z of another shape": (reshaped(0), "z is"),
    "z of another dtype": (wrong_dtype, "z is"),
    "a divergence of another shape": (reshaped(1), "shape"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("error", NOISY_ERRORS)
def test_wrong_samples_fail(error, dtype, device):
    plant, expected = NOISY_ERRORS[error]
    case = Case("gaussian_sample_kl_packed", "bandwidth", True, dtype, unit_gradient=False, sizes="smoke")
    assert_judged(case, device, plant, expected)


LOSS_ERRORS = {
    "none": (lambda results, inputs: None, None),
    "a loss off by 1e-4": (scaled(0, 1 + 1e-4), "result 0"),
    "a factor in the gradient": (scaled(-1, 1.05), "is off by"),
    "a gradient's block of zeros": (unwritten(1, 0.0), "result 1"),
    "a gradient's block of NaN": (unwritten(1, math.nan), "result 1"),
    "a gradient of another shape": (reshaped(1), "shape"),
    "a result too few": (lambda results, inputs: results.pop(), "results instead of"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operation", ["sigmoid_mse_loss", "elbo_loss"])
@pytest.mark.parametrize("error", LOSS_ERRORS)
def test_wrong_losses_fail(error, operation, dtype, device):
    plant, expected = LOSS_ERRORS[error]
    assert_judged(Case(operation, "bandwidth", True, dtype, sizes="smoke"), device, plant, expected)


@pytest.mark.parametrize("index", range(5))
def test_each_value_and_gradient_is_judged(index, device):
    case = Case("elbo_value_and_grad", "bandwidth", False, sizes="smoke")
    assert_judged(case, device, scaled(index, 1 + 1e-4), f"result {index}")


def assert_judged(case, device, plant, expected):
    inputs = case.inputs(device, 0)
    results = list(BUILDERS["eager"](case)(inputs))
    plant(results, inputs)
    found = complaint(case, inputs, tuple(results))
    assert found is None if expected is None else found is not None and expected in found, found


def test_training_is_judged(monkeypatch):
    subject = training_step.TrainingSubject(batch_size=8, judged_steps=12)
    subject.prepare(CPU, lambda _: 1)
    try:
        assert subject.complaint("eager", subject.build("eager")) is None
        monkeypatch.setattr(training_step, "LEARNING_RATE", 1e-5)
        assert "the loss after 12 steps" in subject.complaint("eager", subject.build("eager"))
    finally:
        subject.release()


# -------------------------------------------------------------------------------------------- a GPU that is not there


class Checked:
    """An object whose calls are first bound to the signatures of the real thing."""

    def __init__(self, real, stand_in):
        self._real, self._stand_in = real, stand_in

    def __getattr__(self, name):
        real = getattr(self._real, name)  # an AttributeError is a typo in the benchmarks
        found = getattr(self._stand_in, name)
        if not callable(found):
            return found

        def call(*arguments, **options):
            # A method is looked up on its class, where self comes first.
            this = (None,) if inspect.isclass(self._real) else ()
            inspect.signature(real).bind(*this, *arguments, **options)
            return found(*arguments, **options)

        return call


class Machine:
    """What torch.cuda does, in order, on the host's clock. `log` says what happened."""

    def __init__(self):
        self.log = []
        self.streams = ["default"]
        self.capturing = False

    def api(self):
        return Checked(torch.cuda, self)

    def current_device(self):
        return 0

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=1 << 14, name="a stand-in")

    def synchronize(self, device=None):
        assert not self.capturing, "a capture may not wait"
        self.log.append("synchronize")

    def Stream(self, device=None):
        return Checked(torch.cuda.Stream, SimpleNamespace(wait_stream=lambda other: None, name="side"))

    def current_stream(self, device=None):
        name = self.streams[-1]
        return Checked(torch.cuda.Stream, SimpleNamespace(wait_stream=lambda other: None, name=name))

    @contextmanager
    def stream(self, stream):
        depth = len(self.streams)
        self.streams.append(stream._stand_in.name)
        try:
            yield
        finally:
            del self.streams[depth:]

    @property
    def default_generators(self):
        return [SimpleNamespace(clone_state=lambda: "state", graphsafe_set_state=self.log.append)]

    def CUDAGraph(self):
        def replay():
            assert not self.capturing
            self.log.append("replay")
            time.sleep(1e-4)

        return Checked(torch.cuda.CUDAGraph, SimpleNamespace(replay=replay))

    def graph(self, graph, capture_error_mode="global"):
        machine = self

        class Capture:
            def __enter__(self):
                machine.log.append("capture")
                machine.streams.append("capture")
                machine.capturing = True

            def __exit__(self, kind, error, traceback):
                machine.capturing = False
                if error is not None:  # as in torch, before the stream is put back
                    raise RuntimeError("operation failed due to a previous error during capture")
                machine.streams.pop()

        return Capture()

    def Event(self, enable_timing=False):
        assert enable_timing
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", time.perf_counter())
        event.synchronize = lambda: None
        event.elapsed_time = lambda other: (other._stand_in.at - event.at) * 1e3
        return Checked(torch.cuda.Event, event)

    def reset_peak_memory_stats(self, device=None):
        self.peak = 1000

    def memory_allocated(self, device=None):
        return 1000

    def max_memory_allocated(self, device=None):
        return self.peak + 234


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(devices, "GIBIBYTE", 1 << 12)
    monkeypatch.setattr(measure, "MAX_ROUNDS", 6)
    return Machine()


@pytest.fixture
def gpu(machine):
    return CUDA(api=machine.api(), device=CPU)


def test_what_the_stand_in_stands_for():
    real = getattr(torch._C, "_CudaDeviceProperties", None)  # not in builds without CUDA
    if real is not None:
        assert hasattr(real, "L2_cache_size") and hasattr(real, "name")
    api = Machine().api()
    with pytest.raises(AttributeError):
        api.syncronize()
    with pytest.raises(TypeError):
        api.synchronize(devices=CPU)
    assert "capture_error_mode" in inspect.signature(torch.cuda.graph).parameters
    assert callable(torch.compiler.reset) and callable(torch.compiler.cudagraph_mark_step_begin)


def test_device(gpu, machine):
    assert gpu.description == "a stand-in"
    assert gpu.input_sets(1 << 40) == 1 and gpu.input_sets(1 << 13) == 4 and gpu.input_sets(1) == 32
    assert gpu.copy_bandwidth() > 0
    assert gpu.extra_bytes(lambda index: machine.log.append("call")) == 234
    calls = []
    assert gpu.host_seconds(calls.append, 3) > 0
    assert calls == [index % 3 for index in range(devices.HOST_CALLS)]
    assert gpu.call_seconds(calls.append, 5, 2) > 0 and calls[-5:] == [0, 1, 0, 1, 0]
    assert 1 <= gpu.calls_per_round(calls.append) <= 1000


def test_capture(gpu, machine):
    where = []
    replay = gpu.capture(lambda index: where.append((machine.streams[-1], index)), sets=4)
    # Warm on a side stream, then each set once.
    assert where == [("side", index) for index in range(3)] + [("capture", index) for index in range(4)]
    assert machine.log == ["synchronize", "capture", "replay", "synchronize"]
    assert machine.streams == ["default"]
    assert 1e-5 < gpu.graph_seconds(replay, 4) < 1.0


def test_capture_that_fails_leaves_the_stream_and_the_generator(gpu, machine):
    def call(index):
        if machine.capturing:
            raise ValueError("not under capture")

    with pytest.raises(RuntimeError, match="during capture"):
        gpu.capture(call, 1)
    assert machine.streams == ["default"]
    assert machine.log[-1] == "state"  # of the generator, put back


def function_event(kind, annotation=False):
    return FunctionEvent(
        id=0, name="", thread=0, start_us=0, end_us=1, device_type=kind, is_user_annotation=annotation
    )  # fmt: skip


def profiler_that_sees(*events):
    @contextmanager
    def profile(activities):
        yield SimpleNamespace(events=lambda: events)

    inspect.signature(torch.profiler.profile).bind(activities=[])
    assert hasattr(torch.profiler.profile, "events")
    return profile


def test_launches(gpu):
    kernel, host = function_event(DeviceType.CUDA), function_event(DeviceType.CPU)
    marked = function_event(DeviceType.CUDA, annotation=True)
    calls = []
    assert gpu.launches(calls.append, profiler_that_sees(host, kernel, marked, kernel, host)) == 2
    assert calls == [0]
    assert gpu.launches(calls.append, profiler_that_sees(host)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="sees what the device does")
@pytest.mark.filterwarnings("ignore")  # that there is no CUDA to profile
def test_the_real_profiler_runs(gpu):
    assert gpu.launches(lambda index: torch.ones(3) + 1) is None


# --------------------------------------------------------------------------------------------------------- measuring


# The others compute the training step alone.
OF_THE_STEP = ("textbook", "compile-nchw", "compile-nchw-graph", "jax")
ALL = tuple(name for name in PROVIDERS if name not in OF_THE_STEP)
SMALL = Case("sigmoid_mse_loss", "launch", True, sizes="smoke")


class Built(OperationSubject):
    """SMALL, with eager PyTorch for every provider but these."""

    def __init__(self, **changed):
        super().__init__(SMALL)
        self.changed = changed

    def build(self, name):
        step = self.changed.get(name.replace("-", "_"), BUILDERS["eager"])(SMALL)
        return lambda index: step(self._inputs[index])


def test_measure(gpu, machine):
    found = measure.measure(Built(), gpu, ALL, budget=0.0)
    assert set(found) == set(ALL)
    for name, it in found.items():
        assert it.failure is None and it.uncaptured is None and it.first > 0, name
        assert len(it.call) == measure.MIN_ROUNDS
        own = PROVIDERS[name].base is None
        assert bool(it.host) == own
        assert bool(it.gpu) == PROVIDERS[name].capturable
        assert it.extra_bytes == (234 if own and PROVIDERS[name].capturable else None)
        as_dict = it.as_dict()
        assert as_dict["call_seconds"] == quartiles(it.call)
        times = it.gpu or it.call
        assert as_dict["bytes_per_second"] == SMALL.compulsory_bytes / quartiles(times)[1]
    assert found["fused-graph"].call == found["fused"].gpu and found["fused-graph"].gpu == found["fused"].gpu
    assert found["compile-graph"].call == found["compile"].gpu
    assert machine.log.count("capture") == 3
    assert machine.streams == ["default"]


def test_input_sets_in_turn_but_for_max_autotune(gpu):
    """Its CUDA graphs know the inputs that they read by address."""
    seen = {"eager": set(), "compile-max-autotune": set()}

    def recording(name):
        def build(case):
            step = BUILDERS["eager"](case)

            def record(inputs):
                seen[name].add(inputs.tensors[0].data_ptr())
                return step(inputs)

            return record

        return build

    changed = {name.replace("-", "_"): recording(name) for name in seen}
    measure.measure(Built(**changed), gpu, tuple(seen), budget=0.0)
    assert len(seen["eager"]) > 1 and len(seen["compile-max-autotune"]) == 1


def test_a_provider_that_fails_fails_alone(gpu, machine):
    eager = BUILDERS["eager"]

    def uncapturable(case):
        def step(inputs):
            if machine.capturing:
                raise ValueError("not under capture")
            return eager(case)(inputs)

        return step

    def unbuildable(case):
        raise NotImplementedError("two\nlines")

    def wrong(case):
        def step(inputs):
            loss, gradient = eager(case)(inputs)
            return loss, 2 * gradient

        return step

    subject = Built(compile=uncapturable, compile_max_autotune=unbuildable, fused=wrong)
    found = measure.measure(subject, gpu, ALL, budget=0.0)
    assert found["eager"].failure is None and found["eager"].gpu
    assert found["compile"].failure is None and found["compile"].call and not found["compile"].gpu
    assert "during capture" in found["compile"].uncaptured
    assert found["compile-graph"].failure == found["compile"].uncaptured and not found["compile-graph"].call
    assert found["compile-max-autotune"].failure == "NotImplementedError: two"
    for name in ("fused", "fused-graph"):
        assert "result 1 is off by" in found[name].failure and not found[name].call
    assert machine.streams == ["default"]


def test_a_provider_that_fails_while_timed(gpu):
    def tiring(case):
        step, calls = BUILDERS["eager"](case), []

        def tired(inputs):
            calls.append(inputs)
            if len(calls) > 60:  # 39 until it is timed, and at least 21 in each of 5 rounds
                raise MemoryError("no more")
            return step(inputs)

        return tired

    found = measure.measure(Built(fused=tiring), gpu, ALL, budget=0.0)
    assert found["fused"].failure == "MemoryError: no more"
    assert found["fused-graph"].failure == "MemoryError: no more"
    assert not any((found["fused"].call, found["fused"].host, found["fused-graph"].call))
    assert len(found["compile"].call) == measure.MIN_ROUNDS


def test_inputs_that_do_not_fit(gpu, monkeypatch):
    subject = Built()

    def refuse(device, seed):
        raise torch.OutOfMemoryError("too much")

    with monkeypatch.context() as patch:
        patch.setattr(Case, "inputs", lambda self, device, seed: refuse(device, seed))
        found = measure.measure(subject, gpu, ALL, budget=0.0)
        assert {it.failure for it in found.values()} == {"OutOfMemoryError: too much"}
        assert measure.count_launches(subject, gpu, ["eager"]) == {"eager": None}
    assert measure.measure(subject, gpu, ["eager"], budget=0.0)["eager"].failure is None


def test_the_budget_is_kept(gpu):
    assert len(measure.measure(Built(), gpu, ["eager"], budget=60.0)["eager"].call) == measure.MAX_ROUNDS


# ------------------------------------------------------------------------------------------- what conftest.py arranges


@pytest.fixture
def session_module(monkeypatch, machine):
    """benchmarks/conftest.py, with the stand-in for its device."""
    spec = importlib.util.spec_from_file_location("benchmarks_conftest", BENCHMARKS / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class StandIn(CUDA):
        def __init__(self):
            super().__init__(machine.api(), CPU)

    monkeypatch.setattr(module, "CUDA", StandIn)
    monkeypatch.setattr(module, "CPU", StandIn)
    monkeypatch.setattr(module, "BUDGET", 0.0)
    return module


def test_a_session_on_a_gpu(session_module, tmp_path, monkeypatch):
    session = session_module.Session(tmp_path, planned=1, limit=1e9)
    subject = Built()
    found = session.measured(subject)
    assert set(found) == set(ALL) and session.measured(subject) is found
    assert session.not_measured() is None
    kernel = function_event(DeviceType.CUDA)
    monkeypatch.setattr(torch.profiler, "profile", profiler_that_sees(kernel, kernel, kernel))
    session.count_launches()
    (cell,) = json.loads((tmp_path / "benchmarks.json").read_text())["cells"]
    launches = {name: it["launches"] for name, it in cell["providers"].items()}
    assert launches == {name: None if PROVIDERS[name].base else 3 for name in ALL}
    assert cell["case"] == str(SMALL) and cell["elements"] == SMALL.elements
    assert (tmp_path / "benchmarks.png").stat().st_size > 1000


def test_a_session_that_is_short_of_time(session_module, tmp_path):
    session = session_module.Session(tmp_path, planned=1, limit=0.0)
    assert set(session.measured(Built())) == set(ALL) - {"compile-max-autotune"}
    session.count_launches()
    assert session.run["cells"][0]["providers"]["eager"]["launches"] is None


def test_the_default_limit_leaves_time_for_all(session_module):
    parser = pytest.Parser(_ispytest=True)
    session_module.pytest_addoption(parser)
    limit = parser.parse([]).limit
    cases = len(headline("cuda")) + 1
    each = session_module.BUDGET + session_module.COMPILATION + session_module.LAUNCH_COUNT
    assert cases * each + session_module.SEARCH < limit < 480


FAST = """
import measure, providers
measure.MAX_ROUNDS = 7
providers.PROVIDERS["compile"] = providers.PROVIDERS["compile"]._replace(on_cpu=False)  # would take a minute
import devices
devices.GIBIBYTE = 1 << 16
"""


def run_pytest(folder, *options):
    (folder / "fast.py").write_text(FAST)
    path = os.pathsep.join((str(folder), str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "fast", "-p", "no:cacheprovider", str(BENCHMARKS)]
    # As from a shell: pytest-benchmark measures nothing in a process of pytest-xdist's.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [*command, *options],
        cwd=BENCHMARKS.parent,
        env=inherited | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--part", "1"], "--part needs --benchmark"), (["--benchmark", "--part", "99"], "--part must be 1 to")],
)
def test_options_that_make_no_sense(tmp_path, options, message):
    ran = run_pytest(tmp_path, "--collect-only", *options)
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR, ran.stdout + ran.stderr
    assert message in ran.stdout + ran.stderr


@pytest.mark.slow
def test_times_reach_pytest_benchmark_unchanged(tmp_path):
    saved, folder = tmp_path / "saved.json", tmp_path / "report"
    selection = ["-k", "launch and (sigmoid_mse_loss or elbo_value_and_grad)"]
    ran = run_pytest(tmp_path, "--benchmark", *selection, "--benchmark-json", saved, "--report", folder)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "No CUDA device, so not measured" in ran.stdout
    own = json.loads((folder / "benchmarks.json").read_text())
    benchmarks = json.loads(saved.read_text())["benchmarks"]
    assert len(benchmarks) == len(own["cells"]) == 2
    for benchmark in benchmarks:
        (cell,) = [cell for cell in own["cells"] if cell["case"] == benchmark["group"]]
        measured = cell["providers"]["eager"]
        assert benchmark["extra_info"] == measured
        assert len(benchmark["stats"]["data"]) == 7
        assert list(quartiles(benchmark["stats"]["data"])) == measured["call_seconds"]
    # What says most first, whatever the file it is in.
    assert [cell["operation"] for cell in own["cells"]] == ["elbo_value_and_grad", "sigmoid_mse_loss"]


# ---------------------------------------------------------------------------------------------------------- the report

SPEEDUPS = {"eager": 8.0, "compile": 3.0, "compile-max-autotune": 2.5, "compile-graph": 2.0, "fused": 1.5}
SPEEDUPS |= {"fused-graph": 1.25}
COPIED = 4e12


def synthetic_cell(case):
    """Each provider takes so many times what copying its compulsory bytes takes."""
    providers = {}
    for name, factor in SPEEDUPS.items():
        it = measure.Measurement(name, case.compulsory_bytes, first=1.5, call=[1e-6, 3e-6, 4e-6])
        median = factor * case.compulsory_bytes / COPIED
        it.call = [0.9 * median, median, 1.3 * median]
        if PROVIDERS[name].capturable:
            it.gpu = it.call
        if not PROVIDERS[name].base:
            it.host, it.extra_bytes, it.launches = [2e-6], 4096, 7
        providers[name] = it.as_dict()
    return {
        "case": str(case),
        **case.as_dict(),
        "compulsory_bytes": case.compulsory_bytes,
        "providers": providers,
    }


@pytest.fixture
def results():
    return {
        "device": "A card",
        "device_type": "cuda",
        "versions": {"torch": "1", "triton": "2", "fastvae": "3", "python": "4"},
        "commit": None,
        "sources": "0123456789ab",
        "copy_bandwidth": COPIED,
        "cells": [synthetic_cell(case) for case in headline("cuda")],
    }


def test_the_page(results):
    page = report.markdown(results)
    assert "Nowhere in this run." in page and "FAIL" not in page
    assert "commit unknown" in page and "4,000 GB/s" in page
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines() if line.startswith("| ")}
    assert {str(case) for case in headline("cuda")} <= set(rows)
    device = page.split("## Time on the device")[1].split("##")[0]
    # 1 / 1.5 of the copy.
    assert device.count("(2,667 GB/s, 67%)") == len(headline("cuda"))
    assert "compile-max-autotune" not in device and "fused-graph" not in device
    calls = page.split("## Time on the device")[0]
    bold = [line for line in calls.splitlines() if "**" in line]
    assert len(bold) == 15 and all(line.rstrip(" |").endswith("**") for line in bold)  # the last column, fused-graph
    assert "4,096 B" in page and "1.50 s" in page


def test_the_page_lists_losses_and_failures(results):
    slow, wrong, missing, uncaptured = (cell["providers"] for cell in results["cells"][:4])
    slow["fused"]["call_seconds"] = [x * 4 for x in slow["fused"]["call_seconds"]]  # 6 times the floor
    wrong["fused"] = measure.Measurement("fused", 1, failure="the loss is off").as_dict()
    del missing["compile-max-autotune"]
    uncaptured["compile"]["uncaptured"] = "why not"
    page = report.markdown(results)
    names = [cell["case"] for cell in results["cells"]]
    losses = page.split("## Where fastvae loses")[1].strip().splitlines()
    assert losses == [
        f"- {names[0]}: fused takes 2.00 times as long as compile",
        f"- {names[0]}: fused takes 2.40 times as long as compile-max-autotune",
        f"- {names[1]}: fused failed",
    ]
    assert f"- FAIL: {names[1]}, fused: the loss is off" in page
    assert f"- no graph: {names[3]}, compile: why not" in page
    row = next(line for line in page.splitlines() if line.startswith(f"| {names[1]} "))
    assert row.count("FAIL") == 1
    row = next(line for line in page.splitlines() if line.startswith(f"| {names[2]} "))
    assert row.split(" | ")[3].strip() == ""


def test_the_page_of_a_cpu(results):
    results["device_type"] = "cpu"
    for cell in results["cells"]:
        cell["providers"] = {name: cell["providers"][name] for name in ("eager", "compile")}
    page = report.markdown(results)
    assert "this machine has no CUDA device" in page
    assert "Time on the device" not in page and "Launches" not in page


def test_the_page_of_nothing(results, tmp_path):
    results["cells"] = []
    report.write(tmp_path, results)
    assert "## Where fastvae loses" in (tmp_path / "benchmarks.md").read_text()


def test_a_provider_that_only_some_cells_have_is_shown(results):
    """Some have the training step alone, which may lack another provider."""
    results["cells"] = results["cells"][:1]
    training = copy.deepcopy(results["cells"][0]) | {"case": "training_step", "compulsory_bytes": None}
    training["providers"]["jax"] = training["providers"].pop("compile-max-autotune")
    for name in OF_THE_STEP:
        training["providers"][name] = training["providers"]["jax"]
    results["cells"].append(training)
    header = next(line for line in report.markdown(results).splitlines() if line.startswith("| case | textbook"))
    assert header == f"| case | {' | '.join(PROVIDERS)} |"
    assert set(report.COLORS) == set(PROVIDERS)


def test_the_figure(results, tmp_path, monkeypatch):
    figures = []
    from matplotlib.figure import Figure

    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    report.plot(tmp_path / "figure.png", results)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*ALL, "floor: bytes / copy bandwidth"]
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width  # nothing of it is cut off
    for axes in figure.axes:
        lines = {line.get_label(): line for line in axes.lines}
        sizes, times = lines["fused"].get_data()
        assert len(sizes) == 3 and list(sizes) == sorted(sizes)
        floor = lines["floor: bytes / copy bandwidth"].get_ydata()
        assert floor[0] < floor[1] and times[-1] > 0
    words = {text.get_text() for text in figure.axes[0].texts}
    assert words == {"bandwidth-bound"}  # every time is a multiple of the floor, so nothing is launch-bound


def test_launches_are_seen_in_the_figure(results, tmp_path, monkeypatch):
    for cell in results["cells"]:
        for it in cell["providers"].values():
            it["call_seconds"] = [seconds + 2e-5 for seconds in it["call_seconds"]]
    words = []
    from matplotlib.axes import Axes

    text = Axes.text
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, *a, **k: (words.append(s), text(self, x, y, s, *a, **k))[1])
    report.plot(tmp_path / "figure.png", results)
    assert words.count("launch-bound") == words.count("bandwidth-bound") == 2


def test_files_are_whole_or_absent(results, tmp_path, monkeypatch):
    report.write(tmp_path, results)
    before = (tmp_path / "benchmarks.png").read_bytes()
    from matplotlib.figure import Figure

    def half(self, file, **options):
        file.write(b"half of a picture")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        report.write(tmp_path, results)
    assert (tmp_path / "benchmarks.png").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"benchmarks.json", "benchmarks.md", "benchmarks.png"}


def test_the_page_and_the_figure_can_be_made_again(results, tmp_path):
    report.write(tmp_path, results)
    page = (tmp_path / "benchmarks.md").read_bytes()
    (tmp_path / "benchmarks.md").unlink()
    (tmp_path / "benchmarks.png").unlink()
    subprocess.run([sys.executable, BENCHMARKS / "report.py", tmp_path], check=True)
    assert (tmp_path / "benchmarks.md").read_bytes() == page
    assert (tmp_path / "benchmarks.png").exists()


@pytest.mark.skipif(not INTERPRETED, reason="with a GPU the default backend is asked")
def test_fastvae_on_the_interpreter_is_fastvae(triton_backend):
    """The smoke run's fused provider launches kernels, also where the reference would be the default."""
    inputs = SMALL.inputs(CPU, 0)
    before = triton_backend.count
    BUILDERS["fused"](SMALL)(inputs)
    assert triton_backend.count == before + 2
