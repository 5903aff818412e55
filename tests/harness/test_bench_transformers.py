"""What ``bench`` asks of transformers, held against the release that is installed."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from harness.bench.engines.base import EngineSpec
from harness.bench.engines.transformers_engine import ContinuousBatchingEngine, GenerateEngine
from harness.bench.workloads import Limits
from reference.checkpoints import random_checkpoint
from tests.reference.tiny import tiny_config


@pytest.mark.parametrize("engine", [GenerateEngine, ContinuousBatchingEngine])
def test_an_engine_of_transformers_starts_without_a_warning(
    engine: type[GenerateEngine | ContinuousBatchingEngine], tmp_path: Path
) -> None:
    folder = random_checkpoint(tmp_path / "tiny", tiny_config())
    limits = Limits(max_model_len=64, max_num_seqs=2, max_num_batched_tokens=64)
    spec = EngineSpec(folder=folder, tp_size=1, fabric="own", device="cpu", dtype="float32", vocab_size=101, limits=limits,
                      sequence_lens=(8,))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        engine(spec, folder).close()
    assert [str(warning.message) for warning in seen] == []
