"""Our processing of logits beside vLLM's own sampler, on the same logits and drawn parameters.

Runs where ``SHARDPROOF_VLLM_PYTHON`` names an interpreter that has vLLM (``docs/vllm_names.md`` says what was seen).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.frontend.sampling import SamplingParams
from engine.layers.sampler import ORDINARY_DRAWING, prompt_logprobs_of, sample
from engine.scheduling.batch import build_batch
from engine.scheduling.scheduler import Chunk
from engine.scheduling.sequence import Request, Sequence

PYTHON = os.environ.get("SHARDPROOF_VLLM_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="SHARDPROOF_VLLM_PYTHON names no interpreter that has vLLM")

BATCHES, ROWS = 75, 4
"""300 rows a kind."""
BORDER = 1e-5
"""Nearer than this to a border in probability, rounding decides which side a token is on."""
LAST_BIT = 2.0**-22
"""Of a float32: where vLLM multiplies by a penalty's inverse and we divide, say."""
Draw = Callable[[random.Random, int], dict[str, Any]]


def some(draw: random.Random, vocab_size: int, most: int) -> list[int]:
    return [draw.randrange(vocab_size) for _ in range(draw.randint(1, most))]


KINDS: dict[str, Draw] = {
    "temperature": lambda draw, v: {"temperature": draw.choice([0.0, 0.3, 1.0, 2.0])},
    "top_k": lambda draw, v: {"top_k": draw.choice([-1, 0, 1, 2, 5, v, v + 9])},
    "top_p": lambda draw, v: {"top_p": draw.choice([1.0, 0.95, draw.random()])},
    "min_p": lambda draw, v: {"min_p": draw.choice([0.0, 1.0, draw.random(), draw.random() / 20])},
    "repetition_penalty": lambda draw, v: {"repetition_penalty": draw.choice([1.0, 0.5, draw.uniform(0.1, 3)])},
    "presence_penalty": lambda draw, v: {"presence_penalty": draw.uniform(-2, 2)},
    "frequency_penalty": lambda draw, v: {"frequency_penalty": draw.uniform(-2, 2)},
    "logit_bias": lambda draw, v: {"logit_bias": {token: draw.choice([draw.uniform(-9, 9), 100.0, -100.0])
                                                  for token in some(draw, v, 6)}},
    "allowed_token_ids": lambda draw, v: {"allowed_token_ids": some(draw, v, 8)} if draw.random() < 0.8 else {},
    "bad_words": lambda draw, v: {},
    "min_tokens": lambda draw, v: {"min_tokens": draw.randint(0, 9), "stop_token_ids": some(draw, v, 5)},
}


def draw_row(draw: random.Random, kinds: list[str], vocab_size: int) -> dict[str, Any]:
    params: dict[str, Any] = {"temperature": draw.choice([0.4, 1.0, 1.7]), "max_tokens": 20}
    for kind in kinds:
        params |= KINDS[kind](draw, vocab_size)
    if params["temperature"] == 0:  # without meaning there
        params.pop("min_p", None)
    output = [draw.randrange(vocab_size) for _ in range(draw.randint(0, 9))]
    words = [output[-draw.randint(1, 3):] * (draw.random() < 0.7) + some(draw, vocab_size, 2) for _ in range(3)]
    generator = np.random.default_rng(draw.randrange(2**32))
    return {
        "logits": (3 * generator.standard_normal(vocab_size)).astype(np.float32).tolist(), "output": output,
        "prompt": some(draw, vocab_size, 9), "logit_bias": list(params.pop("logit_bias", {}).items()), "params": params,
        "bad_words": [word for word in words if word] if "bad_words" in kinds else [], "told": draw.randrange(vocab_size),
    }


def draw_batches(kinds: list[str]) -> list[list[dict[str, Any]]]:
    draw = random.Random(f"vllm {kinds}")
    batches = []
    for _ in range(BATCHES):
        vocab_size = draw.randint(12, 80)
        batches.append([draw_row(draw, kinds, vocab_size) for _ in range(ROWS)])
    return batches


TOGETHER: dict[str, list[str]] = {**{kind: [kind] for kind in KINDS}, "all together": list(KINDS)}
ALIKE = {name: draw_batches(kinds) for name, kinds in TOGETHER.items()} if PYTHON else {}
ROW: dict[str, Any] = {"logits": [1.0, 2.0, 2.0, 2.0, 0.0], "output": [], "prompt": [1], "logit_bias": [], "bad_words": [],
                       "told": 2, "params": {"temperature": 1.0}}
OTHERWISE = [[ROW | {"params": {"temperature": 1.0, "top_k": 2}}], [ROW | {"logit_bias": [[0, 300.0], [1, -300.0]]}]]


