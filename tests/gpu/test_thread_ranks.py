"""Whole models on one GPU, their ranks as threads of this process: green as they are, red where a fault is planted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from engine.layers.attention_backends import select_backend
from engine.layers.attention_layout import AttentionLayout
from engine.parallel.sharding import head_shard
from engine.ranks.ranks import Ranks
from harness.checks import CHECK_NAMES
from harness.strategies import random_config
from harness.verification.reference_results import ReferenceResults
from harness.verification.verify import VerifyPlan, verify
from tests.gpu.support import (
    DEVICE,
    MakeModel,
    Plant,
    check,
    exchange_keys_and_values,
    shift_slots,
    skip_all_reduce,
)
from tests.reference.tiny import small_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

TP_SIZES = (1, 2, 3, 4, 8)


def drawn_config(seed: int, tp_size: int) -> dict[str, Any]:
    """A small model that the Triton kernels serve: a head_dim of 4 goes to plain torch."""
    draw = random.Random(seed)
    while head_dim_of(config := random_config(draw, tp_size, max_width=64, max_layers=2)) % 8:
        pass
    return config


def head_dim_of(config: dict[str, Any]) -> int:
    head_dim: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return head_dim


@pytest.mark.parametrize(("seed", "tp_size"), list(enumerate(TP_SIZES * 2)))
def test_drawn_models_are_green(small_model: MakeModel, seed: int, tp_size: int) -> None:
    config = drawn_config(seed, tp_size)
    for tp_rank in range(tp_size):
        heads = head_shard(config["num_attention_heads"], config["num_key_value_heads"], tp_rank=tp_rank, tp_size=tp_size)
        layout = AttentionLayout(heads=heads, head_dim=head_dim_of(config), block_size=16, dtype=torch.bfloat16,
                                 device=torch.device(DEVICE))
        assert select_backend("auto", layout).name == "triton"
    report = verify(VerifyPlan(model="drawn", folder=small_model(config, "bfloat16"), tp_sizes=(tp_size,), fabric="threads",
                               device=DEVICE))
    assert [row.message for row in report.checks if row.verdict in ("finding", "error")] == []
    assert list(dict.fromkeys(row.check for row in report.checks)) == list(CHECK_NAMES)
    assert {row.fabric for row in report.checks} == {"solo" if tp_size == 1 else "threads"}


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    with Ranks(2, fabric="threads", device=DEVICE, auto_restart=True) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def results(small_model: MakeModel) -> ReferenceResults:
    return ReferenceResults(small_model(small_config(), "bfloat16"), dtype="bfloat16", device=DEVICE)


def test_the_control_without_a_fault_is_green(two_ranks: Ranks, results: ReferenceResults) -> None:
    outcome = check("logits", two_ranks, results)
    assert outcome.finding is None
    assert outcome.compared > 0


@pytest.mark.parametrize(("plant", "argument", "module"), [
    (shift_slots, 1, "model.layers.0.self_attn (attention, before o_proj)"),
    (skip_all_reduce, 0, "model.layers.0.mlp.down_proj"),
    (skip_all_reduce, 1, "model.layers.1.mlp.down_proj"),
    (exchange_keys_and_values, 1, "model.layers.1.self_attn (attention, before o_proj)"),
])
def test_a_planted_fault_is_found_where_it_is(two_ranks: Ranks, results: ReferenceResults, plant: Plant, argument: int,
                                                  module: str) -> None:
    outcome = check("logits", two_ranks, results, plant, argument)
    assert outcome.finding is not None
    assert outcome.module == module, outcome.finding
    if plant is shift_slots:
        assert outcome.rank == argument, outcome.finding
