"""Two configurations: the model's, read from ``config.json``, and the engine's own. Both frozen, both checked when made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch

from engine.checkpoint.checkpoint_files import (
    CONFIG_FILE,
    CheckpointError,
    by_model_name,
    one_line,
    open_file,
    read_headers,
    read_json,
    short,
)
from engine.checkpoint.config_rules import LARGEST_SIZE, check_values
from engine.kernels.ieee import LEAF
from engine.kernels.invariant_matmul import MAX_RANKS
from engine.layers.rotary import FrequenciesAlone, rope_frequencies, rope_tables
from engine.models.registry import FAMILIES, family_of
from engine.models.table import Family

DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64,
}
OTHER_NAMES = {"half": "float16", "float": "float32"}
"""Of dtypes, as vLLM takes them."""
ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings")
"""Keys of ``config.json`` that ``hf_overrides`` may change."""
ROPE_KEPT = ("rope_theta", "partial_rotary_factor")
"""Values of RoPE that stay where scaling alone is changed."""
INVARIANT_DTYPES = {"cpu": ("bfloat16", "float32"), "cuda": ("bfloat16",)}
"""Those of ``tp_invariant`` on each kind of device."""
KEYS = {"num_layers": "num_hidden_layers", "num_q_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}
"""Fields that have another name in ``config.json``."""
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
"""Which tensor stands for which where a config ties the embeddings."""


class UnsupportedModelError(CheckpointError):
    """The model needs something that the engine does not have. The message says what, and what is supported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A dense decoder of one of the supported families (``engine.models.registry``).

    Fields without a default are read alike in all families; a family's own file gives the others, or other values.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    """The most tokens that a sequence can have: of the config's limits the one that comes first."""
    tie_word_embeddings: bool
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    hf_config: Any
    """The transformers config, whose own functions compute RoPE where it is more than plain; on ranks, what came of that."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each query and key head."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_q_heads", "num_kv_heads",
                     "head_dim", "max_position_embeddings"):
            if not 1 <= getattr(self, name) <= LARGEST_SIZE:
                raise CheckpointError(f"{KEYS.get(name, name)}={getattr(self, name)} must be from 1 to {LARGEST_SIZE}")
        if self.num_q_heads % self.num_kv_heads:
            raise CheckpointError(f"num_attention_heads={self.num_q_heads} is not a multiple of "
                                  f"num_key_value_heads={self.num_kv_heads}: query heads would share KV heads unevenly")
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")

    @property
    def position_limit(self) -> str:
        """``name=value`` of what limits the length of a sequence, with what there is to know of it."""
        limit = self.max_position_embeddings
        if limit < self.hf_config.max_position_embeddings:
            if limit == getattr(self.hf_config, "sliding_window", None):
                return f"sliding_window={limit} of the model, and attention has no windows here: take at most {limit}"
            return (f"original_max_position_embeddings={limit} of the model, beyond which longrope would turn all keys anew: "
                    f"take at most {limit}")
        return f"max_position_embeddings={limit} of the model"

    def for_ranks(self) -> ModelConfig:
        """The same, to be sent to ranks: without the object of transformers, whose module each rank would import for seconds."""
        return replace(self, hf_config=FrequenciesAlone(rope_frequencies(self.hf_config, self.head_dim)))

    @classmethod
    def from_folder(cls, folder: str | Path, hf_overrides: Mapping[str, Any] | None = None) -> ModelConfig:
        """Read ``config.json`` (and ``generation_config.json`` for stop tokens) of a Hugging Face model folder.

        Where the config ties the embeddings, but the checkpoint holds an LM head of its own that differs, they are not tied, as
        in transformers.

        Args:
            folder: of the model.
            hf_overrides: values of ``ROPE_KEYS`` instead of the file's.

        Raises:
            CheckpointError: naming file and key, if a file is missing, unreadable or broken, or a value can't be.
            UnsupportedModelError: if the model needs what the engine lacks.
        """
        folder = Path(folder)
        path = folder / CONFIG_FILE
        if not path.exists():
            raise CheckpointError(f"no {CONFIG_FILE} in folder={folder}: give a Hugging Face model folder")
        raw = read_json(path)
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise UnsupportedModelError(f"model_type={short(model_type)} in file={path} is not supported; "
                                        f"supported: {', '.join(FAMILIES)}")
        if raw.get("quantization_config") is not None:
            raise UnsupportedModelError(f"quantization_config in file={path} is not supported; use an unquantised checkpoint")
        if hf_overrides:
            raw = _overridden(raw, hf_overrides)
        check_values(raw, path)
        for key in ("dtype", "torch_dtype"):
            if raw.get(key) is not None and raw[key] not in DTYPES:
                raise UnsupportedModelError(f"{key}={short(raw[key])} in file={path} is not supported; "
                                            f"supported: {', '.join(DTYPES)}")
        generation = folder / "generation_config.json"
        eos = None
        if generation.exists():
            values = read_json(generation)
            check_values({"eos_token_id": values.get("eos_token_id")}, generation)
            eos = values.get("eos_token_id")
        from transformers import AutoConfig  # seconds, which ranks need not spend: they are handed what was read

        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if hf_overrides:
                config = type(config).from_dict(raw)
            model = cls.from_hf(config, eos_token_id=eos)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"file={path}: {error}") from error
        except Exception as error:  # whatever transformers makes of a config that can't be
            raise CheckpointError(f"file={path}: {one_line(error)}") from error
        if model.tie_word_embeddings and _has_a_head_of_its_own(folder):
            return replace(model, tie_word_embeddings=False)
        return model

    @classmethod
    def from_hf(cls, config: Any, *, eos_token_id: int | list[int] | None = None) -> ModelConfig:
        """From a transformers config object.

        Raises:
            CheckpointError: if its values can't be.
            UnsupportedModelError: if the model needs what the engine lacks.
        """
        family = family_of(config.model_type)
        _refuse_unsupported(config, family)
        eos = config.eos_token_id if eos_token_id is None else eos_token_id
        eos_ids = () if eos is None else eos if isinstance(eos, (list, tuple)) else (eos,)
        dtype = getattr(config, "dtype", None) or torch.float32
        values: dict[str, Any] = {
            "model_type": config.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_layers": config.num_hidden_layers,
            "num_q_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads or config.num_attention_heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "rms_norm_eps": config.rms_norm_eps,
            "max_position_embeddings": usable_positions(config.max_position_embeddings, config.rope_parameters),
            "tie_word_embeddings": bool(config.tie_word_embeddings),
            "dtype": DTYPES[dtype] if isinstance(dtype, str) else dtype,
            # One outside the vocabulary can't be drawn, nor banned until min_tokens were.
            "eos_token_ids": tuple(token_id for token_id in eos_ids if 0 <= token_id < config.vocab_size),
            "hf_config": config,
        }
        model = cls(**(values | family.fields(config)))
        # Transformers looks at few of RoPE's values; the tables show them all.
        tables = rope_tables(config, model.head_dim, 2)
        if not all(table.numel() and table.isfinite().all() for table in tables):
            raise CheckpointError(f"rope_parameters={config.rope_parameters} give rotary tables that are not finite, or empty")
        return model


