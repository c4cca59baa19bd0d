"""Sampling and the divergence."""

from __future__ import annotations

from cases import GAUSSIAN

FAMILY = GAUSSIAN


def test_gaussian(subject, provider, run):
    run(subject, provider)
