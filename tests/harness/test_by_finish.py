"""A model of which nobody has written a table: the module that was made wrong is named, and what can't be compared is counted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.subjects.base import Schedule
from harness.verification.by_finish import WHOLE_MODEL, search_by_finish
from harness.verification.matching import match
from harness.verification.places import Search
from harness.verification.reference_results import ReferenceResults
from reference.hf import Activations, Reference
from reference.shrink import shrink

TP_SIZE = 3
COLUMN = ("q_proj", "k_proj", "v_proj")
ROW = ("o_proj",)

Hook = Callable[[int, Any, Tensor, Tensor], Tensor]
"""(rank, module, its input, its output) -> what it is to give instead."""


class Cut:
    """Ranks that compute alike and show what they would have under tensor parallelism; one module may be wrong, by rank."""

    def __init__(self, folder: Path, path: str | None = None, hook: Hook | None = None) -> None:
        self.reference = Reference.load(folder, "float32")
        self.path = path
        self.hook = hook

    def layout(self, config: Any, name: str, shape: tuple[int, ...]) -> Any:
        return None

    def activations(self, schedule: Schedule, sequence: int) -> list[Activations]:
        return [self._cut(self._seen(schedule.sequences[sequence], rank), rank) for rank in range(TP_SIZE)]

    def _seen(self, token_ids: tuple[int, ...], rank: int) -> Activations:
        with ExitStack() as hooks:
            if self.path is not None and self.hook is not None:
                hook = self.hook

                def wrong(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
                    first = output[0] if isinstance(output, tuple) else output
                    changed = hook(rank, module, args[0] if args else first, first)
                    return (changed, *output[1:]) if isinstance(output, tuple) else changed

                module = self.reference.model.get_submodule(self.path)
                hooks.callback(module.register_forward_hook(wrong).remove)
            return self.reference.activations(token_ids)

    def _cut(self, seen: Activations, rank: int) -> Activations:
        def of_rank(side: dict[str, Tensor], kinds: tuple[str, ...]) -> dict[str, Tensor]:
            return {name: x.tensor_split(TP_SIZE, -1)[rank] if name.endswith(kinds) else x for name, x in side.items()}

        return Activations(inputs=of_rank(seen.inputs, ROW), outputs=of_rank(seen.outputs, COLUMN), left_out=seen.left_out)


@pytest.fixture(scope="module", params=["mixtral", "gemma2", "gpt_neox"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ReferenceResults:
    folder = shrink({"model_type": request.param}, tmp_path_factory.mktemp("model") / request.param)
    return ReferenceResults(folder, dtype="float32", schedule_lengths=(13, 7))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> ReferenceResults:
    folder = shrink({"model_type": "mixtral"}, tmp_path_factory.mktemp("model") / "mixtral")
    return ReferenceResults(folder, dtype="float32", schedule_lengths=(13, 7))


def searched(results: ReferenceResults, path: str | None = None, hook: Hook | None = None) -> Search:
    return search_by_finish(Cut(results.folder, path, hook), results, 0)  # type: ignore[arg-type]


def test_nothing_is_named_where_nothing_is_wrong_and_everything_is_accounted_for(results: ReferenceResults) -> None:
    search = searched(results)
    assert search.place is None
    exact = results.exact_activations(0)
    assert search.compared + len(search.not_comparable) == len(exact.outputs.keys() | exact.left_out.keys())
    assert search.compared > 25
    assert ("experts" in search.left_out) == bool(exact.left_out)


def doubled_on_rank_1(rank: int, module: Any, given: Tensor, output: Tensor) -> Tensor:
    """Of a column-parallel module: the second of three ranks' features."""
    parts = list(output.tensor_split(TP_SIZE, -1))
    parts[1] = parts[1] * 2
    return torch.cat(parts, -1)


def one_rank_alone(rank: int, module: Any, given: Tensor, output: Tensor) -> Tensor:
    """Of a row-parallel module: never reduced."""
    x, weight = (whole.tensor_split(TP_SIZE, -1)[rank] for whole in (given, module.weight))
    return F.linear(x, weight)


def off_by_a_little(rank: int, module: Any, given: Tensor, output: Tensor) -> Tensor:
    return output * 1.01


LAYER = "model.layers.1"


