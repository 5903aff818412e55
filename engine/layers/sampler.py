"""Draws the next token of each row, the same one on every rank.

A draw is a function of the logits and of (seed, position): no generator, no rank, no place in the batch. Temperature
sampling is Gumbel-max (Gumbel 1954; Maddison et al. 2014): argmax of logits / T plus noise from a counter-based generator.

Shape suffixes: R = rows, V = vocabulary, K = best tokens of a row, L = rows that want log-probabilities; in logits_RL this
rank's part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.kernels.philox import gumbel_argmax, gumbel_argmax_torch
from engine.layers.dispatch import pick
from engine.layers.logits_processors import process_logits
from engine.parallel.group import TPGroup
from engine.parallel.sharding import VocabShard
from engine.scheduling.batch import SamplingBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """The functions by which tokens are drawn and their probabilities told.

    filter              as :func:`filter_top_k_top_p`
    argmax              as :func:`engine.kernels.philox.gumbel_argmax`
    log_softmax, best   over the last dimension; ``best`` as ``torch.topk``
    """

    filter: Callable[..., Tensor]
    argmax: Callable[..., tuple[Tensor, Tensor]]
    log_softmax: Callable[[Tensor], Tensor]
    best: Callable[[Tensor, int], tuple[Tensor, Tensor]]


def _argmax(logits_RV: Tensor, *args: Any) -> Any:
    return pick(logits_RV, gumbel_argmax, gumbel_argmax_torch)(logits_RV, *args)


def _probability_before(scaled_RV: Tensor) -> Tensor:
    probability_RV = scaled_RV.softmax(dim=-1)
    return probability_RV.cumsum(dim=-1) - probability_RV


ORDINARY_DRAWING = Drawing(filter=lambda *args: filter_top_k_top_p(*args), argmax=_argmax,
                           log_softmax=lambda x: x.log_softmax(dim=-1), best=lambda x, num: x.topk(num, dim=-1))


class LogprobTensors(NamedTuple):
    """Log-probabilities of L drawn tokens and of the K best beside them.

    A rank is 1 + the number of tokens that are more probable.
    """

    logprob_L: Tensor
    rank_L: Tensor
    top_token_LK: Tensor
    top_logprob_LK: Tensor
    top_rank_LK: Tensor


def sample(logits_RV: Tensor, sampling: SamplingBatch, newest_R: Tensor | None = None,
           drawing: Drawing = ORDINARY_DRAWING) -> Tensor:
    """Token ids ``[R]`` int64 from whole, unpadded logits; -1 (``NO_TOKEN``) where a logit is NaN or +inf, or all are -inf.

    newest_R  the newest token of each row's sequence, for ``sampling.processing``
    """
    if sampling.banned_row_X.numel():
        logits_RV = logits_RV.index_put((sampling.banned_row_X, sampling.banned_token_X), logits_RV.new_tensor(-torch.inf))
    if sampling.processing is not None:
        assert newest_R is not None, "processing goes by the newest token"
        logits_RV = process_logits(logits_RV, sampling.processing, newest_R)
    if sampling.filters:
        logits_RV = drawing.filter(logits_RV, sampling.temperature_R, sampling.top_k_R, sampling.top_p_R)
    _, token_R = drawing.argmax(logits_RV, sampling.temperature_R, sampling.seed_R, sampling.position_R)
    return token_R


def sample_shards(logits_RL: Tensor, sampling: SamplingBatch, shard: VocabShard, tp: TPGroup,
                  drawing: Drawing = ORDINARY_DRAWING) -> Tensor:
    """The tokens of :func:`sample` for rows without filters and bans, from each rank's own columns: no logits travel.

    The noise of a column is the same on whichever rank it is, so the best of the ranks' best is the best of all.

    logits_RL  this rank's columns, its ``shard`` of the vocabulary, and padding behind them, which is cut off
    """
    if shard.ids:
        value_R, token_R = drawing.argmax(logits_RL[:, : len(shard.ids)], sampling.temperature_R, sampling.seed_R,
                                          sampling.position_R, shard.ids.start)
    else:
        token_R = torch.full_like(sampling.seed_R, -1)
        value_R = token_R.new_full(token_R.shape, -torch.inf, dtype=torch.promote_types(torch.float32, logits_RL.dtype))
    return tp.argmax(value_R, token_R)


def filter_top_k_top_p(logits_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor,
                       probability_before: Callable[[Tensor], Tensor] = _probability_before) -> Tensor:
    """Logits with -inf outside the top_k best, then outside the smallest set that holds top_p of the probability left.

    The order, k before p and both after the temperature, is the one of Hugging Face and vLLM. Ties at a border go to the
    lower token id.

    probability_before   logits / T ``[R, V]``, best first -> the probability of all tokens before each
    """
    order = logits_RV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    outside_k_RV = (top_k_R[:, None] > 0) & (rank_V >= top_k_R[:, None])
    temperature_R1 = torch.where(temperature_R > 0, temperature_R, 1.0)[:, None]
    scaled_RV = order.values.to(torch.promote_types(torch.float32, logits_RV.dtype)) / temperature_R1
    # A token stays if those before it do not reach top_p yet: the best one always does.
    before_RV = probability_before(scaled_RV.masked_fill(outside_k_RV, -torch.inf))
    outside_p_RV = (before_RV >= top_p_R[:, None]) & (top_p_R[:, None] < 1)
    drop_RV = (outside_k_RV | outside_p_RV).index_fill(1, rank_V[:1], False)
    return logits_RV.masked_fill(drop_RV.gather(1, order.indices.argsort(dim=-1)), -torch.inf)


def logprobs_of(logits_RV: Tensor, token_R: Tensor, row_L: Tensor, num_top: int,
                drawing: Drawing = ORDINARY_DRAWING) -> LogprobTensors:
    """Log-probabilities of some rows under the model itself: of the raw logits, before temperature, bans and filters.

    In float32, or in float64 if the logits are.
    """
    logprob_LV = drawing.log_softmax(logits_RV[row_L].to(torch.promote_types(torch.float32, logits_RV.dtype)))
    drawn_L1 = logprob_LV.gather(1, token_R[row_L, None].clamp(min=0))  # without a token there is nothing to tell of it
    top_logprob_LK, top_token_LK = drawing.best(logprob_LV, min(num_top, logits_RV.shape[1]))
    return LogprobTensors(
        logprob_L=drawn_L1.squeeze(1),
        rank_L=1 + (logprob_LV > drawn_L1).sum(dim=-1),
        top_token_LK=top_token_LK,
        top_logprob_LK=top_logprob_LK,
        top_rank_LK=_ranks(top_logprob_LK),
    )


def _ranks(sorted_LK: Tensor) -> Tensor:
    """1 + how many of a row are larger, where the largest come first: the place at which a run of equal ones begins."""
    place_LK = torch.arange(1, sorted_LK.shape[1] + 1, device=sorted_LK.device).expand(sorted_LK.shape)
    is_next_LK = torch.zeros_like(place_LK, dtype=torch.bool)
    is_next_LK[:, 1:] = sorted_LK[:, 1:] == sorted_LK[:, :-1]
    return place_LK.masked_fill(is_next_LK, 0).cummax(dim=-1).values if sorted_LK.shape[1] else place_LK


def prompt_logprobs_of(logits_PV: Tensor, token_P: Tensor, num_top: int, drawing: Drawing = ORDINARY_DRAWING) -> LogprobTensors:
    """As :func:`logprobs_of`, of prompt tokens by the logits before each; ``num_top`` = -1 tells the whole vocabulary."""
    row_P = torch.arange(len(token_P), device=token_P.device)
    return logprobs_of(logits_PV, token_P, row_P, logits_PV.shape[1] if num_top < 0 else num_top, drawing)
