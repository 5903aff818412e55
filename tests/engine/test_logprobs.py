"""Log-probabilities are those of the raw logits, by the reference's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import RequestOutput, SamplingParams
from tests.engine.served import (
    BOTH,
    PROMPTS,
    MakeLLM,
    open_llm,
)
from tests.engine.talking import TOKENS, Exact


def exact_logprobs(exact: Exact, output: RequestOutput) -> torch.Tensor:
    """``[tokens, vocabulary]`` where each token of the first completion was drawn."""
    logits = exact.logits([*output.prompt_token_ids, *output.outputs[0].token_ids])
    return logits[len(output.prompt_token_ids) - 1 : -1].log_softmax(dim=-1)


def best(output: RequestOutput, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, logprobs) ``[tokens, count]``, best first."""
    assert output.outputs[0].logprobs is not None
    rows = [sorted(at.items(), key=lambda pair: -pair[1].logprob)[:count] for at in output.outputs[0].logprobs]
    return (torch.tensor([[token for token, _ in row] for row in rows]),
            torch.tensor([[logprob.logprob for _, logprob in row] for row in rows]))


@BOTH
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_logprobs_are_those_of_the_raw_logits(exact: Exact, served: MakeLLM, tp_size: int, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.8, seed=2, max_tokens=30, logprobs=5, min_tokens=30)
    (output,) = served(tp_size).generate(PROMPTS[0], params)
    exact_TV = exact_logprobs(exact, output)
    ids, logprobs = best(output, 5)
    assert torch.equal(ids, exact_TV.topk(5).indices)
    assert (logprobs - exact_TV.gather(1, ids)).abs().max() <= exact.margin
    # What was drawn, with its rank and sum.
    (completion,) = output.outputs
    assert completion.logprobs is not None
    for row, (token_id, at) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        assert next(iter(at)) == token_id
        assert at[token_id].rank == 1 + int((exact_TV[row] > exact_TV[row, token_id]).sum())
        assert {logprob.rank for logprob in at.values()} >= {1, 2, 3, 4, 5}
        assert at[token_id].decoded_token == served(tp_size).get_tokenizer().decode([token_id])
    drawn = torch.tensor([[at[token].logprob] for token, at in zip(completion.token_ids, completion.logprobs, strict=True)])
    assert completion.cumulative_logprob == pytest.approx(drawn.sum().item(), rel=1e-5)


def test_the_margin_sees_logprobs_taken_after_the_temperature(exact: Exact, served: MakeLLM) -> None:
    (output,) = served(1).generate(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=30, logprobs=5, ignore_eos=True))
    exact_TV = exact_logprobs(exact, output)
    ids, logprobs = best(output, 5)
    late = (exact_TV / 0.999).log_softmax(dim=-1)
    assert (logprobs - exact_TV.gather(1, ids)).abs().max() <= exact.margin
    assert (late - exact_TV).gather(1, ids).abs().max() > exact.margin


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


def test_logprobs_come_with_prompts_that_run_in_chunks(talking: Path, exact: Exact, served: MakeLLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3, ignore_eos=True)
    prompts = [[token for token in range(start, 13) for _ in range(4)] for start in range(3)]
    with open_llm(talking, 1, max_num_batched_tokens=16) as llm:
        outputs = llm.generate(prompts, params)
    for output, whole in zip(outputs, served(1).generate(prompts, params), strict=True):
        assert output.outputs[0].token_ids == whole.outputs[0].token_ids
        ids, logprobs = best(output, 3)
        assert (logprobs - exact_logprobs(exact, output).gather(1, ids)).abs().max() <= exact.margin
