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


# In a process of its own, whose heap has no holes. Prints the page faults of writing 20 tensors, one after the other,
# before a block and in it; and the resident megabytes before it, in it, after it, and after one that ended with an
# error; in the order in which they are found.
FAULTS = """
import resource, torch
from fastvae.training.memory import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(80 << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20

found = [faults(), resident()]
with freed_memory_kept():
    faults()
    found += [faults(), resident()]
found.append(resident())
try:
    with freed_memory_kept():
        faults()
        raise KeyError
except KeyError:
    found.append(resident())
print(*found)
"""


@glibc
def test_freed_memory_is_used_again_and_given_back():
    """80 MB, which glibc never keeps by itself."""
    result = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    faults_before, before, faults_inside, inside, after, after_the_error = map(int, result.stdout.split())
    assert faults_inside < 0.05 * faults_before
    assert inside > before + 70
    assert after < before + 20 and after_the_error < before + 20


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
