"""examples/any_data.py: two epochs of each task."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "examples" / "any_data.py"


@pytest.mark.parametrize("task", ["table", "signal", "volume", "conditional"])
@pytest.mark.skipif(not SCRIPT.exists(), reason="needs the examples of the source tree")
def test_a_task(task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("any_data_example", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    whole = example.TASKS[task]

    def part():
        """A tenth of the data, so that it is quick."""
        made = whole()
        condition = None if made.condition is None else made.condition[::10]
        return made._replace(data=made.data[::10], condition=condition)

    monkeypatch.setattr(example, "BATCH_SIZE", 8)
    monkeypatch.setitem(example.TASKS, task, part)
    monkeypatch.setattr(sys, "argv", ["any_data.py", task, "--epochs", "6", "--device", "cpu"])
    before = torch.get_rng_state()
    try:
        assert example.main() == 0
    finally:
        torch.set_rng_state(before)
    lines = capsys.readouterr().out.splitlines()
    first, last = (float(line.split("test loss ")[1].split()[0]) for line in (lines[0], lines[1]))
    assert lines[1].startswith("epoch   6: test loss")
    assert last < first
    assert (tmp_path / "runs" / "conditional.png").exists() == (task == "conditional")


def test_another_task_is_one_line(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("any_data_example", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(sys, "argv", ["any_data.py", "text"])
    assert example.main() == 2
    assert "invalid choice: 'text'" in capsys.readouterr().err
