"""Every parallel layer on live gloo ranks, to the bit; a failure is brought down to its smallest shape, tp_size and dtype.

``pytest -m multirank -k row_parallel`` runs those of one kind of layer, as whoever changes it would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from engine.layers.matmul import linear
from engine.parallel.linear import RowParallelLinear
from engine.ranks.ranks import RankContext
from harness.checks.base import Answer
from harness.checks.layer_cases import LayerCase
from harness.checks.layers import run_case
from harness.live_ranks import RankPools
from harness.subjects.engine_rank import EngineRank

KINDS = {"column_parallel": "column", "merged_column_parallel": "merged", "qkv_parallel": "qkv", "row_parallel": "row",
         "row_parallel_attention_output": "attention_output", "vocab_parallel_embedding": "embedding",
         "vocab_parallel_lm_head": "lm_head"}
Job = Callable[[RankContext, LayerCase], list[Answer]]


@st.composite
def problems(draw: st.DrawFn, layer: str) -> dict[str, Any]:
    """``tp_size`` and ``case``: one layer on integers that its dtype adds exactly."""
    tp_size = draw(st.sampled_from([2, 3]))
    num_kv_heads = draw(st.integers(1, 3))
    group = draw(st.integers(-(-tp_size // num_kv_heads), 4))
    case = LayerCase(layer=layer, hidden_size=draw(st.integers(1, 40)), intermediate_size=draw(st.integers(tp_size, 8 * tp_size)),
                     num_q_heads=num_kv_heads * group, num_kv_heads=num_kv_heads, head_dim=draw(st.sampled_from([2, 4, 8])),
                     vocab_size=draw(st.integers(tp_size, 9 * tp_size)), bias=layer != "embedding" and draw(st.booleans()),
                     dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])), seed=draw(st.integers(0, 2**31 - 1)))
    return {"tp_size": tp_size, "case": case}


def run_layer(rank: RankContext, case: LayerCase) -> list[Answer]:
    """Job: the engine's layer on this rank, compared."""
    return run_case(EngineRank(rank), case)


def assert_whole(ranks: RankPools, tp_size: int, case: LayerCase, job: Job = run_layer) -> None:
    for rank, (answer,) in enumerate(ranks(tp_size).run(job, case, timeout_s=60.0)):
        assert answer.compared
        assert answer.problem is None, f"rank {rank} of {tp_size}: {case}: {answer.problem}"


@pytest.mark.multirank
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_layer_on_live_ranks_gives_what_the_whole_one_gives(ranks: RankPools, kind: str) -> None:
    @settings(deadline=None, max_examples=25)
    @given(problems(kind))
    def check(problem: dict[str, Any]) -> None:
        assert_whole(ranks, **problem)

    check()


def add_the_bias_on_every_rank(rank: RankContext, case: LayerCase) -> list[Answer]:
    """Job: as ``run_layer``, with a fault planted in this rank's process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowParallelLinear, "forward", lambda self, x: self.tp.all_reduce(linear(x, self.weight, self.bias)))
        return run_layer(rank, case)


@pytest.mark.multirank
def test_a_row_parallel_bias_on_every_rank_is_found_in_its_smallest_case(ranks: RankPools) -> None:
    @settings(deadline=None, max_examples=50, database=None, derandomize=True, phases=(Phase.generate, Phase.shrink))
    @given(problems("row"))
    def check(problem: dict[str, Any]) -> None:
        assert_whole(ranks, **problem, job=add_the_bias_on_every_rank)

    smallest = r"rank 0 of 2: row layer, 2->1, with bias, float32 integers, seed=\d+: 1 of \d+ values differ"
    with pytest.raises(AssertionError, match=smallest):
        check()
