"""Triton kernels and their launchers: shapes, strides, grids; no autograd. Importing this package imports Triton."""

from .launch import INTERPRETED

__all__ = ["INTERPRETED"]
