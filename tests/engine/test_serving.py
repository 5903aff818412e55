"""The interface people meet: streams, chat, stop strings, several completions, log-probabilities, aborts.

On a random model whose few tokens are letters, words and parts of characters, so that its texts hold all that is hard to
stream; what text means is tried on the real small model.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import LLM, CompletionOutput, RequestOutput, SamplingParams
from engine.parallel.ranks import RankContext, RankFailure
from harness.budgets import computation
from reference.checkpoints import random_checkpoint, resolve
from reference.hf import Reference
from tests.engine.support import tiny_config
from tests.engine.talking import EOS, TOKENS, talking_checkpoint

MakeLLM = Callable[[int], LLM]

PROMPTS = [[8, 9, 10, 8, 9, 10, 7, 11, 12, 0], [7, 10, 7], [9], [8, 9, 10, 8, 9, 10, 7, 11, 12, 0]]
SAMPLED = SamplingParams(temperature=1.0, seed=7, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("served"))


def open_llm(folder: Path, tp_size: int, **options: Any) -> LLM:
    options = {"fabric": "threads" if tp_size > 1 else "solo", "num_kv_blocks": 200, "max_num_seqs": 16} | options
    return LLM(folder, tensor_parallel_size=tp_size, device="cpu", dtype="float32", block_size=4, **options)


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[MakeLLM]:
    """``served(tp_size)``: the model on so many ranks, kept for the whole module. Tests leave it idle."""
    running: dict[int, LLM] = {}

    def get(tp_size: int) -> LLM:
        if tp_size not in running:
            running[tp_size] = open_llm(checkpoint, tp_size)
        return running[tp_size]

    yield get
    for llm in running.values():
        assert not llm._ranks._running, "a message is left under way"
        assert blocks_in_use(llm) == [0] * llm.config.tensor_parallel_size
        llm.close()


BOTH = pytest.mark.parametrize("tp_size", [1, 2])


def count_blocks(rank: RankContext) -> int:
    """Job: blocks of the rank's cache that some sequence holds."""
    blocks = rank.state["core"].scheduler.blocks
    return int(blocks.num_blocks - blocks.num_free)


def count_sequences(rank: RankContext) -> int:
    """Job: sequences that run or wait on the rank."""
    scheduler = rank.state["core"].scheduler
    return len(scheduler.running) + len(scheduler.waiting)


def blocks_in_use(llm: LLM) -> list[int]:
    return llm._ranks.run(count_blocks)


def plain(outputs: Sequence[RequestOutput]) -> list[list[CompletionOutput]]:
    """The completions of each prompt: all of what a request gives but its number and counts."""
    return [output.outputs for output in outputs]


def joined(items: Sequence[RequestOutput]) -> list[list[CompletionOutput]]:
    """What a stream's items make up, by prompt; checks what each says of itself."""
    whole: dict[int, dict[int, CompletionOutput]] = {}
    for item in items:
        completions = whole.setdefault(item.request_id, {})
        assert item.outputs, "an item with nothing new"
        for delta in item.outputs:
            completion = completions.setdefault(delta.index, CompletionOutput(index=delta.index))
            assert completion.finish_reason is None, "something came after the end"
            assert delta.text or delta.finish_reason, "an item with nothing new"
            completion.text += delta.text
            completion.token_ids += delta.token_ids
            if delta.logprobs is not None:
                completion.logprobs = (completion.logprobs or []) + delta.logprobs
            completion.cumulative_logprob = delta.cumulative_logprob
            completion.finish_reason, completion.stop_reason = delta.finish_reason, delta.stop_reason
        ended = all(completion.finish_reason for completion in completions.values())
        assert not item.finished or ended
        known = sum(len(completion.token_ids) for completion in completions.values())
        assert item.num_generated_tokens >= known
    return [[completions[index] for index in sorted(completions)] for _, completions in sorted(whole.items())]


# --- streams ---

