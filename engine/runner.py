"""One rank's device side: the model, its cache and the state that steps hand to each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engine.batch import IN_FLIGHT, StepBatch
from engine.config import DTYPES, EngineConfig, ModelConfig
from engine.layers.attention import LayerCache, allocate_cache
from engine.layers.sampler import sample
from engine.models.registry import MODELS
from engine.parallel.group import TPGroup
from engine.parallel.sharding import HeadShard, head_shard
from engine.weights import load_weights


class Runner:
    """Loads this rank's shards, then launches steps.

    ``launch`` returns before the step has run (on a GPU) and ``collect`` waits for it. Tokens that a step draws stay on the
    device, in ``last_token_M``, a row for each running sequence, and feed the next step from there.

    Args:
        config: a resolved one (``EngineConfig.resolve``).
    """

    def __init__(self, folder: str | Path, model_config: ModelConfig, config: EngineConfig, tp: TPGroup,
                 device: torch.device) -> None:
        self.model_config = model_config
        self.config = config
        self.tp = tp
        self.device = device
        self.dtype = DTYPES[config.dtype]
        self.model = MODELS[model_config.model_type](
            model_config, tp=tp, dtype=self.dtype, device=device, attention_backend=config.attention_backend,
            max_model_len=config.max_model_len or model_config.max_position_embeddings,
        )
        self.load_report = load_weights(self.model, folder, packed=self.model.packed, tied=self.model.tied)
        self.caches: list[LayerCache] = []
        self.last_token_M = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=device)

    def make_cache(self) -> int:
        """Allocate the KV cache, of equally many blocks on every rank, and return how many.

        Raises:
            ValueError: if it can't hold one sequence of ``max_model_len``.
        """
        block_size = self.config.block_size
        assert block_size is not None, "config must be resolved"
        num_blocks = self.tp.all_reduce_min(self.config.num_kv_blocks or self._affordable_blocks())
        longest = self.config.max_model_len or 1
        if num_blocks * block_size < longest:
            raise ValueError(f"the KV cache holds num_kv_blocks={num_blocks} x block_size={block_size} tokens, fewer than "
                             f"max_model_len={longest}: lower max_model_len, or give the cache more memory")
        self.caches = allocate_cache(self.model_config.num_layers, num_blocks, self._heads, block_size,
                                     self.model_config.head_dim, dtype=self.dtype, device=self.device)
        return num_blocks

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
        raise NotImplementedError

    @torch.inference_mode()
    def launch(self, batch: StepBatch) -> Tensor:
        """Start a step. Returns the drawn tokens ``[R]`` on the device."""
        batch = batch.to(self.device)
        hidden_TE = self.forward(batch)
        last_R = batch.cu_seqlens_S1[batch.sample_S + 1].long() - 1
        token_R = sample(self.model.logits(hidden_TE[last_R]), batch.sampling)
        self.last_token_M[batch.rows_S[batch.sample_S]] = token_R
        return token_R

    def collect(self, token_R: Tensor) -> list[int]:
        """Wait for a step and bring its tokens home."""
        tokens: list[int] = token_R.tolist()
        return tokens

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> Tensor:
        """Hidden states ``[T, E]`` of the step's tokens; their keys and values go to the cache."""
        if batch.has_in_flight:
            # A token in flight is the last, and only, one of its sequence in this step.
            last_S = batch.cu_seqlens_S1[1:].long() - 1
            known_S = batch.token_ids_T[last_S]
            fed_S = torch.where(known_S == IN_FLIGHT, self.last_token_M[batch.rows_S], known_S)
            batch = replace(batch, token_ids_T=batch.token_ids_T.index_copy(0, last_S, fed_S))
        hidden_TE: Tensor = self.model(batch, self.caches)
        return hidden_TE
