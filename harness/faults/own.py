"""Bugs that nobody reported: one for each part of the engine, such as a refactoring leaves behind.

They were written from the engine's code alone, without a look at the checks. Each is silent: shapes fit, nothing is raised,
and most inputs give right results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import engine.kernels.attention_torch as attention_module
import engine.layers.rotary as rotary_module
import engine.layers.sampler as sampler_module
import engine.models.decoder as decoder_module
from engine.checkpoint.weights import CheckpointTensor
from engine.parallel.embedding import VocabParallelEmbedding
from engine.parallel.group import TPGroup
from engine.parallel.linear import RowParallelLinear
from engine.parallel.sharding import HeadShard
from engine.scheduling.kv_cache import ROOT_HASH, BlockManager, hash_block
from engine.scheduling.scheduler import Chunk, Scheduler
from engine.scheduling.sequence import Sequence
from harness.faults.base import Patches, around, fault, instead
from harness.faults.collectives import EMBEDDING
from harness.faults.layers import BEFORE_O_PROJ
from harness.faults.loading import ATTENTION

PIECE_BYTES = 2048


@fault(layout="llama-nine-heads", checks=("attention", "logits"), module=BEFORE_O_PROJ)
@around(HeadShard, "__init__")
def even_counts_taken_for_even_groups(original: Any, self: HeadShard, *, q_heads: range, kv_heads: range,
                                      kv_of_q: tuple[int, ...]) -> None:
    """Four query heads on two KV heads are taken for two and two, though the cut left one and three of them."""
    per_kv_head, rest = divmod(len(q_heads), len(kv_heads))
    if not rest:
        kv_of_q = tuple(local // per_kv_head for local in range(len(q_heads)))
    original(self, q_heads=q_heads, kv_heads=kv_heads, kv_of_q=kv_of_q)


@fault(checks=("collectives",))
@around(TPGroup, "all_reduce")
def reduced_copy_thrown_away(original: Any, self: TPGroup, x: Tensor) -> Tensor:
    """What is not contiguous is copied, the copy is reduced, and the tensor itself is given back as it was."""
    total: Tensor = original(self, x)
    return total if x.is_contiguous() else x


@fault(checks=("layers", "logits"), module=f"{ATTENTION}.o_proj", effect="bias")
@around(RowParallelLinear, "forward")
def single_row_without_bias(original: Any, self: RowParallelLinear, x_TI: Tensor) -> Any:
    """A row-parallel layer has a path of its own for one row, a matrix-vector product, which forgets the bias."""
    if x_TI.shape[0] == 1:
        return self.tp.all_reduce(torch.mv(self.weight, x_TI[0]))[None]
    return original(self, x_TI)


@fault(checks=("layers", "logits"), module=EMBEDDING)
@instead(VocabParallelEmbedding, "forward")
def border_token_on_two_ranks(self: VocabParallelEmbedding, token_ids_T: Tensor) -> Tensor:
    """A token at the border of two shards counts for both: the first of them adds its last row."""
    ids = self.shard.ids
    is_mine_T = (token_ids_T >= ids.start) & (token_ids_T <= ids.stop)
    row_T = (token_ids_T - ids.start).clamp(0, self.shard.local_size - 1)
    return self.tp.all_reduce(F.embedding(row_T, self.weight).masked_fill_(~is_mine_T.unsqueeze(-1), -0.0))


@fault(checks=("weights", "logits"), module=EMBEDDING, effect="lost")
@around(CheckpointTensor, "__getitem__")
def last_piece_of_a_large_tensor_not_read(original: Any, self: CheckpointTensor, index: Any) -> Tensor:
    """Large tensors are read in pieces of as many rows as fit, and the rows that do not fill a piece stay zero."""
    value: Tensor = original(self, index)
    if isinstance(index, slice) and value.dim() == 2 and value.nbytes > PIECE_BYTES:
        piece = max(1, PIECE_BYTES // value[0].nbytes)
        value = value.clone()
        value[len(value) // piece * piece :] = 0
    return value


@fault(checks=("kv",))
@instead(BlockManager, "_hash_known_blocks")
def second_block_forgets_the_first(self: BlockManager, sequence: Sequence) -> None:
    """The chain of hashes begins anew at a sequence's second block, so two blocks of the same words are taken for one."""
    hashes, size = sequence.block_hashes, self.block_size
    for index in range(len(hashes), len(sequence.token_ids) // size):
        parent = hashes[index - 1] if index > 1 else ROOT_HASH
        hashes.append(hash_block(parent, sequence.token_ids[index * size : (index + 1) * size]))


@fault(checks=("kv",))
@instead(Scheduler, "_take")
def drawn_as_soon_as_past_the_prompt(self: Scheduler, sequence: Sequence, num_tokens: int) -> Chunk:
    """Whatever chunk reaches past the prompt draws a token: also the first of several when a preempted sequence starts over."""
    start = sequence.num_computed
    self.blocks.grow(sequence, start + num_tokens)
    sequence.num_computed += num_tokens
    self.blocks.register(sequence)
    chunk = Chunk(sequence, start, num_tokens, samples=sequence.num_computed >= sequence.num_prompt_tokens,
                  in_flight=sequence.num_computed > len(sequence.token_ids))
    sequence.num_in_flight += chunk.samples
    return chunk


@fault(checks=("generation",), field="SamplingParams.top_k")
@around(sampler_module, "filter_top_k_top_p")
def nucleus_of_the_whole_vocabulary(original: Any, logits_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor,
                                    top_p_R: Tensor) -> Tensor:
    """With top_k and top_p both, top_p is held against the probability of all tokens, not of the top_k that are left."""
    in_k_RV = original(logits_RV, temperature_R, top_k_R, torch.ones_like(top_p_R))
    in_p_RV = original(logits_RV, temperature_R, torch.zeros_like(top_k_R), top_p_R)
    return torch.minimum(in_k_RV, in_p_RV)


@fault(checks=("attention",))
@around(attention_module, "_attend")
def later_parts_of_a_prompt_start_over(original: Any, q_AIQH: Tensor, k_ANLH: Tensor, v_ANLH: Tensor, contexts_A: Tensor,
                                       kv_heads: list[int], scale: float) -> Any:
    """Queries that are too many for one score tensor are handled in parts, and each part is masked as if it were the first."""
    num_queries = q_AIQH.shape[1]
    step = max(1, attention_module._MAX_SCORES // (q_AIQH.shape[0] * len(kv_heads) * k_ANLH.shape[2]))
    # A part of i queries that end at contexts + i - num_queries begins where the first part does.
    return torch.cat([original(part, k_ANLH, v_ANLH, contexts_A - num_queries + part.shape[1], kv_heads, scale)
                      for part in q_AIQH.split(step, dim=1)], dim=1)


@fault(layout="llama-yarn", checks=("attention",))
def short_tables_not_scaled(patch: Patches, tp: TPGroup) -> None:
    """RoPE is stretched only where the tables reach beyond the length that the model was first trained on."""

    @patch.around(rotary_module, "rope_tables")
    @patch.around(decoder_module, "rope_tables")
    def rope_tables(original: Any, hf_config: Any, head_dim: int, num_positions: int, **options: Any) -> Any:
        parameters = hf_config.rope_parameters
        if num_positions <= parameters.get("original_max_position_embeddings", 0):
            hf_config = type(hf_config)(**{**hf_config.to_dict(), "rope_parameters": {
                "rope_type": "default", "rope_theta": parameters["rope_theta"]}})
        return original(hf_config, head_dim, num_positions, **options)
