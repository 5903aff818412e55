"""Draws the next token of each row, the same one on every rank.

A draw is a function of the logits and of (seed, position): no generator, no rank, no place in the batch. Temperature
sampling is Gumbel-max (Gumbel 1954; Maddison et al. 2014): argmax of logits / T plus noise from a counter-based generator.

Shape suffixes: R = rows, V = vocabulary, K = best tokens of a row, L = rows that want log-probabilities; in logits_RL this
rank's part of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels.philox import gumbel_argmax, gumbel_argmax_torch
from engine.layers.dispatch import pick
from engine.parallel.group import TPGroup
from engine.parallel.sharding import VocabShard
from engine.scheduling.batch import SamplingBatch


class LogprobTensors(NamedTuple):
    """Log-probabilities of L drawn tokens and of the K best beside them.

    A rank is 1 + the number of tokens that are more probable.
    """

    logprob_L: Tensor
    rank_L: Tensor
    top_token_LK: Tensor
    top_logprob_LK: Tensor
    top_rank_LK: Tensor


def sample(logits_RV: Tensor, sampling: SamplingBatch) -> Tensor:
    """Token ids ``[R]`` int64 from whole, unpadded logits; -1 (``NO_TOKEN``) where a logit is NaN or +inf, or all are -inf."""
    if sampling.banned_row_X.numel():
        logits_RV = logits_RV.index_put((sampling.banned_row_X, sampling.banned_token_X), logits_RV.new_tensor(-torch.inf))
    if sampling.filters:
        logits_RV = filter_top_k_top_p(logits_RV, sampling.temperature_R, sampling.top_k_R, sampling.top_p_R)
    _, token_R = pick(logits_RV, gumbel_argmax, gumbel_argmax_torch)(
        logits_RV, sampling.temperature_R, sampling.seed_R, sampling.position_R,
    )
    return token_R


def sample_shards(logits_RL: Tensor, sampling: SamplingBatch, shard: VocabShard, tp: TPGroup) -> Tensor:
    """The tokens of :func:`sample` for rows without filters and bans, from each rank's own columns: no logits travel.

    The noise of a column is the same on whichever rank it is, so the best of the ranks' best is the best of all.

    logits_RL  this rank's columns, its ``shard`` of the vocabulary, and padding behind them, which is cut off
    """
    if shard.ids:
        value_R, token_R = pick(logits_RL, gumbel_argmax, gumbel_argmax_torch)(
            logits_RL[:, : len(shard.ids)], sampling.temperature_R, sampling.seed_R, sampling.position_R, shard.ids.start,
        )
    else:
        token_R = torch.full_like(sampling.seed_R, -1)
        value_R = token_R.new_full(token_R.shape, -torch.inf, dtype=torch.promote_types(torch.float32, logits_RL.dtype))
    return tp.argmax(value_R, token_R)


def filter_top_k_top_p(logits_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> Tensor:
    """Logits with -inf outside the top_k best, then outside the smallest set that holds top_p of the probability left.

    The order, k before p and both after the temperature, is the one of Hugging Face and vLLM. Ties at a border go to the
    lower token id.
    """
    order = logits_RV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    outside_k_RV = (top_k_R[:, None] > 0) & (rank_V >= top_k_R[:, None])
    temperature_R1 = torch.where(temperature_R > 0, temperature_R, 1.0)[:, None]
    scaled_RV = order.values.to(torch.promote_types(torch.float32, logits_RV.dtype)) / temperature_R1
    probability_RV = scaled_RV.masked_fill(outside_k_RV, -torch.inf).softmax(dim=-1)
    # A token stays if those before it do not reach top_p yet: the best one always does.
    before_RV = probability_RV.cumsum(dim=-1) - probability_RV
    outside_p_RV = (before_RV >= top_p_R[:, None]) & (top_p_R[:, None] < 1)
    drop_RV = (outside_k_RV | outside_p_RV).index_fill(1, rank_V[:1], False)
    return logits_RV.masked_fill(drop_RV.gather(1, order.indices.argsort(dim=-1)), -torch.inf)


def logprobs_of(logits_RV: Tensor, token_R: Tensor, row_L: Tensor, num_top: int) -> LogprobTensors:
    """Log-probabilities of some rows under the model itself: of the raw logits, before temperature, bans and filters.

    In float32, or in float64 if the logits are.
    """
    logprob_LV = logits_RV[row_L].to(torch.promote_types(torch.float32, logits_RV.dtype)).log_softmax(dim=-1)
    drawn_L1 = logprob_LV.gather(1, token_R[row_L, None].clamp(min=0))  # without a token there is nothing to tell of it
    top_LK = logprob_LV.topk(min(num_top, logits_RV.shape[1]), dim=-1)
    return LogprobTensors(
        logprob_L=drawn_L1.squeeze(1),
        rank_L=1 + (logprob_LV > drawn_L1).sum(dim=-1),
        top_token_LK=top_LK.indices,
        top_logprob_LK=top_LK.values,
        top_rank_LK=1 + (top_LK.values[:, None, :] > top_LK.values[:, :, None]).sum(dim=-1),
    )
