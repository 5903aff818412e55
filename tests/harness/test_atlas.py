"""The atlas: each way of not working is called what it is, a bug is wrong at its module, and what was done is not done again."""

from __future__ import annotations

import os
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from harness.atlas import run as atlas_run
from harness.atlas.judge import ONE_BY_ONE, Ended, Judged, _failed
from harness.atlas.layouts import BASE, layouts_of
from harness.atlas.run import AtlasPlan, Entry, run_atlas
from harness.commands.progress import RowsShown
from harness.errors import CouldNotRunError, UsageError
from harness.interrupted import Interrupted
from harness.subjects.base import SubjectFailure
from harness.subjects.dtensor import plain
from harness.subjects.transformers import OLDEST, TransformersRank, TransformersSubject
from reference.shrink import tiny_config
from reports.records import AtlasRow, read_report, write_report
from tests.harness.test_exit_codes import run

pytest.importorskip("accelerate", reason="accelerate is not installed here, and transformers shards no model without it")
pytest.importorskip("transformers", minversion=OLDEST, reason=f"before {OLDEST} transformers gives ranks no uneven parts")

TWO = SimpleNamespace(tp_size=2)
ON_PURPOSE = '''Traceback (most recent call last):
  File "/x/site-packages/transformers/modeling_utils.py", line 7, in from_pretrained
    model = distribute(model)
            ^^^^^^^^^^^^^^^^^
  File "/x/site-packages/transformers/distributed/mixin.py", line 9, in distribute
    raise ValueError("no plan")
ValueError: no plan
'''
BY_CHANCE = '''Traceback (most recent call last):
  File "/x/site-packages/transformers/models/llama/modeling_llama.py", line 7, in forward
    q = self.q_proj(x).view(shape)
        ^^^^^^^^^^^^^^^^^^^^^^^^^^
RuntimeError: shape '[1, 5, -1, 8]' is invalid for input of size 100
'''


def error(summary: str, traceback: str = "", kind: str = "raised", *, consequence: bool = False) -> Any:
    return SimpleNamespace(kind=kind, summary=summary, phase="load", traceback=traceback, consequence=consequence)


def failed(**by_rank: Any) -> Judged:
    return _failed(SubjectFailure("job 'load' failed", failures={int(rank[1:]): each for rank, each in by_rank.items()}), TWO)


def test_a_statement_of_the_library_is_a_clear_refusal() -> None:
    judged = failed(r0=error("ValueError: no plan", ON_PURPOSE), r1=error("ValueError: no plan", ON_PURPOSE))
    assert judged.verdict == "refused clearly"
    assert judged.message == 'ValueError: no plan (in transformers/distributed/mixin.py, distribute: raise ValueError("no plan"))'


def test_what_pydantic_says_for_a_library_is_a_clear_one() -> None:
    said = error("ValidationError: 1 validation error for ModelConfig Value error, not supported anymore", BY_CHANCE)
    assert failed(r0=said, r1=said).verdict == "refused clearly"


def test_a_shape_that_does_not_fit_is_an_unclear_one() -> None:
    judged = failed(r0=error("RuntimeError: shape", BY_CHANCE), r1=error("RuntimeError: shape", BY_CHANCE))
    assert judged.verdict == "refused unclearly"
    assert judged.message.endswith("(in transformers/models/llama/modeling_llama.py, forward: q = self.q_proj(x).view(shape))")


@pytest.mark.parametrize(("by_rank", "message"), [
    ({"r1": error("ValueError: no plan", ON_PURPOSE)}, "of 2 ranks only [1] raise: ValueError: no plan"),
    ({"r0": error("killed by SIGSEGV", kind="died")}, "rank 0 died in phase 'load': killed by SIGSEGV"),
    ({"r0": error("in all_reduce", kind="stuck"), "r1": error("in all_reduce", kind="stuck")}, "rank 0 stuck in phase 'load'"),
    ({}, "job 'load' failed"),
])
def test_ranks_that_do_not_fail_alike_crashed(by_rank: dict[str, Any], message: str) -> None:
    judged = failed(**by_rank)
    assert (judged.verdict, judged.message[: len(message)]) == ("crashed", message)


def test_a_rank_that_waits_for_one_that_raised_did_not_end_by_itself() -> None:
    waited = failed(r0=error("RuntimeError: strides", BY_CHANCE), r1=error("in all_reduce", kind="stuck", consequence=True))
    assert (waited.verdict, type(waited)) == ("crashed", Judged)
    died = failed(r0=error("killed by SIGSEGV", kind="died"), r1=error("in all_reduce", kind="stuck", consequence=True))
    assert (died.verdict, type(died)) == ("crashed", Ended)


