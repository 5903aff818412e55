"""The plain model of sampling parameters: what it lets pass, and each thing about an answer that it minds."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest

from harness.checks.requests import MAX_NUM_SEQS, NUM_DRAWS, draw_requests, stream
from harness.checks.semantics import Asked, WrongAnswerError
from harness.checks.talker import MAX_MODEL_LEN, Talker
from harness.faults.layouts import LAYOUTS
from tests.harness.checking import on_threads

OPTIONS = {"dtype": "auto", "block_size": 4, "num_kv_blocks": 40, "max_num_seqs": MAX_NUM_SEQS, "max_num_batched_tokens": 24}
Answered = list[tuple[Asked, Any]]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Talker:
    return Talker(tmp_path_factory.mktemp("talker") / "model", LAYOUTS["llama"].config, tp_size=1, dtype="float64", seed=0,
                  device="cpu")


@pytest.fixture(scope="module", params=[range(1), pytest.param(range(1, 10), marks=pytest.mark.endurance)], ids=str)
def seeds(request: pytest.FixtureRequest) -> range:
    return request.param


@pytest.fixture(scope="module")
def answered(talker: Talker, seeds: range) -> Iterator[Answered]:
    """Requests of some seeds with the engine's answers, streamed."""
    asked = [one for seed in seeds for one in draw_requests(random.Random(seed), talker) if one.n < NUM_DRAWS]
    with on_threads(1) as subject, subject.requests(talker.folder, OPTIONS) as llm:
        yield list(zip(asked, stream(llm, asked), strict=True))


def test_the_engines_answers_are_right(talker: Talker, answered: Answered) -> None:
    for asked, answer in answered:
        assert talker.model.judge(asked, answer) == sum(len(one.token_ids) for one in answer.outputs)


def test_every_seed_has_every_ending(answered: Answered, talker: Talker, seeds: range) -> None:
    """What a check is to see must happen, at each seed and not by luck."""
    per_seed = len(answered) // len(seeds)
    for number in range(len(seeds)):
        happened: Counter[str] = Counter()
        for asked, answer in answered[number * per_seed : (number + 1) * per_seed]:
            for one in answer.outputs:
                kind = "stop string" if isinstance(one.stop_reason, str) else "stop id" if one.stop_reason is not None else "eos"
                happened[kind if one.finish_reason == "stop" else one.finish_reason] += 1
                happened["not before min_tokens"] += asked.min_tokens > 0 and len(one.token_ids) == asked.min_tokens + 1
                happened["special"] += not asked.skip_special_tokens and "<" in one.text
                happened["eos of config.json alone"] += bool(set(talker.config_eos_token_ids) & set(one.token_ids))
                happened["to the model's length"] += len(answer.prompt_token_ids) + len(one.token_ids) == MAX_MODEL_LEN
        assert {kind for kind, count in happened.items() if count} == {
            "stop string", "stop id", "eos", "length", "abort", "not before min_tokens", "special", "eos of config.json alone",
            "to the model's length"}


Change = Callable[[Any], None]


def _without_last_token(one: Any) -> None:
    one.token_ids = one.token_ids[:-1]
    if one.logprobs:
        one.logprobs = one.logprobs[:-1]


def _other_token(one: Any) -> None:
    one.token_ids = [*one.token_ids[:-1], (one.token_ids[-1] + 1) % 60]


def _other_text(one: Any) -> None:
    one.text += "x"


def _other_reason(one: Any) -> None:
    one.finish_reason = "length" if one.finish_reason == "stop" else "stop"


def _other_stop_reason(one: Any) -> None:
    one.stop_reason = 59 if one.stop_reason is None else None


def _other_index(one: Any) -> None:
    one.index += 1


@pytest.mark.parametrize("change", [_without_last_token, _other_token, _other_text, _other_reason, _other_stop_reason,
                                    _other_index])
def test_a_wrong_answer_is_minded(talker: Talker, answered: Answered, change: Change) -> None:
    """In nearly every answer: another token may be as good as the one that was drawn, and leave the same text."""
    minded = total = 0
    for asked, answer in answered:
        if asked.abort_after is None:
            wrong = deepcopy(answer)
            change(wrong.outputs[-1])
            total += 1
            try:
                talker.model.judge(asked, wrong)
            except WrongAnswerError:
                minded += 1
    assert minded >= (0.5 if change is _other_token else 1.0) * total > 0


@pytest.mark.parametrize("change", ["logprob", "rank", "decoded_token", "one less", "none at a step", "sum"])
def test_wrong_log_probabilities_are_minded(talker: Talker, answered: Answered, change: str, seeds: range) -> None:
    minded = total = 0
    for asked, answer in answered:
        if asked.logprobs is None or asked.abort_after is not None:
            continue
        wrong = deepcopy(answer)
        one = wrong.outputs[0]
        token_id, entry = next(iter(one.logprobs[0].items()))
        if change == "sum":
            one.cumulative_logprob += 1e-6
        elif change == "one less":
            one.logprobs = one.logprobs[:-1]
        elif change == "none at a step":
            one.logprobs[0] = {}
        else:
            values = {"logprob": entry.logprob, "rank": entry.rank, "decoded_token": entry.decoded_token}
            told = "" if values[change] is None else values[change]  # no text of a request without
            values[change] = told + {"logprob": 1e-3, "rank": 1, "decoded_token": "x"}[change]
            one.logprobs[0][token_id] = type(entry)(**values)
        total += 1
        try:
            talker.model.judge(asked, wrong)
        except WrongAnswerError:
            minded += 1
    # Another rank is right where two tokens are so close that rounding may exchange them.
    assert minded >= (0.99 if change == "rank" else 1.0) * total > len(seeds)


@pytest.mark.parametrize("change", ["logprob", "none of a token", "one less", "of the first", "missing", "beyond the vocabulary"])
def test_wrong_log_probabilities_of_a_prompt_are_minded(talker: Talker, answered: Answered, change: str, seeds: range) -> None:
    total = 0
    for asked, answer in answered:
        if asked.prompt_logprobs is None or len(answer.prompt_token_ids) < 2:
            continue
        wrong = deepcopy(answer)
        told = wrong.prompt_logprobs
        token_id, entry = next(iter(told[1].items()))
        if change == "logprob":
            told[1][token_id] = type(entry)(entry.logprob + 1e-3, entry.rank, entry.decoded_token)
        elif change == "none of a token":
            told[-1] = {}
        elif change == "one less":
            told.pop()
        elif change == "of the first":
            told[0] = told[1]
        elif change == "missing":
            wrong.prompt_logprobs = None
        else:
            told[1][talker.exact.vocab_size] = entry
        total += 1
        with pytest.raises(WrongAnswerError):
            talker.model.judge(asked, wrong)
    assert total > len(seeds)
