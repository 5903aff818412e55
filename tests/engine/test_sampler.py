"""Drawing tokens: the right distribution, the right candidates, and nothing that depends on the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from engine.frontend.sampling import SamplingParams
from engine.layers.sampler import filter_top_k_top_p, sample
from engine.scheduling.batch import SamplingBatch
from tests.engine.support import FEW, MANY

NUM_DRAWS = 20_000
# 99.9 % of chi-square with so many degrees of freedom; draws have fixed seeds, so a pass stays a pass.
CHI_SQUARE_LIMIT = {2: 13.82, 4: 18.47, 7: 24.32}
BORDER = 1e-4  # how near a sum of probabilities may come to top_p before rounding decides which side it is on


def wishes(
    num_rows: int,
    *,
    temperature: float | list[float] = 1.0,
    top_k: int | list[int] = 0,
    top_p: float | list[float] = 1.0,
    seed: list[int] | None = None,
    position: list[int] | None = None,
    banned: list[tuple[int, int]] = [],  # noqa: B006
) -> SamplingBatch:
    """How to draw ``num_rows`` tokens; single values are for all rows, seeds count from 0."""

    def each(value: Any) -> list[Any]:
        return value if isinstance(value, list) else [value] * num_rows

    return SamplingBatch(
        temperature_R=torch.tensor(each(temperature), dtype=torch.float32),
        top_k_R=torch.tensor(each(top_k), dtype=torch.int32),
        top_p_R=torch.tensor(each(top_p), dtype=torch.float32),
        seed_R=torch.tensor(list(range(num_rows)) if seed is None else seed),
        position_R=torch.tensor([3] * num_rows if position is None else position),
        banned_row_X=torch.tensor([row for row, _ in banned], dtype=torch.int64),
        banned_token_X=torch.tensor([token for _, token in banned], dtype=torch.int64),
        filters=any(k > 0 for k in each(top_k)) or any(p < 1 for p in each(top_p)),
    )


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    powers = np.exp(np.asarray(logits, dtype=np.float64) - np.max(logits))
    return powers / powers.sum()


def chi_square(tokens: Tensor, probabilities: NDArray[np.float64]) -> float:
    """The statistic over the tokens that can be drawn at all; infinite if another was drawn."""
    counts = np.bincount(tokens.numpy(), minlength=len(probabilities))
    possible = probabilities > 0
    if counts[~possible].any():
        return np.inf
    expected = probabilities[possible] * len(tokens)
    return float(((counts[possible] - expected) ** 2 / expected).sum())


LOGITS = torch.tensor([0.3, -1.0, 1.2, 0.0, 0.7, -0.4, 1.0, -0.2])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_follow_the_softmax_of_the_tempered_logits(temperature: float, dtype: torch.dtype) -> None:
    tokens = sample(LOGITS.to(dtype).expand(NUM_DRAWS, -1), wishes(NUM_DRAWS, temperature=temperature))
    assert chi_square(tokens, softmax(LOGITS.numpy() / temperature)) < CHI_SQUARE_LIMIT[7]


def test_the_positions_of_one_seed_are_as_independent_as_seeds_are() -> None:
    positions = list(range(NUM_DRAWS))
    tokens = sample(LOGITS.expand(NUM_DRAWS, -1), wishes(NUM_DRAWS, seed=[5] * NUM_DRAWS, position=positions))
    assert chi_square(tokens, softmax(LOGITS.numpy())) < CHI_SQUARE_LIMIT[7]
    pairs = tokens[0::2] * 8 + tokens[1::2]
    single = softmax(LOGITS.numpy())
    # 63 degrees of freedom: 99.9 % lie below 103.4.
    assert chi_square(pairs, np.outer(single, single).flatten()) < 103.4


def test_the_distribution_check_notices_another_temperature() -> None:
    tokens = sample(LOGITS.expand(NUM_DRAWS, -1), wishes(NUM_DRAWS, temperature=1.15))
    assert chi_square(tokens, softmax(LOGITS.numpy())) > 2 * CHI_SQUARE_LIMIT[7]


@pytest.mark.parametrize(("top_k", "top_p", "kept"), [(3, 1.0, [2, 4, 6]), (0, 0.8, [0, 2, 3, 4, 6]), (5, 0.62, [2, 4, 6])])
def test_draws_among_the_kept_tokens_follow_their_renormalised_softmax(top_k: int, top_p: float, kept: list[int]) -> None:
    tokens = sample(LOGITS.expand(NUM_DRAWS, -1), wishes(NUM_DRAWS, top_k=top_k, top_p=top_p))
    assert sorted(set(tokens.tolist())) == kept
    only_kept = np.full(8, -np.inf)
    only_kept[kept] = LOGITS.numpy()[kept]
    assert chi_square(tokens, softmax(only_kept)) < CHI_SQUARE_LIMIT[len(kept) - 1]


def kept_tokens(logits: NDArray[np.float64], temperature: float, top_k: int, top_p: float) -> tuple[set[int], float]:
    """The candidates, best first, ties to the lower id; and how near the decision at top_p was."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if top_k:
        order = order[:top_k]
    probabilities = softmax(logits[order] / (temperature or 1.0))
    kept, before, nearest = set(), 0.0, np.inf
    for token, probability in zip(order, probabilities, strict=True):
        if top_p < 1 and kept:
            nearest = min(nearest, abs(before - top_p))
        if not kept or top_p == 1 or before < top_p:
            kept.add(token)
        before += probability
    return kept, nearest


