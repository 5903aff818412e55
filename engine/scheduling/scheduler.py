"""Continuous batching: which tokens of which sequences run in the next step (Orca, Yu et al. 2022; Sarathi, Agrawal et al. 2023).

Every rank runs its own scheduler on the same requests and comes to the same steps: only new requests and aborts travel.
Steps are scheduled one ahead of the host's knowledge, so a sequence may be scheduled while its newest token is in flight.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from engine.scheduling.kv_cache import BlockManager
from engine.scheduling.sequence import NO_TOKEN, Sequence


class Chunk(NamedTuple):
    """Tokens ``start : start + num_tokens`` of a sequence, to run in one step.

    A tuple, for there are many: a frozen dataclass takes four times as long to make.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    """The chunk reaches the sequence's last token: one is drawn after it."""
    in_flight: bool
    """The chunk's last token is only known on the device."""
    scored: range = range(0)
    """Positions of the prompt whose logits score the token that follows, for ``prompt_logprobs``."""


class Scheduler:
    """First come, first served; running sequences before waiting ones; the youngest gives way when the cache is full."""

    def __init__(self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int,
                 enable_chunked_prefill: bool = True) -> None:
        self.blocks = blocks
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_chunked_prefill = enable_chunked_prefill
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.free_rows = list(range(max_num_seqs - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def abort(self, request_id: int) -> None:
        """Finish a request early; its tokens in flight will be dropped. Unknown or finished ids are ignored."""
        for sequence in [*self.running, *self.waiting]:
            if sequence.request.request_id == request_id:
                sequence.finish_reason = "abort"
                self._retire(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step, decodes before prefills; empty if nothing can run until a step in flight has been committed."""
        budget = self.max_num_batched_tokens
        chunks: list[Chunk] = []
        preempted = False
        for sequence in list(self.running):
            num_tokens = min(sequence.num_uncomputed, budget)
            if not num_tokens or sequence.row < 0:  # done up to its last token, or just preempted for an older one
                continue
            while not self.blocks.can_hold(sequence, sequence.num_computed + num_tokens):
                preempted = True
                victim = self.running[-1]
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                chunks.append(self._take(sequence, num_tokens))
                budget -= num_tokens
        # Whoever was preempted comes first, and there was no room for it.
        while self.waiting and self.free_rows and budget and not preempted:
            sequence = self.waiting[0]
            if sequence.num_in_flight:  # preempted with a token in flight, which the prefill needs on the host
                break
            shared = self.blocks.cached_prefix(sequence)
            num_shared = len(shared) * self.blocks.block_size
            num_left = sequence.num_tokens - num_shared
            num_tokens = min(num_left, budget)
            if num_tokens < num_left and not self.enable_chunked_prefill:
                break
            # Room for all of it, not for this chunk alone: what does not fit in the end is given up, and computed again.
            if not self.blocks.can_hold(sequence, sequence.num_tokens, shared):
                break
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.row = self.free_rows.pop()
            self.blocks.take_prefix(sequence, shared)
            sequence.num_computed = num_shared
            if not sequence.num_preemptions:
                sequence.num_cached_prompt_tokens = num_shared
            chunks.append(self._take(sequence, num_tokens))
            budget -= num_tokens
        chunks.sort(key=lambda chunk: chunk.num_tokens > 1)  # stable: attention kernels want decodes together
        return chunks

    def commit(self, chunks: list[Chunk], token_ids: list[int]) -> list[tuple[Sequence, int]]:
        """Take the tokens that a step drew, one for each chunk that samples, in order.

        Returns:
            The tokens that count: those of sequences that finished meanwhile are dropped.
        """
        committed: list[tuple[Sequence, int]] = []
        sampled = [chunk.sequence for chunk in chunks if chunk.samples]
        for sequence, token_id in zip(sampled, token_ids, strict=True):
            if sequence.finish_reason is not None:
                continue
            is_last = sequence.append(token_id)
            if sequence.row >= 0:
                self.blocks.register(sequence)
            if token_id == NO_TOKEN:
                self.blocks.forget(sequence)
            if is_last:
                self._retire(sequence)
            committed.append((sequence, token_id))
        return committed

    def _take(self, sequence: Sequence, num_tokens: int) -> Chunk:
        start = sequence.num_computed
        self.blocks.grow(sequence, start + num_tokens)
        sequence.num_computed += num_tokens
        self.blocks.register(sequence)
        scored = range(0)
        if sequence.num_scored < sequence.num_to_score:
            scored = range(sequence.num_scored, min(sequence.num_computed, sequence.num_to_score))
            sequence.num_scored += len(scored)
        chunk = Chunk(sequence, start, num_tokens, samples=sequence.num_computed == sequence.num_tokens,
                      in_flight=sequence.num_computed > len(sequence.token_ids), scored=scored)
        sequence.num_in_flight += chunk.samples
        return chunk

    def _preempt(self, sequence: Sequence) -> None:
        """Give up all blocks; the sequence starts over, before all that wait (recomputation, Kwon et al. 2023, section 4.5)."""
        self._release(sequence)
        self.running.remove(sequence)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _retire(self, sequence: Sequence) -> None:
        if sequence.row >= 0:
            self._release(sequence)
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence)
        self.free_rows.append(sequence.row)
        sequence.row = -1
