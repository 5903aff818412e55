"""Checkpoints for the harness's tests: random tiny models, each written once a session."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reference.checkpoints import random_checkpoint

MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """``tiny_model(config, dtype)``: the folder of a random model. Tests copy what they mean to change."""
    written: dict[str, Path] = {}

    def make(config: dict[str, Any], dtype: str = "float32", seed: int = 0) -> Path:
        key = json.dumps([config, dtype, seed], sort_keys=True)
        if key not in written:
            written[key] = random_checkpoint(tmp_path_factory.mktemp("model"), config, dtype=dtype, seed=seed)
        return written[key]

    return make
