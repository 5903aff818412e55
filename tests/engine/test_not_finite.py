"""Logits that are not finite end a request with an error that names step, rank and weight, and nobody else's."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import RequestOutput, SamplingParams
from engine.ranks.ranks import RankContext
from tests.engine.conftest import MakeCheckpoint
from tests.engine.served import SAMPLED, blocks_in_use, open_llm, plain
from tests.engine.support import make_runner, on_ranks

KINDS = [
    pytest.param(("solo", 1), id="solo-1"),
    pytest.param(("threads", 2), id="threads-2"),
    pytest.param(("gloo", 2), id="gloo-2", marks=pytest.mark.multirank),
]
POISON = 97  # a token whose embedding is not finite
GOOD, BAD = [5, 6, 7, 8, 9, 10, 11], [6, 6, 7, 8, 9, POISON, 10]
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def spoilt(checkpoint: MakeCheckpoint, tmp_path: Path) -> Callable[[str, tuple[int, ...], float], Path]:
    """``spoilt(tensor, index, value)``: a model one element of which is something else."""

    def make(tensor: str, index: tuple[int, ...], value: float, **changes: Any) -> Path:
        folder = Path(shutil.copytree(checkpoint(**changes), tmp_path / "model", dirs_exist_ok=True))
        tensors = load_file(folder / "model.safetensors")
        tensors[tensor][index] = value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def errors_of(outputs: Sequence[RequestOutput]) -> list[str]:
    return [output.error or "" for output in outputs]


def tokens_of(outputs: Sequence[RequestOutput]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_ends_every_request_with_its_name(spoilt: Any, kind: tuple[str, int], value: float) -> None:
    folder = spoilt(DOWN, (3, 40), value)  # a row-parallel weight: the second rank's, of two
    with open_llm(folder, kind[1], fabric=kind[0]) as llm:
        for outputs in (llm.generate([GOOD, [1]], SAMPLED), [*llm.stream([GOOD, [1]], SAMPLED)]):
            assert len(outputs) == 2
            for output in outputs:
                (completion,) = output.outputs
                assert (completion.finish_reason, completion.token_ids, completion.text) == ("error", [], "")
                assert output.finished
                assert output.error == (f"request_id={output.request_id}, completion 0: logits are not finite at step 0: "
                                        f"rank {kind[1] - 1}'s part of {DOWN} holds a NaN or an infinity; `shardproof verify` "
                                        "says more")
        assert blocks_in_use(llm) == [0] * kind[1]


@pytest.mark.parametrize(("tensor", "index"), [
    ("lm_head.weight", (100, 3)), ("model.norm.weight", (5,)), ("model.layers.0.self_attn.o_proj.bias", (0,)),
    ("model.layers.0.self_attn.v_proj.weight", (9, 9)), ("model.layers.1.input_layernorm.weight", (0,)),
])
def test_wherever_the_weight_is_the_request_ends(spoilt: Any, tensor: str, index: tuple[int, ...]) -> None:
    with open_llm(spoilt(tensor, index, math.nan), 3) as llm:
        (output,) = llm.generate(GOOD, SamplingParams(temperature=0, max_tokens=5, logprobs=3, top_k=7))
        assert output.outputs[0].finish_reason == "error"
        assert "logits are not finite at step 0: rank " in str(output.error)
        assert "holds a NaN or an infinity" in str(output.error)


PARAMS = {
    "sampled": replace(SAMPLED, max_tokens=12), "greedy": SamplingParams(temperature=0, max_tokens=12),
    "several": SamplingParams(n=3, seed=1, max_tokens=12, logprobs=2),
    "filtered": SamplingParams(seed=2, top_k=9, top_p=0.8, max_tokens=12),
    "banned": SamplingParams(seed=2, min_tokens=12, stop_token_ids=[4], max_tokens=12),
}


@pytest.mark.parametrize(("kind", "params"), [
    pytest.param(kind.values[0], params, id=f"{name}-{kind.id}",
                 # Kinds of ranks differ in how they are driven, parameters in what a rank draws: all of each, not all pairs.
                 marks=[*kind.marks, *[pytest.mark.endurance] * (kind is not KINDS[1] and name != "several")])
    for kind in KINDS for name, params in PARAMS.items()])
def test_the_other_requests_go_on_as_if_they_were_alone(spoilt: Any, kind: tuple[str, int], params: SamplingParams) -> None:
    folder = spoilt("model.embed_tokens.weight", (POISON, 0), math.nan)
    with open_llm(folder, kind[1], fabric=kind[0]) as llm:
        outputs = llm.generate([GOOD, [1]], params)
        assert all(completion.finish_reason == "length" for output in outputs for completion in output.outputs)
        alone = tokens_of(outputs)
        for _ in range(2):  # again, with whatever the prefix cache holds by now
            good, bad, other = llm.generate([GOOD, BAD, [1]], params)
            assert tokens_of([good, other]) == alone
            assert [completion.finish_reason for completion in bad.outputs] == ["error"] * params.n
            assert "rank 1" in str(bad.error) if kind[1] == 2 else "rank 0" in str(bad.error)
            assert good.error is other.error is None
        streamed: dict[int, list[list[int]]] = {}
        for item in llm.stream([GOOD, BAD, [1]], params):
            for completion in item.outputs:
                streamed.setdefault(item.request_id, [[] for _ in range(params.n)])[completion.index] += completion.token_ids
        assert [streamed[number] for number in sorted(streamed)] == [alone[0], [[]] * params.n, alone[1]]
        assert blocks_in_use(llm) == [0] * kind[1]


def test_the_step_is_counted_and_what_came_before_is_kept(spoilt: Any) -> None:
    folder = spoilt("model.embed_tokens.weight", (POISON, 0), 0.0)
    with open_llm(folder, 2) as llm:
        whole = llm.generate([[number] for number in range(16)], SamplingParams(seed=3, max_tokens=60, logprobs=1))
    # A request that draws the token in mid-text: from the step after it, there is nothing finite.
    number, step = next((number, output.outputs[0].token_ids.index(POISON)) for number, output in enumerate(whole)
                        if POISON in output.outputs[0].token_ids[4:50] and POISON not in output.outputs[0].token_ids[:4])
    with open_llm(folder, 2) as llm:
        llm._ranks.run(spoil_embedding)
        (output,) = llm.generate([[number]], SamplingParams(seed=3, max_tokens=60, logprobs=1))
        (completion,) = output.outputs
        assert completion.token_ids == whole[number].outputs[0].token_ids[: step + 1]
        assert output.num_generated_tokens == step + 1 == len(completion.logprobs or [])
        assert f"logits are not finite at step {step + 1}: rank 1's part of model.embed_tokens.weight" in str(output.error)


def spoil_embedding(rank: RankContext) -> None:
    """Job: plants a NaN in the weight of rank 1, which holds the token."""
    if rank.tp.rank == 1:
        weight = rank.state["core"].runner.model.get_parameter("model.embed_tokens.weight")
        with torch.inference_mode():
            weight[POISON - 66] = math.nan


def spoil_cache(rank: RankContext, tp_rank: int) -> None:
    """Job: plants NaN in all of a rank's cached keys and values."""
    if rank.tp.rank == tp_rank:
        for cache in rank.state["core"].runner.caches:
            with torch.inference_mode():
                cache.v_PNBH.fill_(math.nan)


