"""What can't run is refused before anything runs; ranks that fail or disagree end the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine import SamplingParams
from engine.ranks.ranks import RankContext, RankFailure
from tests.engine.served import (
    BOTH,
    PROMPTS,
    SAMPLED,
    MakeLLM,
    count_sequences,
    joined,
    open_llm,
    plain,
)

BAD_PARAMS = [
    ({"n": 0}, "n=0 must be at least 1, and at most 16384"),
    ({"n": 10**9}, "n=1000000000 must be at least 1, and at most 16384"),
    ({"n": True}, "n=True must be at least 1"),
    ({"stop_token_ids": b"ab"}, "stop_token_ids=b'ab' must be a list of token ids"),
    ({"stop_token_ids": ""}, "stop_token_ids='' must be a list of token ids"),
    ({"stop": b""}, "stop=b'' must be a string or a list of strings"),
    ({"n": 2, "temperature": 0.0}, r"n=2 must be 1 with temperature=0\.0"),
    ({"temperature": "hot"}, "temperature='hot' must lie in"),
    ({"top_k": 1.5}, r"top_k=1\.5 must be"),
    ({"max_tokens": "many"}, "max_tokens='many' must be"),
    ({"logprobs": 21}, "logprobs=21 must lie between 0 and 20"),
    ({"logprobs": -1}, "logprobs=-1 must lie between 0 and 20"),
    ({"logprobs": True}, "logprobs=True must lie"),
    ({"stop": ""}, "stop='' must be a string or a list of strings, none of them empty"),
    ({"stop": ["a", ""]}, r"stop=\['a', ''\] must be"),
    ({"stop": [1]}, r"stop=\[1\] must be"),
    ({"stop": 1}, "stop=1 must be"),
    ({"stop_token_ids": [-1]}, r"stop_token_ids=\[-1\] must be a list of token ids"),
    ({"stop_token_ids": ["a"]}, r"stop_token_ids=\['a'\] must be"),
    ({"stop_token_ids": 0}, "stop_token_ids=0 must be"),
    ({"skip_special_tokens": 1}, "skip_special_tokens=1 must be True or False"),
    ({"stop": "a", "detokenize": False}, "stop='a' needs detokenize=True"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens=0 must be at least 1, or be -1"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens=-2 must be"),
]


@pytest.mark.parametrize(("params", "said"), BAD_PARAMS, ids=[str(params) for params, _ in BAD_PARAMS])
def test_bad_parameters_are_refused_by_name(params: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SamplingParams(**params)


def test_parameters_are_as_in_vllm_where_nothing_is_said() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.max_tokens, params.min_tokens) == (16, 0)
    assert (params.seed, params.logprobs, params.ignore_eos, params.include_stop_str_in_output) == (None, None, False, False)
    assert params.skip_special_tokens
    assert SamplingParams(stop="a").stop_strings == SamplingParams(stop=["a"]).stop_strings == ("a",)
    assert SamplingParams(stop=None).stop_strings == ()


BAD_CALLS: list[tuple[Any, Any, str]] = [
    ([], [SAMPLED], r"len\(sampling_params\)=1 does not match len\(prompts\)=0"),
    ([[1]], {"n": 1}, r"sampling_params=\{'n': 1\} must be SamplingParams"),
    ([[1]], [None], "sampling_params=None must be SamplingParams"),
    (5, None, "prompts=5 must be text"),
    ([None], None, "prompt=None must be text"),
    ([[]], None, "an empty prompt"),
    ([1, 14], None, "token_id=14 is outside the vocabulary of vocab_size=14"),
    ([[1, "a"]], None, "token_id='a' must be an integer"),
    ([[1, -1]], None, "token_id=-1 is outside"),
    ({"text": "a"}, None, r"the keys \['text'\] and must have prompt or prompt_token_ids"),
    ([1] * 192, None, r"len\(token_ids\)=192 leaves no room to generate in max_model_len=192"),
    ([1], SamplingParams(stop_token_ids=[14]), "stop_token_id=14 is outside the vocabulary"),
]


@pytest.mark.parametrize(("prompts", "params", "said"), BAD_CALLS, ids=[said for *_, said in BAD_CALLS])
def test_bad_calls_are_refused_before_anything_runs(served: MakeLLM, prompts: Any, params: Any, said: str) -> None:
    llm = served(1)
    for call in (llm.generate, llm.stream):
        with pytest.raises(ValueError, match=said):
            call(prompts, params)
    assert llm._ranks.run(count_sequences) == [0]


def test_a_refused_prompt_leaves_the_others_alone(served: MakeLLM) -> None:
    llm = served(1)
    good, bad = llm.generate([PROMPTS[0], [99]], SAMPLED)
    assert plain([good]) == plain(llm.generate(PROMPTS[0], SAMPLED))
    assert bad.finished
    assert bad.outputs == []
    assert bad.error == "prompt 1: token_id=99 is outside the vocabulary of vocab_size=14"
    refused, *items = llm.stream([[99], PROMPTS[0]], SAMPLED)
    assert refused.error is not None
    assert "token_id=99" in refused.error
    assert joined(items) == plain([good])


def test_nothing_to_do_is_done_at_once(served: MakeLLM) -> None:
    assert served(1).generate([]) == []
    assert list(served(1).stream([])) == []


def draw_another_token(rank: RankContext, tp_rank: int) -> None:
    """Job: plants a fault. From now on this rank draws other tokens than the others."""
    runner = rank.state["core"].runner
    collect = runner.collect
    if rank.tp.rank == tp_rank:
        runner.collect = lambda drawn: [(token + 1) % 13 for token in collect(drawn)]


def test_ranks_that_draw_different_tokens_end_the_run(talking: Path) -> None:
    with open_llm(talking, 2) as llm:
        llm.generate(PROMPTS, SAMPLED)
        llm._ranks.run(draw_another_token, 1)
        with pytest.raises(RuntimeError, match=r"ranks \[1\] drew other token ids than rank 0"):
            llm.generate(PROMPTS, SAMPLED)
        with pytest.raises(RuntimeError, match=r"can't be used any more, make a new one: RuntimeError: ranks \[1\]"):
            llm.generate(PROMPTS, SAMPLED)


def lose_the_scheduler(rank: RankContext) -> None:
    """Job: plants a fault, on one rank alone."""
    if rank.tp.rank == rank.tp.size - 1:
        del rank.state["core"].scheduler


@BOTH
def test_a_rank_that_fails_ends_the_run(talking: Path, tp_size: int) -> None:
    with open_llm(talking, tp_size) as llm:
        stream = llm.stream(PROMPTS, SAMPLED)
        next(stream)
        llm._ranks.run(lose_the_scheduler)
        with pytest.raises(RankFailure, match="scheduler"):
            list(stream)
        with pytest.raises(RuntimeError, match="can't be used any more"):
            llm.generate(PROMPTS, SAMPLED)
