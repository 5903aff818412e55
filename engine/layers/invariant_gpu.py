"""TP-invariant layers on a GPU: ordinary ones with another arithmetic (docs/invariance.md says what is promised, and why).

Norms, ``silu * up``, embedding and drawing are the ordinary kernels, in which a row's or an element's arithmetic knows nothing of
the others.

Shape suffixes: T = tokens, I / O = input / output features, E = hidden size, R = rows, V = vocabulary, L = this rank's
vocabulary rows, Q = query heads, H = head dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from engine.kernels.invariant_attention_gpu import decode_in_order, prefill_in_order
from engine.kernels.invariant_matmul_gpu import add_leaves, linear_in_leaves, linear_in_order, shares_leaves
from engine.kernels.invariant_row_gpu import leaves_cut_of, sums_of_row
from engine.kernels.log_softmax import log_softmax
from engine.kernels.philox import gumbel_argmax
from engine.kernels.quanta import row_peaks, unit_exponents, value_of_sums
from engine.kernels.rms_norm import add_rms_norm_of_quanta
from engine.layers.attention import Attention
from engine.layers.attention_layout import AttentionLayout, LayerCache
from engine.layers.invariant import best_of_sorted, features_in_leaves, probability_in_units
from engine.layers.norm import RMSNorm
from engine.layers.sampler import Drawing, filter_top_k_top_p
from engine.models.parts import ORDINARY, Parts
from engine.parallel.embedding import ParallelLMHead
from engine.parallel.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from engine.parallel.parameter import LoadedWeight, ShardParameter
from engine.scheduling.batch import StepBatch

CAPABILITY = (9, 0)
"""Of the GPUs whose tensor cores were looked at."""


class OrderedMergedColumnParallelLinear(MergedColumnParallelLinear):
    """No rank cuts K: an element is one chain of sums, wherever it is computed."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_in_order(x, self.weight, self.bias)


class OrderedQKVParallelLinear(OrderedMergedColumnParallelLinear, QKVParallelLinear):
    """The same, split by heads."""


class OrderedLMHead(ParallelLMHead):
    """The same over the vocabulary's rows; what pads them stands in no sum."""

    def shard_logits(self, x_RE: Tensor) -> Tensor:
        return linear_in_order(x_RE, self.weight, self.bias)


