"""The collectives check sees wrong sums and gathers, and results that a later call spoils; other ways to the same are green."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import engine.parallel.group as group
from engine.parallel.group import SoloGroup, ThreadGroup, TPGroup
from harness.checks.collectives import NUM_CASES, NUM_STORMS
from harness.faults.layouts import LAYOUTS
from tests.harness.checking import again, assert_green, run_check
from tests.harness.conftest import MakeModel

Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture
def folder(tiny_model: MakeModel) -> Path:
    return tiny_model(LAYOUTS["qwen2"].config)


@pytest.mark.parametrize("tp_size", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_engine_is_green(folder: Path, tp_size: int, dtype: str) -> None:
    assert_green(run_check("collectives", folder, dtype, tp_size=tp_size))


@pytest.mark.parametrize(("tp_size", "compared"), [(1, 754_492), (2, 1_727_736)])
def test_every_case_is_judged_by_all_of_its_values(folder: Path, tp_size: int, compared: int) -> None:
    outcome = run_check("collectives", folder, tp_size=tp_size)
    assert (outcome.cases, outcome.compared) == (NUM_CASES + NUM_STORMS, compared)


def sum_with(work: Callable[[Sequence[Tensor]], Tensor]) -> Plant:
    """``work(deposits)`` in place of the sum."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        def sum_in_place(deposits: Sequence[Tensor]) -> None:
            with torch.inference_mode():
                total = work([x.clone() for x in deposits])
                for x in deposits:
                    x.copy_(total)

        patch.setattr(group, "_sum_in_place", sum_in_place)

    return plant


def test_ranks_added_backwards_are_green(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(deposits: Sequence[Tensor]) -> Tensor:
        total = deposits[-1].float()
        for x in reversed(deposits[:-1]):
            total = total + x
        return total

    sum_with(backwards)(monkeypatch)
    assert_green(run_check("collectives", folder, "bfloat16", tp_size=3))


def last_rank_left_out(patch: pytest.MonkeyPatch) -> None:
    sum_with(lambda deposits: torch.stack(deposits[:-1]).sum(0))(patch)


def sum_in_a_narrower_type(patch: pytest.MonkeyPatch) -> None:
    sum_with(lambda deposits: torch.stack([x.bfloat16() for x in deposits]).sum(0))(patch)


def each_rank_its_own_order(patch: pytest.MonkeyPatch) -> None:
    """Within rounding, but not the same bits everywhere."""

    def sum_in_place(deposits: Sequence[Tensor]) -> None:
        with torch.inference_mode():
            parts = [x.clone() for x in deposits]
            for rank, x in enumerate(deposits):
                total = parts[rank].clone()
                for part in parts[rank + 1 :] + parts[:rank]:
                    total += part
                x.copy_(total)

    patch.setattr(group, "_sum_in_place", sum_in_place)


def copy_reduced_and_thrown_away(patch: pytest.MonkeyPatch) -> None:
    all_reduce = TPGroup.all_reduce

    def wrong(self: TPGroup, x: Tensor) -> Tensor:
        total = all_reduce(self, x)
        return total if x.is_contiguous() else x

    patch.setattr(TPGroup, "all_reduce", wrong)


def one_output_for_all_gathers_of_a_shape(patch: pytest.MonkeyPatch) -> None:
    """Right until the next gather of that shape: whoever still holds the result finds it overwritten."""
    kept: dict[Any, Tensor] = {}
    all_gather = TPGroup.all_gather

    def wrong(self: TPGroup, x: Tensor, dim: int = -1) -> Tensor:
        gathered = all_gather(self, x, dim)
        return kept.setdefault((self.rank, x.shape, x.dtype, dim), gathered).copy_(gathered)

    patch.setattr(TPGroup, "all_gather", wrong)


def input_handed_out_as_the_result(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SoloGroup, "_all_gather", lambda self, x, dim: x)


def reduced_once_and_for_all(patch: pytest.MonkeyPatch) -> None:
    """A buffer that was summed is taken to be summed, also where it holds new values, or is to be summed again."""
    all_reduce = TPGroup.all_reduce

    def wrong(self: TPGroup, x: Tensor) -> Tensor:
        if getattr(x, "is_reduced", False):
            return x
        total: Any = all_reduce(self, x)
        total.is_reduced = True
        return total

    patch.setattr(TPGroup, "all_reduce", wrong)


def minimum_became_the_first(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ThreadGroup, "_all_reduce_min", lambda self, value: int(self._meet(value, lambda values: values[0])))


def gathered_in_another_order(patch: pytest.MonkeyPatch) -> None:
    gather = group._gather_into
    patch.setattr(group, "_gather_into", lambda pairs, dim: gather([*pairs[1:], pairs[0]], dim))


@pytest.mark.parametrize(("plant", "tp_size", "module"), [
    (last_rank_left_out, 2, "TPGroup.all_reduce"), (sum_in_a_narrower_type, 3, "TPGroup.all_reduce"),
    (each_rank_its_own_order, 3, "TPGroup.all_reduce"), (copy_reduced_and_thrown_away, 2, "TPGroup.all_reduce"),
    (reduced_once_and_for_all, 2, "TPGroup.all_reduce"),
    (one_output_for_all_gathers_of_a_shape, 2, "TPGroup.all_gather"), (gathered_in_another_order, 2, "TPGroup.all_gather"),
    (input_handed_out_as_the_result, 1, "TPGroup.all_gather"), (minimum_became_the_first, 2, "TPGroup.all_reduce_min"),
])
def test_a_fault_in_a_collective_is_seen_and_can_be_replayed(folder: Path, plant: Plant, tp_size: int, module: str,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        plant(patch)
        outcome = run_check("collectives", folder, tp_size=tp_size)
        found_again = again("collectives", folder, outcome, tp_size=tp_size)
    assert outcome.module == module
    assert found_again.cases == 1
    assert found_again.finding is not None
    assert_green(again("collectives", folder, outcome, tp_size=tp_size))
