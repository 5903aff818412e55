"""A made-up device under a scheduler: its cache holds tokens where a real one holds keys and values.

A slot remembers the token that was written there with all tokens before it. A step that reads a block which is not its
sequence's, or was handed out again, or was never written, is seen at once; and as the next token is a function of the tokens
that were read, what every request must bring is known beforehand, whatever else runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from harness.subjects.rank import SchedulerLimits, StepInputs

VOCAB_SIZE = 5


class DisagreementError(AssertionError):
    """A scheduler's bookkeeping is not what the model of it says."""


def next_token(tokens: Sequence[int]) -> int:
    """The made-up language model."""
    return hashlib.blake2b(bytes(tokens), digest_size=2).digest()[0] % VOCAB_SIZE


def continuation(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What follows a prompt, whatever else runs."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeDevice:
    """The made-up device. Notes a digest of every step's inputs."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.block_size = limits.block_size
        self.num_slots = limits.num_blocks * limits.block_size
        self.slots: dict[int, tuple[int, ...]] = {}
        self.last_token: dict[int, int] = {}
        self.digests: list[bytes] = []

    def launch(self, step: StepInputs) -> list[int]:
        """Run a step: write its tokens, read every sequence's context, draw.

        Raises:
            DisagreementError: if a context is not the one that its own tokens make, a slot is outside the cache or used twice, or
                a sequence runs no token.
        """
        self.digests.append(step.digest)
        starts, slots, rows = step.cu_seqlens, step.slots, step.rows
        if len(set(slots)) < len(slots) or not all(0 <= slot < self.num_slots for slot in slots):
            raise DisagreementError(f"the step writes to slots {slots} of {self.num_slots}: each must be there, and be used once")
        if idle := [number for number in range(len(rows)) if starts[number] == starts[number + 1]]:
            raise DisagreementError(f"sequences {idle} of the step run no token: there is nothing to draw the next one from")
        fresh: dict[int, tuple[int, int]] = {}
        for number, row in enumerate(rows):
            for at in range(starts[number], starts[number + 1]):
                fresh[slots[at]] = (step.positions[at],
                                    self.last_token[row] if step.token_ids[at] < 0 else step.token_ids[at])
        contexts = [self._context(table, length, fresh)
                    for table, length in zip(step.block_tables, step.context_lens, strict=True)]
        for number, (table, context) in enumerate(zip(step.block_tables, contexts, strict=True)):
            end = step.context_lens[number]
            for position in range(end - (starts[number + 1] - starts[number]), end):
                self.slots[self._slot(table, position)] = context[: position + 1]
        drawn = [next_token(contexts[number]) for number in step.samples]
        self.last_token |= {rows[number]: token for number, token in zip(step.samples, drawn, strict=True)}
        return drawn

    def _slot(self, table: Sequence[int], position: int) -> int:
        block, offset = divmod(position, self.block_size)
        return int(table[block]) * self.block_size + offset

    def _context(self, table: Sequence[int], length: int, fresh: dict[int, tuple[int, int]]) -> tuple[int, ...]:
        """The tokens that a sequence reads. Each must have been written for its position, behind the same tokens."""
        tokens: tuple[int, ...] = ()
        for position in range(length):
            slot = self._slot(table, position)
            if slot in fresh:
                at, token = fresh[slot]
                if at != position:
                    raise DisagreementError(f"position {position} reads slot {slot}, which this step writes for position {at}")
                tokens = (*tokens, token)
            else:
                held = self.slots.get(slot, ())
                if len(held) != position + 1 or held[:-1] != tokens:
                    raise DisagreementError(f"position {position} of a sequence {list(tokens)} reads slot {slot}, "
                                       f"which was written for {list(held)}")
                tokens = held
        return tokens
