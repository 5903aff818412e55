"""Streams: text as it comes, and what ends one before its end: aborts, and readers who leave."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from engine import LLM, CompletionOutput, SamplingParams
from reference.checkpoints import random_checkpoint
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
from tests.engine.support import tiny_config

# --- streams ---


@pytest.mark.parametrize(("tp_size", "params"), [
    *(pytest.param(2, params, id=f"{name}-2") for name, params in STREAMED.items()),
    pytest.param(1, STREAMED["several"], id="several-1"), pytest.param(1, STREAMED["stop strings"], id="stop strings-1")])
def test_a_stream_makes_up_what_generate_gives(served: MakeLLM, tp_size: int, params: SamplingParams) -> None:
    llm = served(tp_size)
    llm.generate(PROMPTS, params)  # after it both find the prompts in the cache, and have the same log-probabilities to the bit
    expected = plain(llm.generate(PROMPTS, params))
    assert joined(list(llm.stream(PROMPTS, params))) == expected
    met = {completion.stop_reason for completions in expected for completion in completions} - {None}
    assert bool(met) == bool(params.stop_strings or params.stop_token_ids), "no stop was met"


@BOTH
def test_the_text_is_what_the_tokens_stand_for(served: MakeLLM, tp_size: int) -> None:
    llm = served(tp_size)
    decode = partial(llm.get_tokenizer().decode, skip_special_tokens=True)
    for output in llm.generate(PROMPTS, SAMPLED):
        (completion,) = output.outputs
        assert completion.text == decode(completion.token_ids)
        assert len(completion.token_ids) == 40
    assert any("漢" in completion.text for (completion,) in plain(llm.generate(PROMPTS, SAMPLED)))


@pytest.mark.parametrize("skip", [True, False])
def test_a_text_is_the_tokenizers_own_to_its_last_character(served: MakeLLM, skip: bool) -> None:
    llm = served(1)
    params = [SamplingParams(seed=seed, max_tokens=1 + seed % 12, ignore_eos=True, skip_special_tokens=skip)
              for seed in range(60)]
    prompts = [PROMPTS[0]] * len(params)
    decode = partial(llm.get_tokenizer().decode, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    for completions in (*plain(llm.generate(prompts, params)), *joined(list(llm.stream(prompts, params)))):
        assert completions[0].text == decode(completions[0].token_ids)


@pytest.mark.parametrize(("tp_size", "steps"), [(1, (3, 5)), (2, (1, 1)), (2, (3, 5)), (2, (50, 50))])
def test_results_do_not_depend_on_the_steps_per_message(
    served: MakeLLM, tp_size: int, steps: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = served(tp_size)
    params = [replace(STREAMED[name], n=1) for name in ("sampled", "stop strings", "stop strings kept", "stop tokens")]
    expected = plain(llm.generate(PROMPTS, params))
    assert {type(completion.stop_reason) for (completion,) in expected} == {type(None), str, int}
    monkeypatch.setattr("engine.execution.driver.STEPS_PER_MESSAGE", steps[0])
    monkeypatch.setattr("engine.execution.driver.STEPS_WHILE_WATCHED", steps[1])
    assert plain(llm.generate(PROMPTS, params)) == expected
    assert joined(list(llm.stream(PROMPTS, params))) == expected


@BOTH
def test_text_comes_while_it_grows(served: MakeLLM, tp_size: int) -> None:
    stream = served(tp_size).stream(PROMPTS[0], SAMPLED)
    first = next(stream)
    assert len(first.outputs[0].token_ids) < 10
    assert not first.finished
    assert sum(1 for _ in stream) > 10


@BOTH
def test_calls_may_be_made_while_a_stream_is_open(served: MakeLLM, tp_size: int) -> None:
    llm = served(tp_size)
    alone = plain(llm.generate(PROMPTS, SAMPLED))
    outer, inner = llm.stream(PROMPTS[:2], SAMPLED), llm.stream(PROMPTS[2], SAMPLED)
    items = [next(outer), next(outer)]
    others = [next(inner)]
    assert plain(llm.generate(PROMPTS[3], SAMPLED)) == alone[3:]
    others += list(inner)
    items += list(outer)
    assert joined(items) == alone[:2]
    assert joined(others) == alone[2:3]


@BOTH
def test_calls_from_several_threads_share_the_ranks(served: MakeLLM, tp_size: int) -> None:
    llm = served(tp_size)
    alone = plain(llm.generate(PROMPTS, SAMPLED))
    results: dict[int, list[list[CompletionOutput]]] = {}

    def call(number: int) -> None:
        for _ in range(2):
            if number % 2:
                results[number] = plain(llm.generate(PROMPTS[number], SAMPLED, use_tqdm=False))
            else:
                results[number] = joined(list(llm.stream(PROMPTS[number], SAMPLED)))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {number: [alone[number]] for number in range(len(PROMPTS))}


def test_a_model_without_a_tokenizer_streams_tokens(tmp_path: Path) -> None:
    with open_llm(random_checkpoint(tmp_path, tiny_config()), 1) as llm:
        (expected,) = llm.generate([5, 6], SAMPLED)
        items = list(llm.stream([5, 6], SAMPLED))
        assert len(items) == len(expected.outputs[0].token_ids) == 40
        assert [item.outputs[0].token_ids[0] for item in items] == expected.outputs[0].token_ids
        with pytest.raises(ValueError, match=r"stop=\('a',\) needs a tokenizer"):
            llm.generate([5, 6], SamplingParams(stop="a"))
        with pytest.raises(ValueError, match="a text prompt needs a tokenizer"):
            llm.generate("text")
        with pytest.raises(ValueError, match="chat needs a tokenizer"):
            llm.chat([{"role": "user", "content": "Hello"}])
        with pytest.raises(ValueError, match="holds no tokenizer"):
            llm.get_tokenizer()


# --- aborts ---


@BOTH
def test_an_aborted_request_ends_and_the_others_do_not_notice(served: MakeLLM, tp_size: int) -> None:
    llm = served(tp_size)
    alone = plain(llm.generate(PROMPTS[:3], SAMPLED))
    stream = llm.stream(PROMPTS[:3], SAMPLED)
    items = [next(stream) for _ in range(6)]
    llm.abort(stream.request_ids[1])
    llm.abort(12345)
    assert llm._ranks.run(count_sequences) == [2] * tp_size  # at once, whether or not anybody asks for more
    items += list(stream)
    first, aborted, third = joined(items)
    assert [first, third] == [alone[0], alone[2]]
    (completion,) = aborted
    assert completion.finish_reason == "abort"
    assert len(completion.token_ids) < 40
    assert alone[1][0].text.startswith(completion.text)
    assert blocks_in_use(llm) == [0] * tp_size


def leave_by_break(llm: LLM) -> None:
    for _ in llm.stream(PROMPTS, SAMPLED):
        break


def leave_by_close(llm: LLM) -> None:
    with llm.stream(PROMPTS, SAMPLED) as stream:
        next(stream)
        assert min(llm._ranks.run(count_sequences)) > 0
    assert list(stream) == []


def leave_by_an_exception(llm: LLM) -> None:
    try:
        for item in llm.stream(PROMPTS, SAMPLED):
            raise KeyError(item.request_id)
    except KeyError:
        pass
    gc.collect()


def leave_by_garbage(llm: LLM) -> None:
    stream = llm.stream(PROMPTS, SAMPLED)
    next(stream)
    cycle = [stream]
    cycle.append(cycle)  # type: ignore[arg-type]
    del stream, cycle
    gc.collect()


def leave_before_the_start(llm: LLM) -> None:
    llm.stream(PROMPTS, SAMPLED).close()


LEAVING = [leave_by_break, leave_by_close, leave_by_an_exception, leave_by_garbage, leave_before_the_start]


@BOTH
@pytest.mark.parametrize("leave", LEAVING)
def test_leaving_a_stream_frees_its_blocks_on_every_rank(served: MakeLLM, tp_size: int, leave: Callable[[LLM], None]) -> None:
    llm = served(tp_size)
    params = replace(SAMPLED, max_tokens=24)
    other = llm.stream(PROMPTS[1], params)
    items = [next(other)]
    leave(llm)
    assert llm._ranks.run(count_sequences) == [1] * tp_size
    items += list(other)
    assert joined(items) == plain(llm.generate(PROMPTS[1], params))
    assert blocks_in_use(llm) == [0] * tp_size


@BOTH
def test_another_thread_may_abort(served: MakeLLM, tp_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = served(tp_size)
    stream = llm.stream([PROMPTS[0], PROMPTS[1]], SamplingParams(seed=1, max_tokens=150, n=2, ignore_eos=True))
    items = [next(stream)]
    threading.Thread(target=llm.abort, args=(stream.request_ids[0],)).start()
    items += list(stream)
    first, second = joined(items)
    assert {completion.finish_reason for completion in first} == {"abort"}
    assert {completion.finish_reason for completion in second} == {"length"}
    assert blocks_in_use(llm) == [0] * tp_size


def test_an_open_stream_does_not_stand_in_the_way_of_closing(talking: Path) -> None:
    llm = open_llm(talking, 2)
    stream = llm.stream(PROMPTS, SAMPLED)
    next(stream)
    llm.close()
    with pytest.raises(RuntimeError, match="the engine was closed while it ran request_id="):
        list(stream)
    stream.close()


# --- on processes ---


@pytest.mark.multirank
def test_ranks_that_are_processes_serve_the_same(talking: Path, served: MakeLLM) -> None:
    with open_llm(talking, 2, fabric="gloo") as llm:
        params = [replace(each, max_tokens=16) for each in STREAMED.values()]
        prompts = [PROMPTS[0]] * len(params)
        expected = plain(served(2).generate(prompts, params))
        assert plain(llm.generate(prompts, params)) == expected
        assert joined(list(llm.stream(prompts, params))) == expected
        leave_by_break(llm)
        assert llm._ranks.run(count_sequences) == [0, 0]
        assert blocks_in_use(llm) == [0, 0]
        stream = llm.stream(PROMPTS[:2], replace(SAMPLED, max_tokens=20))
        items = [next(stream)]
        llm.abort(stream.request_ids[0])
        items += list(stream)
        assert [completions[0].finish_reason for completions in joined(items)] == ["abort", "length"]
