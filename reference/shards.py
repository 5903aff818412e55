"""Which elements of a checkpoint a rank must own, derived a second time.

The engine computes ranges. This module never does: it deals single heads, features and vocabulary rows out to
ranks, one by one, and then asks each rank which it was dealt. The two share no code, so that a mistake has to
be made twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ownership:
    """Who owns what of one tensor.

    dim             the dimension along which ranks differ; None: every rank owns all of the tensor
    indices         by rank: the sorted indices along ``dim`` that it owns; empty arrays where ``dim`` is None
    padded_length   rows that each rank's shard has, the zeros behind its own included; None: no padding
    """

    name: str
    shape: tuple[int, ...]
    tp_size: int
    dim: int | None
    indices: tuple[Indices, ...]
    padded_length: int | None = None

    def shard_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of what ``rank`` holds, padding included."""
        if self.dim is None:
            return self.shape
        length = len(self.indices[rank]) if self.padded_length is None else self.padded_length
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])

    def take(self, whole: NDArray[Any], rank: int) -> NDArray[Any]:
        """``rank``'s shard of ``whole`` [*shape]: its elements in order, then zeros where it is padded."""
        if whole.shape != self.shape:
            raise ValueError(f"whole.shape={whole.shape} is not the shape of {self.name}, {self.shape}")
        if self.dim is None:
            return whole
        shard = np.zeros(self.shard_shape(rank), dtype=whole.dtype)
        own = [slice(None)] * whole.ndim
        own[self.dim] = slice(len(self.indices[rank]))
        shard[tuple(own)] = np.take(whole, self.indices[rank], axis=self.dim)
        return shard


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int


def owners(config: Any, name: str, shape: tuple[int, ...], tp_size: int) -> Ownership:
    """The owners of every element of tensor ``name`` of ``shape``.

    Args:
        config: a Hugging Face config, or a dict like config.json.
        name: as in the checkpoint, such as ``model.layers.0.self_attn.q_proj.weight``.
        shape: the whole tensor's.
        tp_size: ranks that share it.

    Raises:
        ValueError: if the model cannot be split that far, the name is not known, or the shape is not what the
            config says.
    """
    sizes = _sizes(config)
    if not 1 <= tp_size <= sizes.num_q_heads:
        raise ValueError(
            f"tp_size={tp_size} with num_attention_heads={sizes.num_q_heads}: every rank needs a query head; "
            f"take 1 to {sizes.num_q_heads} ranks"
        )
    layer, _, kind = name.rpartition(".")
    layer = layer.rpartition(".")[2]
    if kind not in ("weight", "bias") or layer not in _RULES:
        raise ValueError(f"name={name} is not a tensor whose owners are known; known are {sorted(_RULES)}")
    dim, flags_of = _RULES[layer]
    # A bias has rows alone; that of a row-parallel layer is added once, after the sum: all ranks have it.
    if dim is None or (kind == "bias" and dim == 1):
        return Ownership(name=name, shape=tuple(shape), tp_size=tp_size, dim=None, indices=_nothing(tp_size))

    flags = flags_of(sizes, tp_size)
    if len(shape) <= dim or shape[dim] != flags.shape[1]:
        raise ValueError(f"{name} has shape={tuple(shape)}; the config says {flags.shape[1]} along dim={dim}")
    return Ownership(
        name=name,
        shape=tuple(shape),
        tp_size=tp_size,
        dim=dim,
        indices=tuple(np.flatnonzero(row).astype(np.int64) for row in flags),
        padded_length=_vocab_rows_per_rank(sizes, tp_size) if flags_of is _vocab_flags else None,
    )


def _deal(num_things: int, tp_size: int) -> Flags:
    """[tp_size, num_things]: who gets which thing.

    Dealt like cards, a round at a time, the first ranks get one more where it does not come out even. The
    hands are then laid down in a row, rank by rank, so that neighbours stay together.
    """
    owner_of_place = np.sort(np.arange(num_things) % tp_size)
    return np.stack([owner_of_place == rank for rank in range(tp_size)])


def _query_heads(sizes: _Sizes, tp_size: int) -> Flags:
    return _deal(sizes.num_q_heads, tp_size)


