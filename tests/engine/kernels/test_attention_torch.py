"""The plain-torch paged attention against a dense formula in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels import attention_torch
from engine.kernels.attention_torch import paged_attention_torch
from engine.kernels.paged_decode import paged_decode_torch
from tests.engine.kernels.problems import (
    AttentionProblem,
    attention_budget,
    attention_problem,
    exact_attention,
    over_budget,
)


def _run(problem: AttentionProblem) -> torch.Tensor:
    return paged_attention_torch(
        problem.q,
        problem.k_cache,
        problem.v_cache,
        problem.block_tables,
        problem.cu_seqlens_q,
        problem.context_lens,
        problem.kv_of_q,
        problem.scale,
    )


def _share_of_budget(problem: AttentionProblem, actual: torch.Tensor) -> float:
    exact, scale = exact_attention(problem)
    return over_budget(actual, exact, attention_budget(exact, scale, problem.q.dtype, rounded_weights=False))


@st.composite
def _problems(draw: st.DrawFn) -> AttentionProblem:
    of_all_lengths = st.lists(st.integers(0, 70), min_size=1, max_size=5)
    of_one_length = st.integers(1, 70).flatmap(lambda length: st.lists(st.just(length), min_size=2, max_size=4))
    contexts = draw(of_all_lengths | of_one_length)
    return attention_problem(
        context_lens=contexts,
        query_lens=[draw(st.sampled_from([min(1, n), n, n // 2])) for n in contexts],
        q_counts=draw(st.sampled_from([(1,), (4,), (2, 2), (3, 2), (1, 3, 3)])),
        head_dim=draw(st.sampled_from([8, 40, 64])),
        block_size=draw(st.sampled_from([1, 16, 48, 256])),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])),
        padding_rows=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=60, deadline=None)
@given(_problems())
def test_any_mix_of_prefill_and_decode_is_the_dense_formula(problem: AttentionProblem) -> None:
    assert _share_of_budget(problem, _run(problem)) <= 1


def test_score_tensors_that_need_cutting_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = attention_problem(query_lens=[30, 1, 1, 0], context_lens=[50, 9, 40, 3], dtype=torch.float64)
    monkeypatch.setattr(attention_torch, "_MAX_SCORES", 1000)
    assert _share_of_budget(problem, _run(problem)) <= 1


def test_padding_sequences_and_padding_rows_come_out_as_zeros() -> None:
    problem = attention_problem(query_lens=[1, 1, 2], context_lens=[0, 5, 2], padding_rows=3)
    out = _run(problem)
    assert not out[0].any()
    assert not out[4:].any()
    assert out[1:4].any(dim=2).all()


def test_the_budget_would_notice_a_causal_mask_that_is_off_by_one() -> None:
    problem = attention_problem(query_lens=[20], context_lens=[33])
    exact, scale = exact_attention(problem, shift=1)
    budget = attention_budget(exact, scale, torch.float32, rounded_weights=False)
    assert over_budget(_run(problem), exact, budget) > 100


def test_the_budget_would_notice_a_wrong_kv_head_at_an_uneven_border() -> None:
    problem = attention_problem(query_lens=[1], context_lens=[33], q_counts=(3, 2))
    wrong = replace(problem, kv_of_q=torch.tensor([0, 0, 1, 1, 1]))
    assert _share_of_budget(problem, _run(problem)) <= 1
    assert _share_of_budget(problem, _run(wrong)) > 100


def test_the_budget_would_notice_two_blocks_swapped() -> None:
    problem = attention_problem(query_lens=[4], context_lens=[40], block_size=16)
    swapped = problem.block_tables.clone()
    swapped[0, [0, 2]] = swapped[0, [2, 0]]
    assert _share_of_budget(problem, _run(replace(problem, block_tables=swapped))) > 100


def test_other_sequences_in_the_batch_do_not_change_a_result_beyond_rounding() -> None:
    problem = attention_problem(query_lens=[1, 1, 1], context_lens=[17, 60, 3])
    together = _run(problem)
    for s in range(3):
        alone = paged_attention_torch(
            problem.q[s : s + 1],
            problem.k_cache,
            problem.v_cache,
            problem.block_tables[s : s + 1],
            [0, 1],
            problem.context_lens[s : s + 1],
            problem.kv_of_q.tolist(),
            problem.scale,
        )
        _, scale = exact_attention(problem)
        assert over_budget(together[s : s + 1], alone, 16 * 2.0**-24 * scale[s : s + 1]) <= 1


def test_the_decode_twin_maps_uneven_groups_and_writes_where_it_is_told() -> None:
    problem = attention_problem(query_lens=[1, 1], context_lens=[17, 0], q_counts=(2, 3))
    out = torch.full(problem.q.shape, float("nan"))
    result = paged_decode_torch(
        problem.q,
        problem.k_cache,
        problem.v_cache,
        problem.block_tables,
        problem.context_lens,
        problem.q_start,
        problem.q_count,
        problem.scale,
        out_SQH=out,
    )
    assert result is out
    assert torch.equal(out, _run(problem))
