"""Causal attention over the paged cache of which a query's result depends on its own keys and values alone.

Not on the other sequences of the batch, on how a prompt is cut into chunks, on which blocks hold it or how large they are, nor
on whether the query is a prompt's or a decode step's: keys are taken in tiles at absolute positions, in one order.

Shape suffixes: T = tokens, Q / N = this rank's query / KV heads, H = head dim, P = cache blocks, B = slots of a block,
S = sequences, I = queries together, L = keys, K = keys of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.ieee import exact_matmul, exp, exponent_of, power_of_two, tree_sum

TILE = 128
_QUERIES = 128
"""Queries together: bounds memory, and changes no bit."""


def paged_attention_in_order_torch(q_TQH: Tensor, k_cache_PNBH: Tensor, v_cache_PNBH: Tensor, block_tables_SB: Tensor,
                                   cu_seqlens_S1: Tensor, context_lens_S: Tensor, kv_of_q: Sequence[int],
                                   scale: float) -> Tensor:
    """As :func:`engine.kernels.attention_torch.paged_attention_torch`, in float64 throughout and rounded once."""
    out_TQH = torch.zeros_like(q_TQH)
    heads = torch.tensor(kv_of_q, device=q_TQH.device)
    starts = cu_seqlens_S1.tolist()
    for sequence, context in enumerate(context_lens_S.tolist()):
        first, stop = starts[sequence], starts[sequence + 1]
        if not context or first == stop:
            continue
        blocks = block_tables_SB[sequence, : -(-context // k_cache_PNBH.shape[2])].long()
        k_QLH, v_QLH = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context].index_select(0, heads).double()
                        for cache in (k_cache_PNBH, v_cache_PNBH))
        for start in range(first, stop, _QUERIES):
            q_QIH = q_TQH[start : min(start + _QUERIES, stop)].transpose(0, 1).double()
            position = context - (stop - start)
            seen = position + q_QIH.shape[1]
            attended = _attend(q_QIH, k_QLH[:, :seen], v_QLH[:, :seen], position, scale)
            out_TQH[start : start + q_QIH.shape[1]] = attended.transpose(0, 1).to(q_TQH.dtype)
    return out_TQH


def _attend(q_QIH: Tensor, k_QLH: Tensor, v_QLH: Tensor, position: int, scale: float) -> Tensor:
    """Queries from ``position`` on against the keys up to the last of them, ``[Q, I, H]``."""
    length = k_QLH.shape[1]
    scores_QIL = exact_matmul(q_QIH, k_QLH) * scale
    # A value that is not finite is every later query's trouble, and no earlier one's: a product by 0 would be NaN there too.
    finite_QL = v_QLH.isfinite().all(dim=-1)
    v_QLH = torch.where(finite_QL[..., None], v_QLH, 0.0)
    scores_QIL = torch.where(finite_QL[:, None], scores_QIL, torch.nan)
    hidden_IL = torch.arange(length) > position + torch.arange(q_QIH.shape[1])[:, None]
    scores_QIL = scores_QIL.masked_fill(hidden_IL.to(q_QIH.device), -torch.inf)
    weights_QIL = exp(scores_QIL - scores_QIL.amax(dim=-1, keepdim=True))
    # A value's largest magnitude goes to its weight: scaled by that of its neighbours, it would depend on keys yet to come.
    exponent_QL1 = exponent_of(v_QLH.abs().amax(dim=-1, keepdim=True))
    v_QLH = v_QLH * power_of_two(-exponent_QL1)
    scaled_QIL = weights_QIL * power_of_two(exponent_QL1).mT
    none = exponent_QL1.new_zeros(())
    total_QI = weights_QIL.new_zeros(weights_QIL.shape[:2])
    sum_QIH = torch.zeros_like(q_QIH)
    for tile in (slice(start, start + TILE) for start in range(0, length, TILE)):
        weights_QIK = torch.nn.functional.pad(weights_QIL[..., tile], (0, max(0, tile.stop - length)))
        total_QI = total_QI + tree_sum(weights_QIK)
        sum_QIH = sum_QIH + exact_matmul(scaled_QIL[..., tile], v_QLH[:, tile].mT, none.expand(1, 1))
    return sum_QIH / total_QI[..., None]