STREAMED = {
    "greedy": SamplingParams(temperature=0, max_tokens=30),
    "sampled": SAMPLED,
    "several": SamplingParams(n=3, seed=5, max_tokens=30, logprobs=2),
    "stop strings": SamplingParams(n=2, seed=5, max_tokens=40, stop=["a b", "cab", " c" * 8], ignore_eos=True),
    "stop strings kept": SamplingParams(seed=7, max_tokens=40, min_tokens=9, stop=["漢", "b\ufffd"],
                                        include_stop_str_in_output=True),
    "stop tokens": SamplingParams(seed=8, max_tokens=40, stop_token_ids=[12], logprobs=0, ignore_eos=True),
    "special tokens": SamplingParams(seed=9, max_tokens=20, skip_special_tokens=False, ignore_eos=True),
}


@BOTH
@pytest.mark.parametrize("params", STREAMED.values(), ids=STREAMED)
def test_a_stream_makes_up_what_generate_gives(served: MakeLLM, tp_size: int, params: SamplingParams) -> None:
    llm = served(tp_size)
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
        assert completion.text == decode(completion.token_ids).rstrip("\ufffd")
        assert len(completion.token_ids) == 40
    assert any("漢" in completion.text for (completion,) in plain(llm.generate(PROMPTS, SAMPLED)))


