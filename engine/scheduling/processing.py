"""What the parameters of some requests change about their logits, gathered on the host for one step.

Nothing is kept from step to step: penalties and bad words are worked out anew from a sequence's tokens, which are the same after
a preemption, in another row of the batch and on every rank. Only the newest token may be unknown to the host, still in flight:
what rests on it is decided on the device.

Shape suffixes: R = tokens to draw, P = rows with penalties, A = rows with allowed tokens, X = (row, token) pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.frontend.sampling import SamplingParams
from engine.scheduling.scheduler import Chunk
from engine.scheduling.sequence import IN_FLIGHT
from engine.scheduling.tensors import tensor_of, tensors_on


@dataclass(frozen=True, slots=True, kw_only=True)
class Processing:
    """Tensors of a step in which some row changes its logits. Rows count among the R tokens to draw unless said otherwise."""

    bias_row_X: Tensor
    """int64"""
    bias_token_X: Tensor
    """int64"""
    bias_X: Tensor
    """float32"""
    penalised_row_P: Tensor
    """int64"""
    repetition_P: Tensor
    """float32"""
    frequency_P: Tensor
    """float32"""
    presence_P: Tensor
    """float32"""
    seen_row_X: Tensor
    """int64, place in P of each token of those sequences"""
    seen_token_X: Tensor
    """int64, ``IN_FLIGHT`` where the host does not know it yet"""
    seen_is_output_X: Tensor
    """int64: 1 for what was generated, 0 in the prompt"""
    banned_row_X: Tensor
    """int64: rows where a token may not be drawn if another one is in flight"""
    banned_token_X: Tensor
    """int64"""
    banned_after_X: Tensor
    """int64, that other one"""
    allowed_row_A: Tensor
    """int64"""
    allowed_place_X: Tensor
    """int64, place in A"""
    allowed_token_X: Tensor
    """int64"""
    floor_R: Tensor
    """float32: how far below the best one a logit may lie, temperature * log(min_p)"""

    def to(self, device: torch.device) -> Processing:
        """The same with its tensors on ``device``."""
        if device.type == "cpu":
            return self
        return Processing(**tensors_on(device, self))


def build_processing(chunks: list[Chunk]) -> Processing | None:
    """Of the chunks after which a token is drawn, in their order; None if none changes its logits."""
    if not any(chunk.sequence.request.changes_logits for chunk in chunks):
        return None
    params = [chunk.sequence.request.params for chunk in chunks]
    bans = [(row, word[-1], word[-2]) for row, chunk in enumerate(chunks) if chunk.in_flight
            for word in chunk.sequence.request.bad_words if len(word) > 1 and _ends_with(_output(chunk), word[:-2])]
    if not bans and not any(p.changes_logits for p in params):
        return None
    bias = [(row, token_id, value) for row, p in enumerate(params) for token_id, value in (p.logit_bias or {}).items()]
    penalised = [row for row, p in enumerate(params) if p.has_penalties]
    seen = [_seen(chunks[row]) for row in penalised]
    allowed = [(row, p.allowed_token_ids) for row, p in enumerate(params) if p.allowed_token_ids is not None]
    return Processing(
        **_columns(bias, bias_row_X=np.int64, bias_token_X=np.int64, bias_X=np.float32),
        **_columns([(row, params[row].repetition_penalty, params[row].frequency_penalty, params[row].presence_penalty)
                    for row in penalised],
                   penalised_row_P=np.int64, repetition_P=np.float32, frequency_P=np.float32, presence_P=np.float32),
        seen_row_X=_repeated([len(tokens) for tokens, _ in seen]),
        seen_token_X=_joined([tokens for tokens, _ in seen]),
        seen_is_output_X=_joined([is_output for _, is_output in seen]),
        **_columns(bans, banned_row_X=np.int64, banned_token_X=np.int64, banned_after_X=np.int64),
        **_columns([(row,) for row, _ in allowed], allowed_row_A=np.int64),
        allowed_place_X=_repeated([len(ids) for _, ids in allowed]),
        allowed_token_X=_joined([np.array(ids, dtype=np.int64) for _, ids in allowed]),
        **_columns([(_floor(p),) for p in params], floor_R=np.float32),
    )


def bad_words_that_end(chunk: Chunk) -> list[int]:
    """The last tokens of bad words whose other tokens, all known, stand at the end of what was generated."""
    words = chunk.sequence.request.bad_words
    if chunk.in_flight:
        return [word[-1] for word in words if len(word) == 1]
    return [word[-1] for word in words if _ends_with(_output(chunk), word[:-1])]


def _output(chunk: Chunk) -> list[int]:
    """What the host knows of it."""
    return chunk.sequence.token_ids[chunk.sequence.num_prompt_tokens :]


def _ends_with(tokens: list[int], end: tuple[int, ...]) -> bool:
    return len(tokens) >= len(end) and tuple(tokens[len(tokens) - len(end) :]) == end


def _seen(chunk: Chunk) -> tuple[Any, Any]:
    """A sequence's tokens, and which of them were generated: two int64 arrays."""
    tokens = np.array(chunk.sequence.token_ids + [IN_FLIGHT] * chunk.in_flight, dtype=np.int64)
    return tokens, (np.arange(len(tokens)) >= chunk.sequence.num_prompt_tokens).astype(np.int64)


def _floor(params: SamplingParams) -> float:
    return params.temperature * math.log(params.min_p) if params.min_p and not params.is_greedy else -math.inf


def _columns(rows: list[tuple[Any, ...]], **dtypes: Any) -> dict[str, Tensor]:
    columns = zip(*rows, strict=True) if rows else ((),) * len(dtypes)
    return {name: tensor_of(column, dtype) for (name, dtype), column in zip(dtypes.items(), columns, strict=True)}


def _repeated(counts: list[int]) -> Tensor:
    return torch.from_numpy(np.repeat(np.arange(len(counts)), counts))


def _joined(parts: list[Any]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else np.array([], dtype=np.int64))
