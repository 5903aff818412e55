"""A made-up device under the engine's scheduler: its cache holds tokens where a real one holds keys and values.

A slot remembers the token that was written there with all tokens before it. A step that reads a block which is not its
sequence's, or was handed out again, or was never written, is seen at once; and as the next token is a function of the tokens
that were read, what every request must bring is known beforehand, whatever else runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.scheduling.batch import StepBatch
from harness.verification.budgets import bits

VOCAB_SIZE = 5


class DisagreementError(AssertionError):
    """The engine's bookkeeping is not what the model of it says."""


def next_token(tokens: Sequence[int]) -> int:
    """The made-up language model."""
    return hashlib.blake2b(bytes(tokens), digest_size=2).digest()[0] % VOCAB_SIZE


def continuation(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What follows a prompt, whatever else runs."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@dataclass(frozen=True, slots=True, kw_only=True)
class TapeConfig:
    """What ``EngineCore`` reads of a runner's configuration."""

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_chunked_prefill: bool
    enable_prefix_caching: bool


class TapeRunner:
    """In place of ``engine.execution.runner.Runner``. Notes a digest of every step's inputs."""

    def __init__(self, config: TapeConfig, num_blocks: int) -> None:
        self.config = config
        self.num_slots = num_blocks * config.block_size
        self.slots: dict[int, tuple[int, ...]] = {}
        self.last_token: dict[int, int] = {}
        self.digests: list[bytes] = []

    def launch(self, batch: StepBatch) -> list[int]:
        """Run a step: write its tokens, read every sequence's context, draw.

        Raises:
            DisagreementError: if a context is not the one that its own tokens make, a slot is outside the cache or used twice, or
                a sequence runs no token.
        """
        self.digests.append(digest_of(batch))
        starts, lengths, tables = batch.cu_seqlens_S1.tolist(), batch.context_lens_S.tolist(), batch.block_tables_SB.tolist()
        slots, ids, positions, rows = (x.tolist() for x in (batch.slots_T, batch.token_ids_T, batch.positions_T, batch.rows_S))
        if len(set(slots)) < len(slots) or not all(0 <= slot < self.num_slots for slot in slots):
            raise DisagreementError(f"the step writes to slots {slots} of {self.num_slots}: each must be there, and be used once")
        if idle := [number for number in range(len(rows)) if starts[number] == starts[number + 1]]:
            raise DisagreementError(f"sequences {idle} of the step run no token: there is nothing to draw the next one from")
        fresh: dict[int, tuple[int, int]] = {}
        for number, row in enumerate(rows):
            for at in range(starts[number], starts[number + 1]):
                fresh[slots[at]] = positions[at], self.last_token[row] if ids[at] < 0 else ids[at]
        contexts = [self._context(table, length, fresh) for table, length in zip(tables, lengths, strict=True)]
        for number, (table, context) in enumerate(zip(tables, contexts, strict=True)):
            for position in range(lengths[number] - (starts[number + 1] - starts[number]), lengths[number]):
                self.slots[self._slot(table, position)] = context[: position + 1]
        drawn = [next_token(contexts[number]) for number in batch.sample_S.tolist()]
        self.last_token |= {rows[number]: token for number, token in zip(batch.sample_S.tolist(), drawn, strict=True)}
        return drawn

    def collect(self, drawn: list[int]) -> list[int]:
        return drawn

    def _slot(self, table: Sequence[int], position: int) -> int:
        block, offset = divmod(position, self.config.block_size)
        return int(table[block]) * self.config.block_size + offset

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


def digest_of(batch: StepBatch) -> bytes:
    """Hash of everything that a step is given."""
    total = hashlib.blake2b(digest_size=8)

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            total.update(repr((tuple(value.shape), value.dtype)).encode() + bits(value.cpu()).numpy().tobytes())
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                total.update(field.name.encode())
                add(getattr(value, field.name))
        else:
            total.update(repr(value).encode())

    add(batch)
    return total.digest()