@BOTH
@pytest.mark.parametrize("steps", [(1, 1), (3, 5), (50, 50)])
def test_results_do_not_depend_on_the_steps_per_message(
    served: MakeLLM, tp_size: int, steps: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = served(tp_size)
    params = [replace(STREAMED[name], n=1) for name in ("sampled", "stop strings", "stop strings kept", "stop tokens")]
    expected = plain(llm.generate(PROMPTS, params))
    assert {type(completion.stop_reason) for (completion,) in expected} == {type(None), str, int}
    monkeypatch.setattr("engine.driver.STEPS_PER_MESSAGE", steps[0])
    monkeypatch.setattr("engine.driver.STEPS_WHILE_WATCHED", steps[1])
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
        for _ in range(3):
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
        assert cut.text == decode(whole.token_ids[: count if include else count - 1]).rstrip("\ufffd")
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
    other = llm.stream(PROMPTS[1], SAMPLED)
    items = [next(other)]
    leave(llm)
    assert llm._ranks.run(count_sequences) == [1] * tp_size
    items += list(other)
    assert joined(items) == plain(llm.generate(PROMPTS[1], SAMPLED))
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


def test_an_open_stream_does_not_stand_in_the_way_of_closing(checkpoint: Path) -> None:
    llm = open_llm(checkpoint, 2)
    stream = llm.stream(PROMPTS, SAMPLED)
    next(stream)
    llm.close()
    with pytest.raises(RuntimeError, match="can't be used any more"):
        list(stream)
    stream.close()


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


def test_without_a_seed_the_engine_and_the_request_decide(checkpoint: Path) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    runs = []
    for seed in (0, 0, 1):
        with open_llm(checkpoint, 1, seed=seed) as llm:
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


# --- log-probabilities ---


def reference_logprobs(folder: Path, dtype: str, output: RequestOutput) -> torch.Tensor:
    """``[tokens, vocabulary]`` where each token of the first completion was drawn."""
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    (logits,) = Reference.load(folder, dtype).logits([ids])
    return logits[len(output.prompt_token_ids) - 1 : -1].log_softmax(dim=-1)


def best(output: RequestOutput, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, logprobs) ``[tokens, count]``, best first."""
    assert output.outputs[0].logprobs is not None
    rows = [sorted(at.items(), key=lambda pair: -pair[1].logprob)[:count] for at in output.outputs[0].logprobs]
    return (torch.tensor([[token for token, _ in row] for row in rows]),
            torch.tensor([[logprob.logprob for _, logprob in row] for row in rows]))


@BOTH
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_logprobs_are_those_of_the_raw_logits(checkpoint: Path, served: MakeLLM, tp_size: int, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.8, seed=2, max_tokens=30, logprobs=5, min_tokens=30)
    (output,) = served(tp_size).generate(PROMPTS[0], params)
    exact = reference_logprobs(checkpoint, "exact", output)
    baseline = reference_logprobs(checkpoint, "float32", output)
    ids, logprobs = best(output, 5)
    assert torch.equal(ids, exact.topk(5).indices)
    comparison = computation(logprobs, baseline.gather(1, ids), exact.gather(1, ids), "float32")
    assert comparison.ok, f"error is {comparison.error_over_budget:.2f} of its budget"
    # What was drawn, with its rank and sum.
    (completion,) = output.outputs
    assert completion.logprobs is not None
    for row, (token_id, at) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        assert next(iter(at)) == token_id
        assert at[token_id].rank == 1 + int((exact[row] > exact[row, token_id]).sum())
        assert {logprob.rank for logprob in at.values()} >= {1, 2, 3, 4, 5}
        assert at[token_id].decoded_token == served(tp_size).get_tokenizer().decode([token_id])
    drawn = torch.tensor([[at[token].logprob] for token, at in zip(completion.token_ids, completion.logprobs, strict=True)])
    assert completion.cumulative_logprob == pytest.approx(drawn.sum().item(), rel=1e-5)


def test_the_budget_sees_logprobs_taken_after_the_temperature(checkpoint: Path, served: MakeLLM) -> None:
    (output,) = served(1).generate(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=30, logprobs=5, ignore_eos=True))
    exact = reference_logprobs(checkpoint, "exact", output)
    baseline = reference_logprobs(checkpoint, "float32", output)
    ids, logprobs = best(output, 5)
    exact_5, baseline_5 = exact.gather(1, ids), baseline.gather(1, ids)
    late = (exact / 0.999).log_softmax(dim=-1).gather(1, ids).float()
    assert computation(logprobs, baseline_5, exact_5, "float32").ok
    assert not computation(late, baseline_5, exact_5, "float32").ok


@BOTH
def test_each_request_gets_the_logprobs_that_it_asked_for(served: MakeLLM, tp_size: int) -> None:
    wants = [None, 0, 3, 20]
    params = [SamplingParams(seed=4, max_tokens=12, ignore_eos=True, logprobs=want) for want in wants]
    outputs = served(tp_size).generate([PROMPTS[0]] * 4, params)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert outputs[0].outputs[0].logprobs is None
    assert outputs[0].outputs[0].cumulative_logprob is None
    for want, output in zip(wants[1:], outputs[1:], strict=True):
        (completion,) = output.outputs
        assert completion.logprobs is not None
        assert want is not None
        most = min(want, len(TOKENS))
        for token_id, at in zip(completion.token_ids, completion.logprobs, strict=True):
            assert len(at) == most + (at[token_id].rank > most)
    together = [output.outputs[0].logprobs or [] for output in outputs[1:]]
    for zero, three, everything in zip(*together, strict=True):
        assert zero.keys() <= three.keys() <= everything.keys()


def test_logprobs_come_with_prompts_that_run_in_chunks(checkpoint: Path, served: MakeLLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3, ignore_eos=True)
    prompts = [[token for token in range(start, 13) for _ in range(4)] for start in range(3)]
    with open_llm(checkpoint, 1, max_num_batched_tokens=16) as llm:
        outputs = llm.generate(prompts, params)
    for output, whole in zip(outputs, served(1).generate(prompts, params), strict=True):
        assert output.outputs[0].token_ids == whole.outputs[0].token_ids
        exact = reference_logprobs(checkpoint, "exact", output)
        ids, logprobs = best(output, 3)
        assert computation(logprobs, reference_logprobs(checkpoint, "float32", output).gather(1, ids), exact.gather(1, ids),
                           "float32").ok


# --- counts ---


@BOTH
def test_usage_is_counted(checkpoint: Path, tp_size: int) -> None:
    with open_llm(checkpoint, tp_size) as llm:
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


# --- chat ---


def test_chat_writes_the_conversation_by_the_template(served: MakeLLM) -> None:
    llm = served(1)
    messages = [{"role": "user", "content": "ab a"}, {"role": "assistant", "content": "ba"}]
    (output,) = llm.chat(messages, SAMPLED)
    assert output.prompt == "ab a ba ab"
    assert llm.generate("ab a ba ab", SAMPLED)[0].prompt_token_ids == [EOS, *output.prompt_token_ids]
    assert llm.get_tokenizer().decode(output.prompt_token_ids) == output.prompt
    assert plain([output]) == plain(llm.generate({"prompt_token_ids": output.prompt_token_ids}, SAMPLED))
    two = llm.chat([messages, messages[:1]], SAMPLED, add_generation_prompt=False, chat_template_kwargs={"suffix": "aa"})
    assert [each.prompt for each in two] == ["ab a ba aa", "ab a aa"]
    (own,) = llm.chat(messages, SAMPLED, chat_template="{{ messages[1]['content'] }}")
    assert own.prompt == "ba"
    assert joined(list(llm.stream(llm.preprocess_chat(messages), SAMPLED))) == plain([output])


@pytest.mark.parametrize(
    ("messages", "options", "said"),
    [
        ([{"role": "nobody", "content": "a"}], {}, "the chat template refuses .* who is that"),
        ([], {}, r"messages=\[\] must be a list of messages"),
        ("Hello", {}, "messages='Hello' must be a list of messages"),
        ([[]], {}, r"messages=\[\[\]\] must be a list of messages"),
        ([{"content": "a"}], {}, r"message=\{'content': 'a'\}: messages must be"),
        (["Hello"], {}, r"messages=\['Hello'\] must be"),
        ([{"role": "user", "content": "a"}], {"continue_final_message": True}, "add_generation_prompt=False"),
    ],
    ids=["refused", "empty", "text", "empty one", "no role", "texts", "open and new"],
)
def test_conversations_that_are_none_are_refused(served: MakeLLM, messages: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        served(1).chat(messages, **options)


def test_a_model_without_a_chat_template_says_so(served: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = served(1)
    monkeypatch.setattr(llm.get_tokenizer(), "chat_template", None)
    with pytest.raises(ValueError, match="chat_template=None, and the model's tokenizer has no chat template"):
        llm.chat([{"role": "user", "content": "a"}])
    assert llm.chat([{"role": "user", "content": "a"}], SAMPLED, chat_template="b")[0].prompt == "b"


# --- what can't run ---

BAD_PARAMS = [
    ({"n": 0}, "n=0 must be at least 1"),
    ({"n": True}, "n=True must be at least 1"),
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
    ([[1, "a"]], None, "token_id='a' is outside"),
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
    assert bad.error == f"prompt {bad.request_id}: token_id=99 is outside the vocabulary of vocab_size=14"
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


def test_ranks_that_draw_different_tokens_end_the_run(checkpoint: Path) -> None:
    with open_llm(checkpoint, 2) as llm:
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
def test_a_rank_that_fails_ends_the_run(checkpoint: Path, tp_size: int) -> None:
    with open_llm(checkpoint, tp_size) as llm:
        stream = llm.stream(PROMPTS, SAMPLED)
        next(stream)
        llm._ranks.run(lose_the_scheduler)
        with pytest.raises(RankFailure, match="scheduler"):
            list(stream)
        with pytest.raises(RuntimeError, match="can't be used any more"):
            llm.generate(PROMPTS, SAMPLED)


# --- on processes, and with a model that has something to say ---

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.multirank
def test_ranks_that_are_processes_serve_the_same(checkpoint: Path, served: MakeLLM) -> None:
    with open_llm(checkpoint, 2, fabric="gloo") as llm:
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


@BOTH
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
