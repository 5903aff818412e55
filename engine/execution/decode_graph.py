"""The decode step as one CUDA graph: from the tokens still on the device to the tokens drawn.

A step in which every sequence runs one token always has the same shape but for their number, so it is captured once for a
few numbers of sequences (*buckets*) and replayed: no host work a layer, no gaps between kernels. The inputs of a step travel
in one copy from pinned memory.

``DecodeStep.run`` is the eager form of the replay: the same function, called instead of captured.

Shape suffixes: S = sequences of the bucket, padding included, B = blocks of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.kernels.decode_inputs import decode_inputs, decode_inputs_torch
from engine.layers.dispatch import pick
from engine.scheduling.batch import SamplingBatch, StepBatch

Step = Callable[[StepBatch], tuple[Tensor, Tensor]]
"""Runs a batch: (logits ``[S, V]``, tokens ``[S]``). Everything stays on the device."""

NUM_STAGES = 3
"""Pinned buffers in turn: one step runs, one is launched, and one is being filled."""


def buckets(max_num_seqs: int) -> list[int]:
    """Numbers of sequences to capture: fine where a step is short, coarse where padding costs little.

    >>> buckets(40)
    [1, 2, 4, 8, 16, 24, 32, 40]
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class StepInputs:
    """The inputs of a decode step for ``num_seqs`` sequences, in one buffer and as views of it.

    Padding sequences have no context: attention skips them, their token is written nowhere but to ``padding_row``.
    """

    def __init__(self, num_seqs: int, max_blocks: int, *, padding_row: int, device: torch.device, pinned: bool = False) -> None:
        self.padding_row = padding_row
        wide, narrow = 8 * num_seqs, 4 * num_seqs
        sizes = [wide, wide, wide, narrow, narrow, narrow * max_blocks]
        self.buffer = torch.zeros(sum(sizes), dtype=torch.uint8, device=device, pin_memory=pinned)
        seed, token, row, temperature, context, tables = self.buffer.split(sizes)
        self.seed_S = seed.view(torch.int64)
        self.token_S = token.view(torch.int64)
        self.row_S = row.view(torch.int64)
        self.temperature_S = temperature.view(torch.float32)
        self.context_S = context.view(torch.int32)
        self.tables_SB = tables.view(torch.int32).view(num_seqs, max_blocks)

    def fill(self, batch: StepBatch) -> None:
        """Take over a batch of decodes, and pad."""
        count = batch.num_seqs
        self.seed_S[:count] = batch.sampling.seed_R
        self.token_S[:count] = batch.token_ids_T
        self.row_S[:count] = batch.rows_S
        self.row_S[count:] = self.padding_row
        self.temperature_S[:count] = batch.sampling.temperature_R
        self.context_S[:count] = batch.context_lens_S
        self.context_S[count:] = 0
        # Columns beyond this step's are never read: no context reaches them.
        self.tables_SB[:count, : batch.block_tables_SB.shape[1]] = batch.block_tables_SB


