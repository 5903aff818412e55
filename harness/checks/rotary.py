"""Are the rotary tables those of transformers, at every position and for every length, and are queries and keys turned by them?

Part of the attention check. Tables for a short ``max_model_len``, for the length that the model was first trained on, and for
its longest, because scaled kinds of RoPE must not depend on which of them is asked for; then queries and keys of random values
at positions up to the last one, written to cache slots that lie anywhere, some of them to none.

Shape suffixes: T = tokens, Q / N = query / KV heads, H = head dim, R = H / 2, P = blocks, B = slots in a block.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import engine.layers.rotary as rotary
from engine.config import ModelConfig, usable_positions
from engine.kernels.rope import rope_store_kv, rope_store_kv_torch
from engine.layers.dispatch import pick
from engine.parallel.sharding import head_shard
from engine.ranks.ranks import RankContext
from harness.checks.base import CheckContext, Outcome
from harness.verification.budgets import rounding, same_bits, sum_variance
from reference.hf import DTYPES

SHORT = 40
"""Positions of the shortest tables."""
MOST_TABLE = 32_768
"""Positions of the longest: larger tables differ in nothing but their size."""
NUM_POSITIONS = 64
BLOCK_SIZE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryCase:
    """Tables of so many positions, and the positions looked at."""

    num_positions: int
    positions: tuple[int, ...]
    dtype: str
    seed: int

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> RotaryCase:
        """From JSON values."""
        return cls(**{**values, "positions": tuple(values["positions"])})

    def __str__(self) -> str:
        return f"rotary tables of {self.num_positions} positions, {self.dtype} (seed={self.seed})"


def check_rotary(context: CheckContext) -> Outcome:
    folder = context.truth.folder
    if context.case is None:
        cases = draw_cases(random.Random(context.seed), context.truth.config, context.dtype)
    else:
        cases = [RotaryCase.from_plain(context.case)]
    by_rank: list[list[tuple[int, str | None]]] = context.ranks.run(run_cases, folder, cases)
    compared = sum(count for answers in by_rank for count, _ in answers)
    for number, case in enumerate(cases):
        for rank, answers in enumerate(by_rank):
            if answers[number][1] is not None:
                return Outcome(cases=len(cases), compared=compared, rank=rank, module="rotary", case=asdict(case),
                               finding=f"{case}: rank {rank}: {answers[number][1]}")
    return Outcome(cases=len(cases), compared=compared)


def draw_cases(draw: random.Random, config: dict[str, Any], dtype: str) -> list[RotaryCase]:
    """Lengths up to, at and beyond the one that the model was first trained on, if its RoPE is a scaled one."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    longest = min(usable_positions(config["max_position_embeddings"], rope), MOST_TABLE)
    original = rope.get("original_max_position_embeddings") or longest
    lengths = sorted({min(length, longest) for length in (SHORT, original, original + 1, longest)})
    cases = []
    for length in lengths:
        # Powers of two too: beyond one of them a narrow type no longer counts every position.
        edges = {0, 1, length - 1, length - 2, original - 1, original, *(2**bit + 1 for bit in range(16))}
        positions = {position for position in edges if 0 <= position < length}
        positions |= {draw.randrange(length) for _ in range(NUM_POSITIONS - len(positions))}
        cases.append(RotaryCase(num_positions=length, positions=tuple(draw.sample(sorted(positions), len(positions))),
                                dtype=dtype, seed=draw.randrange(2**31)))
    return cases


def run_cases(rank: RankContext, folder: Path, cases: Sequence[RotaryCase]) -> list[tuple[int, str | None]]:
    """Job: for each case the number of values compared, and what is wrong, if something is."""
    config = ModelConfig.from_folder(folder)
    with torch.inference_mode():
        return [_run_case(rank, config, case) for case in cases]


def _run_case(rank: RankContext, config: ModelConfig, case: RotaryCase) -> tuple[int, str | None]:
    tables = rotary.rope_tables(config.hf_config, config.head_dim, case.num_positions, device=rank.device)
    position_T = torch.tensor(case.positions)
    right = rotary_embedding(config.hf_config)(torch.zeros(1, dtype=torch.float32), position_T[None])
    half = right[0].shape[-1] // 2
    expected = [table[0, :, :half] for table in right]
    for what, table, rows_TR in zip(("cosine", "sine"), tables, expected, strict=True):
        if table.shape != (case.num_positions, half):
            return 0, f"the {what} table is {tuple(table.shape)}, it should be {(case.num_positions, half)}"
        found_TR = table.cpu()[position_T]
        if not same_bits(found_TR, rows_TR):
            wrong = [case.positions[row] for row in (found_TR != rows_TR).any(1).nonzero().flatten().tolist()]
            return 0, f"the {what} table is not that of transformers, first seen at position {min(wrong, default=0)}"
    compared = 2 * position_T.numel() * half
    turned, problem = _turn(rank, config, case, tables, expected)
    return compared + turned, problem


def rotary_embedding(hf_config: Any) -> Any:
    """Transformers' module for the tables of such a model."""
    modeling = import_module(type(hf_config).__module__.replace(".configuration_", ".modeling_"))
    return next(value for name, value in vars(modeling).items() if name.endswith("RotaryEmbedding"))(hf_config)