class LeafRowParallelLinear(RowParallelLinear):
    """Leaves of fixed width become integers, which are summed on this rank and over all of them.

    leaf     width; ranks are cut between leaves
    unit_O   exponents that say what an integer stands for, from the whole checkpoint tensor: neither knows tp_size
    """

    unit_O: Tensor

    def __init__(self, input_size: int, output_size: int, *, leaf: int, **options: Any) -> None:
        super().__init__(input_size, output_size, **options)
        self.leaf = leaf
        owned = self.input_range
        cuts_none = owned.start % leaf == 0 and (owned.stop % leaf == 0 or owned.stop == input_size)
        assert cuts_none, f"input_range={owned} cuts a leaf of {leaf}"

    def weight_loader(self, param: ShardParameter, loaded_weight: LoadedWeight) -> None:
        super().weight_loader(param, loaded_weight)
        # Every rank reads the whole weight once. As the parameter holds it: a wider dtype may have other magnitudes.
        self.unit_O = unit_exponents(loaded_weight[:].to(param.device, param.dtype), self.leaf)

    def forward(self, x_TI: Tensor) -> Any:
        """The sums, or :class:`Quanta` for a norm that makes them of it: whatever the number of rows, so that the norm is one."""
        # Who looks at a layer's output by a hook is to see all of it.
        gives_quanta = self.norm_follows and not self._forward_hooks
        shape = (x_TI.shape[0], self.weight.shape[0])
        cut = leaves_cut_of(*shape, x_TI.shape[1], self.leaf)
        shares = shares_leaves(*shape, -(-x_TI.shape[1] // self.leaf))
        if self.tp.size == 1 and shares == 1 and cut is None and not gives_quanta:
            return linear_in_leaves(x_TI, self.weight, row_peaks(x_TI), self.unit_O, self.bias, leaf=self.leaf)
        if cut is not None:
            # One rank has the whole row of x, and finds its peak on the way.
            peak_T = self.tp.all_reduce_max(row_peaks(x_TI)) if self.tp.size > 1 else None
            sums_TO, peak_T = sums_of_row(x_TI, self.weight, self.unit_O, cut, leaf=self.leaf, peak_T=peak_T)
        else:
            sums_TO = torch.empty(shape, dtype=torch.int32, device=x_TI.device)
            peak_T = row_peaks(x_TI, sums_TO if shares > 1 else None)
            if self.tp.size > 1:
                peak_T = self.tp.all_reduce_max(peak_T)
            add_leaves(x_TI, self.weight, peak_T, self.unit_O, sums_TO, leaf=self.leaf, shares=shares)
        sums_TO = self.tp.all_reduce(sums_TO)
        if gives_quanta:
            return Quanta(sums_TO, peak_T, self.unit_O)
        return value_of_sums(sums_TO, peak_T, self.unit_O, self.bias, x_TI.dtype)


class Quanta(NamedTuple):
    """Sums of a row-parallel layer as integers, and what they stand for."""

    sums_TE: Tensor
    peak_T: Tensor
    unit_E: Tensor


class QuantaNorm(RMSNorm):
    """The ordinary norm, in which a row's sum knows nothing of the others; also of sums that are integers yet."""

    def forward(self, x: Any, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if isinstance(x, Quanta):
            assert residual is not None, "a row-parallel layer stands behind a residual"
            return add_rms_norm_of_quanta(*x, residual, self.weight, self.eps)
        return super().forward(x, residual)


class OrderedAttention(Attention):
    """Of norm and rotation one variant, whose layout of heads is the same whatever a rank has of them."""

    rope_options: ClassVar[dict[str, Any]] = {"settled": False, "heads": 8}


class OrderedBackend:
    """Attention over the cache in tiles at absolute positions."""

    name = "ordered"
    capturable = True

    def __init__(self, layout: AttentionLayout) -> None:
        heads, device = layout.heads, layout.device
        if device.type == "cuda" and torch.cuda.get_device_capability(device) != CAPABILITY:
            raise ValueError(f"tp_invariant=True is promised on GPUs of compute capability {CAPABILITY} alone, and "
                             f"device={device} has {torch.cuda.get_device_capability(device)}")
        self.scale = layout.head_dim**-0.5
        self.q_start_N = torch.tensor(heads.q_starts, dtype=torch.int32, device=device)
        self.q_count_N = torch.tensor(heads.q_counts, dtype=torch.int32, device=device)
        self.kv_of_q_Q = torch.tensor(heads.kv_of_q, dtype=torch.int32, device=device)
        self.max_group = max(heads.q_counts)

    def __call__(self, q_TQH: Tensor, cache: LayerCache, batch: StepBatch) -> Tensor:
        num_decodes = batch.num_decodes
        out_TQH = torch.empty(q_TQH.shape, dtype=q_TQH.dtype, device=q_TQH.device)
        decode_in_order(q_TQH[:num_decodes], cache.k_PNBH, cache.v_PNBH, batch.block_tables_SB[:num_decodes],
                        batch.context_lens_S[:num_decodes], self.q_start_N, self.q_count_N, self.scale,
                        out_SQH=out_TQH[:num_decodes], max_context=batch.max_decode_context_len, max_group=self.max_group)
        prefill_in_order(q_TQH[num_decodes:], cache.k_PNBH, cache.v_PNBH, batch.block_tables_SB[num_decodes:],
                         batch.prefill_cu_seqlens_S1, batch.context_lens_S[num_decodes:], self.kv_of_q_Q, self.scale,
                         out_TQH=out_TQH[num_decodes:])
        return out_TQH


def _backend(name: str, layout: AttentionLayout) -> OrderedBackend:
    assert name == "auto", "EngineConfig.resolve refuses others"
    return OrderedBackend(layout)


INVARIANT_GPU = Parts(
    merged=OrderedMergedColumnParallelLinear, qkv=OrderedQKVParallelLinear, row=LeafRowParallelLinear, head=OrderedLMHead,
    norm=QuantaNorm, attention=OrderedAttention, silu_mul=ORDINARY.silu_mul, features=features_in_leaves, backend=_backend,
    rope_options={"by_position": True},
    drawing={"drawing": Drawing(filter=partial(filter_top_k_top_p, probability_before=probability_in_units),
                                argmax=gumbel_argmax, log_softmax=log_softmax, best=best_of_sorted)})
