"""Linear layers cut over a tensor-parallel group (Megatron-LM, Shoeybi et al. 2019, section 3).

Shape suffixes: T = tokens, I = input features, O = output features, of this rank where they are split.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from engine.layers.matmul import Product, fuses_norm, fuses_silu_mul, linear
from engine.parallel.group import PartialSum, TPGroup
from engine.parallel.parameter import (
    LoadedWeight,
    ShardParameter,
    check_shape,
    columns_of,
    replicated_loader,
    rows_of,
)
from engine.parallel.sharding import even_range, head_shard, scale_range


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")


class ReplicatedLinear(nn.Module):
    """``y = x @ W.T + b``, whole on every rank; no collective.

    weight  [out, in]
    y_TO    [T, out]   the same on every rank
    """

    def __init__(self, input_size: int, output_size: int, *, bias: bool = False, tp: TPGroup, dtype: torch.dtype,
                 device: torch.device | str = "cpu") -> None:
        super().__init__()
        _check_sizes(input_size=input_size, output_size=output_size)
        self.tp = tp
        self.weight = ShardParameter((output_size, input_size), dtype=dtype, device=device, weight_loader=replicated_loader)
        self.bias = (ShardParameter((output_size,), dtype=dtype, device=device, weight_loader=replicated_loader)
                     if bias else None)

    def forward(self, x_TI: Tensor) -> Tensor:
        return linear(x_TI, self.weight, self.bias)


class MergedColumnParallelLinear(nn.Module):
    """Several column-parallel linears of one input in one matmul: each output is split on its own.

    x_TI     [T, in]                         whole on every rank
    weight   [sum(local outputs), in]        this rank's rows of ``W_0``, then of ``W_1``, ...
    y_TO     [T, sum(local outputs)]         this rank's features of output 0, then of output 1, ...

    No collective. ``shard_id`` of the loader is the output's index, or its name; without one, the checkpoint holds the
    outputs fused in one tensor, one after the other.

    Args:
        output_ranges: for each output its whole size and the rows of it that this rank owns.
        silu_mul_follows: ``silu(gate) * up`` takes the output, and nothing else does: where that is faster, the output is a
            ``Product``.
    """

    def __init__(self, input_size: int, output_sizes: Sequence[int], *, bias: bool = False, tp: TPGroup,
                 dtype: torch.dtype, device: torch.device | str = "cpu", output_ranges: Sequence[range] | None = None,
                 shard_ids: Sequence[str | int] | None = None, silu_mul_follows: bool = False) -> None:
        super().__init__()
        _check_sizes(input_size=input_size, **{f"output_sizes[{i}]": size for i, size in enumerate(output_sizes)})
        self.tp = tp
        self.input_size = input_size
        self.silu_mul_follows = silu_mul_follows
        self.output_sizes = tuple(output_sizes)
        self.output_ranges = tuple(
            output_ranges or (even_range(size, tp_rank=tp.rank, tp_size=tp.size, what="output_size") for size in output_sizes)
        )
        self.shard_ids = tuple(shard_ids or range(len(output_sizes)))
        self.local_sizes = tuple(map(len, self.output_ranges))
        local_output_size = sum(self.local_sizes)
        self.weight = ShardParameter((local_output_size, input_size), dtype=dtype, device=device,
                                     weight_loader=self.weight_loader)
        self.bias = (ShardParameter((local_output_size,), dtype=dtype, device=device, weight_loader=self.weight_loader)
                     if bias else None)

    def weight_loader(self, param: ShardParameter, loaded_weight: LoadedWeight, shard_id: str | int | None = None) -> None:
        """Write this rank's rows of one output, or of all of them when the checkpoint has them fused.

        Raises:
            CheckpointError: if the shape is not the one that the layer's sizes ask for.
            ValueError: if ``shard_id`` is none of this layer's.
        """
        if shard_id is None:
            parts = list(range(len(self.output_sizes)))
        elif shard_id in self.shard_ids:
            parts = [self.shard_ids.index(shard_id)]
        else:
            raise ValueError(f"shard_id={shard_id!r} is unknown: this layer has shard_ids={self.shard_ids}")
        check_shape(loaded_weight, (sum(self.output_sizes[part] for part in parts), *param.shape[1:]))
        source_starts = accumulate((self.output_sizes[part] for part in parts), initial=0)
        for part, source_start in zip(parts, source_starts, strict=False):
            owned, local_start = self.output_ranges[part], sum(self.local_sizes[:part])
            source = range(source_start + owned.start, source_start + owned.stop)
            param.write(rows_of(loaded_weight, source), rows=range(local_start, local_start + len(owned)))

    def forward(self, x: Any) -> Any:
        # Who looks at a layer's output by a hook is to see all of it.
        if self.silu_mul_follows and not self._forward_hooks and fuses_silu_mul(x, self.weight):
            return Product(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias)


class ColumnParallelLinear(MergedColumnParallelLinear):
    """``y = x @ W.T + b`` with ``W`` split over its output features; no collective.

    x_TI     [T, in]              whole on every rank
    weight   [out / tp_size, in]  this rank's rows of ``W``; the first ranks take one more if ``out`` is uneven
    y_TO     [T, out / tp_size]   this rank's features
    """

    def __init__(self, input_size: int, output_size: int, *, bias: bool = False, tp: TPGroup, dtype: torch.dtype,
                 device: torch.device | str = "cpu") -> None:
        super().__init__(input_size, (output_size,), bias=bias, tp=tp, dtype=dtype, device=device)


class QKVParallelLinear(MergedColumnParallelLinear):
    """Query, key and value projections in one matmul, split by heads.

    x_TI     [T, in]                                                     whole on every rank
    weight   [(local_num_q_heads + 2 * local_num_kv_heads) * head_dim, in]   ``[Q | K | V]``
    y_TO     [T, (local_num_q_heads + 2 * local_num_kv_heads) * head_dim]

    No collective. ``shard_id`` of the loader is ``"q"``, ``"k"`` or ``"v"``. Which heads are local: ``sharding.head_shard``.
    """

    def __init__(self, hidden_size: int, head_dim: int, num_q_heads: int, num_kv_heads: int, *, bias: bool = False,
                 tp: TPGroup, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        _check_sizes(head_dim=head_dim, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads)
        heads = head_shard(num_q_heads, num_kv_heads, tp_rank=tp.rank, tp_size=tp.size)
        q_rows, kv_rows = scale_range(heads.q_heads, head_dim), scale_range(heads.kv_heads, head_dim)
        super().__init__(
            hidden_size, (num_q_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim), bias=bias, tp=tp,
            dtype=dtype, device=device, output_ranges=(q_rows, kv_rows, kv_rows), shard_ids=("q", "k", "v"),
        )
        self.heads = heads


class RowParallelLinear(nn.Module):
    """``y = x @ W.T + b`` with ``W`` split over its input features.

    x_TI     [T, in / tp_size]     this rank's features
    weight   [out, in / tp_size]   this rank's columns of ``W``; the first ranks take one more if ``in`` is uneven
    bias     [out]                 whole on every rank, added once
    y_TO     [T, out]              whole on every rank, after one all-reduce

    Args:
        norm_follows: an RMSNorm takes the output, and nothing else does: where the group is faster so, the output is a
            ``PartialSum``, and the all-reduce the norm's; of one rank it is a ``Product`` where that is faster.
        input_range: this rank's input features, where another rule than the even split decides them
            (an attention output follows the query heads).
    """

    def __init__(self, input_size: int, output_size: int, *, bias: bool = False, tp: TPGroup, dtype: torch.dtype,
                 device: torch.device | str = "cpu", input_range: range | None = None, norm_follows: bool = False) -> None:
        super().__init__()
        _check_sizes(input_size=input_size, output_size=output_size)
        self.tp = tp
        self.input_size = input_size
        self.norm_follows = norm_follows and not bias
        self.input_range = input_range or even_range(input_size, tp_rank=tp.rank, tp_size=tp.size, what="input_size")
        self.weight = ShardParameter((output_size, len(self.input_range)), dtype=dtype, device=device,
                                     weight_loader=self.weight_loader)
        self.bias = (ShardParameter((output_size,), dtype=dtype, device=device, weight_loader=replicated_loader)
                     if bias else None)

    def weight_loader(self, param: ShardParameter, loaded_weight: LoadedWeight) -> None:
        """Write this rank's columns.

        Raises:
            CheckpointError: if the shape is not ``(out, in)`` of the whole layer.
        """
        check_shape(loaded_weight, (param.shape[0], self.input_size))
        param.write(columns_of(loaded_weight, self.input_range), rows=range(param.shape[0]))

    def forward(self, x_TI: Tensor) -> Tensor | PartialSum | Product:
        # Who looks at a layer's output by a hook is to see all of it.
        norm_may_finish = self.norm_follows and not self._forward_hooks
        if norm_may_finish and self.tp.size == 1 and fuses_norm(x_TI, self.weight):
            return Product(x_TI, self.weight)
        shape = (x_TI.shape[0], self.weight.shape[0])
        if norm_may_finish and self.tp.fuses_norm(shape, x_TI.dtype):
            return self.tp.partial_sum(shape, x_TI.dtype, lambda rows, out_TO: linear(x_TI[rows], self.weight, out_TO=out_TO))
        y_TO = self.tp.all_reduce(linear(x_TI, self.weight))
        # Added before the all-reduce, the bias would be summed once per rank.
        return y_TO if self.bias is None else y_TO + self.bias
