"""A launch that is found among those kept is the one that Triton would have made: `kept_launches.py`, in a process of
its own, because the interpreter compiles nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import compiling


@pytest.fixture(scope="module")
def found() -> dict:
    return json.loads(compiling(Path(__file__).with_name("kept_launches.py")))


@pytest.mark.slow
def test_what_is_kept_is_what_triton_would_have_launched(found):
    assert not found["different"], "\n".join(found["different"][:5])
    assert found["launches"] > 9000 and found["kept"] > 4000


@pytest.mark.slow
def test_the_driver_is_given_the_same_either_way(found):
    assert found["driver"]


@pytest.mark.slow
def test_both_ways_count_as_a_launch(found):
    assert found["counts"] == [1, 2]