def _kv_heads(sizes: _Sizes, tp_size: int) -> Flags:
    """[tp_size, num_kv_heads]: a rank needs a KV head when one of its query heads reads it."""
    # Every KV head once per query head of its group, in a row: who is read at each query head's place.
    read_by = np.repeat(np.arange(sizes.num_kv_heads), sizes.num_q_heads // sizes.num_kv_heads)
    heads = np.arange(sizes.num_kv_heads)
    return np.stack([np.isin(heads, read_by[has]) for has in _query_heads(sizes, tp_size)])


def _query_flags(sizes: _Sizes, tp_size: int) -> Flags:
    return np.repeat(_query_heads(sizes, tp_size), sizes.head_dim, axis=1)


def _kv_flags(sizes: _Sizes, tp_size: int) -> Flags:
    return np.repeat(_kv_heads(sizes, tp_size), sizes.head_dim, axis=1)


def _feature_flags(sizes: _Sizes, tp_size: int) -> Flags:
    return _deal(sizes.intermediate_size, tp_size)


def _fused_qkv_flags(sizes: _Sizes, tp_size: int) -> Flags:
    """[tp_size, rows of all queries, then all keys, then all values]: each kind of head is dealt by itself."""
    kv_flags = _kv_flags(sizes, tp_size)
    return np.concatenate((_query_flags(sizes, tp_size), kv_flags, kv_flags), axis=1)


def _fused_gate_up_flags(sizes: _Sizes, tp_size: int) -> Flags:
    """[tp_size, rows of all of the gate, then all of up]: whoever has a feature's gate has its up."""
    return np.tile(_feature_flags(sizes, tp_size), (1, 2))


def _vocab_rows_per_rank(sizes: _Sizes, tp_size: int) -> int:
    # Rounded up with whole numbers: minus, floor, minus.
    return -(-sizes.vocab_size // tp_size)


def _vocab_flags(sizes: _Sizes, tp_size: int) -> Flags:
    """[tp_size, vocab_size]: every rank has equally many places; rows fill them from the first on."""
    places = np.repeat(np.arange(tp_size), _vocab_rows_per_rank(sizes, tp_size))
    owner_of_row = places[: sizes.vocab_size]
    return np.stack([owner_of_row == rank for rank in range(tp_size)])


def _nobody(sizes: _Sizes, tp_size: int) -> Flags:
    raise AssertionError("a replicated tensor has no flags")


def _nothing(tp_size: int) -> tuple[Indices, ...]:
    return tuple(np.empty(0, dtype=np.int64) for _ in range(tp_size))


_Rule = tuple[int | None, Callable[[_Sizes, int], Flags]]
_RULES: dict[str, _Rule] = {
    "q_proj": (0, _query_flags),
    "k_proj": (0, _kv_flags),
    "v_proj": (0, _kv_flags),
    "o_proj": (1, _query_flags),
    "gate_proj": (0, _feature_flags),
    "up_proj": (0, _feature_flags),
    "down_proj": (1, _feature_flags),
    # In checkpoints that hold them fused.
    "qkv_proj": (0, _fused_qkv_flags),
    "gate_up_proj": (0, _fused_gate_up_flags),
    "embed_tokens": (0, _vocab_flags),
    "lm_head": (0, _vocab_flags),
    # One norm of head_dim is shared by all heads, so q_norm and k_norm are whole on every rank too.
    **dict.fromkeys(
        ("input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm"), (None, _nobody)
    ),
}


def _sizes(config: Any) -> _Sizes:
    def of(key: str) -> Any:
        return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)

    num_q_heads = int(of("num_attention_heads"))
    num_kv_heads = int(of("num_key_value_heads") or num_q_heads)
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"num_attention_heads={num_q_heads} is no multiple of num_key_value_heads={num_kv_heads}: "
            "query heads would share KV heads unevenly"
        )
    return _Sizes(
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=int(of("head_dim") or of("hidden_size") // num_q_heads),
        intermediate_size=int(of("intermediate_size")),
        vocab_size=int(of("vocab_size")),
    )
