"""RoPE's tables against the rotary module of transformers, bit for bit: they are part of a model's definition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from engine.config import ModelConfig
from engine.layers.rotary import rope_tables
from harness.verification.budgets import same_bits
from tests.engine.support import tiny_config

MODULES: dict[str, Any] = {
    "llama": LlamaRotaryEmbedding,
    "mistral": MistralRotaryEmbedding,
    "qwen2": Qwen2RotaryEmbedding,
    "qwen3": Qwen3RotaryEmbedding,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "large base": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, scaled": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 0.7,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
    },
}


def config_of(model_type: str, rope: str, head_dim: int) -> Any:
    values = tiny_config(model_type=model_type, head_dim=head_dim, max_position_embeddings=300, rope_parameters=ROPES[rope])
    return AutoConfig.for_model(values.pop("model_type"), **values)


def their_tables(model_type: str, config: Any, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    rotary = MODULES[model_type](config)
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(num_positions)[None])
    return cos[0], sin[0]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("model_type", MODULES)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_tables_have_the_bits_of_transformers(model_type: str, rope: str, head_dim: int) -> None:
    config = config_of(model_type, rope, head_dim)
    cos, sin = rope_tables(config, head_dim, 300)
    their_cos, their_sin = their_tables(model_type, config, 300)
    # transformers has every angle twice, for both halves of a head.
    assert same_bits(torch.cat([cos, cos], dim=-1), their_cos)
    assert same_bits(torch.cat([sin, sin], dim=-1), their_sin)


@pytest.mark.parametrize("part", [1.0, 0.75, 0.5])
@pytest.mark.parametrize("rope_type", ["default", "longrope"])
@pytest.mark.parametrize("head_dim", [8, 96])
def test_tables_of_a_part_of_each_head_have_the_bits_of_transformers(rope_type: str, part: float, head_dim: int) -> None:
    num_pairs = int(head_dim * part) // 2
    factors = {"short_factor": [1.0 + pair / 7 for pair in range(num_pairs)], "long_factor": [4.0] * num_pairs}
    rope = {"rope_type": rope_type, "rope_theta": 1e4} | (factors if rope_type == "longrope" else {})
    values = tiny_config(model_type="phi3", hidden_size=6 * head_dim, rope_parameters=rope, partial_rotary_factor=part)
    values |= {"head_dim": head_dim, "original_max_position_embeddings": 64}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    their_cos, their_sin = Phi3RotaryEmbedding(config)(torch.zeros(1, dtype=torch.float32), torch.arange(64)[None])
    for ours, theirs in zip(rope_tables(config, head_dim, 64), (their_cos[0], their_sin[0]), strict=True):
        assert ours.shape == (64, num_pairs)
        assert same_bits(torch.cat([ours, ours], dim=-1), theirs)


@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn"])
def test_configs_that_still_say_rope_scaling_are_understood(tmp_path: Path, rope: str) -> None:
    scaling = {name: value for name, value in ROPES[rope].items() if name != "rope_theta"}
    old = tiny_config(head_dim=64, max_position_embeddings=300, rope_theta=ROPES[rope]["rope_theta"], rope_scaling=scaling)
    (tmp_path / "config.json").write_text(json.dumps(old))
    model_config = ModelConfig.from_folder(tmp_path)
    for ours, theirs in zip(
        rope_tables(model_config.hf_config, 64, 300), their_tables("llama", config_of("llama", rope, 64), 300), strict=True
    ):
        assert same_bits(torch.cat([ours, ours], dim=-1), theirs)


@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn"])
def test_each_scaling_makes_a_difference(rope: str) -> None:
    # Or the comparison above would pass with the scaling left out.
    plain, _ = rope_tables(config_of("llama", "default", 64), 64, 100)
    scaled, _ = rope_tables(config_of("llama", rope, 64), 64, 100)
    assert not torch.equal(plain, scaled)


def test_yarns_attention_factor_is_in_the_tables() -> None:
    cos, sin = rope_tables(config_of("llama", "yarn, scaled", 64), 64, 1)
    assert torch.equal(cos, torch.full((1, 32), 0.7))
    assert torch.equal(sin, torch.zeros(1, 32))


def test_a_position_has_the_same_angles_however_long_the_table() -> None:
    config = config_of("llama", "llama3", 64)
    for short, whole in zip(rope_tables(config, 64, 7), rope_tables(config, 64, 300), strict=True):
        assert same_bits(short, whole[:7])


def test_tables_are_float32_with_a_column_for_each_pair() -> None:
    cos, sin = rope_tables(config_of("qwen3", "default", 64), 64, 5)
    assert cos.shape == sin.shape == (5, 32)
    assert cos.dtype == sin.dtype == torch.float32
