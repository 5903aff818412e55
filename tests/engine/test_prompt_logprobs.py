"""Log-probabilities of the prompt: of every token but the first, whatever chunks, caches, ranks and preemptions it ran under."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine import LLM, Logprob, RequestOutput, SamplingParams
from engine.layers.sampler import prompt_logprobs_of
from tests.engine.served import BOTH, MakeLLM, blocks_in_use, joined, open_llm
from tests.engine.talking import TOKENS, Exact

Told = list[dict[int, Logprob] | None]
VOCABULARY = range(len(TOKENS))
LONG = [token for token in range(13) for _ in range(5)]


def asking(num: int | None, **params: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 1, "ignore_eos": True} | params, prompt_logprobs=num)


def told(output: RequestOutput) -> Told:
    assert output.error is None
    assert output.prompt_logprobs is not None
    return output.prompt_logprobs


def check(exact: Exact, output: RequestOutput, num: int) -> None:
    """Hold an output's log-probabilities against the prompt's, one token after the other."""
    prompt = output.prompt_token_ids
    first, *rest = told(output)
    assert first is None
    assert len(rest) == len(prompt) - 1
    exact_TV = exact.logits(prompt).log_softmax(dim=-1)
    for row_V, token, found in zip(exact_TV[:-1], prompt[1:], rest, strict=True):
        assert found is not None
        by_rank = sorted(VOCABULARY, key=lambda other: -float(row_V[other]))
        best = by_rank[: len(VOCABULARY) if num == -1 else num]
        assert list(found) == [token, *(other for other in best if other != token)]
        assert [entry.rank for entry in found.values()] == [1 + by_rank.index(other) for other in found]
        errors = [abs(entry.logprob - float(row_V[other])) for other, entry in found.items()]
        assert max(errors) <= exact.margin, f"error is {max(errors):.3g}, rounding is at most {exact.margin:.3g}"


@pytest.fixture(scope="module", params=[1, 3])
def narrow(talking: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    """Steps of few tokens, in a cache that is soon full."""
    with open_llm(talking, request.param, max_num_batched_tokens=7, max_num_seqs=6, num_kv_blocks=24, max_model_len=80) as llm:
        yield llm


PROMPTS = st.one_of(st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=30),
                    st.builds(lambda length, more: LONG[:length] + more, st.integers(1, 50),
                              st.lists(st.sampled_from(VOCABULARY), max_size=4)))
ASKED = st.tuples(PROMPTS, st.sampled_from([None, 0, 1, 3, 20, -1]), st.integers(1, 9))


@settings(max_examples=8, deadline=None)
@example(asked=[([0], None, 1), ([0, 8], 0, 1)])
@given(asked=st.lists(ASKED, min_size=1, max_size=8))
def test_any_prompts_are_told_as_the_reference_has_them(
    exact: Exact, narrow: LLM, asked: list[tuple[list[int], Any, int]]
) -> None:
    params = [asking(num, max_tokens=max_tokens) for _, num, max_tokens in asked]
    for output, (_, num, _) in zip(narrow.generate([prompt for prompt, *_ in asked], params), asked, strict=True):
        if num is None:
            assert output.prompt_logprobs is None
        else:
            check(exact, output, num)
            assert output.num_cached_tokens == 0
    assert set(blocks_in_use(narrow)) == {0}


@settings(max_examples=100, deadline=None)
@given(data=st.data(), num_rows=st.integers(1, 4), width=st.integers(1, 9))
def test_values_and_ranks_are_those_of_a_plain_reimplementation(data: st.DataObject, num_rows: int, width: int) -> None:
    """Few different logits, so that many are equal: a rank is 1 + how many are larger."""
    logits = torch.tensor([[data.draw(st.sampled_from([-2.0, 0.0, 0.5])) for _ in range(width)] for _ in range(num_rows)])
    token_P = torch.tensor([data.draw(st.integers(0, width - 1)) for _ in range(num_rows)])
    num_top = data.draw(st.integers(-1, width + 2))
    found = prompt_logprobs_of(logits, token_P, num_top)
    for row in range(num_rows):
        values = logits[row].double().log_softmax(0).tolist()
        assert found.logprob_L[row].item() == pytest.approx(values[token_P[row]], abs=1e-6)
        assert found.rank_L[row] == 1 + sum(value > values[token_P[row]] for value in values)
        best = sorted(values, reverse=True)[: width if num_top < 0 else num_top]
        ids = found.top_token_LK[row].tolist()
        assert len(set(ids)) == len(best)
        assert found.top_logprob_LK[row].tolist() == pytest.approx(best, abs=1e-6)
        assert [values[token] for token in ids] == best
        assert found.top_rank_LK[row].tolist() == [1 + sum(value > one for value in values) for one in best]


@BOTH
def test_a_prompt_is_told_alike_whole_in_chunks_and_beside_others(
    talking: Path, exact: Exact, served: MakeLLM, narrow: LLM, tp_size: int
) -> None:
    (whole,) = served(tp_size).generate([LONG], asking(3))
    check(exact, whole, 3)
    for llm in (served(tp_size), narrow):
        mixed = llm.generate([LONG[:20], LONG, [5]], [asking(None, max_tokens=20), asking(3), asking(0)])
        check(exact, mixed[1], 3)
        assert mixed[0].prompt_logprobs is None
        assert told(mixed[2]) == [None]


def test_a_prefix_in_the_cache_is_run_again_and_later_prompts_find_it(exact: Exact, served: MakeLLM) -> None:
    llm = served(1)
    prompt = [*LONG[:30], 3, 1, 4, 1]
    llm.generate([prompt], asking(None))
    (again,) = llm.generate([prompt], asking(2))
    assert again.num_cached_tokens == 0
    check(exact, again, 2)
    (after,) = llm.generate([prompt], asking(None))
    assert after.num_cached_tokens == 32
    (several,) = llm.generate([prompt], asking(1, n=3, temperature=1.0, seed=5, max_tokens=6))
    check(exact, several, 1)
    assert [len(one.token_ids) for one in several.outputs] == [6, 6, 6]


def test_a_prompt_is_told_once_though_it_gives_way_in_the_midst_of_it(talking: Path, exact: Exact) -> None:
    """The first needs all blocks before the second's prompt is done, which starts over."""
    second = list(reversed(LONG[:26]))
    with open_llm(talking, 1, max_num_batched_tokens=4, max_num_seqs=2, num_kv_blocks=8, max_model_len=32) as llm:
        outputs = llm.generate([[1, 2, 3], second], [asking(0, max_tokens=29), asking(4, max_tokens=4)])
    for output, num in zip(outputs, (0, 4), strict=True):
        check(exact, output, num)


