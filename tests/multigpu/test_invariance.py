"""``tp_invariant=True`` over GPUs joined by NCCL, in captured decode steps: what one GPU gives, to the bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from engine import LLM, SamplingParams
from engine.kernels.log_softmax import log_softmax
from engine.parallel.group import SoloGroup
from tests.engine.support import logits_of, make_runner
from tests.gpu.support import DEVICE, MakeModel
from tests.gpu.test_invariance import CROWDED, served
from tests.multigpu.test_nccl import FABRIC, needs
from tests.reference.tiny import small_config

pytestmark = pytest.mark.multigpu


@pytest.mark.parametrize("tp_size", [needs(2), needs(3), needs(8)])
def test_tokens_and_log_probabilities_are_the_same_to_the_bit(small_model: MakeModel, tp_size: int) -> None:
    folder = small_model(small_config("qwen3", num_q_heads=8, num_kv_heads=2), "bfloat16")
    together = served(folder, True, tensor_parallel_size=tp_size, fabric=FABRIC, **CROWDED)
    assert together == served(folder, False, num_kv_blocks=100)


@pytest.mark.parametrize("tp_size", [needs(2)])
def test_a_rollout_s_log_probabilities_are_those_of_a_teacher_forced_pass_of_one_rank(small_model: MakeModel,
                                                                                      tp_size: int) -> None:
    """Decoded together and sampled, against whole sequences at once. The check ``invariance`` does it with large models."""
    config = small_config("qwen3", num_q_heads=8, num_kv_heads=2) | {"max_position_embeddings": 512}
    folder, draw = small_model(config, "bfloat16"), random.Random(0)
    prompts = [[draw.randrange(config["vocab_size"]) for _ in range(draw.randint(8, 64))] for _ in range(24)]
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=60, ignore_eos=True, logprobs=0) for seed in range(24)]
    with LLM(folder, tensor_parallel_size=tp_size, fabric=FABRIC, device=DEVICE, dtype="bfloat16", tp_invariant=True,
             max_num_seqs=24, max_model_len=512, num_kv_blocks=72, block_size=256) as llm:
        rollout = [output.outputs[0] for output in llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)]
    told = [[row[token].logprob for token, row in zip(completion.token_ids, completion.logprobs or (), strict=True)]
            for completion in rollout]
    assert teacher_forced(folder, prompts, [list(completion.token_ids) for completion in rollout]) == told
    assert sum(map(len, told)) == 24 * 60


def teacher_forced(folder: Path, prompts: list[list[int]], answers: list[list[int]]) -> list[list[float]]:
    """Log-probabilities of each answer's tokens, on one rank, eight sequences at a time in one piece."""
    runner = make_runner(folder, SoloGroup(), device=DEVICE, dtype="bfloat16", tp_invariant=True, enforce_eager=True,
                         block_size=64, num_kv_blocks=80, max_num_seqs=8, max_model_len=512, max_num_batched_tokens=4096)
    told = []
    for start in range(0, len(prompts), 8):
        some = list(zip(prompts[start : start + 8], answers[start : start + 8], strict=True))
        sequences = [prompt + answer[:-1] for prompt, answer in some]
        logits = logits_of(runner, sequences, [[(number, len(sequence)) for number, sequence in enumerate(sequences)]])
        for (prompt, answer), rows in zip(some, logits, strict=True):
            logprobs = log_softmax(rows[len(prompt) - 1 :].to(DEVICE).float())
            told.append(logprobs.gather(1, torch.tensor(answer, device=DEVICE)[:, None])[:, 0].tolist())
    return told