def _turn(rank: RankContext, config: ModelConfig, case: RotaryCase, tables: tuple[Tensor, Tensor],
          expected: Sequence[Tensor]) -> tuple[int, str | None]:
    """Rotate and store this rank's heads at the case's positions."""
    heads = head_shard(config.num_q_heads, config.num_kv_heads, tp_rank=rank.tp.rank, tp_size=rank.tp.size)
    num_q, num_kv, dim = heads.local_num_q_heads, heads.local_num_kv_heads, config.head_dim
    num_tokens, dtype = len(case.positions), DTYPES[case.dtype]
    if dtype is torch.float64 and rank.device.type == "cuda":
        return 0, None  # no kernel computes in float64
    generator = torch.Generator().manual_seed(case.seed + rank.tp.rank)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    # Wider rows than the heads take, so that a token's heads do not begin where the last one's end.
    qkv_TC = drawn(num_tokens, (num_q + 2 * num_kv) * dim + 8)[:, :-8]
    num_blocks = -(-num_tokens // BLOCK_SIZE) + 2
    slot_T = torch.randperm(num_blocks * BLOCK_SIZE, generator=generator)[:num_tokens]
    slot_T[::7] = -1
    caches = torch.full((2, num_blocks, num_kv, BLOCK_SIZE, dim), float("nan"), dtype=dtype, device=rank.device)
    norms = [1 + 0.1 * drawn(dim) if config.qk_norm else None for _ in range(2)]
    q_TQH = pick(caches, rope_store_kv, rope_store_kv_torch)(
        qkv_TC.to(rank.device), torch.tensor(case.positions, device=rank.device), *tables, caches[0], caches[1],
        slot_T.to(rank.device),
        q_norm_weight_H=None if norms[0] is None else norms[0].to(rank.device),
        k_norm_weight_H=None if norms[1] is None else norms[1].to(rank.device), eps=config.rms_norm_eps).cpu()
    given = qkv_TC.unflatten(1, (-1, dim)).split([num_q, num_kv, num_kv], dim=1)
    stored = slot_T >= 0
    rows = [cache.cpu().transpose(1, 2).flatten(0, 1)[slot_T[stored]] for cache in caches]
    for what, found, x_TNH, norm_H, keep in (("queries", q_TQH, given[0], norms[0], torch.ones_like(stored)),
                                             ("keys", rows[0], given[1], norms[1], stored)):
        exact, variance = (value[keep].flatten(0, 1) for value in
                           _rotate(x_TNH, expected, norm_H, config.rms_norm_eps, case.dtype))
        comparison = rounding(found.flatten(0, 1), exact, variance, shared=norm_H is not None)
        if not comparison.ok:
            return 0, (f"{what} are off by {comparison.error_over_budget:.3g} of the budget at "
                       f"{comparison.where} of tokens times heads")
    if not same_bits(rows[1], given[2][stored]):
        return 0, "the cache holds other values than it was given"
    untouched = torch.ones(num_blocks * BLOCK_SIZE, dtype=torch.bool).index_fill(0, slot_T[stored], False)
    if not all(cache.cpu().transpose(1, 2).flatten(0, 1)[untouched].isnan().all() for cache in caches):
        return 0, "slots were written that no token was given"
    return q_TQH.numel() + sum(map(torch.numel, rows)), None


def _rotate(x_TNH: Tensor, tables: Sequence[Tensor], norm_H: Tensor | None, eps: float, dtype: str) -> tuple[Tensor, Tensor]:
    """Exact result of norm and rotation, and the variance that rounding gives it.

    Each of the two products may take a table and a normed value that were rounded to the dtype, as in Hugging Face: three
    roundings (of the norm, of its weight, of the table) beside those of a sum of two addends. The elements of a head share the
    error of their root mean square, half the relative one of a sum of H squares.
    """
    x, error = x_TNH.double(), torch.zeros((), dtype=torch.float64)
    if norm_H is not None:
        total, fourth_powers = x.square().sum(-1, keepdim=True), x.square().square().sum(-1, keepdim=True)
        wide = "float64" if dtype == "float64" else "float32"
        error = sum_variance(fourth_powers, total, wide, addends=x.shape[-1]) / (2 * total).square()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm_H.double()
    rest = x.shape[-1] - 2 * tables[0].shape[-1]  # elements behind those that are turned
    cos, sin = (torch.nn.functional.pad(torch.cat((table, table), -1)[:, None].double(), (0, rest), value=behind)
                for table, behind in zip(tables, (1.0, 0.0), strict=True))
    first, second = x[..., : x.shape[-1] - rest].chunk(2, dim=-1)
    turned = torch.nn.functional.pad(torch.cat((-second, first), -1), (0, rest))
    exact, squares = x * cos + turned * sin, (x * cos).square() + (turned * sin).square()
    taken = sum_variance(3 * squares, torch.zeros_like(exact), dtype, addends=0, parts=0)
    return exact, taken + sum_variance(squares, exact, dtype, addends=2) + error * exact.square()
