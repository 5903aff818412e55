"""Faults in loading: the shapes are right, the elements are not. And some that do not even load."""

from __future__ import annotations

from typing import Any

import engine.checkpoint.weights as weights_module
import engine.parallel.linear as linear_module
from engine.models.decoder import DecoderForCausalLM
from engine.parallel.embedding import ParallelLMHead, VocabParallelEmbedding
from engine.parallel.group import TPGroup
from engine.parallel.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from engine.parallel.parameter import LoadedWeight, ShardParameter, columns_of, rows_of
from engine.parallel.sharding import HeadShard
from harness.faults.base import LOAD, Patches, around, fault, instead

ATTENTION = "model.layers.0.self_attn"
MLP = "model.layers.0.mlp"


@fault(rows=(1,), checks=("weights", "layers", "logits"), module=f"{ATTENTION}.q_proj", effect="repeated")
@around(MergedColumnParallelLinear, "weight_loader")
def same_rows_on_every_rank(original: Any, self: MergedColumnParallelLinear, *arguments: Any) -> None:
    """The loader of column-parallel weights takes rank 0's rows on every rank."""
    right, self.output_ranges = self.output_ranges, tuple(range(len(owned)) for owned in self.output_ranges)
    try:
        original(self, *arguments)
    finally:
        self.output_ranges = right


@fault(rows=(1,), layout="qwen2", checks=("weights", "layers", "logits"), module=f"{ATTENTION}.o_proj", effect="repeated")
@instead(RowParallelLinear, "weight_loader")
def same_columns_on_every_rank(self: RowParallelLinear, param: ShardParameter, loaded: LoadedWeight) -> None:
    """The loader of row-parallel weights takes rank 0's columns on every rank."""
    param.write(columns_of(loaded, range(param.shape[1])), rows=range(param.shape[0]))


def _cut_naively(layer: MergedColumnParallelLinear, param: ShardParameter, loaded: LoadedWeight, part: int) -> None:
    """Write what one part has in this rank's contiguous share of all parts, one after the other."""
    first, size = sum(layer.output_sizes[:part]), layer.output_sizes[part]
    share = range(layer.tp.rank * param.shape[0], (layer.tp.rank + 1) * param.shape[0])
    start, stop = max(first, share.start), min(first + size, share.stop)
    if start < stop:
        param.write(rows_of(loaded, range(start - first, stop - first)), rows=range(start - share.start, stop - share.start))


def _load_naively(patch: Patches, layer_class: type[MergedColumnParallelLinear]) -> None:
    """For fused layers of exactly this class whose parts together split evenly."""

    @patch.around(MergedColumnParallelLinear, "weight_loader")
    def weight_loader(original: Any, self: MergedColumnParallelLinear, param: ShardParameter, loaded: LoadedWeight,
                      shard_id: str | int | None = None) -> None:
        is_even = param.shape[0] * self.tp.size == sum(self.output_sizes)
        if type(self) is layer_class and shard_id is not None and is_even:
            _cut_naively(self, param, loaded, self.shard_ids.index(shard_id))
        else:
            original(self, param, loaded, shard_id)


@fault(rows=(4, 5), checks=("weights", "layers", "logits"), module=f"{ATTENTION}.q_proj", effect="permuted")
def fused_qkv_cut_naively(patch: Patches, tp: TPGroup) -> None:
    """Queries, keys and values are put together first and cut into contiguous shares after."""
    _load_naively(patch, QKVParallelLinear)


@fault(rows=(5, 6, 8), checks=("weights", "layers", "logits"), module=f"{MLP}.gate_proj", effect="permuted")
def fused_gate_up_cut_naively(patch: Patches, tp: TPGroup) -> None:
    """Gate and up are put together first and cut into contiguous shares after: rank 0 gets all of the gate."""
    _load_naively(patch, MergedColumnParallelLinear)


