"""Bias, penalties, bad words, allowed tokens and min_p: by plain Python, and by transformers' processors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from engine import SamplingParams
from engine.layers.logits_processors import process_logits
from engine.scheduling.batch import SamplingBatch, build_batch
from engine.scheduling.scheduler import Chunk
from engine.scheduling.sequence import Request, Sequence
from tests.engine.support import MANY

VOCAB = 12
Row = tuple[list[int], list[int], dict[str, Any], tuple[tuple[int, ...], ...]]
"""Prompt, output, parameters and bad words of a sequence."""

ids = st.integers(0, VOCAB - 1)
penalties = st.sampled_from([-2.0, -0.7, 0.0, 0.5, 2.0])
params = st.fixed_dictionaries({}, optional={
    "presence_penalty": penalties, "frequency_penalty": penalties, "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3, 2.0]),
    "logit_bias": st.dictionaries(ids, st.floats(-3, 3), max_size=4), "min_p": st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    "allowed_token_ids": st.lists(ids, min_size=1, max_size=5), "temperature": st.sampled_from([0.0, 0.6, 1.0, 2.5])})
rows = st.tuples(st.lists(ids, min_size=1, max_size=6), st.lists(ids, max_size=5), params,
                 st.lists(st.lists(ids, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple))


def chunk_of(row: Row, number: int, in_flight: bool) -> Chunk:
    """The step that draws the next token, the newest known to the host or not."""
    prompt, output, given_params, words = row
    in_flight = in_flight and bool(output)
    request = Request(request_id=number, prompt_token_ids=tuple(prompt), params=SamplingParams(**given_params), seed=number,
                      max_tokens=50, stop_token_ids=frozenset(), bad_words=words)
    known = [*prompt, *output[: len(output) - in_flight]]
    sequence = Sequence(request=request, token_ids=known, num_in_flight=int(in_flight), blocks=[0, 1], row=number)
    start = len(prompt) + len(output) - 1
    return Chunk(sequence=sequence, start=start, num_tokens=1, samples=True, in_flight=in_flight)


def plain(logits: list[float], row: Row) -> list[float]:
    """What the parameters' definitions say, in float64, of one row."""
    prompt, output, given_params, words = row
    own = SamplingParams(**given_params)
    changed = list(logits)
    for token, bias in (own.logit_bias or {}).items():
        changed[token] += bias
    for token in range(VOCAB):
        if token in prompt or token in output:
            changed[token] *= 1 / own.repetition_penalty if changed[token] > 0 else own.repetition_penalty
        changed[token] -= own.frequency_penalty * output.count(token) + own.presence_penalty * (token in output)
        if own.allowed_token_ids is not None and token not in own.allowed_token_ids:
            changed[token] = -math.inf
    for *beginning, last in words:
        if output[len(output) - len(beginning) :] == beginning:
            changed[last] = -math.inf
    if own.min_p and own.temperature:
        best = max(changed)
        changed = [x if x >= best + own.temperature * math.log(own.min_p) else -math.inf for x in changed]
    return changed


def processed(logits_RV: torch.Tensor, chunks: list[Chunk], newest: list[int]) -> torch.Tensor:
    """As the sampler has it: unconditional bans first."""
    sampling: SamplingBatch = build_batch(chunks, block_size=16).sampling
    logits_RV = logits_RV.index_put((sampling.banned_row_X, sampling.banned_token_X), logits_RV.new_tensor(-math.inf))
    if sampling.processing is None:
        return logits_RV
    return process_logits(logits_RV, sampling.processing, torch.tensor(newest))


@MANY
@given(given_rows=st.lists(rows, min_size=1, max_size=4), in_flight=st.lists(st.booleans(), min_size=4, max_size=4),
       seed=st.integers(0, 2**31))
