"""What ``bench`` asks of transformers, held against the release that is installed."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from transformers import GenerationConfig

from harness.bench.engines import EngineSpec
from harness.bench.engines.transformers_engine import ContinuousBatchingEngine, GenerateEngine
from harness.bench.workloads import Limits
from reference.checkpoints import random_checkpoint
from tests.reference.tiny import tiny_config


def test_no_end_of_sequence_token_and_no_other_default_of_a_checkpoint_ends_what_transformers_generates(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "tiny", tiny_config())
    config = GenerationConfig(eos_token_id=list(range(101)), repetition_penalty=1.5, max_length=9, stop_strings=["a"])
    config.save_pretrained(folder)
    limits = Limits(max_model_len=64, max_num_seqs=2, max_num_batched_tokens=64)
    spec = EngineSpec(folder=folder, tp_size=1, fabric="own", device="cpu", dtype="float32", limits=limits, sequence_lens=(8,))
    engine = GenerateEngine(spec, folder)
    for requests in ([([1, 2, 3], 8)] * 2, [([1, 2, 3], 8), ([4, 5], 3)]):
        try:
            times = engine.stream(requests, 0.6)
        except ValueError as error:
            pytest.fail(f"a default of the checkpoint was in the way: {error}")
        assert [len(stamps) for stamps in times] == [count for _, count in requests]
        assert list(engine.generate(requests, 0.6).num_tokens) == [count for _, count in requests]
    engine.close()


@pytest.mark.parametrize("engine", [GenerateEngine, ContinuousBatchingEngine])
def test_an_engine_of_transformers_starts_without_a_warning(
    engine: type[GenerateEngine | ContinuousBatchingEngine], tmp_path: Path
) -> None:
    folder = random_checkpoint(tmp_path / "tiny", tiny_config())
    limits = Limits(max_model_len=64, max_num_seqs=2, max_num_batched_tokens=64)
    spec = EngineSpec(folder=folder, tp_size=1, fabric="own", device="cpu", dtype="float32", limits=limits, sequence_lens=(8,))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        engine(spec, folder).close()
    assert [str(warning.message) for warning in seen] == []
