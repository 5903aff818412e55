"""One step's inputs against what each token of each chunk must be given, worked out token by token."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.frontend.sampling import SamplingParams
from engine.scheduling.batch import StepBatch, build_batch
from engine.scheduling.scheduler import Chunk
from engine.scheduling.sequence import IN_FLIGHT, Request, Sequence
from tests.engine.support import FEW, MANY


def sequence_of(prompt: list[int], *, blocks: list[int], row: int = 0, seed: int = 0, **params: Any) -> Sequence:
    stops = frozenset(params.get("stop_token_ids", ()))
    request = Request(
        request_id=row,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(**params),
        seed=seed,
        max_tokens=50,
        stop_token_ids=stops,
    )
    sequence = Sequence.from_request(request)
    sequence.blocks, sequence.row = blocks, row
    return sequence


def chunk_of(sequence: Sequence, start: int, num_tokens: int) -> Chunk:
    end = start + num_tokens
    return Chunk(sequence, start, num_tokens, samples=end == sequence.num_tokens, in_flight=end > len(sequence.token_ids))


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Chunk], int]:
    """A step as a scheduler might make it, and its block size. Blocks are in any order; some are not full."""
    block_size = draw(st.integers(1, 5))
    num_seqs = draw(st.integers(1, 4))
    pool = draw(st.permutations(range(60)))
    rows = draw(st.permutations(range(num_seqs)))
    chunks = []
    for index in range(num_seqs):
        known = draw(st.lists(st.integers(0, 99), min_size=1, max_size=12))
        num_prompt = draw(st.integers(1, len(known)))
        num_blocks = -(-(len(known) + 1) // block_size) + draw(st.integers(0, 1))
        blocks, pool = list(pool[:num_blocks]), pool[num_blocks:]
        sequence = sequence_of(
            known[:num_prompt],
            blocks=blocks,
            row=rows[index],
            seed=draw(st.integers(0, 2**63 - 1)),
            temperature=draw(st.sampled_from([0.0, 0.7, 1.0])),
            top_k=draw(st.sampled_from([-1, 0, 3])),
            top_p=draw(st.sampled_from([0.5, 1.0])),
            min_tokens=draw(st.integers(0, 3)),
            stop_token_ids=draw(st.lists(st.integers(0, 99), max_size=2)),
        )
        sequence.token_ids = known
        if draw(st.booleans()):
            sequence.num_in_flight = 1
            chunks.append(chunk_of(sequence, len(known), 1))
        else:
            start = draw(st.integers(0, len(known) - 1))
            chunks.append(chunk_of(sequence, start, draw(st.integers(1, len(known) - start))))
    chunks.sort(key=lambda chunk: chunk.num_tokens > 1)
    return chunks, block_size


@MANY
@given(steps())
def test_every_token_gets_its_id_position_and_slot(step: tuple[list[Chunk], int]) -> None:
    chunks, block_size = step
    batch = build_batch(chunks, block_size)
    ids, positions, slots = [], [], []
    for chunk in chunks:
        sequence = chunk.sequence
        for position in range(chunk.start, chunk.start + chunk.num_tokens):
            ids.append(sequence.token_ids[position] if position < len(sequence.token_ids) else IN_FLIGHT)
            positions.append(position)
            slots.append(sequence.blocks[position // block_size] * block_size + position % block_size)
    assert batch.token_ids_T.tolist() == ids
    assert batch.positions_T.tolist() == positions
    assert batch.slots_T.tolist() == slots
    assert batch.num_tokens == len(ids)
    assert batch.has_in_flight == (IN_FLIGHT in ids)


@MANY
@given(steps())
def test_every_sequence_gets_its_span_context_blocks_and_row(step: tuple[list[Chunk], int]) -> None:
    chunks, block_size = step
    batch = build_batch(chunks, block_size)
    spans = [0]
    for chunk in chunks:
        spans.append(spans[-1] + chunk.num_tokens)
    assert batch.cu_seqlens_S1.tolist() == spans
    assert batch.context_lens_S.tolist() == [chunk.start + chunk.num_tokens for chunk in chunks]
    assert batch.rows_S.tolist() == [chunk.sequence.row for chunk in chunks]
    for table, chunk in zip(batch.block_tables_SB.tolist(), chunks, strict=True):
        blocks = chunk.sequence.blocks
        assert table == blocks + [0] * (len(table) - len(blocks))
    assert batch.num_seqs == len(chunks)
    assert batch.num_decodes == sum(chunk.num_tokens == 1 for chunk in chunks)
    assert batch.num_decodes == next((i for i, chunk in enumerate(chunks) if chunk.num_tokens > 1), len(chunks))
    decodes = [chunk for chunk in chunks if chunk.num_tokens == 1]
    assert batch.max_decode_context_len == max((chunk.start + 1 for chunk in decodes), default=0)
    prefills = [chunk.num_tokens for chunk in chunks if chunk.num_tokens > 1]
    assert batch.max_prefill_len == max(prefills, default=0)
    assert batch.prefill_cu_seqlens_S1.tolist() == [sum(prefills[:count]) for count in range(len(prefills) + 1)]
    assert batch.sample_S.tolist() == [index for index, chunk in enumerate(chunks) if chunk.samples]


@MANY
@given(steps())
def test_every_token_to_draw_gets_its_requests_wishes(step: tuple[list[Chunk], int]) -> None:
    chunks, block_size = step
    sampling = build_batch(chunks, block_size).sampling
    drawn = [chunk.sequence for chunk in chunks if chunk.samples]
    params = [sequence.request.params for sequence in drawn]
    assert sampling.temperature_R.tolist() == torch.tensor([each.temperature for each in params]).tolist()
    assert sampling.top_k_R.tolist() == [max(0, each.top_k) for each in params]
    assert sampling.top_p_R.tolist() == [each.top_p for each in params]
    assert sampling.seed_R.tolist() == [sequence.request.seed for sequence in drawn]
    # The place of the token to draw: behind all tokens, those in flight included.
    assert sampling.position_R.tolist() == [sequence.num_tokens for sequence in drawn]
    assert sampling.filters == any(each.top_k > 0 or each.top_p < 1 for each in params)
    banned = set(zip(sampling.banned_row_X.tolist(), sampling.banned_token_X.tolist(), strict=True))
    assert banned == {
        (row, token_id)
        for row, sequence in enumerate(drawn)
        for token_id in sequence.request.stop_token_ids
        if sequence.num_generated < sequence.request.params.min_tokens
    }


@pytest.mark.parametrize(("num_generated", "banned"), [(0, [5]), (1, [5]), (2, []), (3, [])])
def test_stop_tokens_are_banned_until_min_tokens_were_drawn(num_generated: int, banned: list[int]) -> None:
    sequence = sequence_of([1, 2], blocks=[0, 1, 2], min_tokens=2, stop_token_ids=[5])
    sequence.token_ids += [7] * num_generated
    whole = chunk_of(sequence, 0, len(sequence.token_ids))
    assert build_batch([whole], 2).sampling.banned_token_X.tolist() == banned


def test_a_token_in_flight_counts_as_drawn() -> None:
    sequence = sequence_of([1, 2], blocks=[0, 1, 2], min_tokens=1, stop_token_ids=[5])
    sequence.num_in_flight = 1
    assert build_batch([chunk_of(sequence, 2, 1)], 2).sampling.banned_token_X.tolist() == []


def test_a_prompt_cut_short_draws_nothing() -> None:
    sequence = sequence_of([1, 2, 3], blocks=[4, 5], stop_token_ids=[5], min_tokens=1)
    batch = build_batch([chunk_of(sequence, 0, 2)], 2)
    assert batch.sample_S.tolist() == []
    for field in fields(batch.sampling):
        value = getattr(batch.sampling, field.name)
        assert not isinstance(value, torch.Tensor) or value.numel() == 0


def test_dtypes_and_devices_are_those_that_kernels_ask_for() -> None:
    batch = build_batch([chunk_of(sequence_of([1, 2, 3], blocks=[4, 5]), 0, 3)], 2)
    int32 = {"cu_seqlens_S1", "prefill_cu_seqlens_S1", "context_lens_S", "block_tables_SB"}
    for field in fields(StepBatch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            assert value.dtype == (torch.int32 if field.name in int32 else torch.int64), field.name
            assert value.is_contiguous()
    assert batch.sampling.temperature_R.dtype == batch.sampling.top_p_R.dtype == torch.float32
    assert batch.to(torch.device("cpu")) is batch


def test_seeds_keep_all_their_bits() -> None:
    sequence = sequence_of([1], blocks=[0], seed=2**63 - 1)
    assert build_batch([chunk_of(sequence, 0, 1)], 2).sampling.seed_R.tolist() == [2**63 - 1]


@FEW
@given(st.floats(0, 1e-5, exclude_max=True))
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature: float) -> None:
    sampling = build_batch([chunk_of(sequence_of([1], blocks=[0], temperature=temperature), 0, 1)], 2).sampling
    assert sampling.temperature_R.tolist() == [0.0]


def test_a_top_k_beyond_any_vocabulary_keeps_all() -> None:
    sampling = build_batch([chunk_of(sequence_of([1], blocks=[0], top_k=2**40), 0, 1)], 2).sampling
    assert sampling.top_k_R.tolist() == [2**31 - 1]


def test_a_step_without_chunks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"len\(chunks\)=0"):
        build_batch([], 2)
