"""Faults that are planted in the sources fail a test of the contract; see `planted_faults.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastvae.kernels import INTERPRETED
from planted_faults import FAULTS

# Every eighth fault of the list, which goes family by family. All of them take five minutes of a core:
# python tests/planted_faults.py
EVERY = 8


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="the faults are planted in processes that run Triton's interpreter")
def test_planted_faults_are_found() -> None:
    command = [sys.executable, Path(__file__).with_name("planted_faults.py"), "--every", str(EVERY)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    assert found == {"planted": len(FAULTS[::EVERY]), "missed": {}}
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) > 20
