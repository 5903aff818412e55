from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from transformers import AutoConfig

from engine.checkpoint.checkpoint_files import CheckpointError
from engine.config import DTYPES, EngineConfig, EngineOptions, ModelConfig, UnsupportedModelError
from engine.layers.rotary import rope_tables
from reference.checkpoints import random_checkpoint
from tests.engine.support import FEW, tiny_config
from tests.reference.tiny import small_config


def write(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def model_config(**changes: Any) -> ModelConfig:
    values = tiny_config(**changes)
    return ModelConfig.from_hf(AutoConfig.for_model(values.pop("model_type"), **values))


def test_a_llama_config_is_read(tmp_path: Path) -> None:
    config = ModelConfig.from_folder(write(tmp_path, tiny_config(dtype="bfloat16", eos_token_id=7)))
    assert (config.model_type, config.vocab_size, config.hidden_size) == ("llama", 131, 42)
    assert (config.intermediate_size, config.num_layers, config.rms_norm_eps) == (50, 2, 1e-5)
    assert (config.num_q_heads, config.num_kv_heads, config.head_dim) == (6, 3, 8)
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (192, False)
    assert (config.dtype, config.eos_token_ids) == (torch.bfloat16, (7,))


@pytest.mark.parametrize(
    ("changes", "biases"),
    [
        ({}, (True, True, True)),
        ({"attention_bias": False, "mlp_bias": False}, (False, False, False)),
        ({"model_type": "qwen2"}, (True, False, False)),
        ({"model_type": "qwen3"}, (False, False, False)),
        ({"model_type": "qwen3", "attention_bias": True}, (True, True, False)),
        ({"model_type": "mistral", "attention_bias": True, "mlp_bias": True}, (False, False, False)),
        ({"model_type": "phi3", "attention_bias": True, "mlp_bias": True}, (False, False, False)),
    ],
    ids=str,
)
def test_biases_follow_family_and_config(changes: dict[str, Any], biases: tuple[bool, bool, bool]) -> None:
    config = model_config(**changes)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == biases
    assert config.qk_norm == (changes.get("model_type") == "qwen3")


def test_what_a_config_leaves_out_is_derived() -> None:
    config = model_config(head_dim=None, num_key_value_heads=None, hidden_size=48)
    assert (config.head_dim, config.num_kv_heads) == (8, 6)


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


@pytest.mark.parametrize(
    ("changes", "limit", "said"),
    [
        ({"model_type": "mistral", "sliding_window": 100}, 100, "sliding_window=100 of the model, .*take at most 100"),
        ({"model_type": "mistral", "sliding_window": 4096}, 192, "max_position_embeddings=192 of the model"),
        ({"model_type": "mistral", "sliding_window": None}, 192, "max_position_embeddings=192 of the model"),
        ({"model_type": "phi3", "sliding_window": 127}, 127, "sliding_window=127 of the model"),
        (
            {"model_type": "phi3", "rope_parameters": LONGROPE, "original_max_position_embeddings": 48},
            48,
            "original_max_position_embeddings=48 of the model, .*longrope.* take at most 48",
        ),
        # Windows that the family has, but this config does not use.
        ({"model_type": "qwen2", "sliding_window": 8}, 192, "max_position_embeddings=192 of the model"),
    ],
    ids=str,
)
def test_a_sequence_ends_where_a_window_or_other_angles_would_begin(changes: dict[str, Any], limit: int, said: str) -> None:
    model = model_config(hidden_size=48, **changes)
    assert model.max_position_embeddings == limit
    assert EngineConfig(device="cpu", max_model_len=limit).resolve(model).max_model_len == limit
    with pytest.raises(ValueError, match=f"max_model_len={limit + 1} is above {said}"):
        EngineConfig(device="cpu", max_model_len=limit + 1).resolve(model)


@pytest.mark.parametrize(
    ("eos", "generation", "expected"),
    [
        (2, None, (2,)),
        (None, None, ()),
        (2, {"eos_token_id": [5, 6]}, (5, 6)),
        ([3, 4], {"temperature": 0.6}, (3, 4)),
        (2, {"eos_token_id": 0}, (0,)),
        (0, None, (0,)),
        (-1, None, ()),
        (2, {"eos_token_id": [130, 131]}, (130,)),
    ],
)
def test_stop_tokens_come_from_the_generation_config_if_it_names_any(
    tmp_path: Path, eos: Any, generation: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    config = ModelConfig.from_folder(write(tmp_path, tiny_config(eos_token_id=eos), generation))
    assert config.eos_token_ids == expected


def test_a_folder_without_a_config_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no config.json in folder={tmp_path}: give a Hugging Face model folder"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[1]", b'"llama"', b"\xff\xfe\x00"])
def test_a_config_that_is_no_json_object_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"file={tmp_path / 'config.json'}"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mixtral"}, "model_type='mixtral' .*supported: llama, mistral, phi3, qwen2, qwen3"),
        ({"model_type": None}, "model_type=None .*supported: llama"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config .*unquantised"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' .*supported: silu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type='dynamic' .*yarn",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            r"layer_types=\['sliding_attention'\] .*full_attention",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor of a llama .*1.0",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_engine_lacks_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        ModelConfig.from_folder(write(tmp_path, tiny_config() | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_kv_heads": 4}, "num_attention_heads=6 .*num_key_value_heads=4"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"intermediate_size": 0}, "intermediate_size=0 must be from 1"),
        ({"num_layers": -1}, "num_hidden_layers=-1 must be from 1"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(model_config(), **changes)


@pytest.mark.parametrize(
    "name",
    [
        "tensor_parallel_size",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "block_size",
        "num_kv_blocks",
    ],
)
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_counts_must_be_whole_and_positive(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r} must be a whole number"):
        EngineConfig(**{name: value})


@pytest.mark.parametrize("name", ["tensor_parallel_size", "max_num_seqs"])
def test_counts_without_a_default_to_fall_back_on_are_needed(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=None must be a whole number"):
        EngineConfig(**{name: None})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float8"}, "dtype='float8' is unknown; supported: auto, bfloat16"),
        ({"device": "tpu"}, "device='tpu' is unknown; supported: auto, cpu, cuda"),
        ({"gpu_memory_utilization": 0.0}, r"gpu_memory_utilization=0\.0 must lie in \(0, 1\]"),
        ({"gpu_memory_utilization": 1.1}, r"gpu_memory_utilization=1\.1"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization=nan"),
        ({"kv_cache_gib": 0.0}, r"kv_cache_gib=0\.0"),
        ({"kv_cache_gib": float("nan")}, "kv_cache_gib=nan"),
        ({"kv_cache_gib": float("inf")}, "kv_cache_gib=inf"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EngineConfig(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor_parallel_size": 7}, "num_q_heads=6 .*tensor_parallel_size=7"),
        ({"max_model_len": 193}, "max_model_len=193 is above max_position_embeddings=192"),
        (
            {"max_num_batched_tokens": 8, "max_num_seqs": 9},
            "max_num_batched_tokens=8 is below max_num_seqs=9",
        ),
        (
            {"max_num_batched_tokens": 191, "max_num_seqs": 9, "enable_chunked_prefill": False},
            "max_num_batched_tokens=191 is below max_model_len=192",
        ),
    ],
    ids=str,
)
def test_options_that_do_not_fit_the_model_are_refused_by_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EngineConfig(device="cpu", **options).resolve(model_config())


@FEW
@given(
    dtype=st.sampled_from(["auto", *DTYPES]),
    device=st.sampled_from(["cpu", "cuda"]),
    max_num_seqs=st.sampled_from([1, 7, 20_000]),
    max_model_len=st.sampled_from([None, 1, 100, 192]),
    enable_chunked_prefill=st.booleans(),
    block_size=st.sampled_from([None, 1, 48]),
)
def test_resolving_decides_everything_and_is_stable(
    dtype: str,
    device: str,
    max_num_seqs: int,
    max_model_len: int | None,
    enable_chunked_prefill: bool,
    block_size: int | None,
) -> None:
    model = model_config(dtype="float16")
    config = EngineConfig(
        dtype=dtype,
        device=device,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        enable_chunked_prefill=enable_chunked_prefill,
        block_size=block_size,
    ).resolve(model)
    own = "float16" if device == "cuda" else "float32"
    assert config.dtype == (own if dtype == "auto" else dtype)
    assert config.block_size == (block_size or (256 if device == "cuda" else 16))
    assert config.max_num_batched_tokens is not None
    assert config.max_num_batched_tokens >= max_num_seqs
    if not enable_chunked_prefill:
        assert config.max_num_batched_tokens >= (max_model_len or 192)
    assert config.resolve(model) == config


def test_a_cpu_is_chosen_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert EngineConfig().resolve(model_config()).device == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert EngineConfig().resolve(model_config()).device == "cuda"


def test_without_chunks_a_default_budget_grows_to_the_longest_prompt() -> None:
    model = model_config(max_position_embeddings=5000)
    config = EngineConfig(device="cpu", enable_chunked_prefill=False).resolve(model)
    assert config.max_num_batched_tokens == 5000


def test_the_options_of_llm_that_type_checkers_see_are_the_fields_of_its_configuration() -> None:
    assert EngineOptions.__annotations__.keys() == {field.name for field in fields(EngineConfig)}
    hints = get_type_hints(EngineConfig)
    assert {name: hints[name] for name in get_type_hints(EngineOptions)} == get_type_hints(EngineOptions)


def test_what_ranks_import_and_are_sent_brings_no_transformers(tmp_path: Path) -> None:
    """They would wait seconds for it."""
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 64}
    sent = tmp_path / "configs.pickle"
    configs = [model_config(), model_config(rope_parameters=llama3)]
    sent.write_bytes(pickle.dumps([config.for_ranks() for config in configs]))
    code = ("import pickle, sys; from pathlib import Path; import engine.execution.core, engine.ranks.rank_loop; "
            "from engine.layers.rotary import rope_tables; configs = pickle.loads(Path(sys.argv[1]).read_bytes()); "
            "Path(sys.argv[1]).write_bytes(pickle.dumps([rope_tables(config.hf_config, 8, 40) for config in configs])); "
            "sys.exit('transformers' in sys.modules)")
    subprocess.run([sys.executable, "-c", code, str(sent)], check=True, timeout=120)
    for config, found in zip(configs, pickle.loads(sent.read_bytes()), strict=True):
        assert all(map(torch.equal, rope_tables(config.hf_config, 8, 40), found))


STARTED = """
import gc, sys
looks = []
gc.callbacks.append(lambda phase, info: looks.append(phase))
from engine import LLM, SamplingParams
assert "transformers" not in sys.modules
at_first = len(looks)
with LLM(sys.argv[1], skip_tokenizer_init=True) as llm:
    llm.generate([{"prompt_token_ids": [1, 2]}], SamplingParams(max_tokens=1), use_tqdm=False)
    assert gc.isenabled() and not gc.get_freeze_count()
    print(at_first, len(looks), *sys.modules)
"""
NOT_NEEDED = {"hypothesis", "pandas", "rich", "sympy", "tokenizers", "torch._dynamo", "torch._inductor",
              "torch.distributed.tensor", "safetensors.torch", "transformers.modeling_utils"}


def test_a_start_imports_what_it_needs_and_collects_no_garbage_meanwhile(tmp_path: Path) -> None:
    """Transformers before 5.24 may import all its models, and torch._dynamo with them, to describe the class of a config."""
    folder = random_checkpoint(tmp_path / "model", small_config("qwen3"))
    done = subprocess.run([sys.executable, "-c", STARTED, str(folder)], check=True, timeout=120, capture_output=True, text=True)
    at_first, looks, *modules = done.stdout.split()
    assert int(at_first) < 20
    assert int(looks) < 60, "1,000 if the collector is not kept out"
    if Version(transformers.__version__) >= Version("5.24"):
        assert NOT_NEEDED & set(modules) == set()
