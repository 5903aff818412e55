"""Inputs for the kernels' tests, formulas in float64 to hold them against, and error budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Shape suffixes as in engine/kernels: T = tokens, Q = query heads, N = KV heads, H = head dim, P = cache
# blocks, B = slots in a block, S = sequences, L = keys of one sequence

UNIT_ROUNDOFF = {
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}


def over_budget(actual: torch.Tensor, exact: torch.Tensor, budget: torch.Tensor | float) -> float:
    """The largest error as a fraction of its budget; infinite where anything is not a number."""
    error = (actual.double() - exact.double()).abs()
    budget = torch.as_tensor(budget, dtype=torch.float64, device=error.device).expand_as(error)
    share = torch.where(error == 0, 0.0, error / budget)
    return share.nan_to_num(nan=float("inf")).max().item() if share.numel() else 0.0


def rounding_budget(
    exact: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, *, roundings: float = 1, steps: float = 8
) -> torch.Tensor:
    """``roundings`` of the result's dtype, and ``steps`` of the float32 arithmetic before it, in units of u *
    S.

    exact   what the final rounding applies to; scale   the magnitude S of what was summed to get it
    """
    inner = UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
    # Below the smallest normal number the spacing is absolute.
    tiny = torch.finfo(dtype).tiny * UNIT_ROUNDOFF[dtype]
    # A 16-bit result is rounded from float32 once; a float32 result has no rounding beyond its arithmetic's.
    last = roundings * UNIT_ROUNDOFF[dtype] if UNIT_ROUNDOFF[dtype] > inner else 0.0
    return last * exact.double().abs() + steps * inner * scale.double().abs() + tiny


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionProblem:
    """Ragged queries, a paged cache whose free slots are NaN, and what describes them."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    cu_seqlens_q: torch.Tensor
    context_lens: torch.Tensor
    kv_of_q: torch.Tensor
    q_start: torch.Tensor
    q_count: torch.Tensor
    scale: float
    # One [N, L, H] a sequence: what the cache holds, in order.
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]


def attention_problem(
    *,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    q_counts: Sequence[int] = (3, 2),
    head_dim: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    padding_rows: int = 0,
    spread: float = 1.0,
    seed: int = 0,
) -> AttentionProblem:
    """A problem of ``len(query_lens)`` sequences; KV head ``n`` serves ``q_counts[n]`` query heads.

    Queries are a strided view into a fused projection. Blocks are scattered; the last block of the cache is
    all NaN, and it is what table entries past a sequence's length name. ``spread`` scales the scores.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    num_kv_heads, num_q_heads = len(q_counts), sum(q_counts)
    blocks_each = [-(-length // block_size) for length in context_lens]
    num_blocks = sum(blocks_each) + 1
    order = torch.randperm(num_blocks - 1, generator=generator).tolist()
    caches = torch.full((2, num_blocks, num_kv_heads, block_size, head_dim), float("nan"), dtype=dtype)
    table_shape = (len(context_lens), max([*blocks_each, 0]) + 2)
    block_tables = torch.full(table_shape, num_blocks - 1, dtype=torch.int32)
    keys, values = [], []
    for s, length in enumerate(context_lens):
        mine = torch.tensor([order.pop() for _ in range(blocks_each[s])], dtype=torch.int64)
        block_tables[s, : len(mine)] = mine.int()
        kv_2NLH = normal(2, num_kv_heads, length, head_dim)
        positions = torch.arange(length)
        for cache, kv_NLH in zip(caches, kv_2NLH, strict=True):
            cache[mine[positions // block_size], :, positions % block_size] = kv_NLH.transpose(0, 1)
        keys.append(kv_2NLH[0].to(device))
        values.append(kv_2NLH[1].to(device))
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    fused = normal(int(starts[-1]) + padding_rows, num_q_heads + 2, head_dim)
    counts = torch.tensor(q_counts, dtype=torch.int32)
    return AttentionProblem(
        q=fused.to(device)[:, :num_q_heads],
        k_cache=caches[0].to(device),
        v_cache=caches[1].to(device),
        block_tables=block_tables.to(device),
        cu_seqlens_q=starts.to(device),
        context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        kv_of_q=torch.arange(num_kv_heads, dtype=torch.int32).repeat_interleave(counts).to(device),
        q_start=(counts.cumsum(0) - counts).int().to(device),
        q_count=counts.to(device),
        scale=spread * head_dim**-0.5,
        keys=tuple(keys),
        values=tuple(values),
    )


def exact_attention(problem: AttentionProblem, *, shift: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """``(result, budget's scale S)`` in float64, one sequence and one formula at a time, no cache involved.

    S is ``sum(p * |v|)`` times one plus the scores' magnitude, which is what a rounding of a score is
    amplified by.
    ``shift`` moves every query that many positions: a planted fault.
    """
    result = torch.zeros(problem.q.shape, dtype=torch.float64, device=problem.q.device)
    scale = torch.zeros_like(result)
    starts = problem.cu_seqlens_q.tolist()
    for s, (keys_NLH, values_NLH) in enumerate(zip(problem.keys, problem.values, strict=True)):
        count, length = starts[s + 1] - starts[s], keys_NLH.shape[1]
        if count == 0 or length == 0:
            continue
        q_QIH = problem.q[starts[s] : starts[s + 1]].double().transpose(0, 1)
        k_QLH = keys_NLH.double()[problem.kv_of_q.long()]
        v_QLH = values_NLH.double()[problem.kv_of_q.long()]
        positions = torch.arange(count, device=q_QIH.device) + length - count + shift
        hidden_IL = torch.arange(length, device=q_QIH.device) > positions[:, None]
        scores = (q_QIH @ k_QLH.transpose(1, 2) * problem.scale).masked_fill(hidden_IL, float("-inf"))
        magnitude = (q_QIH.abs() @ k_QLH.abs().transpose(1, 2) * problem.scale).amax(dim=2, keepdim=True)
        weights = scores.softmax(dim=2)
        result[starts[s] : starts[s + 1]] = (weights @ v_QLH).transpose(0, 1)
        scale[starts[s] : starts[s + 1]] = ((weights @ v_QLH.abs()) * (1 + magnitude)).transpose(0, 1)
    return result, scale


def attention_budget(exact: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, *, rounded_weights: bool) -> torch.Tensor:
    """The result's rounding, 16 float32 steps of S, and where weights are rounded to the dtype, 2 u of sum(p
    |v|).

    Each weight is off by at most u relatively; their sum is taken before rounding, hence no more than u of
    ``sum(p |v|)``, which S bounds. The factor 2 leaves room for weights below the dtype's normal numbers.
    """
    budget = rounding_budget(exact, scale, dtype, steps=16)
    if rounded_weights and dtype in (torch.bfloat16, torch.float16):
        budget = budget + 2 * UNIT_ROUNDOFF[dtype] * scale
    return budget


def decode_inputs_problem(
    *, num_seqs: int, block_size: int, device: str = "cpu", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Arguments of ``decode_inputs``: some tokens known, some in flight, some sequences padding."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    token = torch.where(integers(0, 2, num_seqs) > 0, integers(0, 1000, num_seqs), -1)
    context = integers(0, 7 * block_size + 1, num_seqs) * (integers(0, 4, num_seqs) > 0)
    state = integers(-1, 1000, num_seqs + 3)
    state[::5] = -1  # nothing could be drawn there
    rows, tables = integers(0, num_seqs + 3, num_seqs), integers(0, 10_000, num_seqs, 7).int()
    return token.to(device), rows.to(device), context.int().to(device), tables.to(device), state.to(device), block_size
