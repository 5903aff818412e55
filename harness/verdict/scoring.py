"""Log-probabilities of given tokens by this machine: of the engine on any number of ranks, and of the reference on one device.

Shape suffixes: T = tokens of one sequence, V = vocabulary, K = best tokens of a row, D = draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from harness.subjects.base import Schedule, Subject
from harness.subjects.rank import Rank
from harness.verdict.streams import Scored
from harness.verification.simulated import SimulatedRounding
from reference.hf import Reference

BLOCK_SIZE = 16
NUM_SIMULATED = 8
"""Draws of simulated rounding a sequence."""
MOST_LOGITS = 2**27
"""Bytes of logits that a rank holds at a time, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How sequences are run: so many together, in steps of so many tokens, and so many of their last tokens one by one."""

    batch_size: int = 1
    chunk: int | None = None
    decoded: int = 0


class Row(NamedTuple):
    """What comes home of one sequence: logprob of each token but the first, the K best before each of them."""

    logprob_T: Tensor
    top_token_TK: Tensor
    top_logprob_TK: Tensor


def score(subject: Subject, folder: Path, sequences: Sequence[Sequence[int]], way: Way, *, dtype: str,
          vocab_size: int, num_top: int = 0) -> Iterator[Scored]:
    """Each sequence as the subject's rank 0 scores it, teacher-forced, in the order given.

    Args:
        subject: with live ranks; ``folder`` is loaded there.
        folder: a Hugging Face model folder.
        sequences: token ids.
        way: how they run.
        dtype: in which the model computes.
        vocab_size: of the model.
        num_top: how many of the best tokens to tell beside the given one.

    Raises:
        SubjectFailure, CheckpointError: as the subject's own.
    """
    longest = max(map(len, sequences))
    blocks = way.batch_size * (longest // BLOCK_SIZE + 2)
    subject.load(folder, dtype=dtype, options={"block_size": BLOCK_SIZE, "num_kv_blocks": blocks, "max_model_len": longest + 1,
                                               "max_num_seqs": way.batch_size, "max_num_batched_tokens": longest * way.batch_size,
                                               "enable_prefix_caching": False})
    # A job holds the logits of whole batches, as many as fit.
    per_job = max(1, MOST_LOGITS // (longest * way.batch_size * vocab_size * 4))
    batches = [tuple(map(tuple, sequences[at : at + way.batch_size])) for at in range(0, len(sequences), way.batch_size)]
    for at in range(0, len(batches), per_job):
        together = batches[at : at + per_job]
        rows: list[list[Row]] = subject.run(_score, [schedule(batch, way) for batch in together], num_top)[0]
        for batch, found in zip(together, rows, strict=True):
            for token_ids, row in zip(batch, found, strict=True):
                start = decode_start(len(token_ids), way)
                yield scored(token_ids, row, decoded_from=start if way.decoded else None, batch_size=len(batch), chunk=way.chunk)


def schedule(sequences: Sequence[Sequence[int]], way: Way) -> Schedule:
    """All sequences side by side: chunks first, then the tokens that are to come one by one."""
    done = [0] * len(sequences)
    steps = []
    while any(at < len(ids) for at, ids in zip(done, sequences, strict=True)):
        step = []
        for number, ids in enumerate(sequences):
            start = decode_start(len(ids), way)
            size = min(way.chunk or len(ids), start - done[number]) if done[number] < start else min(1, len(ids) - done[number])
            if size:
                step.append((number, size))
                done[number] += size
        steps.append(tuple(step))
    return Schedule(sequences=tuple(map(tuple, sequences)), steps=tuple(steps))


def decode_start(length: int, way: Way) -> int:
    """The place of the first token that runs by itself. The prompt keeps one token at least."""
    return max(1, length - way.decoded)


def scored(token_ids: Sequence[int], row: Row, *, decoded_from: int | None = None, batch_size: int | None = None,
           chunk: int | None = None, rounding: Sequence[float] = ()) -> Scored:
    """A row as streams have it."""
    top = tuple(dict(zip(ids, values, strict=True)) for ids, values in
                zip(row.top_token_TK.tolist(), row.top_logprob_TK.tolist(), strict=True)) if row.top_token_TK.shape[1] else ()
    # Token i + 1 is told by the logits after token i: the first generated token comes of the prompt's last.
    return Scored(token_ids=tuple(token_ids), logprobs=(None, *row.logprob_T.tolist()), decoded_from=decoded_from,
                  batch_size=batch_size, chunk=chunk, top=({}, *top) if top else (), rounding=tuple(rounding))


def logprobs_of(logits_TV: Tensor, token_ids: Sequence[int], num_top: int) -> Row:
    """Of logits after each token, those of the tokens that followed; in float32, or in float64 if the logits are."""
    wide = torch.promote_types(torch.float32, logits_TV.dtype)
    logprob_TV = logits_TV[: len(token_ids) - 1].to(wide).log_softmax(-1)
    next_T1 = torch.tensor(token_ids[1:], device=logits_TV.device)[:, None]
    top = logprob_TV.topk(min(num_top, logprob_TV.shape[-1]), dim=-1)
    return Row(logprob_TV.gather(-1, next_T1).squeeze(-1).cpu(), top.indices.cpu(), top.values.cpu())


def _score(rank: Rank, schedules: Sequence[Schedule], num_top: int) -> list[list[Row]]:
    """Job."""
    found = []
    for one in schedules:
        logits = rank.logits(one)
        # On its device: a processor takes as long to sort a hundred thousand rows of a real vocabulary as all else together.
        found.append([logprobs_of(of_one.to(rank.device), ids, num_top)
                      for of_one, ids in zip(logits, one.sequences, strict=True)] if rank.tp_rank == 0 else [])
    return found


def score_exactly(exact: Reference, sequences: Sequence[Sequence[int]], *, dtype: str, seed: int = 0,
                  num_top: int = 0) -> Iterator[Scored]:
    """Each sequence in float64, with how far off the rounding of ``dtype`` puts each token, by simulation.

    Whatever the dtype, log-softmax is one of float32, as engines take it: its sum over the vocabulary loses what is small beside
    the largest term, so a token that is all but certain is off by more than a last digit.
    """
    for token_ids in sequences:
        row = logprobs_of(exact.logits([token_ids])[0], token_ids, num_top)
        with SimulatedRounding(dtype, seed=seed):
            draws_DTV = exact.copies_of_logits(token_ids, NUM_SIMULATED)
        error_DT = torch.stack([logprobs_of(draw_TV.float(), token_ids, 0).logprob_T for draw_TV in draws_DTV]) - row.logprob_T
        yield scored(token_ids, row, batch_size=1, rounding=[0.0, *error_DT.square().mean(0).sqrt().tolist()])