class DecodeStep:
    """One bucket: its inputs on the device, and the graph that reads them."""

    def __init__(self, num_seqs: int, *, max_blocks: int, block_size: int, padding_row: int, device: torch.device,
                 step: Step, last_token_M: Tensor) -> None:
        self.num_seqs = num_seqs
        self.block_size = block_size
        self.max_context_len = max_blocks * block_size
        self.step = step
        self.last_token_M = last_token_M
        self.device = device
        self.inputs = StepInputs(num_seqs, max_blocks, padding_row=padding_row, device=device)
        self.cu_seqlens_S1 = torch.arange(num_seqs + 1, dtype=torch.int32, device=device)
        self.index_S = torch.arange(num_seqs, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: tuple[Tensor, Tensor] | None = None

    def run(self) -> tuple[Tensor, Tensor]:
        """The step on the inputs as they are: replayed if it was captured, else called."""
        if self.graph is None:
            return self.step(self._batch())
        self.graph.replay()
        assert self.outputs is not None, "capture sets the outputs"
        return self.outputs

    def capture(self, pool: Any) -> Any:
        """Record the step into a graph. Returns the memory pool, for the next bucket to share."""
        self.step(self._batch())  # kernels are compiled and loaded before capture
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.outputs = self.step(self._batch())
        self.graph = graph
        return graph.pool()

    def _batch(self) -> StepBatch:
        """The inputs as a batch, by operations on the device that the graph records too."""
        inputs = self.inputs
        token_S, position_S, slot_S, length_S = pick(inputs.token_S, decode_inputs, decode_inputs_torch)(
            inputs.token_S, inputs.row_S, inputs.context_S, inputs.tables_SB, self.last_token_M, self.block_size,
        )
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)
        return StepBatch(
            token_ids_T=token_S, positions_T=position_S, slots_T=slot_S, cu_seqlens_S1=self.cu_seqlens_S1,
            context_lens_S=inputs.context_S, block_tables_SB=inputs.tables_SB, rows_S=inputs.row_S, sample_S=self.index_S,
            sampling=SamplingBatch(
                temperature_R=inputs.temperature_S, top_k_R=nothing, top_p_R=nothing, seed_R=inputs.seed_S,
                position_R=length_S, banned_row_X=nothing, banned_token_X=nothing, filters=False,
            ),
            num_decodes=self.num_seqs, prefill_cu_seqlens_S1=self.cu_seqlens_S1[:1],
            max_decode_context_len=self.max_context_len, max_prefill_len=0, has_in_flight=False,
        )


class DecodeGraphs:
    """The decode step for every number of sequences up to ``max_num_seqs``.

    Args:
        step: runs a batch on the device without asking the host for anything.
        padding_row: a row of the device's state that no sequence has.
        last_token_M: that state: the last token drawn in each row. The step writes it, and the next one reads it.
    """

    def __init__(self, step: Step, *, max_num_seqs: int, max_blocks: int, block_size: int, padding_row: int,
                 last_token_M: Tensor, device: torch.device) -> None:
        self.device = device
        self.steps = [
            DecodeStep(size, max_blocks=max_blocks, block_size=block_size, padding_row=padding_row, device=device, step=step,
                       last_token_M=last_token_M)
            for size in buckets(max_num_seqs)
        ]
        on_gpu = device.type == "cuda"
        self.staged = {
            decode.num_seqs: [StepInputs(decode.num_seqs, max_blocks, padding_row=padding_row, device=torch.device("cpu"),
                                         pinned=on_gpu) for _ in range(NUM_STAGES)]
            for decode in self.steps
        }
        self.turn = 0

    @torch.inference_mode()
    def capture(self) -> None:
        """Record every bucket, the largest first: the smaller ones fit into its memory."""
        pool = None
        for decode in reversed(self.steps):
            pool = decode.capture(pool)
        for decode in self.steps:
            decode.run()  # the first replay also brings the graph to the device, which no request should wait for

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Run a batch of decodes, still on the host: (logits ``[S, V]``, tokens ``[S]``), without the padding.

        The results stand until the next run of any bucket.
        """
        decode = next(decode for decode in self.steps if decode.num_seqs >= batch.num_seqs)
        self.turn = (self.turn + 1) % NUM_STAGES
        staged = self.staged[decode.num_seqs][self.turn]
        staged.fill(batch)
        decode.inputs.buffer.copy_(staged.buffer, non_blocking=True)
        logits, tokens = decode.run()
        return logits[: batch.num_seqs], tokens[: batch.num_seqs]

    @staticmethod
    def can_run(batch: StepBatch) -> bool:
        """Whether every sequence of the batch runs one token and draws the next."""
        return batch.draws_after_every_token


REPLAY_TIMEOUT_S = 5.0
"""How long a replay may take in which ranks meet, once it is waited for: a decode step takes milliseconds. Nothing else watches
what hangs inside a graph; the driver ends the others soon after, so that the call ends within 10 s."""


class TokenReadback:
    """Brings drawn tokens home without stopping the device: a copy to pinned memory, and an event to wait for."""

    def __init__(self, tokens: Tensor) -> None:
        self.host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        self.host.copy_(tokens, non_blocking=True)
        self.done = torch.cuda.Event()
        self.done.record()

    def tolist(self) -> list[int]:
        self.done.synchronize()
        tokens: list[int] = self.host.tolist()
        return tokens
