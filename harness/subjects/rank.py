"""What checks see inside one rank of a subject: an implementation there, and its parts alone, by capability.

Shape suffixes: T = tokens of one sequence, R = rows, V = vocabulary, H = head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from harness.subjects.base import Schedule, missing
from reference.hf import Activations
from reference.shards import Ownership


class Collectives(Protocol):
    """One rank's end of the collectives. Capability ``collectives``.

    ``capturable = True`` says that CUDA graphs may hold them; left out, they are called one by one.
    """

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks; it may be ``x`` itself."""

    def all_gather(self, x: Tensor, *, dim: int) -> Tensor:
        """What all ranks give, along ``dim``, in rank order."""

    def all_reduce_min(self, value: int) -> int:
        """The smallest of all ranks' values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One parallel layer with whole weights, in the order of the checkpoint's tensors that it fuses.

    kind     ``replicated``, ``column``, ``merged`` (gate, up), ``qkv``, ``row``, ``attention_output``, ``embedding``, ``lm_head``
    config   a config.json that gives its sizes
    """

    kind: str
    config: Mapping[str, Any]
    dtype: torch.dtype
    weights: Sequence[Tensor]
    biases: Sequence[Tensor] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionStep:
    """Several sequences' queries against all that each has seen; whole, the same on every rank.

    queries   per sequence [new tokens, query heads, H]
    keys      per sequence [all tokens, KV heads, H]; values likewise
    shared    leading tokens that all sequences have in common, as far as they reach
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    queries: Sequence[Tensor]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    shared: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotated:
    """What became of queries, keys and values: q [T, Q, H]; the cache's contents slot by slot, [slots, KV heads, H]."""

    q: Tensor
    k_slots: Tensor
    v_slots: Tensor


class AttentionAlone(Protocol):
    """One rank's attention. Capability ``attention``."""

    def heads(self, num_q_heads: int, num_kv_heads: int) -> tuple[range, range]:
        """This rank's query heads and the KV heads that it keeps for them."""

    def attend(self, step: AttentionStep) -> dict[str, list[Tensor]]:
        """By backend that serves this layout: outputs ``[new tokens, this rank's query heads, H]`` of each sequence."""

    def rotary_tables(self, config: Mapping[str, Any], num_positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[positions, rotated features / 2]``."""

    def rotate(self, config: Mapping[str, Any], tables: tuple[Tensor, Tensor], qkv: Tensor, positions: Tensor, slots: Tensor, *,
               num_slots: int, block_size: int, norms: Sequence[Tensor | None]) -> Rotated:
        """Norm and rotate this rank's heads of ``qkv`` [T, (Q + 2 N) * H]; keys and values go to ``slots``, or nowhere (-1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawRow:
    """How one row's token is to be drawn."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    position: int
    banned: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """One step of a scheduler: its sequences' new tokens, where to write them and what to read.

    token_ids   of each new token; negative: the one that was drawn last in its sequence's row
    rows        of each sequence, in which its last token is kept
    samples     numbers of the sequences of which a token is drawn
    digest      of everything that the device would be given
    """

    cu_seqlens: list[int]
    context_lens: list[int]
    block_tables: list[list[int]]
    slots: list[int]
    token_ids: list[int]
    positions: list[int]
    rows: list[int]
    samples: list[int]
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What a scheduler is given, by vLLM's names."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_chunked_prefill: bool
    enable_prefix_caching: bool


class SchedulerAlone(Protocol):
    """A scheduler with its block manager over a device that is made up. Capability ``scheduler``."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""

    def add(self, number: int, prompt: tuple[int, ...], num_tokens: int) -> None:
        """A greedy request: so many tokens after this prompt."""

    def abort(self, number: int) -> None:
        """Give a request up, wherever it is."""

    def step(self) -> list[tuple[int, int]]:
        """One step: (request, token) that came."""

    def blocks(self) -> tuple[list[int], list[int], int]:
        """Blocks that running sequences hold, one entry a holder; reference counts by block; the number that counts as free."""


class Rank(ABC):
    """An implementation inside one rank, for :class:`harness.subjects.on_ranks.OnRanks` and for jobs of capabilities.

    phase   what it is doing, for the report if it fails
    """

    tp_rank: int
    tp_size: int
    device: torch.device
    phase: str = ""

    @abstractmethod
    def load(self, folder: Path, *, dtype: str, options: Mapping[str, Any]) -> None:
        """Load this rank's shards."""

    @abstractmethod
    def shards(self) -> dict[str, Tensor]:
        """As ``Subject.shards``: all that this rank holds, wherever it lives."""

    @abstractmethod
    def logits(self, schedule: Schedule) -> list[Tensor]:
        """As ``Subject.logits``."""

    @abstractmethod
    def activations(self, schedule: Schedule, sequence: int) -> Activations:
        """As ``Subject.activations``."""

    @abstractmethod
    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]],
                 before_step: Callable[[str], None] = lambda phase: None) -> list[list[int]]:
        """As ``Subject.generate``, calling ``before_step("prefill" or "decode")`` before each step."""

    # Capabilities.

    @property
    def collectives(self) -> Collectives:
        """Capability ``collectives``."""
        raise missing("collectives", "collectives")

    @staticmethod
    def layout(config: Mapping[str, Any], name: str, shape: tuple[int, ...], tp_size: int) -> Ownership:
        """As ``Subject.layout``, for any number of ranks and a model that need not be loaded. Capability ``layers``."""
        raise missing("layers", "layout")

    def layer(self, spec: LayerSpec) -> Callable[[Tensor], Tensor]:
        """This rank's part of the layer, loaded: what the rank is given -> what it shows, on the CPU. Capability ``layers``."""
        raise missing("layers", "layer")

    @property
    def attention(self) -> AttentionAlone:
        """Capability ``attention``."""
        raise missing("attention", "attention")

    def draw(self, logits: Tensor, rows: Sequence[DrawRow]) -> Tensor:
        """A token ``[R]`` from ``logits`` [V] for each row, all in one batch. Capability ``sampler``."""
        raise missing("sampler", "draw")

    def scheduler(self, limits: SchedulerLimits, launch: Callable[[StepInputs], list[int]]) -> SchedulerAlone:
        """A new scheduler, which has ``launch`` run its steps: it returns the tokens of ``samples``. Capability ``scheduler``."""
        raise missing("scheduler", "scheduler")

    def cache_blocks(self) -> tuple[int, int]:
        """Blocks that the bookkeeping of what is loaded counts on, and blocks that its cache tensors have. ``scheduler``."""
        raise missing("scheduler", "cache_blocks")
