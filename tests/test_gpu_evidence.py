"""benchmarks/gpu_evidence.py without a GPU: its parts stand in for the real ones, the tools' output is canned."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from fastvae.operations import all_kernel_names

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("needs the benchmarks of the source tree", allow_module_level=True)


@pytest.fixture
def gpu_evidence(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_evidence

    return gpu_evidence


@pytest.fixture
def read(gpu_evidence):
    import evidence_output

    return evidence_output


# ------------------------------------------------------------------------------------------------- what the tools print


def test_pytest_output(read):
    output = "....\nFAILED tests/test_a.py::test_b[x] - assert 1\nERROR tests/test_c.py\n"
    output += "1 failed, 20 passed, 3 skipped in 2.10s\n5 Triton launches on NVIDIA H200\n"
    passed, found = read.read_tests(output, 1)
    assert not passed
    assert found == {
        "failed": 1,
        "passed": 20,
        "skipped": 3,
        "failures": ["tests/test_a.py::test_b[x]", "tests/test_c.py"],
    }
    assert read.read_tests("20 passed in 2.01s", 0)[0]
    assert not read.read_tests("20 passed in 2.01s", 3)[0]  # an error after the last test
    assert not read.read_tests("5 deselected in 2.01s", 0)[0]  # nothing ran
    assert not read.read_tests("", 0)[0]


@pytest.mark.parametrize(
    "output",
    [
        "tests/test_a.py::test_b[x] FAILED      [ 10%]\ntests/test_a.py::test_c PASSED   [ 20%]\n"
        "tests/test_a.py::test_d SKIPPED (no x) [ 30%]\ntests/test_a.py::test_e ",
        "[gw3] [ 10%] FAILED tests/test_a.py::test_b[x] \n[gw0] [ 20%] PASSED tests/test_a.py::test_c \n"
        "tests/test_a.py::test_e \n[gw0] [ 30%] SKIPPED tests/test_a.py::test_d \n",
    ],
    ids=["one process", "several"],
)
def test_pytest_output_that_was_cut_short_names_the_failures(read, output):
    passed, found = read.read_tests(output, -9)
    assert not passed
    assert found == {"passed": 1, "failed": 1, "skipped": 1, "failures": ["tests/test_a.py::test_b[x]"]}


def test_names_of_tests_may_hold_spaces(read):
    names = ["tests/test_a.py::test_b[torch.Size([2, 3])-too few]", "tests/test_a.py::test_c[x - y]"]
    verbose = "".join(f"[gw0] [ 10%] FAILED {name} \n" for name in names)
    short = "".join(f"FAILED {name} - assert 1 == 2\n" for name in names[:1])
    assert read.read_tests(verbose + short, 1)[1]["failures"] == names
    assert read.read_tests(short, 1)[1]["failures"] == names[:1]


def test_smoke_output(read):
    output = "ok     1.20 s  copy: copying moves 3,000 GB/s\nok     0.02 s  gaussian_kl none [3] float32: 0.1\n"
    passed, found = read.read_smoke(output + "2 checks passed, 0 failed\n", 0)
    assert passed
    assert found == {"passed": 2, "failures": [], "remarks": ["copy: copying moves 3,000 GB/s"]}
    assert not read.read_smoke(output, 0)[0]  # it did not come to its end
    output += "FAIL   0.02 s  noise: AssertionError: two calls drew the same noise\n2 checks passed, 1 failed\n"
    passed, found = read.read_smoke(output, 1)
    assert not passed
    assert found["failures"] == ["0.02 s  noise: AssertionError: two calls drew the same noise"]


def test_training_output(read, tmp_path):
    reader = read.read_training(tmp_path)
    assert not reader("", 0)[0]  # nothing was written
    last = {"epoch": 30, "seconds": 4.123, "loss": 18.5, "test_loss": 19.2}
    summary = {"final": last, "interrupted": False, "backend": {"name": "triton"}, "processes": 1}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    passed, found = reader("", 0)
    assert passed
    assert found["epochs run"] == 30 and found["backend"] == "triton"
    assert not reader("", 1)[0]
    assert not reader("UserWarning: training goes on without a CUDA graph", 0)[0]
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "interrupted": True}))
    assert not reader("", 0)[0]


@pytest.mark.parametrize("tool", ["ERROR", "RACECHECK"])
def test_sanitizer_output(read, tool):
    clean = {
        "ERROR": "========= ERROR SUMMARY: 0 errors",
        "RACECHECK": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
    }[tool]
    assert read.read_sanitizer(f"48 operations ran\n{clean}\n", 0) == (True, {"operations": 48, "errors": 0})
    assert not read.read_sanitizer(f"48 operations ran\n{clean.replace('0', '2', 1)}\n", 0)[0]
    assert not read.read_sanitizer(f"{clean}\n", 0)[0]  # the program did not come to its end
    assert not read.read_sanitizer("48 operations ran\n", 0)[0]  # the tool did not watch
    assert not read.read_sanitizer(f"48 operations ran\n{clean}\n", 1)[0]
    assert not read.read_sanitizer("========= Error: Device not supported\n", 1)[0]


NCU = """==PROF== Connected to process 7 (/usr/bin/python3.12)
6 operations ran
==PROF== Disconnected from process 7
"ID","Process ID","Kernel Name","Context","Stream","Metric Name","Metric Unit","Metric Value"
"0","7","gaussian_forward_kernel","1","7","dram__bytes_read.sum","byte","536870912"
"0","7","gaussian_forward_kernel","1","7","launch__registers_per_thread","register/thread","40"
"1","7","void at::native::vectorized_elementwise_kernel<4>","1","7","dram__bytes_read.sum","byte","1"
"2","7","value_kernel","1","7","gpu__time_duration.sum","nsecond","190000"
"""


def test_ncu_output(read):
    passed, found = read.read_counters(NCU, 0)
    assert passed
    assert found["kernels"] == {
        "0 gaussian_forward_kernel": {"bytes read": "536870912 byte", "registers": "40 register/thread"},
        "2 value_kernel": {"nanoseconds": "190000 nsecond"},
    }
    assert not read.read_counters(NCU, 1)[0]
    assert not read.read_counters("==ERROR== Failed to initialize the profiler: LibraryNotLoaded\n", 0)[0]


def test_the_kernels_of_every_operation_are_counted(read):
    rows = [
        f'"0","7","{name}","1","7","dram__bytes_read.sum","byte","1"'
        for name in {name.split(".")[1] for name in all_kernel_names()}
    ]
    _, found = read.read_counters("\n".join([NCU.splitlines()[3], *rows]), 0)
    assert len(found["kernels"]) == len(rows) > 1


def test_host_time_output(read):
    output = "import: fastvae 17.2 ms\nelbo_value_and_grad   90.8   141.1   0.65\nELBO path   572.0   775.5   0.74\n"
    assert read.read_host_time(output, 0) == (True, {"of eager's host time on the ELBO path": "0.74"})
    assert not read.read_host_time(output, 1)[0]
    assert not read.read_host_time("import: fastvae 17.2 ms\n", 0)[0]


def test_benchmark_output(read, tmp_path):
    reader = read.read_benchmarks(tmp_path)
    assert not reader("2 passed in 1.00s", 0)[0]  # nothing was written
    cell = {"case": "a", "providers": {"eager": {"failure": None}, "fused": {"failure": "off by 2"}}}

    def write():
        (tmp_path / "benchmarks.json").write_text(json.dumps({"cells": [cell]}))

    write()
    passed, found = reader("1 failed, 1 passed in 1.00s", 1)
    assert not passed
    assert found["FAIL"] == ["a, fused: off by 2"]
    cell["providers"]["fused"]["failure"] = None
    write()
    assert reader("2 passed in 1.00s", 0)[0]
    assert not reader("", 2)[0]  # pytest was interrupted
    # A rival's failure is told, and is not fastvae's.
    cell["providers"]["eager"]["failure"] = "no memory"
    write()
    passed, found = reader("1 failed, 1 passed in 1.00s", 1)
    assert passed
    assert found["rivals"] == ["a, eager: no memory"]
    del cell["providers"]["fused"]
    write()
    assert not reader("1 failed in 1.00s", 1)[0]  # fastvae was not measured


# ---------------------------------------------------------------------------------------------------------- the command

EPOCHS = {
    "provider": "fused", "dataset": "mnist", "epochs": 30, "steps": 14040, "seconds_of_training": 2.0,
    "final_losses": [18.6], "steps_per_second": 7020.0, "final_loss": 18.6, "test_loss": 19.0, "test_mse": 0.02,
}  # fmt: skip


@pytest.fixture
def command(gpu_evidence, monkeypatch, tmp_path):
    """Run the command with these stages; returns its exit code and what it knows."""
    monkeypatch.setattr(gpu_evidence, "sources", lambda: "abc")

    def run(*stages, options=()):
        monkeypatch.setattr(gpu_evidence, "stages", lambda out, data, rehearse, failed: list(stages))
        monkeypatch.setattr(sys, "argv", ["gpu_evidence.py", "--out", str(tmp_path / "out"), "--rehearse", *options])
        code = gpu_evidence.main()
        return code, json.loads((tmp_path / "out" / "evidence.json").read_text())["parts"]

    run.out = tmp_path / "out"
    return run


def read_nothing(output, code):
    return code == 0, {}


def part(name, program, *, seconds=60.0, read=read_nothing, **more):
    from evidence_process import Part

    return Part(name, [sys.executable, "-c", program], seconds, read, **more)


def test_one_failure_costs_one_part(command, read):
    from evidence_process import Part

    code, found = command(
        [
            part("good", "print('hello')"),
            part("bad", "import sys; print('complaint'); sys.exit(3)"),
            part("killed", "import os; os.kill(os.getpid(), 9)"),
            part("unreadable", "print('{')", read=lambda output, code: json.loads(output)),
            Part("no tool", ["no-such-tool"], 60.0, read_nothing),
        ],
        [part("numbers", f"print({json.dumps(EPOCHS)!r})", read=read.read_epochs)],
    )
    assert code == 1
    assert {name: it["status"] for name, it in found.items()} == {
        "good": "passed", "bad": "failed", "killed": "failed", "unreadable": "failed", "no tool": "absent",
        "numbers": "passed",
    }  # fmt: skip
    assert found["bad"]["exit_code"] == 3
    assert "complaint" in found["bad"]["log"]
    assert found["killed"]["exit_code"] == -9
    assert "JSONDecodeError" in found["unreadable"]["unreadable"]
    page = (command.out / "summary.md").read_text()
    assert "| no tool | absent |" in page
    assert "| numbers | passed |" in page
    with tarfile.open(command.out / "evidence.tgz") as archive:
        assert b"hello" in archive.extractfile("log.txt").read()


def test_a_hanging_part_is_asked_to_end_before_it_is_stopped(command, monkeypatch):
    """What a part says after SIGINT is in its log, and the limit holds; also where SIGINT is ignored, as it is in a
    job in the background.
    """
    import evidence_process

    monkeypatch.setattr(evidence_process, "GRACE", 10.0)
    program = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('names of failures')"
    began = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code, found = command([part("hangs", program, seconds=15.0)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, found["hangs"]["status"]) == (1, "timed out")
    assert "names of failures" in found["hangs"]["log"]
    assert time.monotonic() - began < 15.0


def test_a_part_that_does_not_end_is_stopped_with_its_children(command, monkeypatch, tmp_path):
    import evidence_process

    monkeypatch.setattr(evidence_process, "GRACE", 0.5)
    ignore = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    child = f"{ignore}; time.sleep(3); open({str(tmp_path / 'alive')!r}, 'w')"
    program = f"{ignore}; import subprocess, sys; print('started', flush=True); "
    program += f"subprocess.run([sys.executable, '-c', {child!r}])"
    code, found = command([part("hangs", program, seconds=1.5)])
    assert (code, found["hangs"]["status"]) == (1, "timed out")
    assert "started" in found["hangs"]["log"]
    time.sleep(2.5)
    assert not (tmp_path / "alive").exists()


def test_a_part_may_take_all_the_time_that_is_left(gpu_evidence, tmp_path):
    from evidence_process import Running

    ends = []
    for takes_the_rest in (False, True):
        running = Running(part("it", "pass", seconds=2.0, takes_the_rest=takes_the_rest), tmp_path, 100.0)
        ends.append(running._end - running._began)
        running.stop()
        running.result()
    assert ends == [pytest.approx(2.0), pytest.approx(100.0)]


def test_a_part_is_told_in_which_time_it_should_be_done(command):
    _, found = command([part("it", "import sys; print(sys.argv[1:])", seconds=105.0, limit_option="--limit")])
    assert "['--limit', '89']" in found["it"]["log"]


def test_parts_of_a_stage_run_together_and_stages_in_turn(command):
    program = "import time; print(time.time()); time.sleep(1.5); print(time.time())"
    _, found = command([part("a", program), part("b", program)], [part("c", program)])
    times = {name: [float(line) for line in it["log"].split()] for name, it in found.items()}
    assert times["a"][0] < times["b"][1] and times["b"][0] < times["a"][1]
    assert times["c"][0] >= max(times["a"][1], times["b"][1])


def test_the_same_command_again_goes_on(command, tmp_path):
    flag = tmp_path / "flag"
    program = f"import pathlib, sys; sys.exit(0 if pathlib.Path({str(flag)!r}).exists() else 1)"
    stage = [part("first", "import time; print(time.time())"), part("second", program)]
    code, before = command(stage)
    assert (code, before["second"]["status"]) == (1, "failed")
    flag.touch()
    code, after = command(stage)
    assert code == 0
    assert after["second"]["status"] == "passed"
    assert after["first"] == before["first"]  # not run again


def test_what_passed_with_other_sources_runs_again_and_says_with_which(command, gpu_evidence, monkeypatch):
    command([part("a", "pass"), part("b", "pass")])
    monkeypatch.setattr(gpu_evidence, "sources", lambda: "def")
    _, found = command([part("a", "pass"), part("b", "pass")], options=["--only", "b"])
    assert {name: it["sources"] for name, it in found.items()} == {"a": "abc", "b": "def"}
    page = (command.out / "summary.md").read_text()
    assert page.count("abc") == page.count("def") == 1


def test_evidence_of_another_device_is_not_mixed_in(command, gpu_evidence, monkeypatch, capsys):
    command([part("old", "pass")])
    monkeypatch.setattr(gpu_evidence, "versions", lambda: dict.fromkeys(("torch", "triton", "python", "fastvae"), "9"))
    _, found = command([part("new", "pass")])
    assert list(found) == ["new"]
    assert "starting anew" in capsys.readouterr().out


def test_what_no_longer_fits_is_left_for_the_next_time(command):
    late = [part("late", "pass")]
    code, found = command(late, options=["--minutes", "0.1"])
    assert (code, found["late"]["status"]) == (1, "not run")
    code, found = command(late)
    assert (code, found["late"]["status"]) == (0, "passed")


def test_what_was_found_stays_when_there_is_no_time_to_find_it_again(command, gpu_evidence, monkeypatch):
    command([part("it", "pass")])
    monkeypatch.setattr(gpu_evidence, "sources", lambda: "def")
    _, found = command([part("it", "pass")], options=["--minutes", "0.1"])
    assert (found["it"]["status"], found["it"]["sources"]) == ("passed", "abc")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--only", "smoke", "host"], ["smoke 1", "host time"]),
        (["--skip", "smoke"], ["host time", "training"]),
        (["--only", "t", "--skip", "host"], ["training"]),
    ],
)
def test_parts_are_chosen_by_words_of_their_names(command, options, names):
    stages = [[part("smoke 1", "pass"), part("host time", "pass")], [part("training", "pass")]]
    _, found = command(*stages, options=options)
    assert list(found) == names


def test_a_word_of_no_part_is_an_error(command, capsys):
    with pytest.raises(SystemExit):
        command([part("training", "pass")], options=["--only", "trainnig"])
    assert "no part is called 'trainnig'; the parts are training" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_found(command, gpu_evidence, monkeypatch):
    real = gpu_evidence.run_stage

    def interrupted(stage, evidence, deadline):
        if stage[0].name == "second":
            raise KeyboardInterrupt
        real(stage, evidence, deadline)

    monkeypatch.setattr(gpu_evidence, "run_stage", interrupted)
    code, found = command([part("first", "pass")], [part("second", "pass")])
    assert code == 130
    assert found["first"]["status"] == "passed"


def test_the_files(command, gpu_evidence, tmp_path):
    """Two files travel; the archive holds the rest, without checkpoints, and no temporary file is left."""
    program = "import pathlib; it = pathlib.Path('benchmarks/a'); it.mkdir(parents=True); "
    program += "(it / 'benchmarks.md').write_text('# Benchmarks\\n\\n## Time of a call\\n'); "
    program += "pathlib.Path('checkpoint.pt').touch()"
    command.out.mkdir()
    delivered = tmp_path / "delivered"
    command(
        [part("writes", f"import os; os.chdir({str(command.out)!r}); {program}")], options=["--deliver", str(delivered)]
    )
    assert sorted(path.name for path in delivered.iterdir()) == ["evidence.tgz", "summary.md"]
    assert (delivered / "evidence.tgz").read_bytes() == (command.out / "evidence.tgz").read_bytes()
    assert not [path for path in command.out.rglob("*") if path.name.startswith(".")]
    with tarfile.open(command.out / "evidence.tgz") as archive:
        assert sorted(archive.getnames()) == ["benchmarks/a/benchmarks.md", "evidence.json", "log.txt", "summary.md"]
    page = (command.out / "summary.md").read_text()
    assert "\n## Benchmarks\n" in page and "\n### Time of a call\n" in page


def test_a_file_that_vanishes_while_it_is_packed_costs_nothing(command, monkeypatch):
    """Parts write into the same folder while the results of others are packed."""
    command.out.mkdir()
    (command.out / "metrics.csv").write_text("1,2\n")
    real = Path.read_bytes

    def vanished(path):
        if path.name == "metrics.csv":
            raise FileNotFoundError(path)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", vanished)
    code, _ = command([part("it", "pass")])
    assert code == 0
    with tarfile.open(command.out / "evidence.tgz") as archive:
        assert sorted(archive.getnames()) == ["evidence.json", "log.txt", "summary.md"]


def test_without_a_gpu_it_says_how_to_rehearse(gpu_evidence, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_evidence.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_evidence.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        gpu_evidence.main()
    assert "--rehearse" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- the real parts


@pytest.fixture
def real(gpu_evidence, tmp_path):
    """(command, first stages, second stages)"""
    import evidence_parts

    command = evidence_parts.Command(tmp_path, tmp_path, rehearse=False)
    return evidence_parts, evidence_parts.first(command, ["tests/test_a.py::test_b"]), evidence_parts.second(command)


def test_the_limits_of_both_visits_add_up_to_their_minutes(real):
    parts, first, second = real
    for stages, minutes in ((first, parts.FIRST_MINUTES), (second, parts.SECOND_MINUTES)):
        assert sum(max(part.seconds for part in stage) for stage in stages) <= 60 * minutes


def test_the_real_parts_name_existing_programs(real):
    _, first, second = real
    everything = [part for stage in (*first, *second) for part in stage]
    for it in everything:
        for word in map(str, it.command):
            if word.endswith(".py"):
                assert (BENCHMARKS.parent / word).exists(), word
    assert len({it.name for it in everything}) == len(everything)
    # What is timed runs alone.
    assert [len(stage) for stage in first] == [len(first[0]), 1, 1, 1, 1, 2]
    assert [len(stage) for stage in second] == [1, 1, 1, 1, 2]


def test_every_test_of_a_family_runs_on_the_device(real):
    """Files of tests that ask for the device and for the fused path are in the list."""
    parts, _, _ = real
    tests = Path(__file__).parent
    asking = {
        path.stem.removeprefix("test_")
        for path in tests.glob("test_*.py")
        if "def test" in (text := path.read_text()) and "triton_backend" in text and "device" in text
    }
    # These two measure with stand-ins, or start processes of their own.
    assert asking - set(parts.DEVICE_TESTS) <= {"gpu_evidence", "benchmarks"}
    assert all((tests / f"test_{name}.py").exists() for name in parts.DEVICE_TESTS)


def test_each_visit_runs_another_share_of_the_tests(real):
    _, first, second = real
    shares = [part.command[part.command.index("--shard") + 1] for part in (first[-1][1], second[-1][1])]
    assert shares == ["0/8", "1/8"]


def test_the_tests_that_failed_run_first_and_by_name(gpu_evidence, tmp_path):
    import evidence_parts

    found = {"status": "failed", "failures": ["tests/test_b.py::test_x", "tests/test_a.py::test_y"]}
    evidence = gpu_evidence.Evidence(tmp_path, "a card")
    evidence.state["parts"] = {"tests": found, "graphs and streams": {"status": "timed out"}}
    failed = evidence.failed_tests()
    stages = evidence_parts.stages(tmp_path, None, False, failed)
    (part,) = [it for it in stages[0] if it.name == "failed tests"]
    assert [word for word in map(str, part.command) if "::" in word] == sorted(found["failures"])


def test_the_commands_of_the_docstring_fit_where_they_are_sent(gpu_evidence):
    """Each is one line of at most 2,000 characters."""
    blocks = [it for it in gpu_evidence.__doc__.split("\n\n") if it.startswith("    ") and "--deliver $OUT" in it]
    assert len(blocks) == 2
    for block in blocks:
        command = " ".join(block.split())
        assert len(command) < 2000
        subprocess.run(["bash", "-n", "-c", command], check=True)


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
