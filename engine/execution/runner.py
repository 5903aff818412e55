"""One rank's device side: the model, its cache and the state that steps hand to each other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint.weights import load_weights
from engine.config import DTYPES, EngineConfig, ModelConfig
from engine.execution.decode_graph import REPLAY_TIMEOUT_S, DecodeGraphs, TokenReadback
from engine.layers.attention import allocate_cache
from engine.layers.attention_layout import AttentionLayout, LayerCache
from engine.layers.sampler import logprobs_of, prompt_logprobs_of, sample, sample_shards
from engine.models.parts import ORDINARY, Parts
from engine.models.registry import family_of
from engine.parallel.group import TPGroup
from engine.parallel.sharding import HeadShard, head_shard
from engine.scheduling.batch import MAX_SCORED_ROWS, ScoredRows, StepBatch, profiling_batch
from engine.scheduling.sequence import IN_FLIGHT, PromptLogprobs, TokenLogprobs

_HANGS = "waits for a captured decode step that its device does not finish: a rank that takes part in it did not come"


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """What a step drew, on its way to the host."""

    token_R: Tensor | TokenReadback
    logprobs: tuple[Tensor | TokenReadback, ...]
    """:class:`LogprobTensors` of the rows that want them; empty if none does"""
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    """Of the chunks with prompt tokens to score, in their order. On the host already."""
    meets_in_replay: bool = False
    """Whether it is a replay in which ranks meet: the host that waits for it waits for all of them."""


def parts_of(config: EngineConfig, device: torch.device) -> Parts:
    """What the model is built of."""
    if not config.tp_invariant:
        return ORDINARY
    if device.type == "cuda":
        from engine.layers.invariant_gpu import INVARIANT_GPU

        return INVARIANT_GPU
    from engine.layers.invariant import INVARIANT

    return INVARIANT


def step_sizes(max_num_batched_tokens: int, tp_size: int) -> list[int]:
    """Numbers of tokens whose steps, run at the start, compile all that steps of up to the first need.

    On one rank no kernel depends on how many tokens a prefill has; all-reduces have variants by powers of two.
    """
    smaller = [2**power for power in range(7, 32) if 2**power < max_num_batched_tokens] if tp_size > 1 else []
    return [max_num_batched_tokens, *reversed(smaller)]


class Runner:
    """Loads this rank's shards, then launches steps: decode steps as CUDA graphs where there are any.

    ``launch`` returns before the step has run (on a GPU) and ``collect`` waits for it. Tokens that a step draws stay on the
    device, in ``last_token_M``, a row for each running sequence, and feed the next step from there.

    Args:
        config: a resolved one (``EngineConfig.resolve``).
        at_most: bounds a wait for the device (``RankContext.at_most``); None: nothing does.
    """

    def __init__(self, folder: str | Path, model_config: ModelConfig, config: EngineConfig, tp: TPGroup,
                 device: torch.device, *, at_most: Callable[[float, str], AbstractContextManager[None]] | None = None) -> None:
        self.at_most = at_most or (lambda seconds, what: nullcontext())
        self.model_config = model_config
        self.config = config
        self.tp = tp
        self.device = device
        self.dtype = DTYPES[config.dtype]
        assert config.block_size is not None, "config must be resolved"
        layout = AttentionLayout(heads=self._heads, head_dim=model_config.head_dim, block_size=config.block_size,
                                 dtype=self.dtype, device=device)
        self.parts = parts_of(config, device)
        self.attention_backend = self.parts.backend(config.attention_backend, layout)
        self.family = family_of(model_config.model_type)
        self.model = self.family.model(
            model_config, tp=tp, dtype=self.dtype, device=device, backend=self.attention_backend, parts=self.parts,
            max_model_len=config.max_model_len or model_config.max_position_embeddings,
        )
        self.load_report = load_weights(self.model, folder, modules=self.family.modules, tied=self.model.tied)
        self.caches: list[LayerCache] = []
        self.graphs: DecodeGraphs | None = None
        # One row more than sequences: the decode graphs' padding writes there.
        self.last_token_M = torch.zeros(config.max_num_seqs + 1, dtype=torch.int64, device=device)

    def make_cache(self) -> int:
        """Allocate the KV cache, of equally many blocks on every rank, and return how many.

        Raises:
            ValueError: if it can't hold one sequence of ``max_model_len``.
        """
        block_size = self.config.block_size
        assert block_size is not None, "config must be resolved"
        if self.config.num_kv_blocks is None:
            num_blocks = self._affordable_blocks()
        else:
            num_blocks = self.config.num_kv_blocks
            if self.device.type == "cuda":
                # What steps run is compiled and loaded here, as where memory is looked at, and not in the first request.
                self._run_largest_step()
        num_blocks = self.tp.all_reduce_min(num_blocks)
        longest = self.config.max_model_len or 1
        if num_blocks * block_size < longest:
            raise ValueError(f"the KV cache holds num_kv_blocks={num_blocks} x block_size={block_size} tokens, fewer than "
                             f"max_model_len={longest}: lower max_model_len, or give the cache more memory")
        self.caches = self._allocate(num_blocks)
        if self.captures_graphs:
            self.graphs = self._make_graphs(num_blocks)
            self.graphs.capture()
        return num_blocks

    @property
    def captures_graphs(self) -> bool:
        """Whether decode steps become graphs. What asks the host can't: not all collectives and attentions go without."""
        return (self.device.type == "cuda" and not self.config.enforce_eager and self.tp.capturable
                and self.attention_backend.capturable)

    def _make_graphs(self, num_blocks: int) -> DecodeGraphs:
        assert self.config.block_size is not None, "config must be resolved"
        longest = self.config.max_model_len or self.model_config.max_position_embeddings
        return DecodeGraphs(self._step, max_num_seqs=self.config.max_num_seqs, block_size=self.config.block_size,
                            max_blocks=min(num_blocks, -(-longest // self.config.block_size)),
                            padding_row=self.config.max_num_seqs, last_token_M=self.last_token_M, device=self.device)

    def _allocate(self, num_blocks: int) -> list[LayerCache]:
        assert self.config.block_size is not None, "config must be resolved"
        return allocate_cache(self.model_config.num_layers, num_blocks, self._heads, self.config.block_size,
                              self.model_config.head_dim, dtype=self.dtype, device=self.device)

    @property
    def _heads(self) -> HeadShard:
        return head_shard(self.model_config.num_q_heads, self.model_config.num_kv_heads, tp_rank=self.tp.rank,
                          tp_size=self.tp.size)

    def _affordable_blocks(self) -> int:
        config, model = self.config, self.model_config
        assert config.block_size is not None, "config must be resolved"
        bytes_per_block = (2 * model.num_layers * self._heads.local_num_kv_heads * config.block_size * model.head_dim
                           * self.dtype.itemsize)
        longest = config.max_model_len or model.max_position_embeddings
        useful = config.max_num_seqs * -(-longest // config.block_size)
        if self.device.type == "cpu":
            return min(useful, int(config.kv_cache_gib * 2**30) // bytes_per_block)
        return min(useful, self._free_device_bytes() // bytes_per_block)

    def _free_device_bytes(self) -> int:
        """What ``gpu_memory_utilization`` leaves this rank for its cache, after the largest step that can come."""
        torch.cuda.reset_peak_memory_stats(self.device)  # loading had its own peak
        self._run_largest_step()
        torch.cuda.synchronize(self.device)
        # Nobody may allocate its cache before all have looked: thread ranks share one device.
        torch.cuda.empty_cache()
        self.tp.barrier()
        free, total = torch.cuda.mem_get_info(self.device)
        num_sharing = self.tp.size if self.tp.fabric == "threads" else 1
        peak = torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)
        left = int(free - (1 - self.config.gpu_memory_utilization) * total) - peak
        self.tp.barrier()
        if left <= 0:
            raise ValueError(f"no memory is left for the KV cache: free={free / 2**30:.1f} GiB, activations need "
                             f"{peak / 2**30:.1f} GiB and gpu_memory_utilization={self.config.gpu_memory_utilization} keeps "
                             f"{(1 - self.config.gpu_memory_utilization) * total / 2**30:.1f} GiB: raise it, or use more GPUs")
        return left // num_sharing

    def _run_largest_step(self) -> None:
        """One step of ``max_num_batched_tokens``, to see what activations take. Its cache is one block that nobody reads.

        Several ranks run smaller ones behind it, so that no request waits until their all-reduces are compiled.
        """
        assert self.config.max_num_batched_tokens is not None, "config must be resolved"
        self.caches = self._allocate(1)
        longest = self.config.max_model_len or self.model_config.max_position_embeddings
        for num_tokens in step_sizes(self.config.max_num_batched_tokens, self.tp.size):
            length = min(longest, num_tokens)
            num_seqs = max(1, min(self.config.max_num_seqs, num_tokens // length))
            self.launch(profiling_batch(num_seqs, length))
        self.caches = []

    @torch.inference_mode()
    def launch(self, batch: StepBatch) -> SamplerOutput:
        """Start a step on a batch that is still on the host. ``collect`` brings the drawn tokens ``[R]`` home."""
        replays = self.graphs is not None and self.graphs.can_run(batch)
        prompt_logprobs: tuple[PromptLogprobs, ...] = ()
        if replays:
            assert not batch.scored, "a replay draws after every token: no prompt token follows one"
            newest_M = self.last_token_M.clone() if batch.sampling.processing is not None else self.last_token_M
            logits, token_R = self._replay(batch)
            if batch.sampling.needs_whole_logits:
                # The graph draws from all there is; these rows are drawn again from what they may take.
                logits = self.model.lm_head.whole(logits)
                token_R = self._draw(logits, batch.to(self.device), newest_M)
        else:
            on_device = batch.to(self.device)
            hidden_TE = self.forward(on_device)
            logits, token_R = self._logits_and_tokens(hidden_TE, on_device)
            prompt_logprobs = tuple(self._score(hidden_TE, rows) for rows in on_device.scored)
        row_L = batch.sampling.logprob_row_L
        logprobs = () if row_L is None else logprobs_of(
            logits, token_R, row_L.to(self.device), batch.sampling.num_logprobs, **self.parts.drawing)
        return SamplerOutput(self._readback(token_R), tuple(map(self._readback, logprobs)), prompt_logprobs,
                             replays and self.tp.size > 1)

    def collect(self, sampled: SamplerOutput) -> list[int]:
        """Wait for a step and bring its tokens home."""
        with self.at_most(REPLAY_TIMEOUT_S, _HANGS) if sampled.meets_in_replay else nullcontext():
            tokens: list[int] = sampled.token_R.tolist()
        return tokens

    def collect_logprobs(self, sampled: SamplerOutput) -> list[TokenLogprobs]:
        """Log-probabilities of a step, one for each row that wants them."""
        return [TokenLogprobs(logprob, rank, tuple(zip(*top, strict=True)))
                for logprob, rank, *top in zip(*(column.tolist() for column in sampled.logprobs), strict=True)]

    @cached_property
    def not_finite_weight(self) -> str | None:
        """A weight of this rank's that holds a NaN or an infinity, if one does. Looks at all of them: for errors."""
        for name, weight in self.model.named_parameters():
            if weight.numel() and not all(bound.isfinite() for bound in weight.detach().aminmax()):
                return name
        return None

    def _readback(self, x: Tensor) -> Tensor | TokenReadback:
        return TokenReadback(x) if self.device.type == "cuda" else x

    @torch.inference_mode()
    def logits(self, batch: StepBatch) -> Tensor:
        """Logits after every token of a step that is still on the host, ``[T, V]``: for checks, teacher-forced.

        A step of decodes runs as in generation, through its graph if there is one. The result stands until the next step.
        """
        if self.graphs is not None and self.graphs.can_run(batch):
            logits_RL, _ = self._replay(batch)
            return self.model.lm_head.whole(logits_RL)
        return self.model.logits(self.forward(batch.to(self.device)))

    def _replay(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        assert self.graphs is not None, "there are no graphs to replay"
        # One entry for the whole step: the collectives inside a graph are not seen by the host.
        self.tp.log.enter(f"decode graph for {batch.num_seqs} sequences")
        results = self.graphs.run(batch)
        self.tp.log.finish()
        return results

    def _step(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Logits and drawn tokens ``[R]`` of a batch on the device. Asks the host nothing: graphs capture it.

        The logits are this rank's, ``[R, L]``, or whole where the batch needs them so.
        """
        return self._logits_and_tokens(self.forward(batch), batch)

    def _logits_and_tokens(self, hidden_RE: Tensor, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Of a step's hidden states, those after every token."""
        if not batch.draws_after_every_token:
            hidden_RE = hidden_RE[batch.cu_seqlens_S1[batch.sample_S + 1].long() - 1]
        head = self.model.lm_head
        logits = head.shard_logits(hidden_RE)
        if batch.sampling.needs_whole_logits:
            logits = head.whole(logits)
        return logits, self._draw(logits, batch, self.last_token_M)

    def _score(self, hidden_TE: Tensor, rows: ScoredRows) -> PromptLogprobs:
        """Log-probabilities of prompt tokens, brought home at once."""
        parts = []
        for row_P, token_P in zip(rows.row_P.split(MAX_SCORED_ROWS), rows.token_P.split(MAX_SCORED_ROWS), strict=True):
            logits_PV = self.model.logits(hidden_TE[row_P])
            parts.append([column.cpu().numpy() for column in
                          prompt_logprobs_of(logits_PV, token_P, rows.num_top, **self.parts.drawing)])
        return PromptLogprobs(*map(np.concatenate, zip(*parts, strict=True)))

    def _draw(self, logits: Tensor, batch: StepBatch, newest_M: Tensor) -> Tensor:
        """Draw, and keep what was drawn. ``newest_M``: what was drawn in each row before."""
        rows_R = batch.rows_S if batch.draws_after_every_token else batch.rows_S[batch.sample_S]
        if self.tp.size == 1 or batch.sampling.needs_whole_logits:
            newest_R = None if batch.sampling.processing is None else newest_M[rows_R]
            token_R = sample(logits, batch.sampling, newest_R, **self.parts.drawing)
        else:
            token_R = sample_shards(logits, batch.sampling, self.model.lm_head.shard, self.tp, **self.parts.drawing)
        self.last_token_M[rows_R] = token_R
        return token_R

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> Tensor:
        """Hidden states ``[T, E]`` of the step's tokens; their keys and values go to the cache."""
        if batch.has_in_flight:
            # A token in flight is the last, and only, one of its sequence in this step.
            last_S = batch.cu_seqlens_S1[1:].long() - 1
            known_S = batch.token_ids_T[last_S]
            # Where none could be drawn, token 0 runs, for nobody.
            fed_S = torch.where(known_S == IN_FLIGHT, self.last_token_M[batch.rows_S].clamp(min=0), known_S)
            batch = replace(batch, token_ids_T=batch.token_ids_T.index_copy(0, last_S, fed_S))
        hidden_TE: Tensor = self.model(batch, self.caches)
        return hidden_TE
