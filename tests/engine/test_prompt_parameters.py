"""What is run of a prompt and made of its tokens: ``truncate_prompt_tokens`` and ``detokenize``."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine import SamplingParams
from tests.engine.served import MakeLLM, plain

LONG = [token for token in range(13) for _ in range(16)]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.mark.parametrize(("most", "kept"), [(1, 1), (20, 20), (500, 208), (-1, 186)])
def test_the_last_tokens_of_a_prompt_run(served: MakeLLM, most: int, kept: int) -> None:
    """The model takes 192, answers included."""
    prompt = LONG[:100] if most == 500 else LONG
    kept = min(kept, len(prompt))
    (cut,) = served(1).generate([prompt], replace(GREEDY, truncate_prompt_tokens=most))
    assert cut.error is None
    assert cut.prompt_token_ids == prompt[-kept:]
    assert plain([cut]) == plain(served(1).generate([prompt[-kept:]], GREEDY))


def test_without_a_limit_of_its_own_an_answer_keeps_room_for_one_token(served: MakeLLM) -> None:
    (cut,) = served(1).generate([LONG], replace(GREEDY, truncate_prompt_tokens=-1, max_tokens=None))
    assert cut.num_prompt_tokens == 191
    assert len(cut.outputs[0].token_ids) == 1


def test_a_text_keeps_its_prompt_and_loses_its_first_tokens(served: MakeLLM) -> None:
    (whole,) = served(1).generate(["ab c ab"], GREEDY)
    (cut,) = served(1).generate(["ab c ab"], replace(GREEDY, truncate_prompt_tokens=3))
    assert cut.prompt == "ab c ab"
    assert cut.prompt_token_ids == whole.prompt_token_ids[-3:]


def test_tokens_without_text_are_those_with_text(served: MakeLLM) -> None:
    params = SamplingParams(n=2, temperature=1.0, seed=4, max_tokens=20, stop_token_ids=[12], logprobs=2)
    llm = served(1)
    (spoken,) = llm.generate([[8, 9, 10]], params)
    (silent,) = llm.generate([[8, 9, 10]], replace(params, detokenize=False))
    for mine, its in zip(silent.outputs, spoken.outputs, strict=True):
        assert mine.text == ""
        assert (mine.token_ids, mine.finish_reason, mine.stop_reason) == (its.token_ids, its.finish_reason, its.stop_reason)
        for found, expected in zip(mine.logprobs or [], its.logprobs or [], strict=True):
            assert {token: (entry.logprob, entry.rank, entry.decoded_token) for token, entry in found.items()} == {
                token: (entry.logprob, entry.rank, None) for token, entry in expected.items()}
    items = list(llm.stream([[8, 9, 10]], replace(params, detokenize=False)))
    assert sum(len(one.token_ids) for item in items for one in item.outputs) == silent.num_generated_tokens
