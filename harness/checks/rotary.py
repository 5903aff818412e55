"""Are the rotary tables those of transformers, at every position and for every length, and are queries and keys turned by them?

Part of the attention check. Tables for a short ``max_model_len``, for the length that the model was first trained on, and for
its longest, because scaled kinds of RoPE must not depend on which of them is asked for; then queries and keys of random values
at positions up to the last one, written to cache slots that lie anywhere, some of them to none.

Shape suffixes: T = tokens, Q / N = query / KV heads, H = head dim, R = H / 2, P = blocks, B = slots in a block.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.checks.base import Answer, CheckContext
from harness.subjects.rank import Rank
from harness.verification.budgets import rounding, same_bits, sum_variance, underflow_variance
from reference.checkpoints import as_config, weight_shapes
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

    config: dict[str, Any]
    """The model's config.json."""
    has_norms: bool
    """Whether it norms each query and key head before it turns them."""
    num_positions: int
    positions: tuple[int, ...]
    dtype: str
    seed: int

    kind: ClassVar[str] = "rotary"
    module: ClassVar[str] = "rotary"

    @property
    def size(self) -> int:
        return self.num_positions

    def __str__(self) -> str:
        return f"rotary tables of {self.num_positions} positions, {self.dtype} (seed={self.seed})"


def draw_rotary(context: CheckContext) -> list[RotaryCase]:
    """The cases of a seed, for the model under test."""
    config = context.results.config
    has_norms = any(name.endswith("self_attn.q_norm.weight") for name in weight_shapes(as_config(config)))
    return draw_cases(random.Random(context.seed), config, context.dtype, has_norms=has_norms)


def draw_cases(draw: random.Random, config: dict[str, Any], dtype: str, *, has_norms: bool) -> list[RotaryCase]:
    """Lengths up to, at and beyond the one that the model was first trained on, if its RoPE is a scaled one."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    longest = config["max_position_embeddings"]
    original = rope.get("original_max_position_embeddings") or longest
    if rope.get("rope_type") == "yarn":  # a config may hold the length before it is stretched
        longest = max(longest, int(original * (rope.get("factor") or 1)))
    if rope.get("rope_type") == "longrope":  # beyond it a sequence has other angles from its first token on
        longest = original
    longest = min(longest, MOST_TABLE)
    original = min(original, longest)
    lengths = sorted({min(length, longest) for length in (SHORT, original, original + 1, longest)})
    cases = []
    for length in lengths:
        # Powers of two too: beyond one of them a narrow type no longer counts every position.
        edges = {0, 1, length - 1, length - 2, original - 1, original, *(2**bit + 1 for bit in range(16))}
        positions = {position for position in edges if 0 <= position < length}
        positions |= {draw.randrange(length) for _ in range(NUM_POSITIONS - len(positions))}
        shuffled = tuple(draw.sample(sorted(positions), len(positions)))
        cases.append(RotaryCase(config=config, has_norms=has_norms, num_positions=length, positions=shuffled, dtype=dtype,
                                seed=draw.randrange(2**31)))
    return cases


@torch.inference_mode()
def run_rotary(rank: Rank, case: RotaryCase) -> list[Answer]:
    """Tables first, then what is turned by them."""
    config = as_config(case.config)
    position_T = torch.tensor(case.positions)
    right = rotary_embedding(config)(torch.zeros(1, dtype=torch.float32), position_T[None])
    half = right[0].shape[-1] // 2
    expected = [table[0, :, :half] for table in right]
    tables = rank.attention.rotary_tables(case.config, case.num_positions)
    for what, table, rows_TR in zip(("cosine", "sine"), tables, expected, strict=True):
        if table.shape != (case.num_positions, half):
            return [Answer(problem=f"the {what} table is {tuple(table.shape)}, it should be {(case.num_positions, half)}")]
        found_TR = table.cpu()[position_T]
        if not same_bits(found_TR, rows_TR):
            wrong = [case.positions[row] for row in (found_TR != rows_TR).any(1).nonzero().flatten().tolist()]
            return [Answer(problem=f"the {what} table is not that of transformers, first seen at position "
                                   f"{min(wrong, default=0)}")]
    turned, problem = _turn(rank, config, case, tables, expected)
    return [Answer(compared=2 * position_T.numel() * half + turned, problem=problem)]


def rotary_embedding(config: Any) -> Any:
    """Transformers' module for the tables of such a model."""
    modeling = import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    return next(value for name, value in vars(modeling).items() if name.endswith("RotaryEmbedding"))(config)


