"""The interface people meet: how a text ends, several completions, counts.

On a random model whose few tokens are letters, words and parts of characters, so that its texts hold all that is hard to
stream; what text means is tried on the real small model.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from engine import LLM, SamplingParams
from reference.checkpoints import resolve
from tests.engine.served import (
    BOTH,
    PROMPTS,
    SAMPLED,
    STREAMED,
    MakeLLM,
    blocks_in_use,
    count_sequences,
    joined,
    open_llm,
    plain,
)
from tests.engine.talking import EOS

# --- the end of a text ---


def test_a_stop_string_across_tokens_ends_text_and_tokens(served: MakeLLM) -> None:
    llm = served(1)
    ((whole,),) = plain(llm.generate(PROMPTS[0], SAMPLED))
    decode = partial(llm.get_tokenizer().decode, skip_special_tokens=True)
    # A stop string that begins inside the text of one token and ends inside that of another.
    start = next(at for at in range(3, 30) if not decode(whole.token_ids[: at + 1]).endswith("\ufffd")
                 and not decode(whole.token_ids[: at + 2]).endswith("\ufffd"))
    before, after = decode(whole.token_ids[: start + 1]), decode(whole.token_ids[: start + 2])
    stop = after[len(before) - 1 : len(before) + 1]
    end = whole.text.index(stop) + len(stop)
    for include in (False, True):
        params = replace(SAMPLED, stop=stop, include_stop_str_in_output=include)
        ((cut,),) = plain(llm.generate(PROMPTS[0], params))
        assert cut.text == whole.text[: end if include else end - len(stop)]
        assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        assert stop in decode(cut.token_ids)
        assert stop not in decode(cut.token_ids[:-1])


@BOTH
def test_the_ranks_soon_drop_what_a_stop_string_has_ended(served: MakeLLM, tp_size: int) -> None:
    llm = served(tp_size)
    stopped, running = replace(STREAMED["stop strings"], n=1), replace(SAMPLED, max_tokens=100)
    with llm.stream([PROMPTS[1], PROMPTS[0]], [stopped, running]) as stream:
        while next(stream).outputs[0].stop_reason is None:
            pass
        next(stream)  # what came with the end, perhaps
        next(stream)
        assert llm._ranks.run(count_sequences) == [1] * tp_size


def test_a_stop_token_is_counted_but_not_shown(served: MakeLLM) -> None:
    llm = served(1)
    ((whole,),) = plain(llm.generate(PROMPTS[0], SAMPLED))
    stop = whole.token_ids[7]
    count = whole.token_ids.index(stop) + 1
    decode = partial(llm.get_tokenizer().decode, skip_special_tokens=True)
    for include in (False, True):
        params = replace(SAMPLED, stop_token_ids=[stop], include_stop_str_in_output=include)
        ((cut,),) = plain(llm.generate(PROMPTS[0], params))
        assert cut.token_ids == whole.token_ids[:count]
        assert cut.text == decode(whole.token_ids[: count if include else count - 1])
        assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)


def test_the_end_of_sequence_token_is_no_stop_reason(served: MakeLLM) -> None:
    llm = served(1)
    params = [SamplingParams(seed=seed, max_tokens=100, skip_special_tokens=False) for seed in range(4)]
    for (completion,) in plain(llm.generate([PROMPTS[0]] * 4, params)):
        assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
        assert completion.token_ids[-1] == EOS
        assert "<end>" not in completion.text
    for ignored, reason in ((False, None), (True, EOS)):
        asked_for = SamplingParams(seed=0, max_tokens=100, ignore_eos=ignored, stop_token_ids=[EOS])
        ((completion,),) = plain(llm.generate(PROMPTS[0], asked_for))
        assert (completion.finish_reason, completion.stop_reason) == ("stop", reason)


def test_min_tokens_holds_off_stop_tokens_and_stop_strings(served: MakeLLM) -> None:
    params = SamplingParams(seed=3, max_tokens=40, min_tokens=25, stop=["a", "b", " "], stop_token_ids=[0, 1])
    for (completion,) in plain(served(1).generate(PROMPTS, params)):
        assert 25 < len(completion.token_ids) <= 40
        assert completion.finish_reason == "stop"


def test_a_prompt_gets_no_more_tokens_than_the_model_has_room_for(served: MakeLLM) -> None:
    llm = served(1)
    for max_tokens in (None, 10_000):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        ((completion,),) = plain(llm.generate(PROMPTS[0], params))
        assert len(PROMPTS[0]) + len(completion.token_ids) == llm.max_model_len
        assert completion.finish_reason == "length"


# --- several completions ---


@BOTH
def test_completions_of_one_prompt_differ_and_come_again_by_their_seed(served: MakeLLM, tp_size: int) -> None:
    llm = served(tp_size)
    params = SamplingParams(n=5, seed=21, max_tokens=20, ignore_eos=True)
    ((*completions,),) = plain(llm.generate(PROMPTS[0], params))
    assert [completion.index for completion in completions] == [0, 1, 2, 3, 4]
    assert len({tuple(completion.token_ids) for completion in completions}) == 5
    assert plain(llm.generate(PROMPTS[0], params)) == [completions]
    ((*others,),) = plain(llm.generate(PROMPTS[0], SamplingParams(n=5, seed=22, max_tokens=20, ignore_eos=True)))
    assert not {tuple(each.token_ids) for each in others} & {tuple(each.token_ids) for each in completions}
    # The first is the only one that n=1 gives; fewer completions are the first of more.
    fewer = SamplingParams(n=2, seed=21, max_tokens=20, ignore_eos=True)
    assert plain(llm.generate(PROMPTS[0], fewer)) == [completions[:2]]


def test_completions_are_the_same_on_one_rank_and_on_several(served: MakeLLM) -> None:
    params = SamplingParams(n=4, seed=21, max_tokens=40)
    assert plain(served(1).generate(PROMPTS, params)) == plain(served(2).generate(PROMPTS, params))


def test_without_a_seed_the_engine_and_the_request_decide(talking: Path) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    runs = []
    for seed in (0, 0, 1):
        with open_llm(talking, 1, seed=seed) as llm:
            runs.append(plain([*llm.generate([PROMPTS[0]] * 2, params), *llm.generate(PROMPTS[0], params)]))
    assert runs[0] == runs[1]
    texts = [completion.text for run in runs[1:] for (completion,) in run]
    assert len(set(texts)) == 6


@BOTH
def test_completions_share_the_blocks_of_their_prompt(served: MakeLLM, tp_size: int) -> None:
    llm = served(tp_size)
    prompt = [token for token in range(13) for _ in range(5)]  # 65 tokens: 16 whole blocks, shared, and one token
    with llm.stream(prompt, SamplingParams(n=6, seed=1, max_tokens=100, ignore_eos=True)) as stream:
        next(stream)
        own = 6 * 2
        assert blocks_in_use(llm) == [blocks_in_use(llm)[0]] * tp_size
        assert 16 + 6 <= blocks_in_use(llm)[0] <= 16 + own


# --- counts ---


@BOTH
def test_usage_is_counted(talking: Path, tp_size: int) -> None:
    with open_llm(talking, tp_size) as llm:
        params = SamplingParams(n=3, seed=1, max_tokens=7, ignore_eos=True)
        prompt = [token for token in range(13) for _ in range(3)]  # 39 tokens: 9 whole blocks
        (first,) = llm.generate(prompt, params)
        (again,) = llm.generate(prompt, params)
        assert (first.num_prompt_tokens, first.num_generated_tokens, first.num_cached_tokens) == (39, 21, 0)
        assert (again.num_prompt_tokens, again.num_generated_tokens, again.num_cached_tokens) == (39, 21, 36)
        assert first.finished
        assert first.outputs == again.outputs
        *_, last = llm.stream(prompt, params)
        assert (last.num_prompt_tokens, last.num_generated_tokens, last.num_cached_tokens) == (39, 21, 36)
        assert last.finished


def test_outputs_come_in_the_order_of_their_prompts_each_with_its_own_parameters(served: MakeLLM) -> None:
    params = [SamplingParams(seed=1, max_tokens=count, ignore_eos=True) for count in (30, 1, 12, 5)]
    outputs = served(1).generate(PROMPTS, params)
    assert [output.prompt_token_ids for output in outputs] == PROMPTS
    assert [output.num_generated_tokens for output in outputs] == [30, 1, 12, 5]
    assert [output.request_id for output in outputs] == sorted(output.request_id for output in outputs)


# --- a model that has something to say ---

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.parametrize("tp_size", [pytest.param(1, marks=pytest.mark.endurance), 2])
def test_the_real_model_answers_and_stops(tp_size: int) -> None:
    with LLM(resolve("smollm2"), tensor_parallel_size=tp_size, fabric="auto" if tp_size == 1 else "threads", device="cpu",
             dtype="float32", max_model_len=128, max_num_seqs=4) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=16)
        (output,) = llm.chat(QUESTION, greedy)
        (completion,) = output.outputs
        assert completion.text == "The capital of France is Paris."
        assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
        (stopped,) = llm.chat(QUESTION, SamplingParams(temperature=0, stop=["rance is P", "nowhere"]))[0].outputs
        assert (stopped.text, stopped.stop_reason) == ("The capital of F", "rance is P")
        assert stopped.token_ids == completion.token_ids[: len(stopped.token_ids)]
        assert joined(list(llm.stream(llm.preprocess_chat(QUESTION), greedy))) == [[completion]]
