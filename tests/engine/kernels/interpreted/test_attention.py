"""The decode and the prefill kernel against the dense formula, in float32 and float16.

``tl.dot`` of bfloat16 is wrong in the interpreter; that type is left to the GPU.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.paged_decode import paged_decode
from engine.kernels.paged_prefill import paged_prefill
from tests.engine.kernels.problems import (
    AttentionProblem,
    attention_budget,
    attention_problem,
    exact_attention,
    over_budget,
)


def _decode(problem: AttentionProblem, **options: Any) -> torch.Tensor:
    inputs = (problem.q, problem.k_cache, problem.v_cache, problem.block_tables, problem.context_lens)
    out = torch.full(problem.q.shape, float("nan"), dtype=problem.q.dtype)
    return paged_decode(*inputs, problem.q_start, problem.q_count, problem.scale, out_SQH=out, **options)


def _prefill(problem: AttentionProblem, **options: Any) -> torch.Tensor:
    out = torch.full(problem.q.shape, float("nan"), dtype=problem.q.dtype)
    return paged_prefill(
        problem.q,
        problem.k_cache,
        problem.v_cache,
        problem.block_tables,
        problem.cu_seqlens_q,
        problem.context_lens,
        problem.kv_of_q,
        problem.scale,
        out_TQH=out,
        **options,
    )


def _share_of_budget(problem: AttentionProblem, actual: torch.Tensor) -> float:
    exact, scale = exact_attention(problem)
    return over_budget(actual, exact, attention_budget(exact, scale, problem.q.dtype, rounded_weights=True))


_SHAPES = {
    "head_dim": st.sampled_from([8, 40, 64, 80, 128]),
    "block_size": st.sampled_from([1, 16, 48, 64]),
    "dtype": st.sampled_from([torch.float32, torch.float16]),
    "seed": st.integers(0, 2**16),
}


@given(
    problem=st.builds(
        lambda contexts, **shapes: attention_problem(context_lens=contexts, query_lens=[1] * len(contexts), **shapes),
        contexts=st.lists(st.sampled_from([0, 1, 15, 16, 17, 48, 64, 65, 100]), min_size=1, max_size=3),
        q_counts=st.sampled_from([(1,), (4,), (2, 2), (3, 2), (1, 3, 3), (18,)]),
        **_SHAPES,
    ),
    tile=st.sampled_from([16, 32]),
    num_programs=st.sampled_from([1, 2, 3, 5, 50]),
)
def test_decode_is_the_dense_formula(problem: AttentionProblem, tile: int, num_programs: int) -> None:
    out = _decode(problem, tile=tile, num_programs=num_programs)
    assert _share_of_budget(problem, out) <= 1


def test_decode_is_the_dense_formula_wherever_the_sequences_are_cut() -> None:
    problem = attention_problem(query_lens=[1] * 4, context_lens=[70, 0, 16, 39], q_counts=(2,), head_dim=16)
    uncut = _decode(problem, tile=16, num_programs=1)
    for num_programs in range(1, 11):  # there are ten tiles
        out = _decode(problem, tile=16, num_programs=num_programs)
        assert _share_of_budget(problem, out) <= 1
    assert not torch.equal(out, uncut), "must have been cut"


@given(
    problem=st.builds(
        lambda lengths, **shapes: attention_problem(
            context_lens=[prefix + count for prefix, count in lengths],
            query_lens=[count for _, count in lengths],
            **shapes,
        ),
        lengths=st.lists(
            st.tuples(st.sampled_from([0, 1, 16, 31]), st.sampled_from([0, 1, 5, 16, 17, 33])),
            min_size=1,
            max_size=3,
        ),
        q_counts=st.sampled_from([(1,), (4,), (2, 2), (3, 2), (1, 3, 3)]),  # a program each: more of them show no more
        padding_rows=st.sampled_from([0, 0, 3, 20]),
        **_SHAPES,
    ),
    tile=st.sampled_from([16, 32]),
)
def test_prefill_is_the_dense_formula(problem: AttentionProblem, tile: int) -> None:
    assert _share_of_budget(problem, _prefill(problem, tile_q=16, tile=tile)) <= 1


def test_default_launches_are_right_too() -> None:
    problem = attention_problem(query_lens=[1, 1], context_lens=[130, 70], block_size=64)
    assert _share_of_budget(problem, _decode(problem)) <= 1
    assert _share_of_budget(problem, _prefill(problem)) <= 1


def test_padding_comes_out_as_zeros_wherever_the_sequences_are_cut() -> None:
    problem = attention_problem(query_lens=[1, 1], context_lens=[0, 20], padding_rows=0)
    for num_programs in (1, 2, 3):
        out = _decode(problem, tile=16, num_programs=num_programs)
        assert not out[0].any()
        assert out[1].all()
    padded = attention_problem(query_lens=[1, 2], context_lens=[0, 20], padding_rows=18)
    out = _prefill(padded, tile_q=16, tile=16)
    assert not out[0].any()
    assert out[1:3].all()
    assert not out[3:].any()


def test_a_scale_that_is_not_positive_is_refused() -> None:
    problem = attention_problem(query_lens=[1], context_lens=[20])
    with pytest.raises(ValueError, match="scale=0"):
        _prefill(replace(problem, scale=0.0))


@pytest.mark.parametrize("run", [_decode, _prefill])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_scores_do_not_overflow(run: Any, dtype: torch.dtype) -> None:
    problem = attention_problem(query_lens=[1, 1], context_lens=[40, 64], dtype=dtype, spread=50.0)
    assert _share_of_budget(problem, run(problem, tile=16)) <= 1


def test_the_budget_would_notice_a_key_too_few_and_a_block_too_early() -> None:
    problem = attention_problem(query_lens=[1], context_lens=[40], block_size=16, dtype=torch.float16)
    fewer = replace(problem, context_lens=problem.context_lens - 1)
    early = problem.block_tables.clone()
    early[0, 1] = early[0, 0]
    for run in (_decode, _prefill):
        assert _share_of_budget(problem, run(problem)) <= 1
        assert _share_of_budget(problem, run(fewer)) > 10
        assert _share_of_budget(problem, run(replace(problem, block_tables=early))) > 10


def test_strided_tables_and_lengths_are_read_in_order() -> None:
    problem = attention_problem(query_lens=[1, 1, 1], context_lens=[20, 33, 7], q_counts=(3, 2))
    every_other: dict[str, Any] = {
        name: torch.stack([getattr(problem, name)] * 2, dim=-1)[..., 0]
        for name in ("block_tables", "context_lens", "cu_seqlens_q", "kv_of_q", "q_start", "q_count")
    }
    strided = replace(problem, **every_other)
    assert not strided.block_tables.is_contiguous()
    for run in (_decode, _prefill):
        assert torch.equal(run(strided), run(problem))