def _turn(rank: Rank, config: Any, case: RotaryCase, tables: tuple[Tensor, Tensor],
          expected: Sequence[Tensor]) -> tuple[int, str | None]:
    """Rotate and store this rank's heads at the case's positions."""
    q_heads, kv_heads = rank.attention.heads(config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_q, num_kv, num_tokens, dtype = len(q_heads), len(kv_heads), len(case.positions), DTYPES[case.dtype]
    if dtype is torch.float64 and rank.device.type == "cuda":
        return 0, None  # no kernel computes in float64
    generator = torch.Generator().manual_seed(case.seed + rank.tp_rank)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    # Wider rows than the heads take, so that a token's heads do not begin where the last one's end.
    qkv_TC = drawn(num_tokens, (num_q + 2 * num_kv) * dim + 8)[:, :-8]
    num_slots = (-(-num_tokens // BLOCK_SIZE) + 2) * BLOCK_SIZE
    slot_T = torch.randperm(num_slots, generator=generator)[:num_tokens]
    slot_T[::7] = -1
    norms = [1 + 0.1 * drawn(dim) if case.has_norms else None for _ in range(2)]
    rotated = rank.attention.rotate(case.config, tables, qkv_TC, torch.tensor(case.positions), slot_T,
                                    num_slots=num_slots, block_size=BLOCK_SIZE, norms=norms)
    given = qkv_TC.unflatten(1, (-1, dim)).split([num_q, num_kv, num_kv], dim=1)
    stored = slot_T >= 0
    keys, values = rotated.k_slots[slot_T[stored]], rotated.v_slots[slot_T[stored]]
    for what, found, x_TNH, norm_H, keep in (("queries", rotated.q, given[0], norms[0], torch.ones_like(stored)),
                                             ("keys", keys, given[1], norms[1], stored)):
        if found.shape != x_TNH[keep].shape or found.dtype != dtype:
            return 0, f"{what} are {tuple(found.shape)} {found.dtype}, they should be {tuple(x_TNH[keep].shape)} {dtype}"
        exact, variance = (value[keep].flatten(0, 1) for value in
                           _rotate(x_TNH, expected, norm_H, config.rms_norm_eps, case.dtype))
        comparison = rounding(found.flatten(0, 1), exact, variance, shared=norm_H is not None)
        if not comparison.ok:
            return 0, (f"{what} are off by {comparison.error_over_budget:.3g} of the budget at "
                       f"{comparison.where} of tokens times heads")
    if not same_bits(values, given[2][stored]):
        return 0, "the cache holds other values than it was given"
    untouched = torch.ones(num_slots, dtype=torch.bool).index_fill(0, slot_T[stored], False)
    if not all(slots[untouched].isnan().all() for slots in (rotated.k_slots, rotated.v_slots)):
        return 0, "slots were written that no token was given"
    return sum(map(torch.numel, (rotated.q, keys, values))), None


def _rotate(x_TNH: Tensor, tables: Sequence[Tensor], norm_H: Tensor | None, eps: float, dtype: str) -> tuple[Tensor, Tensor]:
    """Exact result of norm and rotation, and the variance that rounding gives it.

    Each of the two products may take a table and a normed value that were rounded to the dtype, as in Hugging Face: three
    roundings (of the norm, of its weight, of the table) beside those of a sum of two addends. The elements of a head share the
    error of their root mean square, half the relative one of a sum of H squares. Whatever is rounded may be subnormal in the
    dtype: a normed value before and after its weight, both tables, the second product beside the first one.
    """
    x, error, of_norm = x_TNH.double(), torch.zeros((), dtype=torch.float64), 0.0
    if norm_H is not None:
        total, fourth_powers = x.square().sum(-1, keepdim=True), x.square().square().sum(-1, keepdim=True)
        wide = "float64" if dtype == "float64" else "float32"
        error = sum_variance(fourth_powers, total, wide, addends=x.shape[-1]) / (2 * total).square()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm_H.double()
        of_norm = 1 + norm_H.double().square().max().item()
    rest = x.shape[-1] - 2 * tables[0].shape[-1]  # elements behind those that are turned
    cos, sin = (torch.nn.functional.pad(torch.cat((table, table), -1)[:, None].double(), (0, rest), value=behind)
                for table, behind in zip(tables, (1.0, 0.0), strict=True))
    first, second = x[..., : x.shape[-1] - rest].chunk(2, dim=-1)
    turned = torch.nn.functional.pad(torch.cat((-second, first), -1), (0, rest))
    exact, squares = x * cos + turned * sin, (x * cos).square() + (turned * sin).square()
    taken = sum_variance(3 * squares, torch.zeros_like(exact), dtype, addends=0, parts=0)
    subnormal = of_norm * (cos.square() + sin.square()) + x.square() + turned.square() + 1
    return exact, (taken + sum_variance(squares, exact, dtype, addends=2) + error * exact.square()
                   + underflow_variance(dtype) * subnormal)