@pytest.mark.parametrize(("changes", "message"), [
    ({"architectures": ("lama",)}, r"architectures=\['lama'\] are unknown; the installed transformers has: .*llama"),
    ({"tp_sizes": (1, 2)}, r"tp_sizes=\(1, 2\) must be 2 or more"),
    ({"dtypes": ("float8",)}, r"dtypes=\['float8'\] are unknown"),
    ({"dtypes": ("float32", "float32")}, "dtypes=float32 is named more than once"),
    ({"architectures": ("llama",), "layouts": ("nothing",)}, r"layouts=\('nothing',\) are none of these architectures'"),
    ({"subject": "engine"}, "subject='engine': the atlas knows the architectures of transformers and vllm alone; use verify"),
])
def test_a_plan_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AtlasPlan(**changes)


# Without ranks


@pytest.fixture
def rows_by_hand(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the rows that were computed: all of them right."""
    computed = []

    def row(self: Any, entry: Entry) -> AtlasRow:
        computed.append(entry.name)
        return AtlasRow(architecture=entry.architecture, layout=entry.layout.name, subject=entry.subject, tp_size=entry.tp_size,
                        dtype=entry.dtype, verdict="right", error_over_budget=0.5, seconds=0.1)

    monkeypatch.setattr(atlas_run._Atlas, "row", row)
    return computed


PLAN = AtlasPlan(architectures=("llama", "qwen3", "mistral"), layouts=("base",), tp_sizes=(2,))


def test_what_was_interrupted_goes_on_where_it_ended(rows_by_hand: list[str], tmp_path: Path) -> None:
    def stop(row: AtlasRow) -> None:
        if row.architecture == "qwen3":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stopped:
        run_atlas(PLAN, on_row=stop)
    assert [row.name for row in stopped.value.report.atlas] == ["llama", "qwen3"]
    write_report(tmp_path, stopped.value.report)
    saved = []
    report = run_atlas(PLAN, done=read_report(tmp_path), save=saved.append)
    assert rows_by_hand == ["llama", "qwen3", "mistral"]
    assert [row.name for row in report.atlas] == ["llama", "qwen3", "mistral"]
    assert [len(each.atlas) for each in saved] == [3]


def test_rows_of_another_seed_are_not_gone_on_from(rows_by_hand: list[str]) -> None:
    done = run_atlas(PLAN)
    with pytest.raises(CouldNotRunError, match=r"the rows that are there are of .*'seed': 0"):
        run_atlas(AtlasPlan(architectures=("llama",), layouts=("base",), seed=1), done=done)


def test_progress_tells_each_row(rows_by_hand: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with RowsShown([entry.name for entry in PLAN.entries]) as shown:
        run_atlas(PLAN, on_row=lambda row: shown.on_row(row, row.name), on_start=shown.on_start)
    assert "[2/3] tp 2  qwen3        right  0.1 s" in capsys.readouterr().err


def test_to_go_on_needs_something_to_go_on_from(tmp_path: Path) -> None:
    done = run("atlas", "--arch", "llama", "--resume", "--out", str(tmp_path / "nothing"))
    assert done.exit_code == 2
    assert "holds no report.json to go on from: leave --resume out" in done.stderr


# On ranks


class ScaledRank(TransformersRank):
    """One projection of rank 1 is a tenth too large."""

    def load(self, folder: Path, *, dtype: str, options: Any) -> None:
        super().load(folder, dtype=dtype, options=options)
        if self.tp_rank == 1:
            with torch.no_grad():
                plain(self.model.get_submodule("model.layers.0.mlp.up_proj").weight).mul_(1.1)


class Scaled(TransformersSubject):
    rank_class: ClassVar[type[TransformersRank]] = ScaledRank


class SwappedRank(TransformersRank):
    """Two rows of a weight are in each other's place, and so are the columns that they go to: the logits are right."""

    def load(self, folder: Path, *, dtype: str, options: Any) -> None:
        super().load(folder, dtype=dtype, options=options)
        if self.tp_size > 1:
            with torch.no_grad():
                for name in ("gate_proj", "up_proj"):
                    plain(self.model.get_submodule(f"model.layers.1.mlp.{name}").weight)[:2] = plain(
                        self.model.get_submodule(f"model.layers.1.mlp.{name}").weight)[[1, 0]].clone()
                down = plain(self.model.get_submodule("model.layers.1.mlp.down_proj").weight)
                down[:, :2] = down[:, [1, 0]].clone()


class Swapped(TransformersSubject):
    rank_class: ClassVar[type[TransformersRank]] = SwappedRank


@pytest.mark.multirank
@pytest.mark.slow
def test_weights_that_are_not_where_they_say_are_wrong_though_the_logits_are_right() -> None:
    (row,) = run_atlas(AtlasPlan(subject="tests.harness.test_atlas:Swapped", architectures=("llama",), layouts=("base",),
                                 tp_sizes=(2,))).atlas
    assert row.verdict == "wrong"
    assert "3 wrong shards on rank 0" in row.message, row.message
    assert row.error_over_budget is not None
    assert row.error_over_budget < 1


class DyingRank(TransformersRank):
    """Its last process ends over a mistral."""

    def load(self, folder: Path, *, dtype: str, options: Any) -> None:
        super().load(folder, dtype=dtype, options=options)
        if self.model.config.model_type == "mistral" and self.tp_rank == self.tp_size - 1:
            os._exit(7)


class Dying(TransformersSubject):
    rank_class: ClassVar[type[TransformersRank]] = DyingRank


@pytest.mark.multirank
@pytest.mark.slow
def test_a_rank_that_dies_is_a_row_and_the_next_one_runs_on_new_ranks() -> None:
    died, right = run_atlas(AtlasPlan(subject="tests.harness.test_atlas:Dying", architectures=("mistral", "llama"),
                                      layouts=("base",), tp_sizes=(2,))).atlas
    assert (died.verdict, died.rank) == ("crashed", 1), died.message
    assert "exited with code 7" in died.message
    assert right.verdict == "right", right.message


@pytest.mark.multirank
@pytest.mark.slow
def test_what_is_right_wrong_and_refused_is_called_so(tmp_path: Path) -> None:
    plan = AtlasPlan(architectures=("gpt2", "llama"), layouts=("base",), tp_sizes=(2,))
    refused, right = run_atlas(plan).atlas
    assert (refused.verdict, refused.message.partition(" Pass")[0]) == (
        "refused clearly", "ValueError: `tp_size=2` was requested, but `GPT2LMHeadModel` has no `tp_plan`.")
    assert right.verdict == "right", right.message
    assert right.sharded is not None
    assert right.sharded > 0.9
    (wrong,) = run_atlas(AtlasPlan(subject="tests.harness.test_atlas:Scaled", architectures=("llama",), layouts=("base",),
                                   tp_sizes=(2,))).atlas
    assert (wrong.verdict, wrong.module, wrong.rank) == ("wrong", "model.layers.0.mlp.up_proj", 1), wrong.message
    assert "first well over budget: model.layers.0.mlp.up_proj on rank 1" in wrong.message


@pytest.mark.multirank
@pytest.mark.slow
def test_experts_of_a_width_that_no_product_of_all_of_them_takes_are_compared_one_at_a_time() -> None:
    """Of 9 columns rank 0 has five, which torch refuses, and rank 1 four: it goes on, and waits. One rank refuses all nine."""
    (row,) = run_atlas(AtlasPlan(architectures=("qwen3_moe",), layouts=("moe_intermediate_size=9",), tp_sizes=(2,))).atlas
    assert (row.verdict, row.message) == ("right", ONE_BY_ONE)


def test_the_base_comes_first_and_a_layout_changes_what_the_config_has() -> None:
    first, *others = layouts_of("llama")
    assert first == BASE
    assert {name for layout in others for name in layout.changes} >= {"tie_word_embeddings", "attention_bias"}


def names_of(architecture: str) -> set[str]:
    return {layout.name for layout in layouts_of(architecture)}


def test_what_a_class_has_is_tried_and_nothing_that_computes_nothing() -> None:
    assert {"num_key_value_heads=1", "head_dim=32", "intermediate_size=51", "intermediate_size=9", "vocab_size=132",
            "mlp_bias=True"} < names_of("llama")
    assert {"sliding_window=8", "use_qk_norm=True", "n_shared_experts=1"} & names_of("glm4_moe") == {"use_qk_norm=True"}
    assert {"moe_intermediate_size=51", "q_lora_rank=24", "expert parallel"} < names_of("deepseek_v3") | names_of("sarvam_mla")
    assert ["own names" in names_of(architecture) for architecture in ("llama", "mixtral")] == [False, True]
    assert "use_bidirectional_attention=all" in names_of("gemma4_text")  # of the values that the class's type hint lists
    assert not {name for name in names_of("gpt2") if name.startswith(("use_cache", "summary_", "reorder_", "output_"))}


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "deepseek_v3"])
def test_each_layout_is_a_config_of_its_own(architecture: str) -> None:
    configs = [tiny_config(architecture, **layout.changes).to_json_string(use_diff=False)
               for layout in layouts_of(architecture) if not (layout.expert_parallel or layout.own_names)]
    assert len(set(configs)) == len(configs) > 4


def test_rows_of_one_checkpoint_follow_each_other() -> None:
    entries = AtlasPlan(architectures=("llama", "mixtral"), tp_sizes=(2, 3)).entries
    assert {entry.subject for entry in entries} == {"transformers", "transformers-ep"}
    runs = [checkpoint for checkpoint, _ in groupby(entry.checkpoint for entry in entries)]
    assert len(runs) == len(set(runs)) < len(entries) // 2 + 1
