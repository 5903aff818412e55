"""Causal attention over the paged cache in plain torch: the twin of the decode and the prefill kernel."""

from collections import defaultdict
from collections.abc import Sequence

import torch

from engine.kernels.common import cdiv, compute_dtype

# Shape suffixes: T = tokens, Q = query heads on this rank, N = KV heads on this rank, H = head dim,
# P = cache blocks, B = slots in a block, S = sequences, A = sequences attended together (of equal query
# length), I = their query length, i = a part of it, L = keys, G/g = query heads of one KV head

_MAX_SCORES = 1 << 24  # elements of one score tensor: bounds memory, and keeps it near the CPU's caches


def paged_attention_torch(
    q_TQH: torch.Tensor,
    k_cache_PNBH: torch.Tensor,
    v_cache_PNBH: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor | Sequence[int],
    context_lens: torch.Tensor | Sequence[int],
    kv_of_q: torch.Tensor | Sequence[int],
    scale: float,
) -> torch.Tensor:
    """Causal attention of ragged queries, prefill chunks and decode rows mixed, to the cached keys.

    q_TQH          ``[T, Q, H]``; may be a strided view
    caches         ``[P, N, B, H]``; they already hold this step's keys and values
    block_tables   ``[S, max_blocks]`` int32: a sequence's blocks in order; entries past its length are unused
    cu_seqlens_q   ``[S + 1]``: sequence ``s`` owns the query rows ``cu_seqlens_q[s] : cu_seqlens_q[s + 1]``
    context_lens   ``[S]``: keys of each sequence, this step's included; 0 marks a padding sequence
    kv_of_q        ``[Q]``: local KV head of each local query head

    Query ``i`` of a sequence with ``n`` queries sits at absolute position ``context_len - n + i`` and sees
    the keys up to itself. Scores and softmax are float32 (float64 for float64 queries), the result
    ``[T, Q, H]`` is rounded once to the queries' dtype. Padding sequences and rows from ``cu_seqlens_q[S]``
    on come out as zeros.
    """
    starts, contexts, kv_heads = _as_ints(cu_seqlens_q), _as_ints(context_lens), _as_ints(kv_of_q)
    out_TQH = torch.zeros(q_TQH.shape, dtype=q_TQH.dtype, device=q_TQH.device)
    by_query_len: dict[int, list[int]] = defaultdict(list)
    for s, context in enumerate(contexts):
        if context > 0 and starts[s + 1] > starts[s]:
            by_query_len[starts[s + 1] - starts[s]].append(s)
    for query_len, sequences in by_query_len.items():
        # Neighbours in length share a batch, so that little of it is padding.
        sequences.sort(key=contexts.__getitem__)
        while sequences:
            keys_each = len(kv_heads) * query_len * contexts[sequences[-1]]
            together = max(1, min(len(sequences), _MAX_SCORES // keys_each))
            batch = sequences[-together:]
            del sequences[-together:]
            rows = _rows(starts, batch, q_TQH.device)
            lengths, tables = [contexts[s] for s in batch], block_tables[batch]
            out_TQH[rows] = _attend(
                q_TQH[rows].unflatten(0, (together, query_len)),
                _gather(k_cache_PNBH, tables, lengths),
                _gather(v_cache_PNBH, tables, lengths),
                lengths,
                kv_heads,
                scale,
            ).flatten(0, 1)
    return out_TQH


def _rows(starts: list[int], batch: list[int], device: torch.device) -> slice | torch.Tensor:
    """The rows of ``T`` that belong to the batch, sequence after sequence."""
    if len(batch) == 1:
        return slice(starts[batch[0]], starts[batch[0] + 1])
    return torch.tensor([range(starts[s], starts[s + 1]) for s in batch], device=device).flatten()


def _as_ints(values: torch.Tensor | Sequence[int]) -> list[int]:
    return [int(v) for v in (values.tolist() if isinstance(values, torch.Tensor) else values)]


def _gather(cache_PNBH: torch.Tensor, tables: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The batch's keys or values in order, ``[A, N, L, H]``; slots beyond a sequence's length are zero."""
    num_heads, block_size, head_dim = cache_PNBH.shape[1:]
    longest, ragged = max(lengths), min(lengths) < max(lengths)
    blocks = tables[:, : cdiv(longest, block_size)].long()
    if ragged:
        # A shorter sequence's row ends in entries that mean nothing and may lie outside the cache.
        num_blocks = torch.tensor([cdiv(length, block_size) for length in lengths], device=blocks.device)
        blocks = blocks.masked_fill(torch.arange(blocks.shape[1], device=blocks.device) >= num_blocks[:, None], 0)
    gathered = cache_PNBH.index_select(0, blocks.flatten())
    gathered = gathered.view(len(lengths), -1, num_heads, block_size, head_dim)
    keys_ANLH = gathered.transpose(1, 2).reshape(len(lengths), num_heads, -1, head_dim)[:, :, :longest]
    if not ragged:
        return keys_ANLH
    beyond_AL = torch.arange(longest, device=blocks.device) >= torch.tensor(lengths, device=blocks.device)[:, None]
    # Free slots hold anything, NaN included, and a probability of zero does not hide it: 0 * NaN is NaN.
    return keys_ANLH.masked_fill(beyond_AL[:, None, :, None], 0.0)


def _attend(
    q_AIQH: torch.Tensor,
    k_ANLH: torch.Tensor,
    v_ANLH: torch.Tensor,
    lengths: list[int],
    kv_heads: list[int],
    scale: float,
) -> torch.Tensor:
    """Causal attention of ``A`` sequences with ``I`` queries each, ``[A, I, Q, H]``."""
    dtype = compute_dtype(q_AIQH)
    num_q_heads, num_kv_heads = len(kv_heads), k_ANLH.shape[1]
    group = max(1, num_q_heads // num_kv_heads)
    if kv_heads != [head // group for head in range(num_kv_heads * group)]:
        # Uneven groups: every query head gets a copy of its KV head. Even ones share it below.
        index = torch.tensor(kv_heads, device=q_AIQH.device)
        k_ANLH, v_ANLH, group = k_ANLH.index_select(1, index), v_ANLH.index_select(1, index), 1
    k_ANLH, v_ANLH = k_ANLH.to(dtype), v_ANLH.to(dtype)
    num_queries, num_keys = q_AIQH.shape[1], k_ANLH.shape[2]
    out_AIQH = torch.empty_like(q_AIQH)
    step = max(1, _MAX_SCORES // (q_AIQH.shape[0] * num_q_heads * num_keys))
    for start in range(0, num_queries, step):
        q_AiQH = q_AIQH[:, start : start + step].to(dtype)
        count = q_AiQH.shape[1]
        # The last query of this part bounds the keys that any of its queries sees.
        seen = num_keys - num_queries + start + count
        q_ANgH = q_AiQH.unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [A, N, G * i, H]
        scores = (q_ANgH @ k_ANLH[:, :, :seen].transpose(2, 3)).mul_(scale).unflatten(2, (group, count))
        if count > 1 or min(lengths) < num_keys:  # one query a sequence of equal lengths sees every key
            first_A = torch.tensor(lengths, device=q_AIQH.device) - num_queries + start
            positions_Ai = first_A[:, None] + torch.arange(count, device=q_AIQH.device)
            hidden_AiL = torch.arange(seen, device=q_AIQH.device) > positions_Ai[:, :, None]
            scores.masked_fill_(hidden_AiL[:, None, None], float("-inf"))
        values = scores.softmax(dim=-1).flatten(2, 3) @ v_ANLH[:, :, :seen]
        values = values.unflatten(2, (group, count)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        out_AIQH[:, start : start + count] = values.to(q_AIQH.dtype)
    return out_AIQH
