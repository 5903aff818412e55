"""A module that is made wrong is the one that is named, on the rank on which it was made wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from harness.faults.layouts import LAYOUTS
from harness.studies.calibrate.draws import OPTIONS, drawn_models
from harness.subjects.engine import EngineSubject
from harness.subjects.engine_rank import EngineRank
from harness.verification.budgets import SEARCH_MARGIN, computation
from harness.verification.localise import Excess, Point, Shown, points, search
from harness.verification.reference_results import ReferenceResults
from tests.harness.checking import on_threads
from tests.harness.conftest import MakeModel

TP_SIZE = 3
LAYOUT = LAYOUTS["llama-cut-group"]
FEW = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def results(tiny_model: MakeModel) -> ReferenceResults:
    return ReferenceResults(tiny_model(LAYOUT.config, LAYOUT.dtype), dtype=LAYOUT.dtype, schedule_lengths=(11, 7, 9))


@contextmanager
def subject_with(results: ReferenceResults, tp_size: int = TP_SIZE) -> Iterator[EngineSubject]:
    """Ranks that are threads, with the model on them."""
    with on_threads(tp_size) as subject:
        subject.load(results.folder, dtype=results.dtype, options=OPTIONS)
        yield subject


@pytest.fixture(scope="module")
def loaded(results: ReferenceResults) -> Iterator[EngineSubject]:
    with subject_with(results) as subject:
        yield subject


def scale_rows(rank: EngineRank, path: str, rows: tuple[int, int] | None, factor: float, only: int | None) -> None:
    """Job: multiply rows of a weight (all by default) of this rank, or of one rank alone."""
    if only in (None, rank.tp_rank):
        weight = rank.runner.model.get_submodule(path).weight.data
        weight[slice(None) if rows is None else slice(*rows)] *= factor


@contextmanager
def wrong(subject: EngineSubject, path: str, *, rows: tuple[int, int] | None = None, only: int | None = None) -> Iterator[None]:
    """The weight at this path is twice what it should be: a power of two, so that taking it back leaves every bit."""
    subject.run(scale_rows, path, rows, 2.0, only)
    try:
        yield
    finally:
        subject.run(scale_rows, path, rows, 0.5, only)


def test_nothing_is_named_where_nothing_is_wrong(loaded: EngineSubject, results: ReferenceResults) -> None:
    assert [search(loaded, results, sequence).place for sequence in range(3)] == [None] * 3


@pytest.mark.endurance
@pytest.mark.parametrize(("seed", "number"), [(1, 6), (6, 2)])
def test_a_row_that_was_lucky_in_the_baseline_is_not_named(seed: int, number: int) -> None:
    """A row of these correct models is further off than the worst of the baseline. Simulated rounding says so of any model."""
    models = drawn_models(random.Random(seed), "judge", number + 1, ("bfloat16", "float16"))
    results = next(islice(models, number, None))
    with subject_with(results) as subject:
        for sequence in range(len(results.schedule.sequences)):
            assert search(subject, results, sequence).place is None


@pytest.mark.endurance
@pytest.mark.parametrize(("seed", "dtypes"), [(101, ("float32",)), (102, ("float32",)), (201, ("bfloat16", "float16")),
                                              (202, ("bfloat16", "float16"))])
def test_hardly_a_module_of_a_correct_model_is_well_over_budget(seed: int, dtypes: tuple[str, ...]) -> None:
    over: list[float] = []
    num_sequences = 0
    for results in drawn_models(random.Random(seed), "judge", 100, dtypes):
        for tp_size in (1, TP_SIZE):
            with subject_with(results, tp_size) as subject:
                places = [search(subject, results, sequence).place for sequence in range(len(results.schedule.sequences))]
            num_sequences += len(places)
            over += [place.error_over_budget for place in places if place is not None]
    well_over = [error for error in over if error > SEARCH_MARGIN]
    counts = f"{len(over)} have a module over budget, {len(well_over)} well over it: {[round(error, 2) for error in well_over]}"
    print(f"seed={seed} dtypes={','.join(dtypes)}: of {num_sequences} sequences {counts}")  # noqa: T201
    assert num_sequences >= 300
    assert len(well_over) <= num_sequences / 200


@pytest.mark.parametrize(("over", "named"), [
    ({"model.embed_tokens": 1.3, "model.layers.0.self_attn.k_proj": 2.5, "model.norm": 9.0}, "model.layers.0.self_attn.k_proj"),
    ({"model.layers.0.self_attn.k_proj": 1.3, "model.norm": 1.9}, "model.layers.0.self_attn.k_proj"),
    ({}, None),
])
def test_what_is_over_budget_by_a_little_is_named_only_if_nothing_else_is(
        loaded: EngineSubject, results: ReferenceResults, monkeypatch: pytest.MonkeyPatch, over: dict[str, float],
        named: str | None) -> None:
    def excess(results: ReferenceResults, point: Point, sequence: int, shown: Shown) -> Excess | None:
        return Excess(over[point.label], rank=1, token=2) if point.label in over else None

    monkeypatch.setattr("harness.verification.localise.worst_excess", excess)
    place = search(loaded, results, 0).place
    assert (None if place is None else place.module) == named
    if place is not None:
        assert (place.rank, place.token, "well over" in str(place)) == (1, 2, place.error_over_budget > 2)


@FEW
@given(layer=st.integers(0, 1), only=st.integers(0, TP_SIZE - 1), sequence=st.integers(0, 2),
       where=st.sampled_from(["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "down_proj"]))
@example(layer=1, only=0, sequence=2, where="k_proj")  # rounding of its input, doubled, is over budget
def test_the_module_that_was_made_wrong_is_named(loaded: EngineSubject, results: ReferenceResults, layer: int, only: int,
                                                 sequence: int, where: str) -> None:
    parent = f"model.layers.{layer}." + ("mlp" if where in ("gate_proj", "up_proj", "down_proj") else "self_attn")
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
             "up_proj": "gate_up_proj"}.get(where, where)
    path = f"{parent}.{fused}"
    rows = loaded.run(rows_of_part, path, where)[only]
    with wrong(loaded, path, rows=rows, only=only):
        place = search(loaded, results, sequence).place
    assert place is not None
    assert place.module == f"{parent}.{where}"
    if where not in ("o_proj", "down_proj"):  # after the all-reduce all ranks are wrong alike
        assert place.rank == only
        assert place.effect is not None
        assert place.effect.kind == "multiplied"


def rows_of_part(rank: EngineRank, path: str, part: str) -> tuple[int, int] | None:
    """Job: the rows of one projection in this rank's fused weight; None for all of it."""
    sizes = getattr(rank.runner.model.get_submodule(path), "local_sizes", ())
    names = ("q_proj", "k_proj", "v_proj") if len(sizes) == 3 else ("gate_proj", "up_proj")
    if part not in names or not sizes:
        return None
    index = names.index(part)
    return sum(sizes[:index]), sum(sizes[: index + 1])