@pytest.fixture(scope="module")
def theirs() -> dict[str, list[dict[str, Any]]]:
    """vLLM's answers by kind, all from one process."""
    script = Path(__file__).with_name("vllm_sampler.py")
    kinds = {**ALIKE, "otherwise": OTHERWISE}
    # Compiling takes longer than what is compiled.
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": ""}
    ran = subprocess.run([PYTHON, str(script)], input=json.dumps([batch for kind in kinds.values() for batch in kind]),
                         capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    answers = iter(json.loads(ran.stdout.splitlines()[-1]))
    return {kind: [next(answers) for _ in batches] for kind, batches in kinds.items()}


def ours(rows: list[dict[str, Any]], draw: random.Random) -> tuple[Tensor, list[int]]:
    """What we draw from, divided by the temperature, and what is drawn; some of the newest tokens are still in flight."""
    chunks, newest = [], []
    for number, row in enumerate(rows):
        params = SamplingParams(**row["params"], logit_bias=dict(row["logit_bias"]) or None)
        request = Request(request_id=number, prompt_token_ids=tuple(row["prompt"]), params=params, seed=number, max_tokens=20,
                          stop_token_ids=frozenset(params.stop_token_ids), bad_words=tuple(map(tuple, row["bad_words"])))
        tokens = [*row["prompt"], *row["output"]]
        in_flight = bool(row["output"]) and draw.random() < 0.5
        known = tokens[:-1] if in_flight else tokens
        sequence = Sequence(request=request, token_ids=known, blocks=[0] * 8, row=number, num_in_flight=int(in_flight))
        start = len(tokens) - 1 if in_flight else 0
        chunks.append(Chunk(sequence, start, len(tokens) - start, samples=True, in_flight=in_flight))
        newest.append(tokens[-1])
    seen: list[Tensor] = []

    def argmax(logits_RV: Tensor, *noise: Any) -> tuple[Tensor, Tensor]:
        seen.append(logits_RV)
        return ORDINARY_DRAWING.argmax(logits_RV, *noise)

    sampling = build_batch(chunks, block_size=4).sampling
    logits = torch.tensor([row["logits"] for row in rows])
    drawn = sample(logits, sampling, torch.tensor(newest), replace(ORDINARY_DRAWING, argmax=argmax))
    temperature_R1 = sampling.temperature_R.where(sampling.temperature_R > 0, 1.0)[:, None]
    return seen[0] / temperature_R1, drawn.tolist()


def can_be_drawn(logits_V: Tensor) -> Tensor:
    """vLLM filters a token of probability 0 where another row of the batch has a top_p, and leaves it alone elsewhere."""
    return logits_V.softmax(0) > 0


def near_border(params: dict[str, Any], left_V: Tensor) -> bool:
    """Whether a token's side of a border in probability is up to rounding, by the tokens that are left."""
    top_p, min_p = params.get("top_p", 1.0), params.get("min_p", 0.0)
    probability = left_V.double().softmax(0).sort(descending=True).values
    sums = probability.cumsum(0)
    # What is left adds up to 1: its last token is near a border if the sums before it are, in units of all there was.
    lies_near = (sums * top_p - top_p).abs() < BORDER
    return bool(lies_near[:-1].any() or ((probability / probability[0] - min_p).abs() < BORDER).any())


@pytest.mark.parametrize("kind", TOGETHER)
def test_what_is_drawn_from_is_what_vllm_draws_from(kind: str, theirs: dict[str, list[dict[str, Any]]]) -> None:
    up_to_rounding = 0
    for number, (rows, answer) in enumerate(zip(ALIKE[kind], theirs[kind], strict=True)):
        found, drawn = ours(rows, random.Random(number))
        expected = as_tensor(answer["processed"])
        for row, mine_V, its_V, token, its_token in zip(rows, found, expected, drawn, answer["drawn"], strict=True):
            if row["params"]["temperature"] == 0:
                assert token == its_token
                continue
            mine_can, its_can = can_be_drawn(mine_V), can_be_drawn(its_V)
            if not torch.equal(mine_can, its_can) and (near_border(row["params"], mine_V) or near_border(row["params"], its_V)):
                up_to_rounding += 1
                continue
            assert torch.equal(mine_can, its_can), f"{row['params']}: {mine_can.sum()} can be drawn, by vLLM {its_can.sum()}"
            torch.testing.assert_close(mine_V[mine_can], its_V[mine_can], rtol=LAST_BIT, atol=LAST_BIT)
    assert up_to_rounding <= 3


def test_log_probabilities_and_ranks_are_vllms(theirs: dict[str, list[dict[str, Any]]]) -> None:
    for rows, answer in zip(ALIKE["temperature"], theirs["temperature"], strict=True):
        found = prompt_logprobs_of(torch.tensor([row["logits"] for row in rows]), torch.tensor([row["told"] for row in rows]), 5)
        assert torch.cat([torch.tensor([[row["told"]] for row in rows]), found.top_token_LK], dim=1).tolist() == answer["ids"]
        mine = torch.cat([found.logprob_L[:, None], found.top_logprob_LK], dim=1)
        torch.testing.assert_close(mine, torch.tensor(answer["logprobs"]), rtol=LAST_BIT, atol=LAST_BIT)
        assert found.rank_L.tolist() == answer["ranks"]


def test_where_we_differ_is_what_the_page_says(theirs: dict[str, list[dict[str, Any]]]) -> None:
    ties, biased = theirs["otherwise"]
    (mine,), _ = ours(OTHERWISE[0], random.Random(0))
    assert (~mine.isinf()).nonzero().flatten().tolist() == [1, 2], "the lower ids of those that are equal"
    assert [place for place, value in enumerate(ties["processed"][0]) if value is not None] == [1, 2, 3], "all of them"
    found = prompt_logprobs_of(torch.tensor([ROW["logits"]]), torch.tensor([ROW["told"]]), 5)
    assert (found.rank_L.tolist(), ties["ranks"]) == ([1], [3])
    (mine,), _ = ours(OTHERWISE[1], random.Random(0))
    assert mine.tolist() == [101.0, -98.0, 2.0, 2.0, 0.0]
    assert biased["processed"] == [[301.0, -298.0, 2.0, 2.0, 0.0]]


def as_tensor(rows: list[list[float | None]]) -> Tensor:
    return torch.tensor([[-torch.inf if value is None else value for value in row] for row in rows])
