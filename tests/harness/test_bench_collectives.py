"""Ways to all-reduce that can't run are named; the ones that must run may not fail in silence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.parallel.group import SoloGroup
from engine.ranks.ranks import RankContext
from harness.bench import collectives
from harness.bench.workloads import CollectivesWork

WORK = CollectivesWork(message_bytes=(1024, 4096), rounds=1, calls=2)
WAYS = collectives._ways


def rank() -> RankContext:
    return RankContext(tp=SoloGroup(), device=torch.device("cpu"))


def refuses_large_ones(who: str) -> Any:
    def ways(rank: RankContext, message_bytes: int, dtype: torch.dtype, problems: collectives.Problems) -> Iterator[Any]:
        def call() -> Tensor:
            if message_bytes > 1024:
                raise RuntimeError(f"{message_bytes} bytes are too many\nand more")
            return torch.zeros(1)

        yield from WAYS(rank, message_bytes, dtype, problems)
        yield who, call

    return ways


def test_a_way_that_refuses_a_size_is_named_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "_ways", refuses_large_ones("symmetric one-shot"))
    context = rank()
    problems = collectives.build(context, "float32", WORK)
    assert problems == {("symmetric one-shot", "4 KiB, eager"): "RuntimeError: 4096 bytes are too many"}
    found = collectives.measure(context)
    assert set(found) == {("1 KiB, eager", "shardproof"), ("4 KiB, eager", "shardproof"), ("1 KiB, eager", "symmetric one-shot")}
    assert all(seconds > 0 for seconds in found.values())


def test_the_engines_own_way_may_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "_ways", refuses_large_ones("torch gloo"))
    with pytest.raises(RuntimeError, match="4096 bytes are too many"):
        collectives.build(rank(), "float32", WORK)
