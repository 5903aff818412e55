"""The time of a call inside a CUDA graph, and random operands for it, paged caches among them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from harness.bench.timing import Group

_ROTATED_BYTES = 256 * 2**20  # well above an H200's 60 MB of L2 cache
_COPY_BYTES_PER_S = 4.30e12  # device copy measured on an H200
DTYPE = torch.bfloat16
BLOCK_SIZE = 256
HEAD_DIM = 128
DECODE_MAX_CONTEXT = 4096  # what a captured graph is planned for, where contexts are below it


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One timed case. ``us`` is the median over replays of the time of one call."""

    kernel: str
    case: str
    config: str
    us: float
    bytes_moved: float
    flop: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel,
            "case": self.case,
            "config": self.config,
            "us": round(self.us, 2),
            "tb_per_s": round(self.bytes_moved / self.us / 1e6, 3),
            "percent_of_copy": round(100 * self.bytes_moved / self.us * 1e6 / _COPY_BYTES_PER_S, 1),
            "tflop_per_s": round(self.flop / self.us / 1e6, 1),
        }


def time_us(calls: Sequence[Callable[[], Any]], *, rounds: int = 7, min_calls: int = 16) -> float:
    """Median time of one call, in µs: the calls in turn inside one CUDA graph, replayed ``rounds`` times."""
    group = Group(calls, len(calls) * -(-min_calls // len(calls)), torch.device("cuda"), graph=True)
    group.run()
    return 1e6 * statistics.median(group.run() for _ in range(rounds)) / group.num_calls


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=DTYPE)


def describe(options: dict[str, int]) -> str:
    return " ".join(f"{name} {value}" for name, value in options.items())


def num_copies(num_bytes: float) -> int:
    return max(1, min(64, -(-_ROTATED_BYTES // max(1, int(num_bytes)))))


def paged(contexts: list[int], num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random caches and a block table of scattered blocks for these lengths."""
    blocks_each = [-(-context // BLOCK_SIZE) for context in contexts]
    order = torch.randperm(sum(blocks_each)).int()
    table = torch.zeros(len(contexts), max(blocks_each), dtype=torch.int32)
    for row, num_blocks in zip(table, blocks_each, strict=True):
        row[:num_blocks], order = order[:num_blocks], order[num_blocks:]
    shape = (sum(blocks_each), num_kv_heads, BLOCK_SIZE, HEAD_DIM)
    return normal(*shape), normal(*shape), table.cuda()