def test_a_damaged_cache_is_told_from_a_bad_weight_and_its_blocks_are_not_used_again(checkpoint: MakeCheckpoint) -> None:
    prompt = list(range(40))
    with open_llm(checkpoint(), 2) as llm:
        alone = plain(llm.generate([prompt], SAMPLED))
        llm._ranks.run(spoil_cache, 1)
        (output,) = llm.generate([prompt], SAMPLED)  # it finds its prefix in the cache
        assert output.num_cached_tokens in (0, 36)
        assert "logits are not finite at step 0: on all 2 ranks, where every weight is finite" in str(output.error)
        again = llm.generate([prompt], SAMPLED)
        assert again[0].num_cached_tokens == 0
        assert plain(again) == alone



def lose_a_token(rank: RankContext) -> None:
    runner = rank.state["core"].runner
    collect = runner.collect
    if rank.tp.rank == 1:
        runner.collect = lambda drawn: [-1 for _ in collect(drawn)]


def test_ranks_that_disagree_on_it_end_the_run(checkpoint: MakeCheckpoint) -> None:
    with open_llm(checkpoint(), 2) as llm:
        llm._ranks.run(lose_a_token)
        with pytest.raises(RuntimeError, match=r"ranks \[1\] drew other token ids than rank 0"):
            llm.generate([GOOD], SamplingParams(max_tokens=1))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_a_weight_that_is_not_finite_is_found_in_every_dtype(checkpoint: MakeCheckpoint, dtype: str) -> None:
    def look(spoil: Callable[[Tensor], None] | None) -> list[str | None]:
        def job(tp: Any) -> str | None:
            runner = make_runner(checkpoint(), tp, dtype=dtype)
            if spoil is not None and tp.rank == 1:
                with torch.inference_mode():
                    spoil(runner.model.get_parameter("model.norm.weight"))
            return runner.not_finite_weight

        return on_ranks(2, job)

    assert look(None) == [None, None]
    for value in (math.nan, math.inf, -math.inf):
        assert look(lambda weight, value=value: weight[3:4].fill_(value)) == [None, "model.norm.weight"]  # type: ignore[misc]


def test_a_prompt_may_begin_as_one_that_failed_did(spoilt: Any) -> None:
    with open_llm(spoilt("model.embed_tokens.weight", (POISON, 0), math.nan), 2) as llm:
        for prompt in ([*GOOD, POISON], [*GOOD, 1], [*GOOD, POISON], GOOD):
            (output,) = llm.generate([prompt], SAMPLED)
            assert (output.error is not None) == (POISON in prompt), "the prefix cache holds what a bad request left there"


def test_an_engine_with_errors_keeps_its_memory_in_order(spoilt: Any) -> None:
    def check(rank: RankContext) -> None:
        rank.state["core"].scheduler.blocks.check_integrity()

    with open_llm(spoilt("model.embed_tokens.weight", (POISON, 0), math.nan), 2, num_kv_blocks=60, max_num_seqs=3) as llm:
        prompts = [BAD, GOOD, [POISON], [1], BAD[1:], GOOD[2:]] * 2
        outputs = llm.generate(prompts, SAMPLED)
        assert [bool(error) for error in errors_of(outputs)] == [POISON in prompt for prompt in prompts]
        llm._ranks.run(check)
        assert blocks_in_use(llm) == [0, 0]
