"""Scheduler, block manager and the engine's loop against a small independent model of them.

The device is made up: a slot of its cache holds the token that was written there and all tokens before it, as the
chunk that wrote it saw them. A chunk therefore sees at once when its context is not its own: a block shared wrongly,
handed out while it was needed, or read before it was written. The next token is a function of the tokens that the
device sees, so what a request must bring is known beforehand, whatever else runs.
"""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from engine.batch import StepBatch
from engine.core import EngineCore
from engine.kv_cache import ROOT_HASH, BlockManager, hash_block
from engine.sampling import SamplingParams
from engine.scheduler import Chunk, Scheduler
from engine.sequence import Request, Sequence
from tests.engine.support import FEW, MANY

Tokens = tuple[int, ...]
VOCAB_SIZE = 3


def continued(tokens: Tokens, count: int) -> Tokens:
    for _ in range(count):
        tokens = (*tokens, next_token(tokens))
    return tokens


def next_token(tokens: Tokens) -> int:
    """The made-up model: any function of all tokens before."""
    return hashlib.blake2b(bytes(tokens), digest_size=1).digest()[0] % VOCAB_SIZE


# Beginnings of few texts: prompts share prefixes, and some are what another request has generated.
PROMPTS = st.one_of(
    st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple),
    st.builds(continued, st.sampled_from([(0,), (1, 0)]), st.integers(0, 20)),
)


