"""The programs of docs/other-loops.md."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.integrations
@pytest.mark.parametrize("package", ["accelerate", "lightning"])
def test_a_loop_of_another_library_trains(package, monkeypatch, tmp_path, capsys):
    pytest.importorskip(package, reason=f"needs {package}: pip install {package}")
    monkeypatch.chdir(tmp_path)
    program = EXAMPLES / f"{package}_loop.py"
    monkeypatch.setattr(sys, "argv", [str(program), "--epochs", "2"])
    runpy.run_path(str(program), run_name="__main__")
    loss = float(re.findall(r"loss ([\d.]+) nats", capsys.readouterr().out)[-1])
    assert loss < 40  # 31.7 here; 45 in the first epoch


@pytest.mark.slow
def test_two_processes_with_parts_of_the_weights_train_as_one_does(tmp_path):
    def losses(processes: int) -> list[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run(
            [*command, EXAMPLES / "sharded.py", "--steps", "40"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    alone = losses(1)
    assert len(alone) == 2
    assert alone == losses(2)
