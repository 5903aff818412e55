"""Checkpoints for the harness's tests: random tiny models, each written once a session."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.ranks.ranks import Ranks
from harness.checks import PRELOAD
from reference.checkpoints import random_checkpoint

MakeModel = Callable[..., Path]
HERE = Path(__file__).parent
ALL_TESTS = pytest.StashKey[list[pytest.Item]]()
TRANSFORMERS = ("harness.subjects.transformers", "harness.subjects.torch_plan", "transformers.models.llama.modeling_llama")
"""What ranks of the subjects that are not the engine import: seconds for each of them, at each start."""


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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep all tests, before any is deselected, for the one that tries selections of them."""
    if config.args == config.getini("testpaths"):
        config.stash[ALL_TESTS] = list(items)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the ranks' fork server with all that the checks import, before a test starts it with less.

    Ranks of a server without it import it one by one, which takes seconds at every restart.
    """
    if any(item.get_closest_marker("multirank") and item.path.is_relative_to(HERE) for item in session.items) \
            and not session.config.option.collectonly:
        Ranks(2, fabric="gloo", preload=(*PRELOAD, *TRANSFORMERS)).close()
