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

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.execution.core import EngineCore
from engine.frontend.sampling import SamplingParams
from engine.scheduling.batch import StepBatch
from engine.scheduling.kv_cache import ROOT_HASH, BlockManager, hash_block
from engine.scheduling.scheduler import Chunk, Scheduler
from engine.scheduling.sequence import Request, Sequence

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


class Drawn(list[int]):
    """What a step drew, and of each prompt that it scores (all tokens before, the next one) by place."""

    prompt_logprobs: list[list[tuple[Tokens, int]]]


class FakeRunner:
    """A device that holds tokens where a real one holds keys and values."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.cache: dict[int, Tokens] = {}
        self.last_token: dict[int, int] = {}
        self.seen: list[Tokens] = []
        """The context of each of the last step's sequences."""
        self.not_collected: list[list[int]] = []

    def launch(self, batch: StepBatch) -> Drawn:
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
        drawn = Drawn(next_token(self.seen[seq]) for seq in batch.sample_S.tolist())
        after = [tokens[: position + 1] for seq, tokens in enumerate(self.seen)
                 for position in positions[cu_seqlens[seq] : cu_seqlens[seq + 1]]]
        drawn.prompt_logprobs = [
            [(after[row], token) for row, token in zip(rows.row_P.tolist(), rows.token_P.tolist(), strict=True)]
            for rows in batch.scored]
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
        scores=st.booleans(),
    )
    def add(self, prompts: list[Tokens], max_tokens: int, stops: frozenset[int], scores: bool = False) -> None:
        for prompt in prompts:
            self.add_one(prompt[: self.max_model_len - 1], max_tokens, stops, scores)

    def add_one(self, prompt: Tokens, max_tokens: int, stops: frozenset[int], scores: bool) -> None:
        request = Request(
            request_id=len(self.prompts),
            prompt_token_ids=prompt,
            params=SamplingParams(),
            seed=0,
            max_tokens=min(max_tokens, self.max_model_len - len(prompt)),
            stop_token_ids=stops,
            num_prompt_logprobs=0 if scores else None,
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
            prompt = self.prompts[number] if sequence.request.num_prompt_logprobs is not None else ()
            scored = [at for part in sequence.prompt_logprobs for at in part]
            assert scored == [(prompt[: place + 1], token) for place, token in enumerate(prompt[1:])], "each token, and once"
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
