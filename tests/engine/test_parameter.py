import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.checkpoint.weights import check_written
from engine.parallel.parameter import (
    CheckpointError,
    ShardParameter,
    check_shape,
    columns_of,
    replicated_loader,
    rows_of,
)
from tests.engine.support import FEW, MANY, OnDisk


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> ShardParameter:
    return ShardParameter(shape, dtype=dtype, device="cpu", weight_loader=replicated_loader)


@st.composite
def regions(draw: st.DrawFn, num_rows: int, num_columns: int) -> tuple[range, range]:
    """A part of a matrix that is not empty."""
    row, column = draw(st.integers(0, num_rows - 1)), draw(st.integers(0, num_columns - 1))
    return (
        range(row, draw(st.integers(row + 1, num_rows))),
        range(column, draw(st.integers(column + 1, num_columns))),
    )


@MANY
@given(st.lists(regions(5, 4), max_size=8))
def test_the_ledger_counts_what_was_written_and_refuses_overlaps(parts: list[tuple[range, range]]) -> None:
    param, taken = parameter(5, 4), np.zeros((5, 4), dtype=bool)
    for rows, columns in parts:
        region = (slice(rows.start, rows.stop), slice(columns.start, columns.stop))
        value = torch.ones(len(rows), len(columns))
        if taken[region].any():
            with pytest.raises(CheckpointError, match="overlaps"):
                param.write(value, rows=rows, columns=columns)
        else:
            param.write(value, rows=rows, columns=columns)
            taken[region] = True
        assert param.num_unwritten == (~taken).sum() == param.isnan().sum()


def test_an_element_that_nobody_wrote_is_nan_and_is_counted() -> None:
    param = parameter(3, 2)
    assert param.isnan().all()
    param.write(torch.zeros(2, 2), rows=range(2))
    assert param.num_unwritten == 2
    with pytest.raises(CheckpointError, match=r"weight \(2 of 6 elements\)"):
        check_written({"weight": param})
    param.write(torch.zeros(1, 2), rows=range(2, 3))
    check_written({"weight": param})


@pytest.mark.parametrize("rows", [range(2, 4), range(3, 4), range(-1, 1), range(-1, 0)], ids=str)
def test_a_region_outside_the_shard_is_refused_and_not_counted(rows: range) -> None:
    # Counted, it would hide an element inside that nobody wrote.
    param = parameter(3, 2)
    with pytest.raises(CheckpointError, match="outside"):
        param.write(torch.zeros(len(rows), 2), rows=rows)
    assert param.num_unwritten == 6


def test_columns_outside_the_shard_are_refused() -> None:
    param = parameter(3, 2)
    with pytest.raises(CheckpointError, match="outside"):
        param.write(torch.zeros(3, 1), rows=range(3), columns=range(2, 3))


def test_an_empty_region_is_nothing_written() -> None:
    param = parameter(3, 2)
    param.write(torch.zeros(0, 2), rows=range(3, 3))
    param.write(torch.zeros(3, 0), rows=range(3), columns=range(1, 1))
    assert param.num_unwritten == 6


@pytest.mark.parametrize("shape", [(2, 3), (3, 1), (1, 2), (3,), (6,)])
def test_a_value_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    # (3, 1) and (1, 2) would be broadcast by a plain copy.
    with pytest.raises(CheckpointError, match="does not fit"):
        parameter(3, 2).write(torch.zeros(shape), rows=range(3))


@FEW
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_a_checkpoint_tensor_must_have_the_shape_that_the_config_asks_for(shape: list[int], other: list[int]) -> None:
    check_shape(torch.zeros(shape), shape)
    assume(shape != other)
    with pytest.raises(CheckpointError) as refusal:
        check_shape(torch.zeros(shape), other)
    assert str(tuple(shape)) in str(refusal.value)
    assert str(tuple(other)) in str(refusal.value)


def test_a_replicated_tensor_is_read_once_and_cast_to_the_parameters_dtype() -> None:
    stored = OnDisk(torch.tensor([1.0, 1.0 + 2**-12], dtype=torch.float64))
    param = parameter(2, dtype=torch.bfloat16)
    param.weight_loader(param, stored)
    assert param.tolist() == [1.0, 1.0]
    assert (stored.elements_read, param.num_unwritten) == (2, 0)


def test_rows_and_columns_are_read_without_the_rest() -> None:
    stored = OnDisk(torch.arange(12.0).reshape(3, 4))
    assert rows_of(stored, range(1, 3)).tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert columns_of(stored, range(1, 2)).tolist() == [[1], [5], [9]]
    assert stored.elements_read == 8 + 3


def test_a_parameter_is_a_parameter_without_gradient() -> None:
    module = torch.nn.Module()
    module.weight = parameter(2, 2)
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert not module.weight.requires_grad
    assert math.isnan(module.weight[0, 0].item())
