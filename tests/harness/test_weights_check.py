"""The weights check names a shard that holds anything but what the checkpoint has for it, and passes what loads in other ways."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

import engine.parallel.embedding as embedding_module
import engine.parallel.linear as linear_module
from engine import CheckpointError
from engine.checkpoint.weights import CheckpointTensor
from engine.parallel.linear import MergedColumnParallelLinear
from engine.parallel.parameter import ShardParameter
from harness.faults.layouts import LAYOUTS
from harness.verification.reference_results import ReferenceResults
from tests.harness.checking import assert_green, run_check, run_kinds
from tests.harness.conftest import MakeModel

Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture
def folder(tiny_model: MakeModel) -> Path:
    return tiny_model(LAYOUTS["llama-nine-heads"].config, "bfloat16")


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_is_green(folder: Path, tp_size: int, dtype: str) -> None:
    assert_green(run_check("weights", folder, dtype, tp_size=tp_size))


@pytest.mark.parametrize(("tp_size", "compared"), [(1, 132_831), (2, 139_410)])
def test_every_element_of_the_three_checkpoints_is_judged_on_every_rank_that_holds_it(folder: Path, tp_size: int,
                                                                                compared: int) -> None:
    kinds = run_kinds("weights", folder, "bfloat16", tp_size=tp_size)
    assert [part.kind for part in kinds] == ["model", "indexed", "own head"]
    assert sum(part.compared for part in kinds) == compared


def test_tensors_that_are_read_whole_and_cut_in_memory_are_green(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "columns_of", lambda loaded, columns: loaded[:][:, columns.start : columns.stop])
    assert_green(run_check("weights", folder, "bfloat16"))


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(
    ("name", "element"),
    [("model.layers.0.mlp.up_proj.weight", (3, 5)), ("model.norm.weight", (7,)), ("model.embed_tokens.weight", (130, 0))],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_found_in_the_file_itself(
    folder: Path, tmp_path: Path, tp_size: int, name: str, element: tuple[int, ...], value: float
) -> None:
    changed = with_value(folder, tmp_path, name, element, value)
    outcome = run_check("weights", changed, "bfloat16", tp_size=tp_size)
    assert outcome.finding is not None
    assert f"{name}{list(element)} is {value} in model.safetensors" in outcome.finding


def test_a_value_that_the_dtype_can_not_hold_is_found(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    changed = with_value(folder, tmp_path, name, (3, 5), 2.0**20)
    assert_green(run_check("weights", changed, "bfloat16"))
    outcome = run_check("weights", changed, "float16")
    assert outcome.finding is not None
    assert f"{name}[3, 5] is 1048576.0 in model.safetensors, which float16 can't hold" in outcome.finding


def with_value(folder: Path, scratch: Path, name: str, element: tuple[int, ...], value: float) -> Path:
    """A copy of the checkpoint with another value for one element."""
    changed = Path(shutil.copytree(folder, scratch / "changed"))
    tensors = load_file(changed / "model.safetensors")
    tensors[name][element] = value
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    return changed


@pytest.mark.parametrize("of_it", ["script", "greedy"])
def test_the_truth_of_weights_that_are_not_finite_names_the_first(folder: Path, tmp_path: Path, of_it: str) -> None:
    changed = with_value(folder, tmp_path, "model.layers.0.mlp.up_proj.weight", (3, 5), math.nan)
    results = ReferenceResults(changed, dtype="bfloat16")
    with pytest.raises((CheckpointError, IndexError)) as refusal:
        _ = results.exact_logits if of_it == "script" else results.greedy
    assert "not finite: model.layers.0.mlp.up_proj.weight[3, 5] is nan" in str(refusal.value)


def columns_of_rank_0(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(linear_module, "columns_of", lambda loaded, columns: loaded[:, : len(columns)])


def keys_into_the_place_of_values(patch: pytest.MonkeyPatch) -> None:
    load = MergedColumnParallelLinear.weight_loader
    swapped = {"k": "v", "v": "k"}
    patch.setattr(MergedColumnParallelLinear, "weight_loader", lambda self, param, loaded, shard_id=None: load(
        self, param, loaded, swapped.get(shard_id, shard_id)))


def uneven_cut_starts_at_the_ranks_multiple(patch: pytest.MonkeyPatch) -> None:
    """Five query heads, then four: rank 1 starts at four."""
    rows_of = linear_module.rows_of

    def wrong(loaded: Any, rows: range) -> Tensor:
        start = rows.start // len(rows) * len(rows)
        return rows_of(loaded, range(start, start + len(rows)))

    patch.setattr(linear_module, "rows_of", wrong)


def last_row_of_the_vocabulary_repeated(patch: pytest.MonkeyPatch) -> None:
    rows_of = embedding_module.rows_of

    def wrong(loaded: Any, rows: range) -> Tensor:
        value = rows_of(loaded, rows)
        value[-1:] = value[-2:-1]
        return value

    patch.setattr(embedding_module, "rows_of", wrong)


def short_last_piece_not_read(patch: pytest.MonkeyPatch) -> None:
    getitem = CheckpointTensor.__getitem__

    def wrong(self: CheckpointTensor, index: Any) -> Tensor:
        value = getitem(self, index).clone()
        if value.dim() == 2 and value.nbytes > 2048:
            value[len(value) // 16 * 16 :] = 0
        return value

    patch.setattr(CheckpointTensor, "__getitem__", wrong)


def narrowed_on_the_way(patch: pytest.MonkeyPatch) -> None:
    """Right to seven bits."""
    write = ShardParameter.write
    patch.setattr(ShardParameter, "write", lambda self, value, **where: write(self, value.bfloat16().to(value.dtype), **where))


@pytest.mark.parametrize(("plant", "says"), [
    (columns_of_rank_0, "rank 1, first model.layers.0.self_attn.o_proj.weight"),
    (keys_into_the_place_of_values, "model.layers.0.self_attn.k_proj.weight"),
    (uneven_cut_starts_at_the_ranks_multiple, "6 wrong shards on rank 1, first model.layers.0.self_attn.q_proj.weight"),
    (last_row_of_the_vocabulary_repeated,
     "first model.embed_tokens.weight: 45 of 2970 elements differ, the first at local index (65, 0)"),
    (short_last_piece_not_read, "the model's checkpoint: "),
])
def test_a_fault_in_loading_is_seen_and_names_the_tensor(folder: Path, plant: Plant, says: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    outcome = run_check("weights", folder, "bfloat16")
    assert outcome.finding is not None
    assert says in outcome.finding


def test_weights_that_lose_bits_are_seen(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    narrowed_on_the_way(monkeypatch)
    outcome = run_check("weights", tiny_model(LAYOUTS["qwen2"].config), "float32")
    assert outcome.finding is not None
    assert "elements differ" in outcome.finding


def test_an_element_of_an_index_valued_checkpoint_names_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own weights are right: only the small checkpoint's sizes show the fault."""
    rows_of = embedding_module.rows_of
    monkeypatch.setattr(embedding_module, "rows_of", lambda loaded, rows: rows_of(
        loaded, range(rows.start, rows.stop) if loaded.shape[0] > 100 else range(len(rows))))
    outcome = run_check("weights", folder, "bfloat16")
    assert outcome.finding is not None
    assert outcome.finding.startswith("an index-valued checkpoint: ")
    assert "it holds model.embed_tokens.weight[0, 0] where model.embed_tokens.weight[8, 0] belongs" in outcome.finding
