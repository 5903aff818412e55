"""What parallel linear layers read of a checkpoint, and which sizes, tensors and parts they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from engine.checkpoint.weights import check_written
from engine.parallel.group import TPGroup
from engine.parallel.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from engine.parallel.parameter import CheckpointError
from tests.engine.support import (
    OnDisk,
    lone_group,
)


def qkv(tp: TPGroup, *, bias: bool = False) -> QKVParallelLinear:
    """9 query heads, 3 KV heads, head_dim 2, 5 inputs: rows 18 | 6 | 6."""
    return QKVParallelLinear(5, 2, 9, 3, bias=bias, tp=tp, dtype=torch.float32)


def test_a_rank_reads_only_the_rows_or_columns_that_it_owns() -> None:
    tp = lone_group(1, 2)
    layer = qkv(tp)
    stored = {"q": OnDisk(torch.zeros(18, 5)), "k": OnDisk(torch.zeros(6, 5)), "v": OnDisk(torch.zeros(6, 5))}
    for shard_id, tensor in stored.items():
        layer.weight.weight_loader(layer.weight, tensor, shard_id)
    assert {shard_id: tensor.elements_read for shard_id, tensor in stored.items()} == {
        "q": 40,
        "k": 20,
        "v": 20,
    }

    columns = OnDisk(torch.zeros(3, 9))
    row = RowParallelLinear(9, 3, tp=tp, dtype=torch.float32)
    row.weight.weight_loader(row.weight, columns)
    assert columns.elements_read == 3 * 4


def test_fused_tensors_are_read_part_by_part() -> None:
    layer, stored = qkv(lone_group(0, 2)), OnDisk(torch.zeros(30, 5))
    layer.weight.weight_loader(layer.weight, stored)
    assert stored.elements_read == (10 + 4 + 4) * 5


def test_an_unknown_shard_id_names_those_that_there_are() -> None:
    layer = qkv(lone_group(0, 2))
    with pytest.raises(ValueError, match=r"shard_id='o' .*\('q', 'k', 'v'\)"):
        layer.weight.weight_loader(layer.weight, torch.zeros(18, 5), "o")
    merged = MergedColumnParallelLinear(5, (4, 4), tp=lone_group(0, 2), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"shard_id=2 .*\(0, 1\)"):
        merged.weight.weight_loader(merged.weight, torch.zeros(4, 5), 2)


@pytest.mark.parametrize("shard_id", ["q", "k", None])
def test_a_tensor_of_the_wrong_shape_names_both_shapes(shard_id: str | None) -> None:
    layer = qkv(lone_group(0, 2))
    expected = {"q": "18, 5", "k": "6, 5", None: "30, 5"}[shard_id]
    with pytest.raises(CheckpointError, match=rf"\(9, 5\) .*\({expected}\)"):
        layer.weight.weight_loader(layer.weight, torch.zeros(9, 5), shard_id)
    assert layer.weight.num_unwritten == layer.weight.numel()


def test_a_shard_in_place_of_the_whole_tensor_is_refused() -> None:
    # Rank 1 of two holds 4 of 9 columns: handing it a tensor cut already would read the wrong ones.
    row = RowParallelLinear(9, 3, tp=lone_group(1, 2), dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"\(3, 4\) .*\(3, 9\)"):
        row.weight.weight_loader(row.weight, torch.zeros(3, 4))


def test_a_part_loaded_twice_is_refused_and_a_part_not_loaded_is_counted() -> None:
    layer = qkv(lone_group(0, 2), bias=True)
    for shard_id in ("q", "k"):
        layer.weight.weight_loader(layer.weight, torch.zeros(18 if shard_id == "q" else 6, 5), shard_id)
    with pytest.raises(CheckpointError, match="overlaps"):
        layer.weight.weight_loader(layer.weight, torch.zeros(6, 5), "k")
    with pytest.raises(CheckpointError, match=r"weight \(20 of 90 elements\), bias \(18 of 18 elements\)"):
        check_written(dict(layer.named_parameters()))
    assert layer(torch.zeros(1, 5)).isnan().any(), "what nobody wrote must be seen in the output"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda tp: ColumnParallelLinear(0, 4, tp=tp, dtype=torch.float32), r"input_size=0"),
        (lambda tp: ColumnParallelLinear(4, 2, tp=tp, dtype=torch.float32), r"output_size=2 .*tp_size=3"),
        (
            lambda tp: MergedColumnParallelLinear(4, (4, 0), tp=tp, dtype=torch.float32),
            r"output_sizes\[1\]=0",
        ),
        (lambda tp: RowParallelLinear(2, 4, tp=tp, dtype=torch.float32), r"input_size=2 .*tp_size=3"),
        (lambda tp: RowParallelLinear(4, -1, tp=tp, dtype=torch.float32), r"output_size=-1"),
        (lambda tp: QKVParallelLinear(4, 0, 4, 4, tp=tp, dtype=torch.float32), r"head_dim=0"),
        (lambda tp: QKVParallelLinear(4, 2, 2, 2, tp=tp, dtype=torch.float32), r"num_q_heads=2 .*tp_size=3"),
        (lambda tp: ReplicatedLinear(4, 0, tp=tp, dtype=torch.float32), r"output_size=0"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(make: Callable[[TPGroup], nn.Module], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(lone_group(0, 3))
