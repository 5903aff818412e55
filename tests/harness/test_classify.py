"""Each kind of bug, made from tensors alone, is named for what it is; what is right, or nothing known, is not named at all."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.verification.budgets import constants
from harness.verification.classify import Evidence, Kind, classify, spans
from reference.hf import DTYPES

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TOKENS, WIDTH = 12, 24
SEEDS, OTHER_SEEDS = st.integers(0, 2**31 - 1), st.integers(2**31, 2**32 - 1)  # one seed twice would be one tensor twice


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """A row-parallel layer's exact parts and bias, the same in the dtype, and what else may stand in its place."""
    tp_size = draw(st.integers(2, 4))
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    generator = torch.Generator().manual_seed(draw(SEEDS))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    parts = {f"rank {rank}": normal(TOKENS, WIDTH) for rank in range(tp_size)}
    parts["bias"] = normal(WIDTH).expand(TOKENS, WIDTH)
    exact = torch.stack(list(parts.values())).sum(0)
    return {
        "tp_size": tp_size, "dtype": dtype, "exact": exact, "parts": parts, "baseline": exact.to(DTYPES[dtype]),
        "foreign": {(1, 0): normal(TOKENS, WIDTH)},
        "columns": {"own": exact, "sibling": normal(TOKENS, WIDTH)}, "own": ("own", torch.arange(WIDTH)),
        "shards": torch.arange(WIDTH).tensor_split(tp_size),
        "rows": {"elsewhere": normal(5, WIDTH)},
    }


def classified(problem: dict[str, Any], wrong: Tensor) -> str | None:
    """The kind that is found for a candidate that is ``wrong`` in the problem's dtype."""
    effect = classify(Evidence(candidate=wrong.to(DTYPES[problem["dtype"]]), **problem))
    return None if effect is None else effect.kind


@FEW
@given(problems())
def test_what_is_right_has_no_effect(problem: dict[str, Any]) -> None:
    assert classified(problem, problem["exact"]) is None


@FEW
@given(problems(), OTHER_SEEDS)
def test_what_has_nothing_to_do_with_it_is_not_explained(problem: dict[str, Any], seed: int) -> None:
    unrelated = torch.randn(problem["exact"].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert classified(problem, 2 * unrelated) is None


@FEW
@given(problems())
def test_a_second_reduce_multiplies_by_tp_size(problem: dict[str, Any]) -> None:
    effect = classify(Evidence(candidate=(problem["exact"] * problem["tp_size"]).to(problem["baseline"].dtype), **problem))
    assert effect is not None
    assert (effect.kind, "tp_size times" in effect.text) == ("multiplied", True)


@FEW
@given(problems())
def test_a_mean_divides_by_tp_size(problem: dict[str, Any]) -> None:
    effect = classify(Evidence(candidate=(problem["exact"] / problem["tp_size"]).to(problem["baseline"].dtype), **problem))
    assert effect is not None
    assert (effect.kind, "1/tp_size" in effect.text) == ("multiplied", True)


@FEW
@given(problems(), st.booleans())
def test_a_bias_too_many_or_none_is_a_bias(problem: dict[str, Any], is_left_out: bool) -> None:
    extra = -1 if is_left_out else problem["tp_size"] - 1
    assert classified(problem, problem["exact"] + extra * problem["parts"]["bias"]) == "bias"


@FEW
@given(problems(), OTHER_SEEDS)
def test_another_bias_is_a_bias(problem: dict[str, Any], seed: int) -> None:
    other = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert classified(problem, problem["exact"] + 2 * other) == "bias"


@FEW
@given(problems(), st.data())
def test_a_part_that_is_missing_is_named_with_its_rank(problem: dict[str, Any], data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, problem["tp_size"] - 1))
    missing = problem["exact"] - problem["parts"][f"rank {rank}"]
    effect = classify(Evidence(candidate=missing.to(problem["baseline"].dtype), **problem))
    assert effect is not None
    assert (effect.kind, f"part of rank {rank} is missing" in effect.text) == ("lost", True)


@FEW
@given(problems())
def test_a_part_that_is_missing_for_some_tokens_is_told_with_their_number(problem: dict[str, Any]) -> None:
    wrong = problem["exact"].clone()
    wrong[4:7] -= problem["parts"]["rank 1"][4:7]
    effect = classify(Evidence(candidate=wrong.to(problem["baseline"].dtype), **problem))
    assert effect is not None
    assert (effect.kind, f"3 of {TOKENS} tokens" in effect.text) == ("lost", True)


@FEW
@given(problems())
def test_a_rank_that_uses_another_ones_shard_is_named(problem: dict[str, Any]) -> None:
    wrong = problem["exact"] - problem["parts"]["rank 1"] + problem["foreign"][1, 0]
    effect = classify(Evidence(candidate=wrong.to(problem["baseline"].dtype), **problem))
    assert effect is not None
    assert (effect.kind, "rank 1 computes with rank 0's shard" in effect.text) == ("repeated", True)


@FEW
@given(problems(), st.data())
def test_columns_in_another_order_are_permuted(problem: dict[str, Any], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(WIDTH)).filter(lambda order: order != list(range(WIDTH))))
    assert classified(problem, problem["exact"][:, order]) == "permuted"


@FEW
@given(problems())
def test_columns_of_a_sibling_are_permuted(problem: dict[str, Any]) -> None:
    wrong = problem["exact"].clone()
    wrong[:, 3:9] = problem["columns"]["sibling"][:, 10:16]
    effect = classify(Evidence(candidate=wrong.to(problem["baseline"].dtype), **problem))
    assert effect is not None
    assert (effect.kind, effect.text) == ("permuted", "columns 3-8 hold sibling 10-15")