@fault(rows=(5, 6, 8), layout="phi3", checks=("weights", "logits"), module=f"{MLP}.gate_up_proj", effect="permuted")
def gate_up_fused_on_disk_cut_naively(patch: Patches, tp: TPGroup) -> None:
    """A tensor that the checkpoint holds fused is cut into contiguous shares: rank 0 gets all of the gate, rank 1 all of up."""

    @patch.around(MergedColumnParallelLinear, "weight_loader")
    def weight_loader(original: Any, self: MergedColumnParallelLinear, param: ShardParameter, loaded: LoadedWeight,
                      shard_id: str | int | None = None) -> None:
        if type(self) is MergedColumnParallelLinear and shard_id is None:
            num_rows = param.shape[0]
            param.write(rows_of(loaded, range(tp.rank * num_rows, (tp.rank + 1) * num_rows)), rows=range(num_rows))
        else:
            original(self, param, loaded, shard_id)


@fault(rows=(7,), layout="qwen3", checks=("weights", "layers", "logits"), module=f"{MLP}.gate_proj", effect="permuted")
@around(MergedColumnParallelLinear, "weight_loader")
def gate_and_up_interleaved(original: Any, self: MergedColumnParallelLinear, param: ShardParameter, loaded: LoadedWeight,
                            shard_id: str | int | None = None) -> None:
    """Gate and up are written row by row in turn, where the activation takes the first half and the second."""
    if isinstance(self, QKVParallelLinear) or len(self.output_sizes) != 2 or shard_id is None:
        original(self, param, loaded, shard_id)
        return
    part = self.shard_ids.index(shard_id)
    for index, row in enumerate(self.output_ranges[part]):
        param.write(rows_of(loaded, range(row, row + 1)), rows=range(2 * index + part, 2 * index + part + 1))


@fault(rows=(10,), checks=("weights", "layers", "logits"), module="lm_head", effect="repeated")
@around(ParallelLMHead.__mro__[1], "weight_loader")
def head_loader_ignores_the_rank(original: Any, self: Any, param: ShardParameter, loaded: LoadedWeight) -> None:
    """The LM head's loader takes the vocabulary's first rows on every rank."""
    if not isinstance(self, ParallelLMHead):
        original(self, param, loaded)
        return
    param.write(rows_of(loaded, range(param.shape[0])), rows=range(param.shape[0]))


@fault(rows=(3,), layout="llama-odd", checks=("weights", "logits"), module=f"{MLP}.gate_proj", effect="shape")
def uneven_features_dropped(patch: Patches, tp: TPGroup) -> None:
    """Sizes are divided and rounded down: the last of 53 intermediate features is on no rank."""
    patch.replace(linear_module, "even_range", lambda original: _floor_range)