@st.composite
def filter_cases(draw: st.DrawFn) -> tuple[list[float], float, int, float]:
    # Few different values: ties at every border.
    levels = st.sampled_from([-2.0, -1.0, 0.0, 0.25, 1.5, 3.0])
    logits = draw(st.lists(levels, min_size=1, max_size=12))
    temperature = draw(st.sampled_from([0.0, 0.5, 1.0, 3.0]))
    return logits, temperature, draw(st.integers(0, 14)), draw(st.sampled_from([0.01, 0.3, 0.5, 0.777, 0.95, 1.0]))


@MANY
@given(st.lists(filter_cases(), min_size=1, max_size=4), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_the_tokens_kept_are_those_of_a_plain_reimplementation(
    cases: list[tuple[list[float], float, int, float]], dtype: torch.dtype
) -> None:
    width = max(len(logits) for logits, *_ in cases)
    padded = torch.tensor([logits + [-50.0] * (width - len(logits)) for logits, *_ in cases], dtype=dtype)
    temperatures, top_ks, top_ps = (torch.tensor([case[i] for case in cases]) for i in (1, 2, 3))
    filtered = filter_top_k_top_p(padded, temperatures, top_ks.int(), top_ps)
    assert filtered.dtype == dtype
    for row, (_, temperature, top_k, top_p) in enumerate(cases):
        kept, nearest = kept_tokens(padded[row].double().numpy(), temperature, top_k, top_p)
        if nearest < BORDER:
            continue
        assert set((~filtered[row].isinf()).nonzero().flatten().tolist()) == kept
        assert torch.equal(filtered[row, sorted(kept)], padded[row, sorted(kept)])


@MANY
@given(
    st.lists(st.floats(-6, 6, width=32), min_size=2, max_size=20, unique=True),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.integers(0, 20),
    st.sampled_from([0.05, 0.5, 0.777, 0.95, 1.0]),
)
@example([0.0, 1.0, 2.0], 1.0, 2, 0.5)
def test_the_tokens_kept_are_those_of_transformers(logits: list[float], temperature: float, top_k: int, top_p: float) -> None:
    _, nearest = kept_tokens(np.array(logits), temperature, top_k, top_p)
    assume(nearest > BORDER)
    assume(np.diff(sorted(logits)).min() / temperature > BORDER)  # transformers keeps all that tie at the border
    scores = torch.tensor([logits])
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    theirs = warpers(torch.zeros(1, 0, dtype=torch.int64), scores)
    ours = filter_top_k_top_p(scores, torch.tensor([temperature]), torch.tensor([top_k]).int(), torch.tensor([top_p]))
    assert torch.equal(ours.isinf(), theirs.isinf())


@FEW
@given(st.lists(st.sampled_from([-1.0, 0.5, 2.0]), min_size=1, max_size=30), st.booleans())
def test_greedy_takes_the_lowest_id_among_equals(logits: list[float], filters: bool) -> None:
    drawn = sample(torch.tensor([logits]), wishes(1, temperature=0.0, top_k=2 if filters else 0))
    assert drawn.tolist() == [logits.index(max(logits))]


def test_greedy_looks_past_no_wide_gap() -> None:
    logits = torch.zeros(1, 50_000)
    logits[0, 49_999] = 1e-6
    assert sample(logits, wishes(1, temperature=0.0)).tolist() == [49_999]


@FEW
@given(
    logits=st.lists(st.floats(-5, 5, width=16), min_size=3, max_size=10),
    temperature=st.sampled_from([0.0, 1.0, 5.0]),
    top_k=st.integers(0, 3),
    top_p=st.sampled_from([0.5, 1.0]),
    data=st.data(),
)
def test_banned_tokens_are_never_drawn(
    logits: list[float], temperature: float, top_k: int, top_p: float, data: st.DataObject
) -> None:
    vocabulary = range(len(logits))
    banned = data.draw(st.sets(st.sampled_from(vocabulary), max_size=len(logits) - 1))
    num_rows = 40
    # Row 0 alone is free of bans.
    pairs = [(row, token) for row in range(1, num_rows) for token in sorted(banned)]
    scores = torch.tensor([logits] * num_rows)
    before = scores.clone()
    drawn = sample(scores, wishes(num_rows, temperature=temperature, top_k=top_k, top_p=top_p, banned=pairs))
    assert not banned & set(drawn[1:].tolist())
    assert torch.equal(scores, before), "the model's logits are not the sampler's to change"
    if temperature == 0:
        assert drawn[0] == logits.index(max(logits))
        allowed = [token for token in vocabulary if token not in banned]
        assert drawn[1] == max(allowed, key=lambda token: (logits[token], -token))


@FEW
@given(num_rows=st.integers(1, 6), rng_seed=st.integers(0, 999), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_draw_depends_on_its_logits_seed_and_position_alone(num_rows: int, rng_seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rng_seed)
    logits = torch.randn(num_rows, 50, generator=generator).to(dtype)
    draws = {
        "temperature": [0.0, 0.8, 1.0, 1.3, 1.0, 2.0][:num_rows],
        "top_k": [0, 5, 0, 0, 7, 0][:num_rows],
        "top_p": [1.0, 1.0, 0.9, 1.0, 0.8, 1.0][:num_rows],
        "seed": torch.randint(2**62, (num_rows,), generator=generator).tolist(),
        "position": torch.randint(2**17, (num_rows,), generator=generator).tolist(),
    }
    together = sample(logits, wishes(num_rows, **draws)).tolist()
    for row in range(num_rows):
        alone = wishes(1, **{name: values[row : row + 1] for name, values in draws.items()})
        assert sample(logits[row : row + 1], alone).tolist() == together[row : row + 1]
    order = torch.randperm(num_rows, generator=generator).tolist()
    shuffled = wishes(num_rows, **{name: [values[row] for row in order] for name, values in draws.items()})
    assert sample(logits[order], shuffled).tolist() == [together[row] for row in order]


def test_another_seed_or_position_is_another_draw() -> None:
    flat = torch.zeros(64, 1000)
    same = sample(flat, wishes(64, seed=[7] * 64, position=[9] * 64))
    assert len(set(same.tolist())) == 1
    assert len(set(sample(flat, wishes(64, position=[9] * 64)).tolist())) > 50
    assert len(set(sample(flat, wishes(64, seed=[7] * 64, position=list(range(64)))).tolist())) > 50


def test_logits_of_sixteen_bits_are_drawn_from_as_if_they_were_float32() -> None:
    logits = torch.randn(500, 200, generator=torch.Generator().manual_seed(1)).bfloat16()
    how = wishes(500, temperature=0.9, top_k=20, top_p=0.9)
    assert torch.equal(sample(logits, how), sample(logits.float(), how))


def test_a_sole_candidate_is_drawn_at_any_temperature() -> None:
    logits = torch.tensor([[0.0, 9.0, 1.0]]).repeat(3, 1)
    assert sample(logits, wishes(3, temperature=[0.0, 1.0, 50.0], top_k=1)).tolist() == [1, 1, 1]


def test_nothing_to_draw_gives_nothing() -> None:
    assert sample(torch.zeros(0, 5), wishes(0)).tolist() == []


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"temperature": -0.1}, r"temperature=-0\.1 must"),
        ({"temperature": float("nan")}, "temperature=nan must"),
        ({"temperature": float("inf")}, "temperature=inf must"),
        ({"top_k": -2}, "top_k=-2 must"),
        ({"top_p": 0.0}, r"top_p=0\.0 must lie in \(0, 1\]"),
        ({"top_p": 1.01}, r"top_p=1\.01"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1, or None"),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 .*max_tokens=4"),
        ({"seed": -1}, "seed=-1 must"),
        ({"seed": 2**63}, "seed=9223372036854775808 must"),
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused_by_name(params: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SamplingParams(**params)


def test_parameters_at_their_borders_are_taken() -> None:
    params = SamplingParams(temperature=0, top_k=-1, top_p=1.0, max_tokens=None, min_tokens=9, seed=2**63 - 1, stop_token_ids=[1])
    assert params.stop_token_ids == (1,)
    assert params.is_greedy