@BOTH
def test_a_stream_brings_them_once(exact: Exact, served: MakeLLM, tp_size: int) -> None:
    params = asking(2, n=2, temperature=1.0, seed=3, max_tokens=12)
    items = list(served(tp_size).stream([LONG, [3, 4]], params))
    whole = served(tp_size).generate([LONG, [3, 4]], params)
    assert joined(items) == [output.outputs for output in whole]
    for output in whole:
        mine = [item for item in items if item.prompt_token_ids == output.prompt_token_ids]
        assert [item.prompt_logprobs for item in mine if item.prompt_logprobs is not None] == [output.prompt_logprobs]
        check(exact, output, 2)


def test_given_up_before_its_first_token_it_is_told_nothing_and_after_it_everything(exact: Exact, narrow: LLM) -> None:
    with narrow.stream([[9], LONG], [asking(None, max_tokens=30), asking(1)]) as stream:
        assert next(stream).request_id == stream.request_ids[0]
        narrow.abort(stream.request_ids[1])
        (item,) = [item for item in stream if item.request_id == stream.request_ids[1]]
        assert item.prompt_logprobs is None
        assert [(one.token_ids, one.finish_reason) for one in item.outputs] == [([], "abort")]
    with narrow.stream([LONG[:40]], asking(1, max_tokens=30)) as stream:
        check(exact, next(stream), 1)
        narrow.abort(stream.request_ids[0])
        assert all(item.prompt_logprobs is None for item in stream)
    assert set(blocks_in_use(narrow)) == {0}


def test_each_token_says_what_it_is(served: MakeLLM) -> None:
    llm = served(1)
    (output,) = llm.generate(["ab c"], asking(-1))
    for found in told(output)[1:]:
        assert found is not None
        assert {token: entry.decoded_token for token, entry in found.items()} == {
            token: llm.get_tokenizer().decode([token]) for token in VOCABULARY}


def test_chat_tells_of_the_rendered_prompt(exact: Exact, served: MakeLLM) -> None:
    (output,) = served(1).chat([{"role": "user", "content": "ab"}], asking(0))
    check(exact, output, 0)


@pytest.mark.parametrize("num", [-2, 21, True, 1.0, "3"])
def test_a_number_that_breaks_the_rule_is_refused(num: Any) -> None:
    with pytest.raises(ValueError, match=r"^prompt_logprobs=.* must lie between 0 and 20, or be -1 \(the whole"):
        SamplingParams(prompt_logprobs=num)
