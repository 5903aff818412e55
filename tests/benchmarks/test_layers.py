"""Each parallel layer alone, whole, by batch size: ``python -m pytest tests/benchmarks --benchmark-only -k layer``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.config import ModelConfig
from engine.parallel.embedding import VocabParallelEmbedding
from engine.parallel.group import SoloGroup
from harness.bench.layers import layer_input, make_layer
from harness.bench.shapes import NO_SPECIAL_TOKENS, SHAPES
from harness.bench.workloads import LayersWork
from reference.checkpoints import as_config
from tests.benchmarks.timed import finished

LAYERS = LayersWork(batch_sizes=(1, 16), rounds=1, slice_s=1).layers


@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, batch_size: int, benchmark: Any, device: torch.device, dtype: torch.dtype) -> None:
    shape = "qwen3-0.6b" if device.type == "cuda" else "smollm2-135m"
    config = ModelConfig.from_hf(as_config(dict(SHAPES[shape]) | NO_SPECIAL_TOKENS))
    layer = make_layer(name, config, SoloGroup(), dtype, device)
    layer.weight.data.normal_(std=layer.weight.shape[1] ** -0.5)
    x = layer_input(layer, config, batch_size, dtype, device)
    width = config.hidden_size if isinstance(layer, VocabParallelEmbedding) else layer.weight.shape[0]
    with torch.inference_mode():
        result = benchmark(finished(lambda: layer(x), device))
    benchmark.extra_info |= {"model": shape, "batch_size": batch_size, "device": device.type}
    assert result.shape == (batch_size, width)
    assert result.isfinite().all()
