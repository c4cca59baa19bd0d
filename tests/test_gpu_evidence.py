"""benchmarks/gpu_evidence.py without a GPU: its parts stand in for the real ones, the tools' output is canned."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("needs the benchmarks of the source tree", allow_module_level=True)


@pytest.fixture
def gpu_evidence(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_evidence

    return gpu_evidence


@pytest.fixture
def parts(gpu_evidence):
    import evidence_parts

    return evidence_parts


# ------------------------------------------------------------------------------------------------- what the tools print


def test_pytest_output(parts):
    output = "....\nFAILED tests/test_a.py::test_b[x] - assert 1\nERROR tests/test_c.py\n"
    output += "1 failed, 20 passed, 3 skipped in 2s\n5 Triton launches on NVIDIA H200\n"
    passed, found = parts.read_tests(output, 1)
    assert not passed
    assert found == {
        "failed": 1,
        "passed": 20,
        "skipped": 3,
        "failures": ["tests/test_a.py::test_b[x]", "tests/test_c.py"],
    }
    assert parts.read_tests("20 passed in 2s", 0)[0]
    assert not parts.read_tests("20 passed in 2s", 3)[0]  # an error after the last test
    assert not parts.read_tests("5 deselected in 2s", 0)[0]  # nothing ran
    assert not parts.read_tests("", 0)[0]


@pytest.mark.parametrize("tool", ["ERROR", "RACECHECK"])
def test_sanitizer_output(parts, tool):
    clean = {
        "ERROR": "========= ERROR SUMMARY: 0 errors",
        "RACECHECK": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
    }[tool]
    assert parts.read_sanitizer(f"48 operations ran\n{clean}\n", 0) == (True, {"operations": 48, "errors": 0})
    assert not parts.read_sanitizer(f"48 operations ran\n{clean.replace('0', '2', 1)}\n", 0)[0]
    assert not parts.read_sanitizer(f"{clean}\n", 0)[0]  # the program did not come to its end
    assert not parts.read_sanitizer("48 operations ran\n", 0)[0]  # the tool did not watch
    assert not parts.read_sanitizer(f"48 operations ran\n{clean}\n", 1)[0]
    assert not parts.read_sanitizer("========= Error: Device not supported\n", 1)[0]


NCU = """==PROF== Connected to process 7 (/usr/bin/python3.12)
6 operations ran
==PROF== Disconnected from process 7
"ID","Process ID","Kernel Name","Context","Stream","Metric Name","Metric Unit","Metric Value"
"0","7","gaussian_sample_kl_kernel","1","7","dram__bytes_read.sum","byte","536870912"
"0","7","gaussian_sample_kl_kernel","1","7","launch__registers_per_thread","register/thread","40"
"1","7","void at::native::vectorized_elementwise_kernel<4>","1","7","dram__bytes_read.sum","byte","1"
"2","7","elbo_forward_kernel","1","7","gpu__time_duration.sum","nsecond","190000"
"""


def test_ncu_output(parts):
    passed, found = parts.read_counters(NCU, 0)
    assert passed
    assert found["kernels"] == {
        "0 gaussian_sample_kl_kernel": {"bytes read": "536870912 byte", "registers": "40 register/thread"},
        "2 elbo_forward_kernel": {"nanoseconds": "190000 nsecond"},
    }
    assert not parts.read_counters(NCU, 1)[0]
    assert not parts.read_counters("==ERROR== Failed to initialize the profiler: LibraryNotLoaded\n", 0)[0]


def test_every_fastvae_kernel_is_counted(parts):
    import re

    import triton

    from fastvae.kernels import conv_elbo, dimensions, elbo, gaussian, reconstruction

    kinds = (triton.JITFunction, triton.runtime.interpreter.InterpretedFunction)
    names = [
        name
        for module in (conv_elbo, dimensions, elbo, gaussian, reconstruction)
        for name, it in vars(module).items()
        if isinstance(it, kinds) and name.endswith("_kernel")
    ]
    assert len(names) == 10
    assert all(re.match(parts.KERNELS, name) for name in names)


def test_host_time_output(parts):
    output = "import: fastvae 17.2 ms\nelbo_value_and_grad   90.8   141.1   0.65\nELBO path   572.0   775.5   0.74\n"
    assert parts.read_host_time(output, 0) == (True, {"of eager's host time on the ELBO path": "0.74"})
    assert not parts.read_host_time(output, 1)[0]
    assert not parts.read_host_time("import: fastvae 17.2 ms\n", 0)[0]


def test_benchmark_output(parts, tmp_path):
    read = parts.read_benchmarks(tmp_path)
    assert not read("2 passed in 1s", 0)[0]  # nothing was written
    cell = {"case": "a", "providers": {"eager": {"failure": None}, "fused": {"failure": "off by 2"}}}
    (tmp_path / "benchmarks.json").write_text(json.dumps({"cells": [cell]}))
    passed, found = read("1 failed, 1 passed in 1s", 1)
    assert not passed
    assert found["FAIL"] == ["a, fused: off by 2"]
    cell["providers"]["fused"]["failure"] = None
    (tmp_path / "benchmarks.json").write_text(json.dumps({"cells": [cell]}))
    assert read("2 passed in 1s", 0)[0]


# ---------------------------------------------------------------------------------------------------------- the command

EPOCHS = {
    "provider": "fused", "dataset": "mnist", "epochs": 30, "steps": 14040, "seconds_of_training": 2.0,
    "final_losses": [18.6], "steps_per_second": 7020.0, "final_loss": 18.6, "test_loss": 19.0, "test_mse": 0.02,
}  # fmt: skip


@pytest.fixture
def command(gpu_evidence, parts, monkeypatch, tmp_path):
    """Run the command with these parts; returns its exit code and what it knows."""
    monkeypatch.setattr(gpu_evidence, "commit", lambda: "abc")

    def run(*stand_ins, options=()):
        monkeypatch.setattr(gpu_evidence, "parts", lambda out, data, rehearse: list(stand_ins))
        monkeypatch.setattr(sys, "argv", ["gpu_evidence.py", "--out", str(tmp_path / "out"), "--rehearse", *options])
        code = gpu_evidence.main()
        return code, json.loads((tmp_path / "out" / "evidence.json").read_text())["parts"]

    run.out = tmp_path / "out"
    return run


def part(parts, name, program, *, stage=1, seconds=60.0, read=None, environment=None):
    return parts.Part(name, stage, [sys.executable, "-c", program], seconds, read or parts.read_code, environment or {})


def test_one_failure_costs_one_part(command, parts):
    code, found = command(
        part(parts, "good", "print('hello')"),
        part(parts, "bad", "import sys; print('complaint'); sys.exit(3)"),
        part(parts, "killed", "import os; os.kill(os.getpid(), 9)"),
        part(parts, "unreadable", "print('{')", read=lambda output, code: json.loads(output)),
        parts.Part("no tool", 1, ["no-such-tool"], 60.0, parts.read_code),
        part(parts, "numbers", f"print({json.dumps(EPOCHS)!r})", stage=2, read=parts.read_epochs),
    )
    assert code == 1
    assert {name: it["status"] for name, it in found.items()} == {
        "good": "passed", "bad": "failed", "killed": "failed", "unreadable": "failed", "no tool": "absent",
        "numbers": "passed",
    }  # fmt: skip
    assert found["bad"]["exit_code"] == 3
    assert found["bad"]["complaints"] == ["complaint"]
    assert found["killed"]["exit_code"] == -9
    assert "JSONDecodeError" in found["unreadable"]["unreadable"]
    page = (command.out / "summary.md").read_text()
    assert "| no tool | absent |" in page
    assert "| numbers | passed |" in page
    assert "hello" in (command.out / "log.txt").read_text()


def test_a_hanging_part_is_stopped_with_its_children(command, parts, tmp_path):
    child = f"import time; time.sleep(3); open({str(tmp_path / 'alive')!r}, 'w')"
    program = f"import subprocess, sys; print('started', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    code, found = command(part(parts, "hangs", program, seconds=1.0))
    assert (code, found["hangs"]["status"]) == (1, "timed out")
    assert "started" in found["hangs"]["log"]
    time.sleep(3)
    assert not (tmp_path / "alive").exists()


def test_parts_of_a_stage_run_together_and_stages_in_turn(command, parts):
    program = "import time; print(time.time()); time.sleep(1.5); print(time.time())"
    _, found = command(*(part(parts, name, program, stage=stage) for name, stage in (("a", 1), ("b", 1), ("c", 2))))
    times = {name: [float(line) for line in it["log"].split()] for name, it in found.items()}
    assert times["a"][0] < times["b"][1] and times["b"][0] < times["a"][1]
    assert times["c"][0] >= max(times["a"][1], times["b"][1])


def test_the_same_command_again_goes_on(command, parts, tmp_path):
    flag = tmp_path / "flag"
    program = f"import pathlib, sys; sys.exit(0 if pathlib.Path({str(flag)!r}).exists() else 1)"
    first = part(parts, "first", "import time; print(time.time())")
    code, before = command(first, part(parts, "second", program))
    assert (code, before["second"]["status"]) == (1, "failed")
    flag.touch()
    code, after = command(first, part(parts, "second", program))
    assert code == 0
    assert after["second"]["status"] == "passed"
    assert after["first"] == before["first"]  # not run again


def test_evidence_of_another_commit_is_not_mixed_in(command, parts, gpu_evidence, monkeypatch, capsys):
    command(part(parts, "old", "pass"))
    monkeypatch.setattr(gpu_evidence, "commit", lambda: "def")
    _, found = command(part(parts, "new", "pass"))
    assert list(found) == ["new"]
    assert "starting anew" in capsys.readouterr().out


def test_what_no_longer_fits_is_left_for_the_next_time(command, parts):
    code, found = command(part(parts, "late", "pass"), options=["--minutes", "0.1"])
    assert (code, found["late"]["status"]) == (1, "not run")


def test_ctrl_c_keeps_what_was_found(command, parts, gpu_evidence, monkeypatch):
    real = gpu_evidence.run_stage

    def interrupted(stage, evidence, deadline):
        if stage[0].name == "second":
            raise KeyboardInterrupt
        real(stage, evidence, deadline)

    monkeypatch.setattr(gpu_evidence, "run_stage", interrupted)
    code, found = command(part(parts, "first", "pass"), part(parts, "second", "pass", stage=2))
    assert code == 130
    assert found["first"]["status"] == "passed"


def test_the_files(command, parts, gpu_evidence):
    """At most 8, all of them in the archive but the archive itself, and no temporary file left."""
    program = "import pathlib; pathlib.Path('benchmarks.md').write_text('# Benchmarks\\n\\n## Time of a call\\n')"
    (command.out).mkdir()
    command(part(parts, "writes", f"import os; os.chdir({str(command.out)!r}); {program}"))
    names = sorted(path.name for path in command.out.iterdir())
    assert set(names) <= {*gpu_evidence.FILES, "evidence.tar.gz"}
    assert len(gpu_evidence.FILES) + 1 <= 8
    with tarfile.open(command.out / "evidence.tar.gz") as archive:
        assert sorted(archive.getnames()) == [name for name in names if name != "evidence.tar.gz"]
    page = (command.out / "summary.md").read_text()
    assert "\n## Benchmarks\n" in page and "\n### Time of a call\n" in page


def test_without_a_gpu_it_says_how_to_rehearse(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, BENCHMARKS / "gpu_evidence.py", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--rehearse" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_real_parts_name_existing_programs(gpu_evidence, tmp_path):
    """Every file and folder on a command line is there, and the time of all stages is bounded."""
    real = gpu_evidence.parts(tmp_path, None, rehearse=False)
    for it in real:
        for word in map(str, it.command):
            if word.endswith(".py") and not word.startswith("--"):
                assert (BENCHMARKS.parent / word).exists(), word
    assert len({it.name for it in real}) == len(real)
    assert [it.name for it in real if it.stage > 1] == [
        "counters", "host time", "benchmarks", "epochs, fused-graph", "epochs, fused-output-graph",
        "epochs, fused", "epochs, eager", "epochs, compile",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "verdict"), [([18.5, 18.6], "inside"), ([19.4, 19.6], "OUTSIDE"), ([17.0], "OUTSIDE")]
)
def test_losses_are_held_against_the_reference(gpu_evidence, tmp_path, monkeypatch, losses, verdict):
    reference = {"dataset": "mnist", "epochs": 30, "steps": 14040, "final_losses": [18.4, 18.7, 18.5]}
    (tmp_path / "reference_losses.json").write_text(json.dumps(reference))
    monkeypatch.setattr(gpu_evidence, "HERE", tmp_path)
    trained = {"provider": "fused-graph", "dataset": "mnist", "epochs": 30, "steps": 14040, "final_losses": losses}
    (line,) = gpu_evidence.against_reference([trained, {**trained, "epochs": 1}])
    assert f"{verdict} of the 18.400 to 18.700 of 3 seeds" in line and f"mean of {len(losses)}" in line


def test_the_reference_losses_are_of_the_whole_example():
    found = json.loads((BENCHMARKS / "reference_losses.json").read_text())
    assert (found["provider"], found["dataset"], found["epochs"], found["steps"]) == ("eager", "mnist", 30, 14040)
    assert len(found["final_losses"]) == len(set(found["seeds"])) and all(15 < it < 20 for it in found["final_losses"])
