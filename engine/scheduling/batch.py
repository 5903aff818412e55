"""One step's inputs, built once on the host, equal on every rank, and handed to whoever needs them.

Shape suffixes: T = tokens of the step, S = sequences of the step, B = blocks of the longest sequence, R = tokens to draw,
X = banned (row, token) pairs, L = tokens to draw whose log-probabilities are wanted, P = prompt tokens whose are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.scheduling.processing import Processing, bad_words_that_end, build_processing
from engine.scheduling.scheduler import Chunk
from engine.scheduling.sequence import IN_FLIGHT
from engine.scheduling.tensors import tensor_of, tensors_on

PAD_SLOT = -1
MAX_TOP_K = 2**31 - 1
MAX_SCORED_ROWS = 64
"""Prompt tokens that are scored at a time: whole logits of all of them might take more memory than there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingBatch:
    """How each of the R tokens is drawn."""

    temperature_R: Tensor
    """float32; 0 is greedy."""
    top_k_R: Tensor
    """int32; 0 keeps all."""
    top_p_R: Tensor
    """float32"""
    seed_R: Tensor
    """int64, one a request"""
    position_R: Tensor
    """int64, of the token to draw in its sequence; (seed, position) keys the random numbers"""
    banned_row_X: Tensor
    """int64: stop tokens of sequences below their ``min_tokens``, and the last tokens of bad words"""
    banned_token_X: Tensor
    """int64"""
    filters: bool
    """Some row has a top_k or top_p."""
    processing: Processing | None = None
    """What changes the logits of some rows; None if nothing does"""
    logprob_row_L: Tensor | None = None
    """int64: rows that want log-probabilities; None if none does"""
    num_logprobs: int = 0
    """The most that a row wants beside the drawn token's."""

    @property
    def needs_whole_logits(self) -> bool:
        """Whether some row is filtered, changed, has banned tokens, or wants log-probabilities."""
        return (self.filters or self.processing is not None or self.banned_row_X.numel() > 0
                or self.logprob_row_L is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRows:
    """Prompt tokens of one sequence that a step scores: their log-probabilities are wanted."""

    row_P: Tensor
    """int64: the token before each, among the T tokens of the step"""
    token_P: Tensor
    """int64: their ids"""
    num_top: int
    """How many of the best are wanted beside each; -1: all"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """Tokens of the step, sequence after sequence, those with one token first."""

    token_ids_T: Tensor
    """int64; -1 where the token is in flight: the runner fills it in from its device state"""
    positions_T: Tensor
    """int64, in the sequence"""
    slots_T: Tensor
    """int64, block * block_size + offset: where the token's key and value go; -1 = nowhere (padding)"""
    cu_seqlens_S1: Tensor
    """int32 [S + 1], running sum of the sequences' tokens in this step, from 0"""
    context_lens_S: Tensor
    """int32, tokens of each sequence up to and with this step's"""
    block_tables_SB: Tensor
    """int32, padded with 0"""
    rows_S: Tensor
    """int64, each sequence's row in the runner's device state"""
    sample_S: Tensor
    """int64 [R], the sequences of this step after which a token is drawn"""
    sampling: SamplingBatch
    num_decodes: int
    """The first so many sequences have one token in this step."""
    prefill_cu_seqlens_S1: Tensor
    """int32, ``cu_seqlens`` of the sequences after those, from 0"""
    max_decode_context_len: int
    """Longest of the ``context_lens`` of the first ``num_decodes``; 0 if there are none"""
    max_prefill_len: int
    """Most tokens in this step of one of the other sequences; 0 if there are none"""
    has_in_flight: bool
    scored: tuple[ScoredRows, ...] = ()
    """Of each sequence with prompt tokens to score, in the order of the chunks"""

    @property
    def num_tokens(self) -> int:
        return self.token_ids_T.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.context_lens_S.shape[0]

    @property
    def draws_after_every_token(self) -> bool:
        """Whether every sequence runs one token and draws the next."""
        return self.num_decodes == self.num_seqs == self.sample_S.shape[0]

    def to(self, device: torch.device) -> StepBatch:
        """The same batch with its tensors on ``device``."""
        if device.type == "cpu":
            return self
        processing = None if self.sampling.processing is None else self.sampling.processing.to(device)
        sampling = replace(self.sampling, processing=processing, **tensors_on(device, self.sampling))
        scored = tuple(replace(rows, **tensors_on(device, rows)) for rows in self.scored)
        return replace(self, sampling=sampling, scored=scored, **tensors_on(device, self))


def build_batch(chunks: list[Chunk], block_size: int) -> StepBatch:
    """The inputs of a scheduled step.

    Raises:
        ValueError: if there is nothing to run.
    """
    if not chunks:
        raise ValueError("len(chunks)=0: a step needs at least one chunk")
    lengths = np.array([chunk.num_tokens for chunk in chunks])
    starts = np.array([chunk.start for chunk in chunks])
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    context_lens = starts + lengths
    max_blocks = max(len(chunk.sequence.blocks) for chunk in chunks)
    # Lists, made into arrays once: writing into an array row by row takes several times as long.
    tables: list[list[int]] = []
    token_ids: list[int] = []
    for chunk in chunks:
        blocks = chunk.sequence.blocks
        tables.append(blocks + [0] * (max_blocks - len(blocks)))
        token_ids += chunk.sequence.token_ids[chunk.start : chunk.start + chunk.num_tokens]
        if chunk.in_flight:
            token_ids.append(IN_FLIGHT)
    assert len(token_ids) == cu_seqlens[-1], f"{len(token_ids)} tokens are not the {cu_seqlens[-1]} of the chunks"
    block_tables = np.array(tables, dtype=np.int32)
    sequence_T = np.repeat(np.arange(len(chunks)), lengths)
    positions = np.arange(cu_seqlens[-1]) - cu_seqlens[sequence_T] + starts[sequence_T]
    slots = block_tables[sequence_T, positions // block_size].astype(np.int64) * block_size + positions % block_size
    num_decodes = int((lengths == 1).sum())
    return StepBatch(
        token_ids_T=tensor_of(token_ids, np.int64),
        positions_T=torch.from_numpy(positions),
        slots_T=torch.from_numpy(slots),
        cu_seqlens_S1=torch.from_numpy(cu_seqlens.astype(np.int32)),
        context_lens_S=torch.from_numpy(context_lens.astype(np.int32)),
        block_tables_SB=torch.from_numpy(block_tables),
        rows_S=tensor_of([chunk.sequence.row for chunk in chunks], np.int64),
        sample_S=tensor_of([index for index, chunk in enumerate(chunks) if chunk.samples], np.int64),
        sampling=_build_sampling([chunk for chunk in chunks if chunk.samples]),
        num_decodes=num_decodes,
        prefill_cu_seqlens_S1=torch.from_numpy((cu_seqlens[num_decodes:] - num_decodes).astype(np.int32)),
        max_decode_context_len=int(context_lens[:num_decodes].max(initial=0)),
        max_prefill_len=int(lengths[num_decodes:].max(initial=0)),
        has_in_flight=any(chunk.in_flight for chunk in chunks),
        scored=tuple(_scored_rows(chunk, int(cu_seqlens[index])) for index, chunk in enumerate(chunks) if chunk.scored),
    )


def _scored_rows(chunk: Chunk, first: int) -> ScoredRows:
    """``first``: the chunk's first token, among those of the step."""
    sequence, scored = chunk.sequence, chunk.scored
    assert sequence.request.num_prompt_logprobs is not None, f"request_id={sequence.request.request_id} did not ask for them"
    return ScoredRows(row_P=torch.arange(scored.start, scored.stop) - chunk.start + first,
                      token_P=tensor_of(sequence.token_ids[scored.start + 1 : scored.stop + 1], np.int64),
                      num_top=sequence.request.num_prompt_logprobs)


def _build_sampling(chunks: list[Chunk]) -> SamplingBatch:
    params = [chunk.sequence.request.params for chunk in chunks]
    positions = [chunk.start + chunk.num_tokens for chunk in chunks]
    banned = [
        (row, token_id)
        for row, (chunk, position) in enumerate(zip(chunks, positions, strict=True))
        # So many tokens were generated before the one at `position`.
        if position - chunk.sequence.num_prompt_tokens < chunk.sequence.request.params.min_tokens
        for token_id in sorted(chunk.sequence.request.stop_token_ids)
    ] + [(row, token_id) for row, chunk in enumerate(chunks) if chunk.sequence.request.bad_words
         for token_id in bad_words_that_end(chunk)]
    logprob_rows = [row for row, p in enumerate(params) if p.logprobs is not None]
    return SamplingBatch(
        temperature_R=tensor_of([0.0 if p.is_greedy else p.temperature for p in params], np.float32),
        top_k_R=tensor_of([min(max(p.top_k, 0), MAX_TOP_K) for p in params], np.int32),
        top_p_R=tensor_of([p.top_p for p in params], np.float32),
        seed_R=tensor_of([chunk.sequence.request.seed for chunk in chunks], np.int64),
        position_R=tensor_of(positions, np.int64),
        banned_row_X=tensor_of([row for row, _ in banned], np.int64),
        banned_token_X=tensor_of([token_id for _, token_id in banned], np.int64),
        filters=any(p.top_k > 0 or p.top_p < 1 for p in params),
        processing=build_processing(chunks),
        logprob_row_L=tensor_of(logprob_rows, np.int64) if logprob_rows else None,
        num_logprobs=max((p.logprobs or 0 for p in params), default=0),
    )


def profiling_batch(num_seqs: int, length: int) -> StepBatch:
    """A step of ``num_seqs`` prompts of ``length`` tokens that writes nothing and reads block 0 alone.

    For looking at memory: its numbers mean nothing.
    """
    num_tokens = num_seqs * length
    starts = torch.arange(0, num_tokens + 1, length, dtype=torch.int32)
    zeros_R = torch.zeros(num_seqs)
    return StepBatch(
        token_ids_T=torch.zeros(num_tokens, dtype=torch.int64),
        positions_T=torch.arange(length).repeat(num_seqs),
        slots_T=torch.full((num_tokens,), PAD_SLOT),
        cu_seqlens_S1=starts,
        context_lens_S=torch.full((num_seqs,), length, dtype=torch.int32),
        block_tables_SB=torch.zeros((num_seqs, length), dtype=torch.int32),
        rows_S=torch.zeros(num_seqs, dtype=torch.int64),
        sample_S=torch.arange(num_seqs),
        sampling=SamplingBatch(
            temperature_R=zeros_R, top_k_R=zeros_R.int(), top_p_R=zeros_R + 1, seed_R=zeros_R.long(), position_R=zeros_R.long(),
            banned_row_X=zeros_R[:0].long(), banned_token_X=zeros_R[:0].long(), filters=False,
            logprob_row_L=zeros_R[:0].long(),  # whole logits, as a step may need them
        ),
        num_decodes=0, prefill_cu_seqlens_S1=starts, max_decode_context_len=0, max_prefill_len=length,
        has_in_flight=False,
        scored=(ScoredRows(row_P=torch.zeros(MAX_SCORED_ROWS, dtype=torch.int64),
                         token_P=torch.zeros(MAX_SCORED_ROWS, dtype=torch.int64), num_top=-1),),
    )