@FEW
@given(problems())
def test_a_shard_that_stands_twice_is_repeated(problem: dict[str, Any]) -> None:
    first, last = problem["shards"][0], problem["shards"][-1]
    wrong = problem["exact"].clone()
    wrong[:, last] = wrong[:, first[: len(last)]]
    effect = classify(Evidence(candidate=wrong.to(problem["baseline"].dtype), **problem))
    assert effect is not None
    assert (effect.kind, "rank 0's shard again" in effect.text) == ("repeated", True)


@FEW
@given(problems())
def test_rows_that_belong_elsewhere_are_stale(problem: dict[str, Any]) -> None:
    wrong = problem["exact"].clone()
    wrong[5] = problem["rows"]["elsewhere"][2]
    effect = classify(Evidence(candidate=wrong.to(problem["baseline"].dtype), **problem))
    assert effect is not None
    assert (effect.kind, "token 5 has those of elsewhere, token 2" in effect.text) == ("stale", True)


@FEW
@given(problems(), st.integers(1, TOKENS))
def test_zeros_where_no_parts_are_known_are_zeros(problem: dict[str, Any], num_rows: int) -> None:
    wrong = problem["exact"].clone()
    wrong[:num_rows] = 0
    problem |= {"parts": {"product": problem["exact"]}, "foreign": {}}
    assert classified(problem, wrong) == "zeros"


@FEW
@given(problems(), st.integers(0, WIDTH - 1))
def test_one_column_of_nan_was_never_written(problem: dict[str, Any], column: int) -> None:
    wrong = problem["exact"].clone()
    wrong[:, column] = torch.nan
    effect = classify(Evidence(candidate=wrong.to(problem["baseline"].dtype), **problem))
    assert effect is not None
    assert (effect.kind, f"NaN in columns {column}:" in effect.text) == ("nan", True)


@FEW
@given(problems(), st.integers(0, WIDTH - 1))
def test_another_width_is_a_shape(problem: dict[str, Any], width: int) -> None:
    assert classified(problem, problem["exact"][:, :width]) == "shape"


@pytest.mark.parametrize("error", [0.5, 3.0])
def test_an_error_of_rounding_is_none_and_one_above_its_budget_is_not_explained_away(error: float) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(40, 64, generator=generator, dtype=torch.float64)
    noise, drawn = torch.randn(2, 40, 64, generator=generator, dtype=torch.float64) * 2.0**-24 * 30
    allowed = constants("typical", "float32").k
    evidence = Evidence(candidate=(exact + noise * allowed * error).float(), baseline=(exact + drawn).float(), exact=exact,
                        dtype="float32", tp_size=2,
                        parts={"product": exact}, columns={"own": exact}, own=("own", torch.arange(64)), rows={"own": exact})
    assert (len(evidence.wrong_rows()) > 0) == (error > 1)
    assert classify(evidence) is None


@pytest.mark.parametrize("factor", [2, 4])
def test_what_comes_out_multiplied_has_its_rounding_errors_multiplied(factor: int) -> None:
    """The input's errors reach it, too: by themselves within budget, multiplied they are above what the right output allows."""
    generator = torch.Generator().manual_seed(0)
    exact, *noise = torch.randn(3, 40, 64, generator=generator, dtype=torch.float64)
    of_baseline, of_candidate = noise[0] * 2.0**-24 * 30, noise[1] * 2.0**-24 * 30 * constants("typical", "float32").k * 0.7
    evidence = Evidence(candidate=(factor * (exact + of_candidate)).float(), baseline=(exact + of_baseline).float(), exact=exact,
                        dtype="float32", tp_size=factor, parts={"product": exact})
    effect = classify(evidence)
    assert effect is not None
    assert (effect.kind, "tp_size times" in effect.text) == ("multiplied", True)


def test_values_in_place_of_zeros_are_those_of_other_rows() -> None:
    elsewhere = torch.randn(8, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = torch.zeros_like(elsewhere)
    effect = classify(Evidence(candidate=elsewhere.float(), baseline=exact.float(), exact=exact, dtype="float32", tp_size=2,
                               rows={"elsewhere": elsewhere}))
    assert effect is not None
    assert effect.kind == "stale"


def test_columns_of_a_wide_tensor_are_looked_at_in_steps() -> None:
    exact = torch.randn(8, 3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    effect = classify(Evidence(candidate=exact.flip(1).float(), baseline=exact.float(), exact=exact, dtype="float32", tp_size=2,
                               parts={"product": exact}, columns={"own": exact}, own=("own", torch.arange(3000))))
    assert effect is not None
    assert effect.kind == "permuted"
    assert effect.text.startswith("columns 0, 3, 6, 9, 12, 15 and 994 more hold own 2999, 2996")


@pytest.mark.parametrize(("numbers", "text"), [
    ([], ""), ([4], "4"), ([0, 1, 2, 7, 9, 8], "0-2, 7, 9, 8"), (list(range(0, 16, 2)), "0, 2, 4, 6, 8, 10 and 2 more"),
])
def test_numbers_are_shown_as_runs(numbers: list[int], text: str) -> None:
    assert spans(numbers) == text


def test_every_kind_is_described() -> None:
    assert len(get_args(Kind)) == len(set(get_args(Kind))) == 9
