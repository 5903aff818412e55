"""Layers cut over ranks against the whole one in int64, equal bit for bit where the dtype adds exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.checkpoint.weights import check_written
from engine.layers.matmul import linear
from engine.parallel.group import TPGroup
from engine.parallel.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from engine.parallel.sharding import head_shard, scale_range
from tests.engine.support import (
    FEW,
    TP_SIZES,
    Integers,
    OnDisk,
    as_integers,
    as_tensor,
    draw_integers,
    magnitudes,
    on_ranks,
    whole_linear,
)

DTYPES = st.sampled_from(["float32", "bfloat16"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A linear layer on integers. weight [O, I], bias [O] or None, x [T, I], y [T, O] in int64."""

    tp_size: int
    dtype: str
    x: Integers
    weight: Integers
    bias: Integers | None

    @property
    def y(self) -> Integers:
        return whole_linear(self.x, self.weight, self.bias, self.dtype)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def load(self, layer: nn.Module, shard_id: str | int | None = None, *, rows: slice = slice(None)) -> None:
        """Hand the layer rows of the checkpoint, as a checkpoint's reader would."""
        for name, whole in (("weight", self.weight), ("bias", self.bias)):
            if whole is not None:
                param = getattr(layer, name)
                loaded = OnDisk(as_tensor(whole[rows], self.dtype))
                arguments = (param, loaded) if shard_id is None else (param, loaded, shard_id)
                param.weight_loader(*arguments)

    def run(self, make: Callable[[TPGroup], tuple[nn.Module, Tensor]]) -> list[tuple[nn.Module, Integers]]:
        """Each rank's layer and output. ``make`` gives the loaded layer and its input."""

        def job(tp: TPGroup) -> tuple[nn.Module, Integers]:
            with torch.inference_mode():
                layer, x = make(tp)
                check_written(dict(layer.named_parameters()))
                return layer, as_integers(layer(x))

        return on_ranks(self.tp_size, job)


@st.composite
def problems(draw: st.DrawFn, num_outputs: st.SearchStrategy[int], num_inputs: st.SearchStrategy[int]) -> Problem:
    dtype, out_size, in_size = draw(DTYPES), draw(num_outputs), draw(num_inputs)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    most_x, most_w, most_b = magnitudes(in_size, dtype)
    return Problem(
        tp_size=draw(TP_SIZES),
        dtype=dtype,
        x=draw_integers(rng, (draw(st.integers(0, 3)), in_size), most_x),
        weight=draw_integers(rng, (out_size, in_size), most_w),
        bias=draw_integers(rng, (out_size,), most_b) if draw(st.booleans()) else None,
    )


SIZES = st.integers(1, 24)


@FEW
@given(problems(st.integers(8, 24), SIZES))
def test_column_parallel_features_join_to_the_whole_output(problem: Problem) -> None:
    def make(tp: TPGroup) -> tuple[nn.Module, Tensor]:
        layer = ColumnParallelLinear(
            problem.weight.shape[1],
            problem.weight.shape[0],
            bias=problem.bias is not None,
            tp=tp,
            dtype=problem.torch_dtype,
        )
        problem.load(layer)
        return layer, as_tensor(problem.x, problem.dtype)

    ranks = problem.run(make)
    assert (np.concatenate([y for _, y in ranks], axis=1) == problem.y).all()


@FEW
@given(problems(st.integers(8, 24), SIZES), st.booleans())
def test_merged_outputs_are_each_split_on_their_own(problem: Problem, fused_on_disk: bool) -> None:
    out_size = problem.weight.shape[0]
    # Three outputs of unequal sizes, fused in one weight; the second has two rows more than the first.
    sizes = (out_size - 8 + problem.tp_size, problem.tp_size + 2, problem.tp_size)
    whole = np.concatenate([problem.weight] * 3)[: sum(sizes)]
    bias = None if problem.bias is None else np.concatenate([problem.bias] * 3)[: sum(sizes)]
    assume(len(whole) == sum(sizes))
    problem = Problem(tp_size=problem.tp_size, dtype=problem.dtype, x=problem.x, weight=whole, bias=bias)
    starts = np.cumsum([0, *sizes])

    def make(tp: TPGroup) -> tuple[nn.Module, Tensor]:
        layer = MergedColumnParallelLinear(whole.shape[1], sizes, bias=bias is not None, tp=tp, dtype=problem.torch_dtype)
        if fused_on_disk:
            problem.load(layer)
        else:
            for part in (2, 0, 1):
                problem.load(layer, part, rows=slice(starts[part], starts[part + 1]))
        return layer, as_tensor(problem.x, problem.dtype)

    ranks = problem.run(make)
    for part, start in enumerate(starts[:-1]):
        pieces = [np.split(y, np.cumsum(layer.local_sizes)[:-1], axis=1)[part] for layer, y in ranks]
        assert (np.concatenate(pieces, axis=1) == problem.y[:, start : start + sizes[part]]).all()


