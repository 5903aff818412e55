"""Faults of captured graphs, as far as they show where the step is called instead of replayed: they need no GPU for that."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import engine.kernels.peer_all_reduce as peer_module
import engine.parallel.group as group
from engine.execution.decode_graph import NUM_STAGES, DecodeGraphs, DecodeStep
from engine.frontend.sampling import SamplingParams
from engine.kernels.peer_all_reduce import PeerMemory, peer_all_reduce_torch
from engine.parallel.group import ProcessTPGroup, SoloGroup, TPGroup
from engine.scheduling.batch import StepBatch, build_batch
from engine.scheduling.scheduler import Chunk
from engine.scheduling.sequence import Request, Sequence
from harness.faults import FAULTS
from harness.faults.base import Patches
from tests.engine.kernels.peers import dawdle, integers, on_ranks, shared_memory

BLOCK_SIZE = 4


@dataclass(slots=True)
class Seen:
    """What a step was given, copied when it ran."""

    batches: list[dict[str, list[int]]] = field(default_factory=list)

    def step(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        names = ("token_ids_T", "positions_T", "slots_T", "context_lens_S", "block_tables_SB")
        self.batches.append({name: getattr(batch, name).flatten().tolist() for name in names})
        return torch.zeros(batch.num_seqs, 5), torch.zeros(batch.num_seqs, dtype=torch.int64)


def graphs_of(seen: Seen) -> DecodeGraphs:
    return DecodeGraphs(seen.step, max_num_seqs=4, max_blocks=3, block_size=BLOCK_SIZE, padding_row=4,
                        last_token_M=torch.zeros(5, dtype=torch.int64), device=torch.device("cpu"))


def decodes(length: int, blocks: list[list[int]]) -> StepBatch:
    """Each of these sequences runs its token number ``length``."""
    chunks = []
    for row, own in enumerate(blocks):
        sequence = Sequence.from_request(Request(request_id=row, prompt_token_ids=tuple(range(length)), seed=0, max_tokens=9,
                                                 params=SamplingParams(temperature=0.0), stop_token_ids=frozenset()))
        sequence.row, sequence.blocks = row, own
        chunks.append(Chunk(sequence, length - 1, 1, samples=True, in_flight=False))
    return build_batch(chunks, BLOCK_SIZE)


def play(seen: Seen) -> list[dict[str, list[int]]]:
    """Two sequences that grow from 3 tokens to 10, and the steps that they were given."""
    graphs = graphs_of(seen)
    for length in range(3, 11):
        graphs.run(decodes(length, [[7, 2, 5][: -(-length // BLOCK_SIZE)], [1, 4, 3][: -(-length // BLOCK_SIZE)]]))
    return seen.batches


@pytest.fixture
def planted() -> Iterator[Patches]:
    patches = Patches()
    yield patches
    patches.close()


def plant(patches: Patches, name: str, tp: TPGroup | None = None) -> None:
    FAULTS[name].plant(patches, tp or SoloGroup())


def differing(found: list[dict[str, list[int]]], right: list[dict[str, list[int]]]) -> dict[str, int]:
    """By what differs, the first step in which it does."""
    return {name: next(step for step, (a, b) in enumerate(zip(found, right, strict=True)) if a[name] != b[name])
            for name in right[0] if any(a[name] != b[name] for a, b in zip(found, right, strict=True))}


@pytest.mark.parametrize(("name", "wrong"), [
    # Two blocks are needed from the fifth token on: each staging buffer has been filled by then, or has not.
    ("block-tables-filled-once", {"block_tables_SB": NUM_STAGES, "slots_T": NUM_STAGES}),
    ("inputs-derived-before-capture", {"token_ids_T": 1, "positions_T": 1, "slots_T": 1}),
    ("length-baked-into-the-graph", {"context_lens_S": 6, "positions_T": 6, "slots_T": 6}),
])
def test_a_replay_is_given_what_is_no_longer_true(planted: Patches, name: str, wrong: dict[str, int]) -> None:
    right = play(Seen())
    plant(planted, name)
    assert differing(play(Seen()), right) == wrong
    planted.close()
    assert play(Seen()) == right


def test_a_bucket_is_missing_on_one_rank_alone(planted: Patches) -> None:
    batch = decodes(3, [[0], [1], [2]])
    assert DecodeGraphs.can_run(batch)
    plant(planted, "bucket-captured-on-one-rank-alone", TPGroup(0, 2, "alone"))
    assert DecodeGraphs.can_run(batch)
    plant(planted, "bucket-captured-on-one-rank-alone", TPGroup(1, 2, "alone"))
    assert not DecodeGraphs.can_run(batch)
    assert DecodeGraphs.can_run(decodes(3, [[0], [1]]))


def test_a_reduce_is_faked_only_while_a_graph_is_captured(planted: Patches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProcessTPGroup, "_all_reduce", lambda self, x: x + 1)
    plant(planted, "reduce-faked-while-capturing")
    one = object.__new__(ProcessTPGroup)
    x = torch.ones(2)
    for is_capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda answer=is_capturing: answer)
        assert one._all_reduce(x).tolist() == ([1.0, 1.0] if is_capturing else [2.0, 2.0])
    planted.close()  # before what it was planted on goes: put back later, it would stay


def sums_of_shared_memory(num_calls: int = 40) -> list[bool]:
    """Whether two ranks, one of them late now and then, got right sums from the plain twin by way of their groups."""
    memories = shared_memory(2)

    def run(memory: PeerMemory) -> list[bool]:
        tp: Any = object.__new__(ProcessTPGroup)
        tp.rank, tp.size, tp.peers = memory.rank, memory.size, memory
        draw, right = random.Random(memory.rank), []
        for number in range(num_calls):
            dawdle(draw)
            x = integers(memory.rank, number, 33, torch.float32)
            wanted = sum(integers(rank, number, 33, torch.float32) for rank in range(2))
            right.append(torch.equal(tp._all_reduce(x), wanted))
        return right

    return [all(right) for right in on_ranks(memories, run)]


def test_what_keeps_ranks_apart_in_shared_memory_is_missing(planted: Patches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "peer_all_reduce", peer_all_reduce_torch)
    summed = peer_module._sum_torch

    def late_sum(parts: list[Tensor]) -> Tensor:
        time.sleep(1e-3 * (random.random() < 0.5))  # between the meeting and the reading
        return summed(parts)

    monkeypatch.setattr(peer_module, "_sum_torch", late_sum)
    assert sums_of_shared_memory() == [True, True]
    plant(planted, "flags-not-waited-for")
    assert not all(sums_of_shared_memory())
    planted.close()
    assert sums_of_shared_memory() == [True, True]


def test_the_twin_of_a_replay_calls_the_step(planted: Patches) -> None:
    """The control: without a fault every run derives its inputs anew."""
    seen = Seen()
    assert isinstance(graphs_of(seen).steps[0], DecodeStep)
    assert [batch["positions_T"] for batch in play(seen)] == [[length - 1] * 2 for length in range(3, 11)]
