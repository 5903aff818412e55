"""Who owns which indices: integers in, ranges out. No tensor, no process group.

Every rule by which a model is cut over ranks stands here and nowhere else in the engine:

* *even split*: contiguous, as even as it gets, the first ranks take one more;
* *attention heads*: query heads are split evenly; a rank holds each KV head that one of its query heads uses, so a KV head
  may live on two ranks at any tp_size, and the local query-to-KV relation is a map, not a ratio;
* *vocabulary*: padded to equal shards, because its all-gather needs equal shapes;
* *leaves*, for TP invariance alone: an even split of pieces whose width depends on no rank, the last one shorter if it must.
"""

from __future__ import annotations

from dataclasses import dataclass


def divide(total: int, parts: int, *, what: str = "total") -> int:
    """``total / parts``, which must come out even.

    >>> divide(12, 4)
    3

    Raises:
        ValueError: if it does not, naming both numbers.
    """
    if parts < 1 or total % parts:
        raise ValueError(f"{what}={total} does not split evenly into parts={parts}")
    return total // parts


def check_rank(tp_rank: int, tp_size: int) -> None:
    """Raise ``ValueError`` unless ``0 <= tp_rank < tp_size``."""
    if not 0 <= tp_rank < tp_size:
        raise ValueError(f"tp_rank={tp_rank} is outside tp_size={tp_size}: ranks count from 0")


def even_range(total: int, *, tp_rank: int, tp_size: int, what: str = "size") -> range:
    """Indices of ``total`` that belong to ``tp_rank``: contiguous, the first ranks take one more.

    >>> [list(even_range(5, tp_rank=r, tp_size=3)) for r in range(3)]
    [[0, 1], [2, 3], [4]]

    Raises:
        ValueError: if some rank would own nothing.
    """
    check_rank(tp_rank, tp_size)
    if total < tp_size:
        raise ValueError(f"{what}={total} can't be split over tp_size={tp_size}: every rank needs at least one")
    share, extra = divmod(total, tp_size)
    start = tp_rank * share + min(tp_rank, extra)
    return range(start, start + share + (tp_rank < extra))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShard:
    """The attention heads of one rank, numbered as in the whole model."""

    q_heads: range
    kv_heads: range
    kv_of_q: tuple[int, ...]
    """Local KV head of each local query head."""

    @property
    def local_num_q_heads(self) -> int:
        return len(self.q_heads)

    @property
    def local_num_kv_heads(self) -> int:
        return len(self.kv_heads)

    @property
    def q_starts(self) -> tuple[int, ...]:
        """First local query head of each local KV head."""
        return tuple(self.kv_of_q.index(kv_head) for kv_head in range(len(self.kv_heads)))

    @property
    def q_counts(self) -> tuple[int, ...]:
        """Number of local query heads of each local KV head."""
        return tuple(self.kv_of_q.count(kv_head) for kv_head in range(len(self.kv_heads)))

    @property
    def is_even(self) -> bool:
        """Every local KV head serves equally many local query heads (what most attention kernels ask for)."""
        return len(set(self.q_counts)) == 1


def query_head_range(num_q_heads: int, *, tp_rank: int, tp_size: int) -> range:
    """Query heads of ``tp_rank``.

    >>> [list(query_head_range(9, tp_rank=r, tp_size=4)) for r in range(4)]
    [[0, 1, 2], [3, 4], [5, 6], [7, 8]]
    """
    return even_range(num_q_heads, tp_rank=tp_rank, tp_size=tp_size, what="num_q_heads")


def head_shard(num_q_heads: int, num_kv_heads: int, *, tp_rank: int, tp_size: int) -> HeadShard:
    """Query heads of ``tp_rank`` and the KV heads that they use.

    >>> shard = head_shard(9, 3, tp_rank=1, tp_size=2)
    >>> shard.q_heads, shard.kv_heads, shard.kv_of_q
    (range(5, 9), range(1, 3), (0, 1, 1, 1))

    Raises:
        ValueError: if the query heads do not group evenly over the KV heads, or are fewer than the ranks.
    """
    group = divide(num_q_heads, num_kv_heads, what="num_q_heads (per num_kv_heads)")
    q_heads = query_head_range(num_q_heads, tp_rank=tp_rank, tp_size=tp_size)
    kv_heads = range(q_heads[0] // group, q_heads[-1] // group + 1)
    kv_of_q = tuple(q_head // group - kv_heads.start for q_head in q_heads)
    return HeadShard(q_heads=q_heads, kv_heads=kv_heads, kv_of_q=kv_of_q)


def scale_range(heads: range, width: int) -> range:
    """The rows that ``heads`` span when each head is ``width`` rows.

    >>> scale_range(range(2, 4), 64)
    range(128, 256)
    """
    return range(heads.start * width, heads.stop * width)


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabShard:
    """Vocabulary rows of one rank. The last ranks may hold padding, even nothing else."""

    ids: range
    """Token ids whose rows this rank owns."""
    local_size: int
    """Rows of the shard, padding included: the same on every rank."""


def vocab_shard(vocab_size: int, *, tp_rank: int, tp_size: int) -> VocabShard:
    """Rows of ``tp_rank`` when the vocabulary is padded to ``tp_size`` equal shards.

    >>> vocab_shard(10, tp_rank=2, tp_size=3)
    VocabShard(ids=range(8, 10), local_size=4)

    Raises:
        ValueError: if there are fewer tokens than ranks.
    """
    check_rank(tp_rank, tp_size)
    if vocab_size < tp_size:
        raise ValueError(f"vocab_size={vocab_size} can't be split over tp_size={tp_size}: every shard needs a row")
    local_size = -(-vocab_size // tp_size)
    start = min(tp_rank * local_size, vocab_size)
    return VocabShard(ids=range(start, min(start + local_size, vocab_size)), local_size=local_size)


MAX_LEAF = 128


def leaf_width(total: int, *, num_q_heads: int) -> int:
    """Width of the pieces, the same at every tp_size: a power of two that leaves each of up to ``num_q_heads`` ranks one.

    >>> leaf_width(1536, num_q_heads=9), leaf_width(100, num_q_heads=8)
    (128, 8)
    """
    width = MAX_LEAF
    while width > 1 and -(-total // width) < num_q_heads:
        width //= 2
    return width


def leaf_range(total: int, leaf: int, *, tp_rank: int, tp_size: int, what: str = "size") -> range:
    """Indices of ``total`` that belong to ``tp_rank``, cut between leaves only.

    >>> [leaf_range(100, 8, tp_rank=r, tp_size=3) for r in range(3)]
    [range(0, 40), range(40, 72), range(72, 100)]
    """
    leaves = even_range(-(-total // leaf), tp_rank=tp_rank, tp_size=tp_size, what=f"leaves of {what}")
    return range(leaves.start * leaf, min(leaves.stop * leaf, total))