@st.composite
def attention_layouts(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(num_q_heads, num_kv_heads, head_dim, tp_size); fewer, as many or more KV heads than ranks."""
    num_kv_heads = draw(st.integers(1, 6))
    num_q_heads = num_kv_heads * draw(st.integers(1, 4))
    return num_q_heads, num_kv_heads, draw(st.integers(1, 3)) * 2, draw(st.integers(1, min(8, num_q_heads)))


def attention_problem(layout: tuple[int, int, int, int], dtype: str, seed: int, *, with_bias: bool) -> Problem:
    num_q_heads, num_kv_heads, head_dim, tp_size = layout
    rng, in_size = np.random.default_rng(seed), 7
    out_size = (num_q_heads + 2 * num_kv_heads) * head_dim
    most_x, most_w, most_b = magnitudes(in_size, dtype)
    return Problem(
        tp_size=tp_size,
        dtype=dtype,
        x=draw_integers(rng, (2, in_size), most_x),
        weight=draw_integers(rng, (out_size, in_size), most_w),
        bias=draw_integers(rng, (out_size,), most_b) if with_bias else None,
    )


@FEW
@given(attention_layouts(), DTYPES, st.integers(0, 2**32), st.booleans(), st.booleans())
@example((9, 3, 4, 2), "bfloat16", 1, True, False)  # the middle KV head lives on both ranks
@example((8, 2, 4, 8), "float32", 2, True, True)  # four ranks a KV head
@example((6, 6, 2, 3), "float32", 3, False, True)
def test_each_rank_has_its_query_heads_and_the_kv_heads_that_they_use(
    layout: tuple[int, int, int, int], dtype: str, seed: int, with_bias: bool, fused_on_disk: bool
) -> None:
    num_q_heads, num_kv_heads, head_dim, tp_size = layout
    problem = attention_problem(layout, dtype, seed, with_bias=with_bias)
    kv_start, v_start = num_q_heads * head_dim, (num_q_heads + num_kv_heads) * head_dim

    def make(tp: TPGroup) -> tuple[nn.Module, Tensor]:
        layer = QKVParallelLinear(
            problem.weight.shape[1],
            head_dim,
            num_q_heads,
            num_kv_heads,
            bias=with_bias,
            tp=tp,
            dtype=problem.torch_dtype,
        )
        if fused_on_disk:
            problem.load(layer)
        else:
            problem.load(layer, "v", rows=slice(v_start, None))
            problem.load(layer, "q", rows=slice(kv_start))
            problem.load(layer, "k", rows=slice(kv_start, v_start))
        return layer, as_tensor(problem.x, problem.dtype)

    def heads(y: Integers) -> Integers:
        return y.reshape(len(y), -1, head_dim)

    y_heads = heads(problem.y)
    group, seen = num_q_heads // num_kv_heads, []
    for rank, (_, y) in enumerate(problem.run(make)):
        shares = [len(part) for part in np.array_split(range(num_q_heads), tp_size)]
        q_heads = list(range(sum(shares[:rank]), sum(shares[: rank + 1])))
        kv_heads = sorted({q_head // group for q_head in q_heads})
        whole_heads = [
            *q_heads,
            *(num_q_heads + kv_head for kv_head in kv_heads),
            *(num_q_heads + num_kv_heads + kv_head for kv_head in kv_heads),
        ]
        assert (heads(y) == y_heads[:, whole_heads]).all()
        seen += q_heads
    assert seen == list(range(num_q_heads))


@FEW
@given(problems(SIZES, st.integers(8, 24)))
def test_row_parallel_sums_to_the_whole_output_on_every_rank(problem: Problem) -> None:
    assert_row_parallel(RowParallelLinear, problem)


def assert_row_parallel(kind: type[RowParallelLinear], problem: Problem) -> None:
    out_size, in_size = problem.weight.shape

    def make(tp: TPGroup) -> tuple[nn.Module, Tensor]:
        layer = kind(in_size, out_size, bias=problem.bias is not None, tp=tp, dtype=problem.torch_dtype)
        problem.load(layer)
        share = np.array_split(np.arange(in_size), tp.size)[tp.rank]
        return layer, as_tensor(problem.x[:, share], problem.dtype)

    expected = problem.y
    for _, y in problem.run(make):
        assert (y == expected).all()


class BiasOnEveryRank(RowParallelLinear):
    """A fault: each rank adds the bias to its part of the sum."""

    def forward(self, x_TI: Tensor) -> Tensor:
        return self.tp.all_reduce(linear(x_TI, self.weight, self.bias))


class NoSum(RowParallelLinear):
    """A fault: each rank gives out its own part."""

    def forward(self, x_TI: Tensor) -> Tensor:
        return linear(x_TI, self.weight, self.bias)


class SummedTwice(RowParallelLinear):
    """A fault: the sum is all-reduced again."""

    def forward(self, x_TI: Tensor) -> Tensor:
        return self.tp.all_reduce(super().forward(x_TI))


def biased_problem(tp_size: int) -> Problem:
    rng = np.random.default_rng(5)
    return Problem(
        tp_size=tp_size,
        dtype="bfloat16",
        x=draw_integers(rng, (2, 9), 3),
        weight=draw_integers(rng, (4, 9), 3),
        bias=np.array([7, -3, 0, 11]),
    )


@pytest.mark.parametrize("fault", [BiasOnEveryRank, NoSum, SummedTwice])
def test_the_row_parallel_check_notices_a_wrong_sum(fault: type[RowParallelLinear]) -> None:
    assert_row_parallel(RowParallelLinear, biased_problem(2))
    with pytest.raises(AssertionError):
        assert_row_parallel(fault, biased_problem(2))


def test_one_rank_alone_sees_no_difference() -> None:
    # Why the checks above need two ranks or more.
    assert_row_parallel(BiasOnEveryRank, biased_problem(1))


@FEW
@given(attention_layouts(), st.integers(0, 2**32))
@example((9, 3, 4, 4), 1)
def test_an_attention_outputs_columns_follow_the_query_heads(layout: tuple[int, int, int, int], seed: int) -> None:
    num_q_heads, num_kv_heads, head_dim, tp_size = layout
    rng, in_size, out_size = np.random.default_rng(seed), num_q_heads * head_dim, 5
    most_x, most_w, most_b = magnitudes(in_size, "float32")
    problem = Problem(
        tp_size=tp_size,
        dtype="float32",
        x=draw_integers(rng, (2, in_size), most_x),
        weight=draw_integers(rng, (out_size, in_size), most_w),
        bias=draw_integers(rng, (out_size,), most_b),
    )

    def make(tp: TPGroup) -> tuple[nn.Module, Tensor]:
        q_heads = head_shard(num_q_heads, num_kv_heads, tp_rank=tp.rank, tp_size=tp.size).q_heads
        layer = RowParallelLinear(
            in_size,
            out_size,
            bias=True,
            tp=tp,
            dtype=torch.float32,
            input_range=scale_range(q_heads, head_dim),
        )
        problem.load(layer)
        by_head = problem.x.reshape(2, num_q_heads, head_dim)[:, list(q_heads)]
        return layer, as_tensor(by_head.reshape(2, -1), "float32")

    for _, y in problem.run(make):
        assert (y == problem.y).all()


@FEW
@given(problems(SIZES, SIZES))
def test_a_replicated_layer_is_whole_on_every_rank(problem: Problem) -> None:
    def make(tp: TPGroup) -> tuple[nn.Module, Tensor]:
        layer = ReplicatedLinear(
            problem.weight.shape[1],
            problem.weight.shape[0],
            bias=problem.bias is not None,
            tp=tp,
            dtype=problem.torch_dtype,
        )
        problem.load(layer)
        return layer, as_tensor(problem.x, problem.dtype)

    for layer, y in problem.run(make):
        assert (y == problem.y).all()
        assert layer.tp.log.snapshot().entered == 0


def test_column_parallel_layers_have_no_collective_and_row_parallel_ones_a_single_all_reduce() -> None:
    def job(tp: TPGroup) -> list[str]:
        column = ColumnParallelLinear(4, 6, bias=True, tp=tp, dtype=torch.float32)
        row = RowParallelLinear(6, 4, bias=True, tp=tp, dtype=torch.float32)
        row(column(torch.zeros(2, 4)))
        return [record.op for record in tp.log.snapshot().records]

    assert on_ranks(3, job) == [["all_reduce"]] * 3
