"""The evidence lower bound, and its value and gradient in one."""

from __future__ import annotations

from cases import ELBO

FAMILY = ELBO


def test_elbo(subject, provider, run):
    run(subject, provider)
