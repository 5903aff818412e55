"""Faults in drawing tokens: what the ranks draw, and what they feed back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import engine.execution.runner as runner_module
import engine.layers.sampler as sampler_module
from engine.execution.runner import Runner
from engine.parallel.group import TPGroup
from engine.scheduling.batch import SamplingBatch, StepBatch
from harness.faults.base import Patches, around, fault


@fault(rows=(68,), checks=("generation",))
def seed_of_each_rank(patch: Patches, tp: TPGroup) -> None:
    """Every rank adds its number to the request's seed: rank 0's output looks fine, the others feed back other tokens."""

    @patch.around(runner_module, "sample")
    @patch.around(runner_module, "sample_shards")
    def sample(original: Any, logits_RV: Tensor, sampling: SamplingBatch, *shard: Any) -> Any:
        return original(logits_RV, replace(sampling, seed_R=sampling.seed_R + tp.rank), *shard)


@fault(rows=(69, 71), layout="qwen2", checks=("generation",))
def generator_of_each_rank(patch: Patches, tp: TPGroup) -> None:
    """Tokens are drawn from a generator that each rank has for itself, in a state of its own."""
    generator = torch.Generator().manual_seed(1 + tp.rank)

    @patch.around(runner_module, "sample")
    def sample(original: Any, logits_RV: Tensor, sampling: SamplingBatch) -> Any:
        gumbel_RV = -torch.empty(logits_RV.shape).exponential_(generator=generator).log()
        return original(logits_RV + gumbel_RV * sampling.temperature_R[:, None],
                        replace(sampling, temperature_R=sampling.temperature_R * 0))


@fault(rows=(68,), layout="qwen3", checks=("generation",))
def token_of_another_sequence_fed_back(patch: Patches, tp: TPGroup) -> None:
    """Rank 1 takes the token in flight from the neighbour's row of its device state."""
    if tp.rank == 1:
        @patch.around(Runner, "launch")
        def launch(original: Any, self: Runner, batch: StepBatch) -> Any:
            self.last_token_M.copy_(self.last_token_M.roll(1))  # this step's own draws go to the right rows again
            return original(self, batch)


@fault(layout="qwen2", checks=("generation",))
@around(sampler_module, "filter_top_k_top_p")
def nucleus_turned_inside_out(original: Any, logits_RV: Tensor, *arguments: Any) -> Tensor:
    """The filter keeps the tokens outside the nucleus, on every rank alike: the ranks agree, and talk nonsense."""
    kept_RV: Tensor = original(logits_RV, *arguments)
    is_out_RV = kept_RV == -torch.inf
    is_filtered_R1 = is_out_RV.any(dim=1, keepdim=True)
    return logits_RV.masked_fill(~is_out_RV & is_filtered_R1, -torch.inf)
