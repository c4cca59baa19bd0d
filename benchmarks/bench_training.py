"""The whole training step of the example, see `training_step`."""

from __future__ import annotations


def test_training_step(subject, provider, run):
    run(subject, provider)