@pytest.mark.parametrize("path", ["model.layers.1.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"])
def test_a_norm_is_named(loaded: EngineSubject, results: ReferenceResults, path: str) -> None:
    with wrong(loaded, path):
        place = search(loaded, results, 0).place
    assert place is not None
    assert (place.module, place.token) == (path, 0)
    assert "2 times" in str(place)


def test_a_row_of_the_embedding_is_named_with_the_first_token_that_uses_it(loaded: EngineSubject,
                                                                           results: ReferenceResults) -> None:
    last = results.config["vocab_size"] - 1  # in every sequence, and on the last rank
    local_rows = -(-results.config["vocab_size"] // TP_SIZE)
    row = last - local_rows * (TP_SIZE - 1)
    with wrong(loaded, "model.embed_tokens", rows=(row, row + 1), only=TP_SIZE - 1):
        place = search(loaded, results, 1).place
    assert place is not None
    assert (place.module, place.token) == ("model.embed_tokens", results.schedule.sequences[1].index(last))


def test_points_follow_the_order_of_computation(results: ReferenceResults) -> None:
    labels = [point.label for point in points(EngineSubject.modules(results.config))]
    assert len(labels) == len(set(labels)) == 3 + 11 * results.config["num_hidden_layers"]
    assert labels[:6] == ["model.embed_tokens", "model.layers.0.input_layernorm", "model.layers.0.self_attn.q_proj",
                          "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj",
                          "model.layers.0.self_attn (attention, before o_proj)"]
    assert labels[-2:] == ["model.norm", "lm_head"]


def test_the_reference_is_within_its_own_budget_at_every_point(results: ReferenceResults) -> None:
    exact, baseline = results.exact_activations(0), results.baseline_activations(0)
    for point in points(EngineSubject.modules(results.config)):
        verdict = computation(point.of(baseline), point.of(baseline), point.of(exact), results.dtype)
        assert 0 <= verdict.error_over_budget <= 1, point.label
        assert verdict.compared == point.of(exact).numel() > 0
        assert torch.isfinite(point.of(baseline)).all()