@pytest.mark.parametrize(("path", "hook", "rank", "says"), [
    ("self_attn.v_proj", doubled_on_rank_1, 1, "exactly 2 times"),
    ("self_attn.o_proj", one_rank_alone, 0, "never added up"),
    ("mlp.experts", off_by_a_little, 0, ""),
    ("mlp", off_by_a_little, 0, ""),
    ("post_attention_layernorm", off_by_a_little, 0, ""),
])
def test_the_module_that_was_made_wrong_is_named(mixtral: ReferenceResults, path: str, hook: Hook, rank: int, says: str) -> None:
    place = searched(mixtral, f"{LAYER}.{path}", hook).place
    assert place is not None
    assert (place.module, place.rank) == (f"{LAYER}.{path}", rank)
    assert says in str(place)


def test_what_no_module_computes_is_named_by_the_module_around_it_and_the_one_behind(mixtral: ReferenceResults) -> None:
    subject = Cut(mixtral.folder)
    o_proj = subject.reference.model.get_submodule(f"{LAYER}.self_attn.o_proj")
    o_proj.register_forward_pre_hook(lambda module, args: (args[0].roll(1, -1),))
    place = search_by_finish(subject, mixtral, 0).place  # type: ignore[arg-type]
    assert place is not None
    assert place.module == f"{LAYER}.self_attn (before o_proj)"


def test_behind_the_last_module_it_is_the_model_itself(mixtral: ReferenceResults) -> None:
    subject = Cut(mixtral.folder)
    subject.reference.model.register_forward_hook(
        lambda module, args, output: type(output)(logits=output.logits * 1.5))
    place = search_by_finish(subject, mixtral, 0).place  # type: ignore[arg-type]
    assert place is not None
    assert place.module == WHOLE_MODEL


def test_a_partial_sum_that_the_module_around_it_adds_up_is_no_error(mixtral: ReferenceResults) -> None:
    class AddedLater(Cut):
        def activations(self, schedule: Schedule, sequence: int) -> list[Activations]:
            by_rank = super().activations(schedule, sequence)
            for rank, seen in enumerate(by_rank):
                seen.outputs[f"{LAYER}.mlp.experts"] *= (rank + 1) / sum(range(1, TP_SIZE + 1))
            return by_rank

    assert search_by_finish(AddedLater(mixtral.folder), mixtral, 0).place is None  # type: ignore[arg-type]
    place = search_by_finish(AddedLater(mixtral.folder, "model.norm", off_by_a_little), mixtral, 0).place  # type: ignore[arg-type]
    assert place is not None
    assert place.module == "model.norm"


def test_what_a_rank_does_not_show_is_not_within_budget_but_not_comparable(mixtral: ReferenceResults) -> None:
    class Silent(Cut):
        def activations(self, schedule: Schedule, sequence: int) -> list[Activations]:
            by_rank = super().activations(schedule, sequence)
            del by_rank[1].outputs["model.norm"]
            by_rank[2].outputs["lm_head"] = by_rank[2].outputs["lm_head"][:, :5]
            return by_rank

    search = search_by_finish(Silent(mixtral.folder), mixtral, 0)  # type: ignore[arg-type]
    assert search.not_comparable["model.norm"] == "ranks [1] show none"
    assert search.not_comparable["lm_head"] == "the ranks have (13, 131), (13, 5) of (13, 131)"


@pytest.mark.parametrize(("whole", "by_rank", "dim", "indices"), [
    ((4, 6), [(4, 6), (4, 6)], None, None),
    ((4, 7), [(4, 4), (4, 3)], 1, [[0, 1, 2, 3], [4, 5, 6]]),
    ((4, 3, 8), [(4, 2, 8), (4, 1, 8)], 1, [[0, 1], [2]]),
    ((5, 6), [(3, 6), (2, 6)], 0, [[0, 1, 2], [3, 4]]),
    ((4, 6), [(4, 3)] * 4, 1, [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]),
])
def test_parts_are_told_by_their_shapes(whole: tuple[int, ...], by_rank: list[tuple[int, ...]], dim: int | None,
                                        indices: list[list[int]] | None) -> None:
    parts = match(whole, by_rank)
    assert not isinstance(parts, str)
    assert {part.dim for part in parts} == {dim}
    if indices is not None:
        assert [part.indices.tolist() for part in parts if part.indices is not None] == indices
    x = torch.arange(torch.tensor(whole).prod().item()).view(whole)
    assert [part.of(x).shape for part in parts] == [torch.Size(shape) for shape in by_rank]


@pytest.mark.parametrize("by_rank", [[(4, 5), (4, 2)], [(2, 6), (3, 6)], [(2, 3), (2, 3), (2, 6)], [(4, 6), (4, 6, 1)],
                                     [(2, 3), (2, 3)], [(4, 4), (4, 4)]])
def test_what_fits_no_rule_is_not_guessed(by_rank: list[tuple[int, ...]]) -> None:
    assert isinstance(match((4, 6), by_rank), str)
