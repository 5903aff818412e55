"""Faults that only a captured graph can have: what a replay reads, and what was baked into it. They are planted on GPUs.

``DecodeStep.run`` calls the same function where nothing was captured; what of a fault shows there too is tested there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.execution.decode_graph import DecodeGraphs, DecodeStep, StepInputs
from engine.kernels.peer_all_reduce import PeerMemory
from engine.parallel.group import ProcessTPGroup, TPGroup
from engine.scheduling.batch import StepBatch
from harness.faults.base import Patches, around, fault


@fault(layout="qwen2", tp_sizes=(1,), checks=("logits", "generation"), device="cuda")
def block_tables_filled_once(patch: Patches, tp: TPGroup) -> None:
    """A replay's block tables are filled in when a staging buffer is used first: blocks that came later are never seen."""
    filled: set[int] = set()

    @patch.around(StepInputs, "fill")
    def fill(original: Any, self: StepInputs, batch: StepBatch) -> None:
        before = self.tables_SB.clone()
        original(self, batch)
        if id(self) in filled:
            self.tables_SB.copy_(before)
        filled.add(id(self))


@fault(layout="qwen2", tp_sizes=(1,), checks=("logits", "generation"), device="cuda")
def inputs_derived_before_capture(patch: Patches, tp: TPGroup) -> None:
    """Positions and slots are worked out when a bucket warms up, and the graph reads those for ever."""
    derived: dict[int, StepBatch] = {}

    @patch.around(DecodeStep, "_batch")
    def batch(original: Any, self: DecodeStep) -> StepBatch:
        if id(self) not in derived:
            derived[id(self)] = original(self)
        return derived[id(self)]


@fault(rows=(51,), layout="qwen2", tp_sizes=(1,), checks=("logits", "generation"), device="cuda")
@around(StepInputs, "fill")
def length_baked_into_the_graph(original: Any, self: StepInputs, batch: StepBatch) -> None:
    """The contexts' length is a number of the host's when the graph is captured: a replay attends to as many tokens."""
    original(self, batch)
    self.context_S.clamp_(max=8)


@fault(rows=(52,), tp_sizes=(2,), checks=("logits", "generation"), device="cuda")
def reduce_faked_while_capturing(patch: Patches, tp: TPGroup) -> None:
    """While a graph is captured an all-reduce gives its input back, and so does every replay."""

    @patch.around(ProcessTPGroup, "_all_reduce")
    def all_reduce(original: Any, self: ProcessTPGroup, x: Tensor) -> Any:
        if torch.cuda.is_current_stream_capturing():
            return x
        return original(self, x)

    patch.replace(ProcessTPGroup, "fuses_norm", lambda original: lambda self, shape, dtype: False)


def _before_each_call(patch: Patches, change: Callable[[PeerMemory], object]) -> None:
    """``change`` this rank's view of the shared memory ahead of each call, and of each replay of a call, that uses it."""
    for name in ("_all_reduce", "_all_reduce_add_norm", "_argmax"):
        @patch.around(ProcessTPGroup, name)
        def call(original: Any, self: ProcessTPGroup, x: Tensor, *rest: Any) -> Any:
            if self.peers is not None:
                change(self.peers)
            return original(self, x, *rest)


@fault(rows=(48, 50), tp_sizes=(2,), checks=("collectives",), device="cuda")
def flags_not_waited_for(patch: Patches, tp: TPGroup) -> None:
    """Rank 1 finds all flags set already: it reads what the others have in their memory, whether they have written or not."""

    def set_all(memory: PeerMemory) -> None:
        if memory.rank == 1:
            memory.flags(1).fill_(2**62)

    def restore() -> None:
        if isinstance(tp, ProcessTPGroup) and tp.peers is not None and tp.rank == 1:
            tp.peers.flags(1).fill_(int(tp.peers.calls[0]))
            int(tp.peers.calls[0])  # before another rank sets a flag for the next call: this waits for the device

    patch.on_close(restore)
    _before_each_call(patch, set_all)


@fault(rows=(79,), tp_sizes=(2,), checks=("logits",), device="cuda")
def bucket_captured_on_one_rank_alone(patch: Patches, tp: TPGroup) -> None:
    """Rank 1 has no graph for three sequences and runs them as they are, while the others replay a padded four."""
    if tp.rank == 1:
        patch.replace(DecodeGraphs, "can_run", lambda original: staticmethod(
            lambda batch: batch.draws_after_every_token and batch.num_seqs != 3))