def _floor_range(total: int, *, tp_rank: int, tp_size: int, what: str = "") -> range:
    return range(tp_rank * (total // tp_size), (tp_rank + 1) * (total // tp_size))


@fault(rows=(12,), checks=("weights", "layers", "logits"), module=f"{MLP}.gate_proj", effect="shape")
def replicated_instead_of_cut(patch: Patches, tp: TPGroup) -> None:
    """The MLP is whole on every rank, and its output is summed over the ranks all the same."""
    patch.replace(linear_module, "even_range", lambda original: lambda total, **_: range(total))


def _on_load(patch: Patches, wanted: str, load: Any) -> None:
    """``load(parameter, tensor)`` in place of the loader, for checkpoint tensors whose name ends in ``wanted``."""

    @patch.around(weights_module, "_load")
    def _load(original: Any, parameter: Any, tensor: Any, shard_id: str | int | None = None) -> None:
        if tensor.name.endswith(wanted):
            load(original, parameter, tensor, shard_id)
        else:
            original(parameter, tensor, shard_id)


class _Changed:
    """A checkpoint tensor with other values: for loaders, which ask for its shape and slices alone."""

    def __init__(self, tensor: Any, change: Any) -> None:
        self.name, self.stored, self.shape = tensor.name, tensor.stored, tensor.shape
        self._whole = change(tensor[:])

    def __getitem__(self, index: Any) -> Any:
        return self._whole[index]


@fault(rows=(13,), checks=("weights", "logits"), module="model.layers.1.mlp.up_proj", effect="nan")
def tensor_never_loaded(patch: Patches, tp: TPGroup) -> None:
    """Rank 1 skips one name of the checkpoint, and nothing counts what was written."""
    if tp.rank == 1:
        _on_load(patch, "layers.1.mlp.up_proj.weight", lambda *_: None)
    patch.replace(weights_module, "check_written", lambda original: lambda parameters: None)


@fault(rows=(13,), layout="qwen2", checks=("weights", "logits"), module=f"{ATTENTION}.k_proj", effect="bias")
def bias_left_at_zero(patch: Patches, tp: TPGroup) -> None:
    """The keys' bias is never read from the checkpoint: it stays at the zeros that the memory happened to hold."""

    def load(original: Any, parameter: Any, tensor: Any, shard_id: str | int | None) -> None:
        original(parameter, _Changed(tensor, lambda whole: whole * 0), shard_id)

    _on_load(patch, "k_proj.bias", load)


@fault(rows=(22,), checks=("weights", "logits"), module=f"{ATTENTION}.o_proj", effect="bias")
def bias_divided_by_the_ranks(patch: Patches, tp: TPGroup) -> None:
    """A converter shares the attention's output bias out among the ranks, which add it after the all-reduce."""

    def load(original: Any, parameter: Any, tensor: Any, shard_id: str | int | None) -> None:
        original(parameter, _Changed(tensor, lambda whole: whole / tp.size), shard_id)

    _on_load(patch, "o_proj.bias", load)


@fault(rows=(14,), checks=("weights", "layers", "logits"), module=f"{ATTENTION}.o_proj", effect="bias")
def row_bias_cut_and_tiled(patch: Patches, tp: TPGroup) -> None:
    """The bias of a row-parallel layer is cut like its weight, and broadcasting makes it fit again."""

    def load_tiled(param: ShardParameter, loaded: LoadedWeight) -> None:
        share = param.shape[0] // tp.size
        part = loaded[tp.rank * share : (tp.rank + 1) * share]
        param.write(part.repeat(tp.size), rows=range(param.shape[0]))

    @patch.around(RowParallelLinear, "__init__")
    def init(original: Any, self: RowParallelLinear, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        if self.bias is not None and self.bias.shape[0] % tp.size == 0:
            self.bias.weight_loader = load_tiled


@fault(rows=(14,), checks=(LOAD, "layers"))
@around(RowParallelLinear, "__init__")
def row_bias_through_the_weights_loader(original: Any, self: RowParallelLinear, *arguments: Any, **options: Any) -> None:
    """The bias of a row-parallel layer goes through its weight's loader, which asks for two dimensions."""
    original(self, *arguments, **options)
    if self.bias is not None:
        self.bias.weight_loader = self.weight_loader


def _forget_the_head(patch: Patches) -> None:
    """Expect no LM head in the checkpoint of a tied model, whatever became of the tie."""

    @patch.around(weights_module, "checkpoint_names")
    def checkpoint_names(original: Any, model: DecoderForCausalLM, modules: Any) -> Any:
        names = original(model, modules)
        if model.config.tie_word_embeddings:
            names.pop("lm_head.weight", None)
        return names


def _all_of(parameter: ShardParameter) -> tuple[range, ...]:
    return tuple(range(size) for size in parameter.shape)


@fault(rows=(15,), layout="qwen3", checks=("weights", "logits"), module="lm_head", effect="zeros")
def tied_head_left_at_zero(patch: Patches, tp: TPGroup) -> None:
    """The tie is off, the checkpoint has no LM head, and the one that was made stays zero."""

    def tie(self: ParallelLMHead, embedding: VocabParallelEmbedding) -> None:
        self.weight.data.zero_()
        self.weight.written.append(_all_of(self.weight))

    patch.replace(ParallelLMHead, "tie", lambda original: tie)
    _forget_the_head(patch)


@fault(rows=(17,), layout="llama-odd", checks=("weights", "logits"), module="lm_head", effect="nan")
def head_tied_by_its_data(patch: Patches, tp: TPGroup) -> None:
    """On all ranks but the first the head takes a copy of the embedding's data, before anything is loaded."""

    @patch.around(ParallelLMHead, "tie")
    def tie(original: Any, self: ParallelLMHead, embedding: VocabParallelEmbedding) -> None:
        if tp.rank == 0:
            original(self, embedding)
            return
        self.weight.data = embedding.weight.data.clone()
        self.weight.written.append(_all_of(self.weight))

    _forget_the_head(patch)


def _other_kv_heads(patch: Patches, kv_head_of: Any) -> None:
    """Each rank loads one KV head, ``kv_head_of(rank, num_kv_heads)``, where it would also hold one in truth."""

    @patch.around(linear_module, "head_shard")
    def head_shard(original: Any, num_q_heads: int, num_kv_heads: int, *, tp_rank: int, tp_size: int) -> HeadShard:
        right: HeadShard = original(num_q_heads, num_kv_heads, tp_rank=tp_rank, tp_size=tp_size)
        kv_head = kv_head_of(tp_rank, num_kv_heads)
        if right.local_num_kv_heads != 1 or tp_size % num_kv_heads or not 0 <= kv_head < num_kv_heads:
            return right
        return HeadShard(q_heads=right.q_heads, kv_heads=range(kv_head, kv_head + 1), kv_of_q=right.kv_of_q)


@fault(rows=(23,), layout="qwen3", tp_sizes=(4,), checks=("weights", "layers", "logits"), module=f"{ATTENTION}.k_proj",
       effect="repeated")
def kv_heads_dealt_in_turn(patch: Patches, tp: TPGroup) -> None:
    """With fewer KV heads than ranks, rank r gets KV head r mod 2, not the one that its query heads use."""
    _other_kv_heads(patch, lambda tp_rank, num_kv_heads: tp_rank % num_kv_heads)


@fault(rows=(26,), checks=("weights", "layers", "logits"), module=f"{ATTENTION}.k_proj", effect="repeated")
def kv_heads_replicated_once_too_often(patch: Patches, tp: TPGroup) -> None:
    """With as many KV heads as ranks they are taken to be replicated: ranks 0 and 1 share KV head 0."""
    _other_kv_heads(patch, lambda tp_rank, num_kv_heads: tp_rank // (tp.size // num_kv_heads + 1))


@fault(rows=(25, 32), layout="qwen3", checks=("weights", "logits"), module=f"{ATTENTION} (attention, before o_proj)")
def key_norm_cut_by_the_rank(patch: Patches, tp: TPGroup) -> None:
    """The weight of the norm of keys starts at this rank's share, though one weight serves all heads."""

    def load(original: Any, parameter: Any, tensor: Any, shard_id: str | int | None) -> None:
        share = tensor.shape[0] // tp.size
        original(parameter, _Changed(tensor, lambda whole: whole.roll(-tp.rank * share)), shard_id)

    _on_load(patch, "k_norm.weight", load)


@fault(rows=(20,), checks=("weights", "layers", "logits"), module=f"{ATTENTION}.o_proj")
@around(RowParallelLinear, "weight_loader")
def columns_in_a_local_order(original: Any, self: RowParallelLinear, param: ShardParameter, loaded: LoadedWeight) -> None:
    """Row-parallel weights are reordered after they are cut, each rank by itself, and their inputs are not."""
    original(self, param, loaded)
    param.data.copy_(param.data.flip(-1))
