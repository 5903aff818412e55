"""The paged KV cache's bookkeeping: blocks, reference counts and the prefix cache (PagedAttention, Kwon et al. 2023).

No tensor lives here: a block is a number. Every rank runs the same bookkeeping on the same requests, so block tables need
not travel; for that, nothing here depends on a clock, on memory or on Python's per-process string hash.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict

from engine.scheduling.sequence import Sequence

ROOT_HASH = b""


def hash_block(parent: bytes, token_ids: list[int]) -> bytes:
    """Hash of a block's tokens and, through ``parent``, of all tokens before it."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), key=parent, digest_size=16).digest()


class BlockManager:
    """Hands out ``num_blocks`` blocks of ``block_size`` tokens each.

    A block is *held* by one sequence or by several with the same prefix, or *free*. Free blocks keep their content until they
    are handed out again, least recently freed first, so a later request with the same prefix may take them back.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks={num_blocks} and block_size={block_size} must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.ref_counts = [0] * num_blocks
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.block_of_hash: dict[bytes, int] = {}
        self.hash_of_block: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self.free)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def cached_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the sequence's first tokens already, as far as their logits are not needed (``num_sharable``)."""
        if not self.enable_prefix_caching:
            return []
        self._hash_known_blocks(sequence)
        blocks = []
        for block_hash in sequence.block_hashes[: sequence.num_sharable // self.block_size]:
            block = self.block_of_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def can_hold(self, sequence: Sequence, num_tokens: int, shared: list[int] | None = None) -> bool:
        """Whether there is room for the sequence's first ``num_tokens`` tokens, ``shared`` blocks being taken over."""
        if not shared and num_tokens <= len(sequence.blocks) * self.block_size:
            return True  # nearly always, and asked for each sequence and step
        shared = shared or []
        num_new = self.num_blocks_for(num_tokens) - len(sequence.blocks) - len(shared)
        num_revived = sum(not self.ref_counts[block] for block in shared)
        return num_new + num_revived <= self.num_free

    def take_prefix(self, sequence: Sequence, blocks: list[int]) -> None:
        """Share ``blocks`` of the prefix cache with a sequence that holds none yet."""
        assert not sequence.blocks, f"request_id={sequence.request.request_id} already holds {sequence.blocks}"
        for block in blocks:
            self.free.pop(block, None)
            self.ref_counts[block] += 1
        sequence.blocks.extend(blocks)
        sequence.num_registered = len(blocks)

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Give the sequence blocks for its first ``num_tokens`` tokens. ``can_hold`` must have said yes."""
        for _ in range(self.num_blocks_for(num_tokens) - len(sequence.blocks)):
            block, _ = self.free.popitem(last=False)
            self._forget(block)
            self.ref_counts[block] = 1
            sequence.blocks.append(block)

    def register(self, sequence: Sequence) -> None:
        """Offer the sequence's full, computed blocks to later requests with the same prefix.

        May be called before the step that computes them has run: steps run in order, and within a step every layer writes
        all keys and values before any of them is read.
        """
        if not self.enable_prefix_caching:
            return
        num_full = min(sequence.num_computed, len(sequence.token_ids)) // self.block_size
        if sequence.num_registered >= num_full:
            return
        self._hash_known_blocks(sequence)
        for index in range(sequence.num_registered, num_full):
            block_hash, block = sequence.block_hashes[index], sequence.blocks[index]
            # A second copy of the same content stays anonymous.
            if block_hash not in self.block_of_hash and block not in self.hash_of_block:
                self.block_of_hash[block_hash] = block
                self.hash_of_block[block] = block_hash
        sequence.num_registered = num_full

    def forget(self, sequence: Sequence) -> None:
        """Offer the sequence's blocks to nobody any more: what they hold is not to be trusted."""
        for block in sequence.blocks:
            self._forget(block)

    def release(self, sequence: Sequence) -> None:
        """Take back all blocks. The last ones are handed out again first: a prefix is worth more than its tail."""
        for block in reversed(sequence.blocks):
            self.ref_counts[block] -= 1
            if not self.ref_counts[block]:
                self.free[block] = None
        sequence.blocks.clear()
        sequence.num_registered = 0

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless every block is in exactly one place and the prefix cache agrees with itself."""
        for block, ref_count in enumerate(self.ref_counts):
            assert ref_count >= 0, f"block {block} has ref_count={ref_count}"
            assert (ref_count == 0) == (block in self.free), f"block {block}: ref_count={ref_count}, free={block in self.free}"
        assert {b: h for h, b in self.block_of_hash.items()} == self.hash_of_block, "prefix cache maps disagree"

    def _hash_known_blocks(self, sequence: Sequence) -> None:
        hashes, size = sequence.block_hashes, self.block_size
        for index in range(len(hashes), len(sequence.token_ids) // size):
            parent = hashes[-1] if hashes else ROOT_HASH
            hashes.append(hash_block(parent, sequence.token_ids[index * size : (index + 1) * size]))

    def _forget(self, block: int) -> None:
        block_hash = self.hash_of_block.pop(block, None)
        if block_hash is not None:
            del self.block_of_hash[block_hash]
