"""What the small model of scheduling says of the real scheduler and block manager, and of faulty ones."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test

from engine.scheduling.kv_cache import ROOT_HASH, BlockManager, hash_block
from engine.scheduling.scheduler import Chunk, Scheduler
from engine.scheduling.sequence import Sequence
from tests.engine.scheduling import Serving
from tests.engine.support import MANY

TestServing = Serving.TestCase
TestServing.settings = settings(MANY, max_examples=40, stateful_step_count=30)


class HashOfOneBlock(BlockManager):
    """A fault: a block's hash leaves out what came before it."""

    def _hash_known_blocks(self, sequence: Sequence) -> None:
        size, tokens = self.block_size, sequence.token_ids
        sequence.block_hashes[:] = [
            hash_block(ROOT_HASH, tokens[at : at + size]) for at in range(0, len(tokens) - size + 1, size)
        ]


class WholePromptFromCache(BlockManager):
    """A fault: a hit may cover the last token too, whose logits are needed."""

    def cached_prefix(self, sequence: Sequence) -> list[int]:
        shared = super().cached_prefix(sequence)
        rest = sequence.block_hashes[len(shared) : len(sequence.token_ids) // self.block_size]
        return [*shared, self.block_of_hash[rest[0]]] if rest and rest[0] in self.block_of_hash else shared


class NeverForgets(BlockManager):
    """A fault: a block that is handed out again still counts as holding what it held."""

    def _forget(self, block: int) -> None:
        pass


class RevivedForFree(BlockManager):
    """A fault: free blocks taken back from the prefix cache are counted as room for others."""

    def can_hold(self, sequence: Sequence, num_tokens: int, shared: list[int] | None = None) -> bool:
        num_new = self.num_blocks_for(num_tokens) - len(sequence.blocks) - len(shared or [])
        return num_new <= self.num_free


class SharesUncounted(BlockManager):
    """A fault: who shares a block does not count as its holder."""

    def take_prefix(self, sequence: Sequence, blocks: list[int]) -> None:
        super().take_prefix(sequence, blocks)
        for block in blocks:
            self.ref_counts[block] = 1


class OffersTooEarly(BlockManager):
    """A fault: a prompt's blocks are offered when it arrives, not when they are computed."""

    def register(self, sequence: Sequence) -> None:
        computed, sequence.num_computed = sequence.num_computed, len(sequence.blocks) * self.block_size
        super().register(sequence)
        sequence.num_computed = computed


class TakesWhatIsOver(Scheduler):
    """A fault: the token drawn after the last one counts."""

    def commit(self, chunks: list[Chunk], token_ids: list[int]) -> list[tuple[Sequence, int]]:
        late = [
            (chunk.sequence, token)
            for chunk, token in zip((c for c in chunks if c.samples), token_ids, strict=True)
            if chunk.sequence.finish_reason == "stop"
        ]
        return super().commit(chunks, token_ids) + late


class KeepsItsPlaceAfterPreemption(Scheduler):
    """A fault: a preempted sequence goes on where it was, without its blocks."""

    def _preempt(self, sequence: Sequence) -> None:
        before = sequence.num_computed
        super()._preempt(sequence)
        sequence.num_computed = before


class PreemptedGoLast(Scheduler):
    """A fault: whoever is preempted waits behind all others."""

    def _preempt(self, sequence: Sequence) -> None:
        super()._preempt(sequence)
        self.waiting.rotate(-1)


class RowsLeak(Scheduler):
    """A fault: a row is never given back."""

    def _release(self, sequence: Sequence) -> None:
        super()._release(sequence)
        if len(self.free_rows) > 1:
            self.free_rows.pop()


class RowsShared(Scheduler):
    """A fault: a row is given back while its sequence runs."""

    def _take(self, sequence: Sequence, num_tokens: int) -> Chunk:
        chunk = super()._take(sequence, num_tokens)
        if chunk.samples and sequence.num_generated == sequence.request.max_tokens:
            self.free_rows.append(sequence.row)
        return chunk


class AbortedKeepBlocks(Scheduler):
    """A fault: an aborted sequence keeps its blocks."""

    def abort(self, request_id: int) -> None:
        for sequence in list(self.running):
            if sequence.request.request_id == request_id:
                sequence.finish_reason = "abort"
                self.running.remove(sequence)
        super().abort(request_id)


class Crowded(Serving):
    """A few small blocks for several sequences that share prefixes: where faults show soonest."""

    @initialize(block_size=st.integers(1, 2), num_blocks=st.integers(4, 8), chunked=st.booleans())
    def start(self, block_size: int, num_blocks: int, chunked: bool) -> None:  # type: ignore[override]
        super().start(block_size, num_blocks, max_num_seqs=3, budget=4, chunked=chunked, caching=True)


FOUND_SOON = settings(
    max_examples=300,
    phases=[Phase.generate],
    database=None,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
FAULTS = [
    HashOfOneBlock,
    WholePromptFromCache,
    NeverForgets,
    RevivedForFree,
    SharesUncounted,
    OffersTooEarly,
    TakesWhatIsOver,
    KeepsItsPlaceAfterPreemption,
    PreemptedGoLast,
    RowsLeak,
    RowsShared,
    AbortedKeepBlocks,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_model_notices(fault: type[BlockManager] | type[Scheduler]) -> None:
    kind = "manager_type" if issubclass(fault, BlockManager) else "scheduler_type"
    faulty = type("Faulty", (Crowded,), {kind: fault})
    with pytest.raises((AssertionError, KeyError, IndexError, ValueError, RuntimeError)):
        run_state_machine_as_test(faulty, settings=FOUND_SOON)


def test_the_crowd_itself_passes() -> None:
    run_state_machine_as_test(Crowded, settings=settings(FOUND_SOON, max_examples=15))
