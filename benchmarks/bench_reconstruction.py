"""The reconstruction loss."""

from __future__ import annotations

from cases import RECONSTRUCTION

FAMILY = RECONSTRUCTION


def test_reconstruction(subject, provider, run):
    run(subject, provider)