class FakeRunner:
    """A device that holds tokens where a real one holds keys and values."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.cache: dict[int, Tokens] = {}
        self.last_token: dict[int, int] = {}
        self.seen: list[Tokens] = []
        """The context of each of the last step's sequences."""
        self.not_collected: list[list[int]] = []

    def launch(self, batch: StepBatch) -> list[int]:
        block_size, cu_seqlens = self.config.block_size, batch.cu_seqlens_S1.tolist()
        slots, positions, token_ids = (x.tolist() for x in (batch.slots_T, batch.positions_T, batch.token_ids_T))
        rows, tables = batch.rows_S.tolist(), batch.block_tables_SB.tolist()
        assert len(set(slots)) == len(slots), f"two tokens of one step in one slot: {slots}"
        # As on a device: each layer writes all keys and values of the step before it reads any.
        written: dict[int, tuple[int, int]] = {}
        for seq, row in enumerate(rows):
            for at in range(cu_seqlens[seq], cu_seqlens[seq + 1]):
                token = self.last_token[row] if token_ids[at] < 0 else token_ids[at]
                written[slots[at]] = (positions[at], token)
        self.seen, contents = [], {}
        for seq, length in enumerate(batch.context_lens_S.tolist()):
            start = length - (cu_seqlens[seq + 1] - cu_seqlens[seq])
            where = [tables[seq][p // block_size] * block_size + p % block_size for p in range(length)]
            assert where[start:] == slots[cu_seqlens[seq] : cu_seqlens[seq + 1]]
            tokens: Tokens = ()
            for position, slot in enumerate(where):
                if slot in written:
                    at, token = written[slot]
                    assert at == position, f"position {position} reads what was written for position {at}"
                else:
                    assert len(self.cache[slot]) == position + 1
                    token = self.cache[slot][-1]
                tokens = (*tokens, token)
            for position in range(start, length):
                contents[where[position]] = tokens[: position + 1]
            self.seen.append(tokens)
        self.cache |= contents
        for seq, tokens in enumerate(self.seen):
            for position in range(len(tokens)):
                slot = tables[seq][position // block_size] * block_size + position % block_size
                assert self.cache[slot] == tokens[: position + 1], "a context of other tokens"
        drawn = [next_token(self.seen[seq]) for seq in batch.sample_S.tolist()]
        assert batch.sampling.position_R.tolist() == [len(self.seen[seq]) for seq in batch.sample_S.tolist()]
        for seq, token in zip(batch.sample_S.tolist(), drawn, strict=True):
            self.last_token[rows[seq]] = token
        self.not_collected.append(drawn)
        return drawn

    def collect(self, drawn: list[int]) -> list[int]:
        # Steps come home in order, and only once the one after has been launched.
        assert self.not_collected.pop(0) is drawn
        return drawn


class Serving(RuleBasedStateMachine):
    """Requests come, steps run, requests are aborted; at the end all that is left runs to its end."""

    scheduler_type = Scheduler
    manager_type = BlockManager

    @initialize(
        block_size=st.integers(1, 4),
        num_blocks=st.integers(2, 9),
        max_num_seqs=st.integers(1, 4),
        budget=st.integers(0, 8),
        chunked=st.booleans(),
        caching=st.booleans(),
    )
    def start(self, block_size: int, num_blocks: int, max_num_seqs: int, budget: int, chunked: bool, caching: bool) -> None:
        self.max_model_len = block_size * num_blocks
        self.max_num_seqs = max_num_seqs
        # What EngineConfig.resolve asks for.
        self.budget = max(max_num_seqs + budget, 0 if chunked else self.max_model_len)
        self.chunked = chunked
        self.runner = FakeRunner(
            SimpleNamespace(
                block_size=block_size,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=self.budget,
                enable_chunked_prefill=chunked,
                enable_prefix_caching=caching,
            )
        )
        self.core = EngineCore(self.runner, num_blocks)  # type: ignore[arg-type]
        self.manager = self.manager_type(num_blocks, block_size, enable_prefix_caching=caching)
        self.scheduler = self.scheduler_type(
            self.manager,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=self.budget,
            enable_chunked_prefill=chunked,
        )
        self.core.scheduler = self.scheduler
        self.schedule, self.scheduler.schedule = self.scheduler.schedule, self.observed_schedule  # type: ignore[method-assign]
        self.chunks: list[Chunk] = []
        self.expected: dict[int, Tokens] = {}
        self.brought: dict[int, list[int]] = {}
        self.prompts: dict[int, Tokens] = {}
        self.live: dict[int, Sequence] = {}
        self.num_steps_allowed = 1

    @rule(
        prompts=st.lists(PROMPTS, min_size=1, max_size=4),
        max_tokens=st.integers(1, 12),
        stops=st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=1),
    )
    def add(self, prompts: list[Tokens], max_tokens: int, stops: frozenset[int]) -> None:
        for prompt in prompts:
            self.add_one(prompt[: self.max_model_len - 1], max_tokens, stops)

    def add_one(self, prompt: Tokens, max_tokens: int, stops: frozenset[int]) -> None:
        request = Request(
            request_id=len(self.prompts),
            prompt_token_ids=prompt,
            params=SamplingParams(),
            seed=0,
            max_tokens=min(max_tokens, self.max_model_len - len(prompt)),
            stop_token_ids=stops,
        )
        expected = continued(prompt, request.max_tokens)[len(prompt) :]
        stop = next((index for index, token in enumerate(expected) if token in stops), len(expected))
        expected = expected[: stop + 1]
        number = request.request_id
        self.prompts[number], self.expected[number], self.brought[number] = prompt, expected, []
        self.live[number] = Sequence.from_request(request)
        self.scheduler.add(self.live[number])
        # Alone and one token at a time it would take so many; the oldest one gets on in every step.
        self.num_steps_allowed += len(prompt) + 2 * request.max_tokens + 2

    @rule(number=st.integers(0, 40))
    def abort(self, number: int) -> None:
        self.scheduler.abort(number)
        if (sequence := self.live.pop(number, None)) is not None:
            assert sequence.finish_reason == "abort"

    @rule(count=st.integers(1, 6))
    def run_steps(self, count: int) -> None:
        for _ in range(count):
            if self.core.has_work:
                self.step()

    def step(self) -> None:
        seen: set[int] = set()
        for sequence, token_id in self.core.step():
            number = sequence.request.request_id
            assert number in self.live, "a token of a request that is over"
            assert number not in seen, "two tokens of one request in one step"
            seen.add(number)
            self.brought[number].append(token_id)
            if sequence.finish_reason is not None:
                reason = "stop" if token_id in sequence.request.stop_token_ids else "length"
                assert sequence.finish_reason == reason
                assert tuple(self.brought[number]) == self.expected[number]
                del self.live[number]

    def observed_schedule(self) -> list[Chunk]:
        """What a step was made of, held against the rules of scheduling."""
        oldest = self.scheduler.running[0] if self.scheduler.running else None
        oldest_needs_a_step = oldest is not None and oldest.num_uncomputed > 0
        ready = [sequence for sequence in self.scheduler.running if sequence.num_uncomputed > 0]
        computed = {number: sequence.num_computed for number, sequence in self.live.items()}
        self.chunks = chunks = self.schedule()
        sequences = [chunk.sequence for chunk in chunks]
        assert len(set(map(id, sequences))) == len(sequences), "a sequence twice in one step"
        assert not oldest_needs_a_step or oldest in sequences, "the oldest sequence must get on in every step"
        left_out = [sequence for sequence in ready if sequence.row >= 0 and sequence not in sequences]
        assert not left_out, "who runs gets on in every step: no prompt may keep the others from decoding"
        assert sum(chunk.num_tokens for chunk in chunks) <= self.budget
        sizes = [chunk.num_tokens > 1 for chunk in chunks]
        assert sizes == sorted(sizes), "single tokens first"
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence in self.scheduler.running
            assert chunk.num_tokens >= 1
            assert sequence.num_computed == chunk.start + chunk.num_tokens
            known = len(sequence.token_ids)
            assert chunk.in_flight == (chunk.start + chunk.num_tokens > known)
            assert chunk.start + chunk.num_tokens <= known + 1, "only one token can be fed from the device"
            assert not chunk.in_flight or chunk.num_tokens == 1
            if computed[sequence.request.request_id] and sequence.num_preemptions == 0:
                assert chunk.start == computed[sequence.request.request_id], "tokens left out or computed twice"
            if not self.chunked:
                assert chunk.samples, "without chunked prefill a prompt runs whole"
        return chunks

    @invariant()
    def every_request_got_the_tokens_that_it_must(self) -> None:
        for number, brought in self.brought.items():
            assert tuple(brought) == self.expected[number][: len(brought)]

    @invariant()
    def contexts_were_those_of_their_requests(self) -> None:
        for chunk, tokens in zip(self.chunks, self.runner.seen if self.chunks else [], strict=True):
            prompt = self.prompts[chunk.sequence.request.request_id]
            assert tokens == continued(prompt, max(0, len(tokens) - len(prompt)))[: len(tokens)]
        self.chunks = []

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        self.manager.check_integrity()
        holders: dict[int, list[tuple[int, Sequence]]] = {}
        for sequence in self.scheduler.running:
            assert len(set(sequence.blocks)) == len(sequence.blocks)
            for index, block in enumerate(sequence.blocks):
                holders.setdefault(block, []).append((index, sequence))
        counts = [len(holders.get(block, ())) for block in range(self.manager.num_blocks)]
        assert self.manager.ref_counts == counts
        size = self.manager.block_size
        for block, held_by in holders.items():
            contents = {(index, tuple(seq.token_ids[: (index + 1) * size])) for index, seq in held_by}
            assert len(contents) == 1, f"block {block} stands for {contents}"
            assert len(held_by) == 1 or all(len(tokens) == (index + 1) * size for index, tokens in contents)

    @invariant()
    def sequences_hold_what_they_computed(self) -> None:
        for sequence in self.scheduler.running:
            assert len(sequence.blocks) == self.manager.num_blocks_for(sequence.num_computed)
            assert sequence.num_computed <= sequence.num_tokens
            assert 0 <= sequence.num_in_flight <= 1, "one step is in flight between two calls"
            assert sequence.finish_reason is None
        for sequence in self.scheduler.waiting:
            assert not sequence.blocks
            assert sequence.row == -1
            assert sequence.num_computed == sequence.num_in_flight == 0

    @invariant()
    def rows_are_shared_out(self) -> None:
        rows = [sequence.row for sequence in self.scheduler.running]
        assert sorted(rows + self.scheduler.free_rows) == list(range(self.max_num_seqs))

    @invariant()
    def first_come_first_served(self) -> None:
        order = [seq.request.request_id for seq in [*self.scheduler.running, *self.scheduler.waiting]]
        assert order == sorted(order)
        assert order == sorted(self.live)

    @invariant()
    def the_prefix_cache_knows_what_its_blocks_hold(self) -> None:
        size = self.manager.block_size
        for block, known_hash in self.manager.hash_of_block.items():
            tokens = self.runner.cache[block * size + size - 1]
            own_hash = ROOT_HASH
            for start in range(0, len(tokens), size):
                own_hash = hash_block(own_hash, list(tokens[start : start + size]))
            assert known_hash == own_hash, f"block {block} holds {tokens}"

    def recheck(self) -> None:
        for check in (
            self.every_request_got_the_tokens_that_it_must,
            self.contexts_were_those_of_their_requests,
            self.every_block_is_accounted_for,
            self.sequences_hold_what_they_computed,
            self.rows_are_shared_out,
            self.first_come_first_served,
            self.the_prefix_cache_knows_what_its_blocks_hold,
        ):
            check()

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for _ in range(self.num_steps_allowed):
            if not self.core.has_work:
                break
            self.step()
            self.recheck()
        assert not self.core.has_work, f"no end after {self.num_steps_allowed} steps"
        assert not self.live
        assert self.manager.num_free == self.manager.num_blocks


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


def make_request(number: int, prompt: Tokens, **changes: Any) -> Sequence:
    values: dict[str, Any] = {"max_tokens": 4, "stop_token_ids": frozenset(), "params": SamplingParams(), "seed": 0}
    return Sequence.from_request(Request(request_id=number, prompt_token_ids=prompt, **(values | changes)))


def scheduler(num_blocks: int = 8, block_size: int = 2, **options: Any) -> Scheduler:
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 16} | options
    return Scheduler(BlockManager(num_blocks, block_size), **options)


def starts(chunks: list[Chunk]) -> list[tuple[int, int, int]]:
    return [(chunk.sequence.request.request_id, chunk.start, chunk.num_tokens) for chunk in chunks]


def test_a_long_prompt_is_cut_to_the_budget_and_decodes_go_first() -> None:
    plan = scheduler(max_num_batched_tokens=4)
    plan.add(make_request(0, (1, 2)))
    plan.add(make_request(1, (3, 4, 5, 6, 7)))
    first = plan.schedule()
    assert starts(first) == [(0, 0, 2), (1, 0, 2)]
    assert [chunk.samples for chunk in first] == [True, False]
    second = plan.schedule()
    assert starts(second) == [(0, 2, 1), (1, 2, 3)]
    assert [chunk.in_flight for chunk in second] == [True, False]
    assert [chunk.samples for chunk in second] == [True, True]


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    plan = scheduler(num_blocks=4, block_size=1, max_num_seqs=3)
    for number in range(3):
        plan.add(make_request(number, (number, number)))
    first = plan.schedule()
    assert starts(first) == [(0, 0, 2), (1, 0, 2)]
    second = plan.schedule()
    assert starts(second) == [(0, 2, 1)]
    assert [sequence.request.request_id for sequence in plan.waiting] == [1, 2]
    assert plan.commit(first, [7, 8])[1][0].token_ids == [1, 1, 8]
    plan.commit(second, [9])
    assert starts(plan.schedule()) == [(0, 3, 1)]


def test_a_preempted_sequence_waits_for_its_token_in_flight() -> None:
    plan = scheduler(num_blocks=4, block_size=1)
    plan.add(make_request(0, (0, 0)))
    plan.add(make_request(1, (1, 1)))
    first = plan.schedule()
    second = plan.schedule()
    assert starts(second) == [(0, 2, 1)]
    plan.abort(0)
    # There is room now, but its third token is on the device only, and a prefill takes tokens from the host.
    assert plan.schedule() == []
    plan.commit(first, [7, 8])
    # Its first block was free, not handed out: the prefix cache gives it back.
    assert starts(plan.schedule()) == [(1, 1, 2)]
    plan.commit(second, [9])


def test_a_sequence_stops_at_a_stop_token_and_its_extra_token_is_dropped() -> None:
    plan = scheduler()
    plan.add(make_request(0, (1, 2), stop_token_ids=frozenset({9})))
    first = plan.schedule()
    second = plan.schedule()
    (news,) = plan.commit(first, [9])
    assert (news[0].finish_reason, news[1]) == ("stop", 9)
    assert not plan.has_work
    assert plan.commit(second, [5]) == []
    assert news[0].token_ids == [1, 2, 9]


def test_nothing_is_launched_beyond_the_last_token() -> None:
    plan = scheduler()
    plan.add(make_request(0, (1,), max_tokens=2))
    steps = [plan.schedule(), plan.schedule()]
    assert [starts(step) for step in steps] == [[(0, 0, 1)], [(0, 1, 1)]]
    assert plan.schedule() == []
    plan.commit(steps[0], [5])
    assert plan.schedule() == []
    assert plan.commit(steps[1], [6])[0][0].finish_reason == "length"


@pytest.mark.parametrize("state", ["waiting", "running", "in flight", "finished", "unknown"])
def test_an_abort_frees_whatever_the_request_holds(state: str) -> None:
    plan = scheduler()
    plan.add(make_request(0, (1, 2, 3), max_tokens=1))
    steps = [plan.schedule()] if state != "waiting" else []
    if state == "finished":
        plan.commit(steps.pop(), [4])
    plan.abort(1 if state == "unknown" else 0)
    plan.abort(0)
    assert not plan.has_work
    assert plan.blocks.num_free == 8
    assert sorted(plan.free_rows) == [0, 1, 2, 3]
    for step in steps:
        assert plan.commit(step, [4]) == []


@FEW
@given(st.integers(1, 6), st.integers(1, 6))
def test_a_prompt_waits_until_its_tokens_have_room(num_blocks: int, prompt_blocks: int) -> None:
    plan = scheduler(num_blocks=num_blocks, block_size=2)
    plan.add(make_request(0, tuple(range(2 * prompt_blocks))))
    assert bool(plan.schedule()) == (prompt_blocks <= num_blocks)


@pytest.mark.parametrize("caching", [True, False])
def test_a_long_prompt_is_not_begun_before_there_is_room_for_all_of_it(caching: bool) -> None:
    # Begun chunk by chunk beside a running sequence, it would fill the cache, give way, and start over, again and again.
    blocks = BlockManager(64, 16, enable_prefix_caching=caching)
    plan = Scheduler(blocks, max_num_seqs=8, max_num_batched_tokens=128)
    plan.add(make_request(0, (1,) * 200, max_tokens=300))
    plan.add(make_request(1, (2,) * 900, max_tokens=20))
    num_computed = [0, 0]
    previous: list[Chunk] = []
    while plan.has_work:
        chunks = plan.schedule()
        for chunk in chunks:
            num_computed[chunk.sequence.request.request_id] += chunk.num_tokens
        plan.commit(previous, [7] * sum(chunk.samples for chunk in previous))
        previous = chunks
    assert num_computed == [499, 919]


def test_a_core_that_cannot_go_on_says_so() -> None:
    config = SimpleNamespace(
        block_size=2, max_num_seqs=2, max_num_batched_tokens=8, enable_chunked_prefill=True, enable_prefix_caching=True
    )
    core = EngineCore(FakeRunner(config), 1)  # type: ignore[arg-type]
    core.scheduler.add(make_request(0, (1, 2, 3)))
    with pytest.raises(RuntimeError, match="nothing can run: waiting=1, free blocks=1"):
        core.step()
