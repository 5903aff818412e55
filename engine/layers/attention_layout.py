"""What an attention backend is given: the layout that it must serve, and one layer's cache.

Shape suffixes: T = tokens, P = cache blocks, B = slots of a block, Q / N = local query / KV heads, H = head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.parallel.sharding import HeadShard
from engine.scheduling.batch import StepBatch


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer on one rank, each ``[blocks, N, block_size, H]``."""

    k_PNBH: Tensor
    v_PNBH: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayout:
    """What a backend must serve."""

    heads: HeadShard
    head_dim: int
    block_size: int
    dtype: torch.dtype
    device: torch.device


class AttentionBackend(Protocol):
    """``(q [T, Q, H], cache, batch) -> [T, Q, H]``. The cache holds this step's keys and values already."""

    name: str
    capturable: bool
    """Asks the host nothing, so a CUDA graph can record it."""

    def __call__(self, q_TQH: Tensor, cache: LayerCache, batch: StepBatch) -> Tensor: ...
