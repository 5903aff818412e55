"""Two streams token by token: what both scored, and what is known of each place.

Shape suffixes: N = tokens that both sides scored, in the order of A's sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.verdict.streams import Scored, Stream, StreamError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

PREFILL, DECODE = 0, 1
UNKNOWN = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The N tokens that were compared, an array each.

    a, b         log-probabilities
    sequence     number of the sequence in A
    position     place in it
    length       of the sequence
    token_id     the token itself
    phase        DECODE where one side at least came to it in a decode step, else PREFILL
    batch_size   the larger of both sides'; UNKNOWN
    chunk        place within the prefill chunk of the side that has chunks; UNKNOWN
    block        place within a block of the cache; UNKNOWN
    repeated     1 within a prefix that an earlier sequence has too, so that a prefix cache may serve it
    context      equal for tokens that are the same and follow the same tokens: their differences are one, told again
    rounding     of a reference on one side: how far off rounding puts the token; else zeros
    flip         margin that a different most probable token had to overcome, the smaller of both sides'; NaN where both agree, or
                 nobody knows
    """

    a: Floats
    b: Floats
    sequence: Integers
    position: Integers
    length: Integers
    token_id: Integers
    phase: Integers
    batch_size: Integers
    chunk: Integers
    block: Integers
    repeated: Integers
    context: Integers
    rounding: Floats
    flip: Floats
    has_top: bool
    left_out: tuple[str, ...] = ()
    """What was not compared, and why."""

    def __len__(self) -> int:
        return len(self.a)

    @property
    def key(self) -> Integers:
        """``[N]``: which of A's tokens it is."""
        return self.sequence << 32 | self.position

    @property
    def difference(self) -> Floats:
        return self.a - self.b


def align(a: Stream, b: Stream) -> Tokens:
    """The tokens that both streams scored.

    Sequences are compared whole where both sides have the same tokens; where both generated from the same prompt, up to the first
    different token, since after it they are about different texts.

    Raises:
        StreamError: if they have no token in common.
    """
    by_tokens = {sequence.token_ids: sequence for sequence in b.sequences}
    by_prompt = {sequence.prompt: sequence for sequence in b.sequences if sequence.decoded_from is not None}
    pairs: list[tuple[int, Scored, Scored, int]] = []
    only_a = cut = 0
    for number, sequence in enumerate(a.sequences):
        if (other := by_tokens.pop(sequence.token_ids, None)) is not None:
            pairs.append((number, sequence, other, len(sequence.token_ids)))
        elif sequence.decoded_from is not None and (other := by_prompt.get(sequence.prompt)) is not None:
            by_tokens.pop(other.token_ids, None)
            # The first token in which they differ is a choice, not a number that both gave.
            pairs.append((number, sequence, other, _common(sequence.token_ids, other.token_ids)))
            cut += 1
        else:
            only_a += 1
    columns: list[dict[str, Any]] = []
    prefixes: set[tuple[int, ...]] = set()
    block_size = a.info.block_size or b.info.block_size
    for number, one, other, length in pairs:
        columns.append(_columns(number, one, other, length, block_size, prefixes))
    names = list(columns[0]) if columns else []
    joined = {name: np.concatenate([column[name] for column in columns]) for name in names}
    if not columns or not len(joined["a"]):
        raise StreamError(f"{a.info.source} ({len(a.sequences)} sequences) and {b.info.source} ({len(b.sequences)}) have no "
                          "scored token in common: both must score the same token ids. Other tokenizers, or other prompts?")
    left_out = [f"{count} sequences are in {who} alone" for count, who in ((only_a, "A"), (len(by_tokens), "B")) if count]
    if cut:
        left_out.append(f"{cut} sequences were generated on both sides, and are compared up to their first different token")
    return Tokens(**joined, has_top=any(one.top and other.top for _, one, other, _ in pairs), left_out=tuple(left_out))


def select(tokens: Tokens, keep: NDArray[np.bool_]) -> Tokens:
    """Those tokens alone."""
    names = [name for name in Tokens.__slots__ if name not in ("has_top", "left_out")]
    return replace(tokens, **{name: getattr(tokens, name)[keep] for name in names})


def _columns(number: int, one: Scored, other: Scored, length: int, block_size: int | None,
             prefixes: set[tuple[int, ...]]) -> dict[str, Any]:
    kept = [at for at in range(length) if one.logprobs[at] is not None and other.logprobs[at] is not None]
    position = np.array(kept, dtype=np.int64)
    size = len(kept)

    def constant(value: int | None) -> Integers:
        return np.full(size, UNKNOWN if value is None else value, dtype=np.int64)

    starts = [side.decoded_from for side in (one, other) if side.decoded_from is not None]
    # The first generated token was told by the prefill's last row.
    phase = (position > min(starts)) if starts else np.zeros(size, dtype=bool)
    chunks = [side.chunk for side in (one, other) if side.chunk]
    sizes = [side.batch_size for side in (one, other) if side.batch_size is not None]
    # The logits of a token are computed where the token before it stands.
    before = position - 1
    shared = _shared_prefix(one.token_ids, prefixes)
    rounding = one.rounding or other.rounding
    return {
        "a": np.array([one.logprobs[at] for at in kept], dtype=np.float64),
        "b": np.array([other.logprobs[at] for at in kept], dtype=np.float64),
        "sequence": constant(number), "position": position, "length": constant(len(one.token_ids)),
        "token_id": np.array([one.token_ids[at] for at in kept], dtype=np.int64),
        "phase": phase.astype(np.int64), "batch_size": constant(max(sizes) if sizes else None),
        "chunk": before % min(chunks) if chunks else constant(None),
        "block": before % block_size if block_size else constant(None),
        "repeated": (position < shared).astype(np.int64),
        "context": _contexts(one.token_ids)[kept],
        "rounding": np.array([rounding[at] for at in kept]) if rounding else np.zeros(size),
        "flip": np.array([_flip(one, other, at) for at in kept], dtype=np.float64),
    }


def _contexts(token_ids: Sequence[int]) -> Integers:
    """Of each token a number that is another one wherever it or a token before it is."""
    return np.array(list(accumulate(token_ids, lambda before, token_id: hash((before, token_id)), initial=0))[1:], dtype=np.int64)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((at for at, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other)))


def _shared_prefix(token_ids: tuple[int, ...], prefixes: set[tuple[int, ...]], step: int = 4) -> int:
    """Tokens, in steps of four, that an earlier sequence begins with too; notes this one's."""
    shared = 0
    for end in range(step, len(token_ids) + 1, step):
        if token_ids[:end] in prefixes:
            shared = end
        prefixes.add(token_ids[:end])
    return shared


def _flip(one: Scored, other: Scored, at: int) -> float:
    if not one.top or not other.top or len(one.top[at]) < 2 or len(other.top[at]) < 2:
        return float("nan")
    (best_a, margin_a), (best_b, margin_b) = (_best(side.top[at]) for side in (one, other))
    return float("nan") if best_a == best_b else min(margin_a, margin_b)


def _best(top: dict[int, float]) -> tuple[int, float]:
    """The most probable token, and how far the next one is behind it."""
    (token_id, first), (_, second) = sorted(top.items(), key=lambda item: (-item[1], item[0]))[:2]
    return token_id, first - second
