"""The kernels of TP invariance against float64, and against themselves in other company.

In float16: the interpreter's product of bfloat16 is wrong. What a tensor core does to bits is left to the GPU.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine.kernels.invariant_attention_gpu import decode_in_order, prefill_in_order
from engine.kernels.invariant_matmul_gpu import add_leaves, linear_in_leaves, linear_in_order
from engine.kernels.invariant_row_gpu import RowCut, row_in_order, sums_of_row
from engine.kernels.log_softmax import log_softmax, log_softmax_torch
from engine.kernels.quanta import row_peaks, unit_exponents, value_of_sums
from engine.kernels.rms_norm import add_rms_norm, add_rms_norm_of_quanta
from engine.parallel.sharding import leaf_range
from tests.engine.kernels.problems import (
    attention_budget,
    attention_problem,
    exact_attention,
    over_budget,
    rounding_budget,
)

HALF = torch.float16


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(HALF)


def leaf_sums(x: Tensor, weight: Tensor, peak: Tensor, unit: Tensor, *, leaf: int, shares: int = 2) -> Tensor:
    sums = torch.zeros((x.shape[0], weight.shape[0]), dtype=torch.int32)
    add_leaves(x, weight, peak, unit, sums, leaf=leaf, shares=shares)
    return sums


def share_of_budget(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rounded: Tensor | float = 0.0) -> float:
    added = 0.0 if bias is None else bias.double()
    exact, scale = x.double() @ weight.double().T + added, x.double().abs() @ weight.double().abs().T
    return over_budget(y, exact, rounding_budget(exact, scale, HALF) + rounded)


@pytest.mark.parametrize(("rows", "outputs", "inputs", "leaf"), [(70, 33, 100, 24), (3, 40, 300, 128), (2, 9, 96, 96)])
def test_products_are_right(rows: int, outputs: int, inputs: int, leaf: int) -> None:
    x, weight, bias = drawn(rows, inputs) * 2.0**-8, drawn(outputs, inputs, seed=1), drawn(outputs, seed=2)
    peak, unit = row_peaks(x), unit_exponents(weight, leaf)
    assert torch.equal(peak.view(torch.float32), x.float().abs().amax(1))
    # Half a quantum a leaf.
    quanta = (peak.view(torch.float32).frexp().exponent[:, None] - unit).double().exp2()
    rounded = -(-inputs // leaf) / 2 * quanta
    for added in (None, bias):
        assert share_of_budget(linear_in_order(x, weight, added), x, weight, added) <= 1
        assert share_of_budget(linear_in_leaves(x, weight, peak, unit, added, leaf=leaf), x, weight, added, rounded) <= 1


@pytest.mark.parametrize(("outputs", "inputs"), [(40, 300), (9, 96), (33, 130)])
def test_one_row_gets_what_it_gets_among_many(outputs: int, inputs: int) -> None:
    """The interpreter's own sums within a leaf go by the shape of its arrays, which may be a quantum."""
    x, weight, bias = drawn(1, inputs), drawn(outputs, inputs, seed=1), drawn(outputs, seed=2)
    peak, unit = row_peaks(x), unit_exponents(weight, 16)
    expected = leaf_sums(x, weight, peak, unit, leaf=16, shares=1)
    for cut in (RowCut(8, 64), RowCut(16, 512, num_stages=1)):
        for given in (None, peak):
            sums, found = sums_of_row(x, weight, unit, cut, leaf=16, peak_T=given)
            assert torch.equal(found, peak)
            assert ((sums - expected).abs() <= -(-inputs // 16)).all()
        for added in (None, bias):
            assert share_of_budget(row_in_order(x, weight, added, cut=cut), x, weight, added) <= 1


@pytest.mark.parametrize("tp_size", [1, 3])
def test_leaves_give_the_same_integers_over_any_ranks_and_programs(tp_size: int) -> None:
    x, weight = drawn(6, 100), drawn(10, 100, seed=1)
    x[:, 7] *= 1000
    peak, unit = row_peaks(x), unit_exponents(weight, 8)
    whole, total = leaf_sums(x, weight, peak, unit, leaf=8, shares=1), torch.zeros((6, 10), dtype=torch.int32)
    for rank in range(tp_size):
        mine = leaf_range(100, 8, tp_rank=rank, tp_size=tp_size)
        part = slice(mine.start, mine.stop)
        assert (row_peaks(x[:, part]) <= peak).all()
        total += leaf_sums(x[:, part], weight[:, part], peak, unit, leaf=8, shares=rank + 1)
    assert torch.equal(total, whole)
    assert torch.equal(value_of_sums(total, peak, unit, None, HALF), linear_in_leaves(x, weight, peak, unit, None, leaf=8))


def test_no_sum_leaves_int32_and_a_row_that_is_not_finite_is_nan() -> None:
    x, weight = torch.full((5, 64), 60_000.0, dtype=HALF), torch.full((3, 64), 60_000.0, dtype=HALF)
    x[1, 20], x[2, 21], x[3] = math.nan, -math.inf, 0
    weight[1] *= -1
    peak, unit = row_peaks(x), unit_exponents(weight, 8)
    sums = leaf_sums(x, weight, peak, unit, leaf=8)[[0, 4]]
    assert (sums.sign() == torch.tensor([1, -1, 1])).all()
    assert (sums.abs() >= 2**22).all()
    y = value_of_sums(leaf_sums(x, weight, peak, unit, leaf=8), peak, unit, None, torch.float32)
    assert y.isnan().all(1).tolist() == [False, True, True, False, False]
    assert (y[3] == 0).all()
    assert torch.allclose(y[0], torch.tensor([64.0, -64, 64]) * 60_000.0**2, rtol=1e-6)


def test_a_norm_of_quanta_is_that_of_what_they_stand_for() -> None:
    x, weight, residual, scale = drawn(4, 40), drawn(30, 40, seed=1), drawn(4, 30, seed=2), drawn(30, seed=3)
    peak, unit = row_peaks(x), unit_exponents(weight, 16)
    sums = leaf_sums(x, weight, peak, unit, leaf=16)
    found = add_rms_norm_of_quanta(sums, peak, unit, residual, scale, 1e-6)
    expected = add_rms_norm(value_of_sums(sums, peak, unit, None, HALF), residual, scale, 1e-6)
    assert torch.equal(found[1], expected[1])
    assert torch.allclose(found[0], expected[0], rtol=2**-10)


def test_attention_is_right_and_a_query_gets_the_same_from_a_prompt_and_from_decode_steps() -> None:
    problem = attention_problem(query_lens=(66, 0, 3), context_lens=(66, 0, 100), q_counts=(2, 1), head_dim=24, dtype=HALF,
                                padding_rows=2)
    cache = (problem.k_cache, problem.v_cache)
    out = torch.full(problem.q.shape, float("nan"), dtype=HALF)
    prefill_in_order(problem.q, *cache, problem.block_tables, problem.cu_seqlens_q, problem.context_lens, problem.kv_of_q,
                     problem.scale, out_TQH=out)
    exact, scale = exact_attention(problem)
    assert over_budget(out, exact, attention_budget(exact, scale, HALF, rounded_weights=True)) <= 1
    other = torch.full_like(out, float("nan"))
    prefill_in_order(problem.q, *cache, problem.block_tables, problem.cu_seqlens_q, problem.context_lens, problem.kv_of_q,
                     problem.scale, out_TQH=other, rows=64)
    assert torch.equal(other, out)
    # The last three queries of the last sequence, and one in the middle of the first, as steps of their own.
    rows, seqs, contexts = [66, 67, 68, 65, 40], [2, 2, 2, 0, 0], torch.tensor([98, 99, 100, 66, 41], dtype=torch.int32)
    for programs in (1, 2):
        step = torch.full((5, *out.shape[1:]), float("nan"), dtype=HALF)
        decode_in_order(problem.q[rows], *cache, problem.block_tables[seqs], contexts, problem.q_start, problem.q_count,
                        problem.scale, out_SQH=step, max_context=112, max_group=2, programs=programs)
        assert torch.equal(step, out[rows])


def test_log_softmax_is_the_twin_s() -> None:
    x = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * 10
    x[1, :4000] = -math.inf
    assert torch.allclose(log_softmax(x), log_softmax_torch(x), rtol=1e-5, atol=1e-5)
