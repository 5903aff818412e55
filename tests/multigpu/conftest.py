"""Fixtures of the tests on several GPUs: those of one."""

from __future__ import annotations

from tests.gpu.support import _quiet_triton, small_model

__all__ = ["_quiet_triton", "small_model"]