def _overridden(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A config with other values for RoPE. Scaling that is given replaces all of the file's but theta and the rotated part."""
    old = {key: raw[key] for key in ROPE_KEPT if key in raw} | (raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    new = dict(overrides.get("rope_parameters", overrides.get("rope_scaling", old)) or {})
    new = {key: old[key] for key in ROPE_KEPT if key in old} | new
    if "rope_theta" in overrides:
        new["rope_theta"] = overrides["rope_theta"]
    kept = {key: value for key, value in raw.items() if key not in ("rope_scaling", "rope_theta", "rope_parameters")}
    if "max_position_embeddings" in overrides:
        kept["max_position_embeddings"] = overrides["max_position_embeddings"]
    return {**kept, "rope_parameters": {"rope_type": new.pop("type", "default"), **new}}


def usable_positions(max_position_embeddings: int, rope_parameters: Mapping[str, Any] | None,
                     sliding_window: int | None = None) -> int:
    """How many positions a sequence can have.

    YaRN reaches ``factor`` times the length that it starts from. A config may hold that product, or the length before it:
    Qwen documents the latter. Longrope turns keys by other angles once a sequence is longer than the length that it starts
    from, those in the cache too: a sequence ends there. It also ends where a token would first be outside a sliding window.
    """
    rope = rope_parameters or {}
    rope_type = rope.get("rope_type", rope.get("type"))
    original = rope.get("original_max_position_embeddings") or max_position_embeddings
    positions = max_position_embeddings
    if rope_type == "yarn":
        positions = max(positions, int(original * (rope.get("factor") or 1)))
    if rope_type == "longrope":
        positions = min(positions, original)
    return min(positions, sliding_window or positions)


def _has_a_head_of_its_own(folder: Path) -> bool:
    """Whether the checkpoint holds both of the tensors that its config ties, and they differ."""
    try:
        stored = by_model_name(read_headers(folder), {*TIED, *TIED.values()})
        pairs = [(stored[copy], stored[original]) for copy, original in TIED.items() if copy in stored and original in stored]
        for pair in pairs:
            copy, original = (open_file(one.file).get_tensor(one.name) for one in pair)
            if copy.shape != original.shape or not (copy == original).all():
                return True
        return False
    except CheckpointError:
        return False  # said by whoever loads the weights


def _refuse_unsupported(config: Any, family: Family) -> None:
    if config.hidden_act != "silu":
        raise UnsupportedModelError(f"hidden_act={config.hidden_act!r} is not supported; supported: silu")
    rope = config.rope_parameters or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in family.rope_types:
        raise UnsupportedModelError(f"rope_type={rope_type!r} is not supported; supported: {', '.join(family.rope_types)}")
    sliding = [kind for kind in getattr(config, "layer_types", None) or [] if kind != "full_attention"]
    if sliding:
        raise UnsupportedModelError(f"layer_types={sorted(set(sliding))} is not supported; "
                                    "supported: full_attention (use_sliding_window=false)")
    partial = getattr(config, "partial_rotary_factor", 1.0) not in (None, 1.0) or rope.get("partial_rotary_factor", 1.0) != 1.0
    if partial and not family.partial_rotary:
        raise UnsupportedModelError(f"partial_rotary_factor of a {config.model_type} is not supported; supported: 1.0")


class EngineOptions(TypedDict, total=False):
    """The options of ``LLM``, for editors and type checkers: the fields of :class:`EngineConfig`."""

    tensor_parallel_size: int
    fabric: str
    device: str
    dtype: str
    attention_backend: str
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int | None
    block_size: int | None
    num_kv_blocks: int | None
    kv_cache_gib: float
    gpu_memory_utilization: float
    enable_prefix_caching: bool
    tp_invariant: bool
    enable_chunked_prefill: bool
    enforce_eager: bool
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How the engine runs a model. ``None`` means: decided from model and device by :meth:`resolve`."""

    tensor_parallel_size: int = 1
    fabric: str = "auto"
    """What joins the ranks: ``auto``, ``solo``, ``threads``, ``gloo`` or ``nccl``."""
    device: str = "auto"
    dtype: str = "auto"
    """``auto``: the checkpoint's on a GPU; at least float32 on a CPU, where 16-bit arithmetic is no faster and rounds more."""
    attention_backend: str = "auto"
    max_model_len: int | None = None
    """Longest sequence in tokens, prompt and output together; by default the model's own limit, or what the cache holds."""
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    """Most tokens in one step: 2,048 on a CPU, 16,384 on a GPU by default."""
    block_size: int | None = None
    """Tokens per KV-cache block: 16 on a CPU, 256 on a GPU by default."""
    num_kv_blocks: int | None = None
    """Blocks in the KV cache; by default from ``kv_cache_gib``, or from what ``gpu_memory_utilization`` leaves free."""
    kv_cache_gib: float = 2.0
    """KV-cache memory of one rank on a CPU, in GiB; never more than ``max_num_seqs`` sequences can fill."""
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    enforce_eager: bool = False
    """Never capture CUDA graphs."""
    tp_invariant: bool = False
    """The same bits at any tensor_parallel_size and in any batch (docs/invariance.md)."""
    seed: int = 0

    def __post_init__(self) -> None:
        decided_later = ("max_model_len", "max_num_batched_tokens", "block_size", "num_kv_blocks")
        for name in ("tensor_parallel_size", "max_num_seqs", *decided_later):
            value = getattr(self, name)
            if value is None and name in decided_later:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed={self.seed!r} must be a whole number")
        for name in ("enable_prefix_caching", "enable_chunked_prefill", "enforce_eager", "tp_invariant"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        for name in ("kv_cache_gib", "gpu_memory_utilization"):
            if not isinstance(getattr(self, name), (int, float)) or isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a number")
        if isinstance(self.dtype, str):
            object.__setattr__(self, "dtype", OTHER_NAMES.get(self.dtype, self.dtype))
        for name in ("fabric", "device", "dtype", "attention_backend"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a name, such as 'auto'")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown; supported: auto, {', '.join(DTYPES)}")
        if self.device != "auto" and not re.fullmatch(r"(cpu|cuda)(:\d+)?", self.device):
            raise ValueError(f"device={self.device!r} is unknown; supported: auto, cpu, cuda, or one GPU as cuda:0")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization={self.gpu_memory_utilization} must lie in (0, 1]")
        if not 0 < self.kv_cache_gib < math.inf:
            raise ValueError(f"kv_cache_gib={self.kv_cache_gib} must be above 0, and finite")

    @property
    def resolved_device(self) -> str:
        """``device``, or for ``auto`` what this machine has."""
        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device

    def resolve(self, model: ModelConfig) -> EngineConfig:
        """The same configuration with every ``auto`` and ``None`` decided that needs no look at the device's memory.

        Raises:
            ValueError: if the model can't run under this configuration.
        """
        device = self.resolved_device
        on_gpu = device.startswith("cuda")
        if model.num_q_heads < self.tensor_parallel_size:
            raise ValueError(f"num_q_heads={model.num_q_heads} can't be split over tensor_parallel_size="
                             f"{self.tensor_parallel_size}: every rank needs at least one query head")
        longest = self.max_model_len or model.max_position_embeddings
        if longest > model.max_position_embeddings:
            raise ValueError(f"max_model_len={longest} is above {model.position_limit}")
        block_size = self.block_size or (256 if on_gpu else 16)
        if self.max_model_len and self.num_kv_blocks and self.num_kv_blocks * block_size < self.max_model_len:
            raise ValueError(f"num_kv_blocks={self.num_kv_blocks} x block_size={block_size} tokens are fewer than max_model_len="
                             f"{self.max_model_len}: lower max_model_len, or raise num_kv_blocks")
        max_num_batched_tokens = self.max_num_batched_tokens or max(16_384 if on_gpu else 2_048, self.max_num_seqs)
        if max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(f"max_num_batched_tokens={max_num_batched_tokens} is below max_num_seqs={self.max_num_seqs}: "
                             "a decode step needs one token per sequence")
        if not self.enable_chunked_prefill and max_num_batched_tokens < longest:
            if self.max_num_batched_tokens:
                raise ValueError(f"max_num_batched_tokens={max_num_batched_tokens} is below max_model_len={longest}: "
                                 "without chunked prefill a whole prompt must fit in one step")
            max_num_batched_tokens = longest
        own = model.dtype if on_gpu else torch.promote_types(model.dtype, torch.float32)
        dtype = str(own).removeprefix("torch.") if self.dtype == "auto" else self.dtype
        if self.tp_invariant:
            self._check_invariant(model, dtype, on_gpu)
        return replace(self, device=device, dtype=dtype,
                       max_num_batched_tokens=max_num_batched_tokens,
                       block_size=block_size)

    def _check_invariant(self, model: ModelConfig, dtype: str, on_gpu: bool) -> None:
        """Refuse by name what ``tp_invariant`` does not promise."""
        kind = "cuda" if on_gpu else "cpu"
        if dtype not in INVARIANT_DTYPES[kind]:
            raise ValueError(f"tp_invariant=True is promised in dtype={' and '.join(INVARIANT_DTYPES[kind])} alone on "
                             f"device={kind}, and dtype={dtype}: give dtype one of these")
        if self.attention_backend != "auto":
            raise ValueError(f"tp_invariant=True has an attention of its own, and attention_backend={self.attention_backend!r}: "
                             "leave it out")
        if on_gpu and model.head_dim % 16:
            raise ValueError(f"head_dim={model.head_dim} is not a multiple of 16, for which alone tp_invariant=True is promised "
                             "on device=cuda")
        if model.head_dim > LEAF:
            raise ValueError(f"head_dim={model.head_dim} is above {LEAF}, the most that tp_invariant=True sums exactly")
        if self.tensor_parallel_size > MAX_RANKS:
            raise ValueError(f"tensor_parallel_size={self.tensor_parallel_size} is above {MAX_RANKS}, the most ranks whose sums "
                             "tp_invariant=True promises")