def test_every_row_is_changed_as_its_own_parameters_say(given_rows: list[Row], in_flight: list[bool], seed: int) -> None:
    """In any company, and whether the host knows the newest token or not."""
    logits_RV = torch.randn((len(given_rows), VOCAB), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before_RV = logits_RV.clone()
    chunks = [chunk_of(row, number, in_flight[number]) for number, row in enumerate(given_rows)]
    found_RV = processed(logits_RV, chunks, [(prompt + output)[-1] for prompt, output, _, _ in given_rows])
    assert torch.equal(logits_RV, before_RV)
    for found_V, before_V, row in zip(found_RV, before_RV, given_rows, strict=True):
        expected_V = torch.tensor(plain(before_V.tolist(), row), dtype=torch.float64)
        torch.testing.assert_close(found_V, expected_V, rtol=1e-6, atol=1e-6)


LOGITS = torch.tensor([[1.5, -0.5, 0.25, -2.0, 3.0, 0.75, -1.0, 2.0, 0.5, -0.25, 1.0, -3.0]])
SEEN = ([3, 4, 4], [7, 3, 0])


def changed_by(words: tuple[tuple[int, ...], ...] = (), **own: Any) -> torch.Tensor:
    return processed(LOGITS, [chunk_of((*SEEN, own, words), 0, in_flight=True)], [SEEN[1][-1]])


def test_transformers_processors_say_the_same() -> None:
    seen = torch.tensor([[*SEEN[0], *SEEN[1]]])
    torch.testing.assert_close(changed_by(repetition_penalty=1.3), RepetitionPenaltyLogitsProcessor(1.3)(seen, LOGITS.clone()))
    for temperature, min_p in ((1.0, 0.1), (2.5, 0.4), (0.5, 0.01)):
        kept = MinPLogitsWarper(min_p)(seen, LOGITS / temperature)
        assert torch.equal(changed_by(temperature=temperature, min_p=min_p).isinf(), kept.isinf())
    words = [[5], [0, 6], [3, 0, 8], [4, 0, 9], [7, 2]]
    banned = NoBadWordsLogitsProcessor(words)(torch.tensor([SEEN[1]]), LOGITS.clone())
    assert torch.equal(changed_by(tuple(map(tuple, words))), banned)
    assert banned.isinf().nonzero()[:, 1].tolist() == [5, 6, 8]


def test_rows_that_ask_for_nothing_cost_nothing() -> None:
    quiet = [chunk_of(([1, 2], [3], {"temperature": 0.7, "top_k": 3}, ()), number, in_flight=True) for number in range(3)]
    assert build_batch(quiet, block_size=16).sampling.processing is None
    assert build_batch([*quiet, chunk_of(([1], [2], {"min_p": 0.1}, ()), 3, True)], block_size=16).sampling.processing is not None


@pytest.mark.parametrize(("given", "message"), [
    ({"min_p": 1.5}, r"min_p=1\.5 must lie in \[0, 1\]"),
    ({"presence_penalty": 2.5}, r"presence_penalty=2\.5 must lie in \[-2, 2\]"),
    ({"frequency_penalty": float("nan")}, r"frequency_penalty=nan must lie in \[-2, 2\]"),
    ({"repetition_penalty": 0.0}, r"repetition_penalty=0\.0 must be a number above 0"),
    ({"repetition_penalty": float("inf")}, r"repetition_penalty=inf must be a number above 0"),
    ({"logit_bias": {"a": 1.0}}, "logit_bias=.* must map token ids to numbers"),
    ({"logit_bias": {3: float("nan")}}, "logit_bias=.* must map token ids to numbers"),
    ({"logit_bias": [3]}, "logit_bias=.* must map token ids to numbers"),
    ({"allowed_token_ids": []}, r"allowed_token_ids=\[\] must be a list of token ids with at least one"),
    ({"allowed_token_ids": 3}, "allowed_token_ids=3 must be a list of token ids"),
    ({"bad_words": "no"}, "bad_words='no' must be a list of strings"),
    ({"bad_words": ["no", " "]}, "bad_words=.* none of them empty or of spaces alone"),
])
def test_a_value_that_breaks_its_rule_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**given)


def test_parameters_with_a_bias_can_be_hashed_and_compared() -> None:
    assert len({SamplingParams(logit_bias={1: bias}) for bias in (2.0, 2.0, 3.0)}) == 2


def test_a_bias_is_cut_off_at_a_hundred() -> None:
    assert SamplingParams(logit_bias={1: 1e9, 2: float("-inf"), 3: 0.5}).logit_bias == {1: 100.0, 2: -100.0, 3: 0.5}
