"""Faults at the two ends of the vocabulary's cut: embedding and LM head, borders and padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import engine.execution.runner as runner_module
import engine.parallel.embedding as embedding_module
from engine.parallel.embedding import ParallelLMHead, VocabParallelEmbedding
from engine.parallel.group import TPGroup
from engine.parallel.sharding import VocabShard
from engine.scheduling.batch import SamplingBatch
from harness.faults.base import Patches, fault, instead
from harness.faults.collectives import EMBEDDING


@fault(rows=(3, 62), layout="llama-odd", checks=("weights", "layers", "logits"), module=EMBEDDING, effect="lost")
@instead(embedding_module, "vocab_shard")
def last_tokens_on_no_rank(vocab_size: int, *, tp_rank: int, tp_size: int) -> VocabShard:
    """Every rank gets vocab_size // tp_size rows, and the rest is nobody's."""
    size = vocab_size // tp_size
    return VocabShard(ids=range(tp_rank * size, (tp_rank + 1) * size), local_size=size)


@fault(rows=(62,), checks=("layers", "logits"), module=EMBEDDING, effect="lost")
@instead(VocabParallelEmbedding, "forward")
def border_token_on_no_rank(self: VocabParallelEmbedding, token_ids_T: Tensor) -> Tensor:
    """The lookup takes a rank's first token to be the last of the rank before, which does not have it."""
    ids = self.shard.ids
    is_mine_T = (token_ids_T > ids.start) & (token_ids_T < ids.stop) | (token_ids_T == 0) & (self.tp.rank == 0)
    row_T = (token_ids_T - ids.start).where(is_mine_T, 0)
    return self.tp.all_reduce(F.embedding(row_T, self.weight).masked_fill_(~is_mine_T.unsqueeze(-1), 0.0))


@fault(checks=("layers", "logits"), module=EMBEDDING)
@instead(VocabParallelEmbedding, "forward")
def foreign_tokens_not_masked(self: VocabParallelEmbedding, token_ids_T: Tensor) -> Tensor:
    """For tokens of other ranks every rank adds its own first row."""
    ids = self.shard.ids
    is_mine_T = (token_ids_T >= ids.start) & (token_ids_T < ids.stop)
    return self.tp.all_reduce(F.embedding((token_ids_T - ids.start).where(is_mine_T, 0), self.weight))


@fault(rows=(59,), checks=("layers", "logits", "generation"), module="lm_head", effect="shape")
def padding_not_cut(patch: Patches, tp: TPGroup) -> None:
    """The logits keep the columns that pad the vocabulary to equal shards, gathered or not."""

    def whole(self: ParallelLMHead, logits_RL: Tensor) -> Tensor:
        return self.tp.all_gather(logits_RL)

    patch.replace(ParallelLMHead, "whole", lambda original: whole)
    patch.replace(runner_module, "sample_shards", _with_padding)


def _with_padding(original: Any) -> Any:
    def sample_shards(logits_RL: Tensor, sampling: SamplingBatch, shard: VocabShard, tp: TPGroup) -> Any:
        ids = range(shard.ids.start, shard.ids.start + shard.local_size)
        return original(logits_RL, sampling, replace(shard, ids=ids), tp)

    return sample_shards


@fault(rows=(60,), layout="small-vocabulary", tp_sizes=(4,), checks=("generation",))
def sampler_sees_the_padding(patch: Patches, tp: TPGroup) -> None:
    """The sampler gets the padded width: where all logits are negative, the zeros of the padding win."""

    @patch.around(runner_module, "sample")
    def sample(original: Any, logits_RV: Tensor, *arguments: Any) -> Any:
        return original(F.pad(logits_RV, (0, -logits_RV.shape[1] % tp.size)), *arguments)

    patch.replace(runner_module, "sample_shards", _with_padding)
