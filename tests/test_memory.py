"""What the loop does with memory on the CPU."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from fastvae.training import memory
from fastvae.training.memory import freed_memory_kept

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told")


# In a process of its own, whose heap has no holes: page faults of writing 20 tensors, one after the other, before,
# inside and after the block; and inside a block that ends with an error, and after it.
FAULTS = """
import resource, sys, torch
from fastvae.training.memory import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(int(sys.argv[1]) << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = [faults()]
with freed_memory_kept():
    faults()
    found.append(faults())
found.append(faults())
try:
    with freed_memory_kept():
        faults()
        found.append(faults())
        raise KeyError
except KeyError:
    found.append(faults())
print(*found)
"""


@glibc
def test_freed_memory_is_used_again():
    """Of a size that glibc never keeps by itself."""
    result = subprocess.run([sys.executable, "-c", FAULTS, "80"], capture_output=True, text=True, check=True)
    before, inside, after, inside_again, after_the_error = (
        int(count) / (20 * (80 << 8)) for count in result.stdout.split()
    )
    assert inside < 0.05 and inside_again < 0.05
    if before > 0.5:  # else the system maps large pages
        assert after > 0.5 and after_the_error > 0.5, "afterwards it goes back to the system as before"


def test_without_glibc_nothing_is_done(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("no library is asked"))
    with freed_memory_kept():
        pass


def test_another_libc_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with freed_memory_kept():
        pass
