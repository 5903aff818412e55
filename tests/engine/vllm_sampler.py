"""What vLLM's own sampler makes of logits: run by an interpreter that has vLLM, plain JSON in and out.

Reads a list of batches, each a list of rows with ``logits``, ``prompt``, ``output``, ``params`` (fields of SamplingParams) and
``bad_words`` (token ids). Writes for each batch the logits that vLLM draws from, row by row, null where they are -inf, and the
log-probabilities, ids and ranks that it tells of each row's token ``told``.
"""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.logits_processor.interface import BatchUpdate
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

EPS = 1e-5
"""Below it a temperature is greedy."""


def metadata(rows: list[dict[str, Any]], vocab_size: int) -> SamplingMetadata:
    """As vLLM's ``InputBatch`` makes it of the rows' parameters."""
    params = [SamplingParams(**row["params"], logit_bias=dict(row["logit_bias"]) or None) for row in rows]
    config: Any = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=len(rows)))
    cpu = torch.device("cpu")
    processors = [kind(config, cpu, False) for kind in (MinTokensLogitsProcessor, LogitBiasLogitsProcessor, MinPLogitsProcessor)]
    outputs = [row["output"] for row in rows]
    for processor in processors:
        processor.update_state(BatchUpdate(batch_size=len(rows), removed=[], moved=[], added=[
            (index, one, row["prompt"], row["output"]) for index, (one, row) in enumerate(zip(params, rows, strict=True))]))
    longest = max(len(row["prompt"]) for row in rows)
    greedy = [one.temperature < EPS for one in params]
    # As InputBatch has them: a greedy row filters nothing.
    top_k = [vocab_size if is_greedy or one.top_k <= 0 else min(one.top_k, vocab_size)
             for one, is_greedy in zip(params, greedy, strict=True)]
    top_p = [1.0 if is_greedy else one.top_p for one, is_greedy in zip(params, greedy, strict=True)]
    allowed = torch.zeros(len(rows), vocab_size, dtype=torch.bool)
    for index, one in enumerate(params):
        if one.allowed_token_ids:
            allowed[index] = True
            allowed[index, one.allowed_token_ids] = False
    penalties = {name: torch.tensor([getattr(one, name.replace("penalties", "penalty")) for one in params])
                 for name in ("frequency_penalties", "presence_penalties", "repetition_penalties")}
    return SamplingMetadata(
        temperature=torch.tensor([one.temperature for one in params]), all_greedy=all(greedy), all_random=not any(greedy),
        top_p=torch.tensor(top_p) if min(top_p) < 1 else None,
        top_k=torch.tensor(top_k, dtype=torch.int32) if min(top_k) < vocab_size else None,
        generators={}, max_num_logprobs=-1, no_penalties=False,
        prompt_token_ids=torch.tensor([row["prompt"] + [vocab_size] * (longest - len(row["prompt"])) for row in rows]),
        output_token_ids=outputs, allowed_token_ids_mask=allowed if allowed.any() else None,
        bad_words_token_ids={index: row["bad_words"] for index, row in enumerate(rows) if row["bad_words"]},
        logitsprocs=LogitsProcessors(processors), **penalties,
    )


def answer(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one batch."""
    logits = torch.tensor([row["logits"] for row in rows])
    sampler = Sampler(logprobs_mode="processed_logits")
    drawn = sampler(logits.clone(), metadata(rows, logits.shape[1]))
    processed: torch.Tensor = drawn.logprobs_tensors.logprobs
    token = torch.tensor([row["told"] for row in rows])
    told = sampler.gather_logprobs(sampler.compute_logprobs(logits), min(5, logits.shape[1]), token)
    return {
        "processed": [[value if math.isfinite(value) else None for value in row] for row in processed.tolist()],
        "drawn": drawn.sampled_token_ids.flatten().tolist(),
        "ids": told.logprob_token_ids.tolist(), "logprobs": told.logprobs.tolist(), "ranks": told.selected_token_ranks.tolist(),
    }


def main() -> None:
    """All batches, from standard input to standard output."""
    batches = json.load(sys.stdin)
    answers = [answer(batch) for batch in batches]
    sys.stdout.write("\n" + json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
