"""Every fault that is planted in the sources fails a test of the contract; see `planted_faults.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastvae.kernels import INTERPRETED
from planted_faults import FAULTS


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="the faults are planted in processes that run Triton's interpreter")
def test_every_planted_fault_is_found() -> None:
    command = [sys.executable, Path(__file__).with_name("planted_faults.py")]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    assert found == {"planted": len(FAULTS), "missed": {}}
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) > 20
