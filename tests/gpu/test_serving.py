"""What is served from a GPU: log-probabilities read back behind captured steps, streams, aborts."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import LLM, CompletionOutput, RequestOutput, SamplingParams
from engine.ranks.ranks import RankContext
from harness.verification.budgets import computation
from reference.hf import Reference
from tests.gpu.support import DEVICE, OPTIONS, MakeModel
from tests.reference.tiny import small_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

NUM_TOP = 5


def served(folder: Path, **options: Any) -> LLM:
    return LLM(folder, device=DEVICE, **(OPTIONS | options))


def prompts_of(count: int) -> list[list[int]]:
    draw = random.Random(5)
    return [[draw.randrange(131) for _ in range(draw.randint(1, 40))] for _ in range(count)]


def top(output: RequestOutput) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, logprobs) ``[tokens, NUM_TOP]``, best first."""
    rows = [sorted(at.items(), key=lambda pair: -pair[1].logprob)[:NUM_TOP] for at in output.outputs[0].logprobs or []]
    return (torch.tensor([[token for token, _ in row] for row in rows]),
            torch.tensor([[logprob.logprob for _, logprob in row] for row in rows]))


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
def test_logprobs_are_those_of_the_raw_logits(small_model: MakeModel, enforce_eager: bool) -> None:
    """Greedy rows, sampled ones, and rows that ask for none, in the same steps."""
    folder = small_model(small_config(), "float32")
    prompts = prompts_of(6)
    params = [SamplingParams(temperature=temperature, seed=3, top_p=top_p, max_tokens=20, logprobs=NUM_TOP if asks else None)
              for temperature, top_p, asks in [(0.0, 1.0, True), (0.7, 1.0, True), (0.7, 0.8, True)] * 2]
    params[3] = SamplingParams(temperature=0.0, max_tokens=20)
    with served(folder, enforce_eager=enforce_eager) as llm:
        outputs = llm.generate(prompts, params)
    assert outputs[3].outputs[0].logprobs is None
    exact_model, baseline_model = (Reference.load(folder, dtype, device=DEVICE) for dtype in ("exact", "float32"))
    for output in (output for index, output in enumerate(outputs) if index != 3):
        ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        exact, baseline = (model.logits([ids])[0][len(output.prompt_token_ids) - 1 : -1].log_softmax(dim=-1)
                           for model in (exact_model, baseline_model))
        tokens, logprobs = top(output)
        comparison = computation(logprobs, baseline.gather(1, tokens), exact.gather(1, tokens), "float32")
        assert comparison.ok, f"error is {comparison.error_over_budget:.2f} of its budget"
        assert torch.equal(tokens, exact.topk(NUM_TOP).indices)


def test_a_stream_makes_up_what_generate_gives(small_model: MakeModel) -> None:
    """One prompt at a time and none from the prefix cache: on other numbers of rows other kernels run, and round otherwise."""
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=30, logprobs=2)
    with served(small_model(small_config(), "float32"), enable_prefix_caching=False) as llm:
        for prompt in prompts_of(3):
            (expected,) = llm.generate(prompt, params)
            deltas = [item.outputs[0] for item in llm.stream(prompt, params)]
            assert len(deltas) == 30, "a token at a time"
            joined = CompletionOutput(index=0, token_ids=[token for delta in deltas for token in delta.token_ids])
            joined.logprobs = [at for delta in deltas for at in delta.logprobs or []]
            last = deltas[-1]
            joined.cumulative_logprob, joined.finish_reason = last.cumulative_logprob, last.finish_reason
            assert [joined] == expected.outputs


def test_an_aborted_request_leaves_the_others_their_tokens(small_model: MakeModel) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40)
    prompts = prompts_of(4)
    with served(small_model(small_config(), "float32")) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        stream = llm.stream(prompts, params)
        found: dict[int, list[int]] = {number: [] for number in stream.request_ids}
        for count, item in enumerate(stream):
            found[item.request_id] += item.outputs[0].token_ids
            if count == 10:
                llm.abort(stream.request_ids[1])
        assert len(found[stream.request_ids[1]]) < 40
        for number, tokens in zip(stream.request_ids, expected, strict=True):
            assert tokens[: len(found[number])] == found[number]
            assert number == stream.request_ids[1] or len(found[number]) == 40


def spoil(rank: RankContext, token_id: int) -> None:
    """Job: plants a NaN in the embedding of a token."""
    with torch.inference_mode():
        rank.state["core"].runner.model.get_parameter("model.embed_tokens.weight")[token_id] = math.nan


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
def test_a_request_that_meets_a_nan_ends_there_and_the_others_go_on(small_model: MakeModel, enforce_eager: bool) -> None:
    params = [SamplingParams(temperature=temperature, seed=3, top_p=top_p, max_tokens=30, logprobs=logprobs)
              for temperature, top_p, logprobs in [(0.0, 1.0, None), (1.0, 1.0, 2), (1.5, 0.8, None)] * 2]
    prompts = prompts_of(6)
    with served(small_model(small_config(), "float32"), enforce_eager=enforce_eager) as llm:
        before = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        others = [{*prompt, *ids} for prompt, ids in zip(prompts, before, strict=True)]
        victim, step = next((number, step) for number, ids in enumerate(before) for step in range(4, 20)
                            if not any(ids[step] in met for other, met in enumerate(others) if other != number)
                            and ids[step] not in (*prompts[number], *ids[:step]))
        llm._ranks.run(spoil, before[victim][step])
        for _ in range(2):
            outputs = llm.generate(prompts, params)
            for number, output in enumerate(outputs):
                (completion,) = output.outputs
                if number != victim:
                    assert completion.token_ids == before[number]
                    continue
                assert completion.finish_reason == "error"
                assert completion.token_ids == before[victim][: step + 1]
                assert f"not finite at step {step + 1}: rank 0's part of model.embed_tokens.weight" in str(output.error)
