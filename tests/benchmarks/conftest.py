"""Off unless asked for: ``python -m pytest tests/benchmarks --benchmark-only``. A test run has no time for timings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # None leaves the decision to others.
    return None if config.getoption("benchmark_only") else True


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def dtype() -> torch.dtype:
    """What the engine is mostly run in."""
    return torch.bfloat16
