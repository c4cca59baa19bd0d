"""What the loop does with memory on the CPU."""

from __future__ import annotations

import ctypes
import platform

import pytest
import torch

from fastvae.training import memory
from fastvae.training.memory import freed_memory_kept

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told")


def page_faults(megabytes: int) -> int:
    """Of writing 20 tensors, one after the other."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(megabytes << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@glibc
@pytest.mark.parametrize("megabytes", [8, 80])  # below and above the largest block that glibc ever keeps by itself
def test_freed_memory_is_used_again(megabytes):
    pages = 20 * (megabytes << 8)
    with freed_memory_kept():
        page_faults(megabytes)
        inside = page_faults(megabytes)
    assert inside < 0.05 * pages
    if megabytes > 64:
        assert page_faults(megabytes) > 0.5 * pages, "afterwards it goes back to the system as before"


@glibc
def test_it_ends_with_an_error_too():
    with pytest.raises(KeyError), freed_memory_kept():
        raise KeyError
    assert page_faults(80) > 0.5 * 20 * (80 << 8)


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
