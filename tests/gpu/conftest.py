"""Fixtures of the tests on one GPU."""

from __future__ import annotations

from tests.gpu.support import _quiet_triton, small_model

__all__ = ["_quiet_triton", "small_model"]
