"""``verify`` on ranks that torchrun started, several hosts among them."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.ranks.ranks import RankContext, Ranks
from harness.checks import all_checks
from harness.checks.base import CheckContext, Outcome
from harness.commands.verify import _tp_sizes as tp_sizes_of
from harness.subjects import on_ranks
from harness.subjects.base import SubjectFailure
from harness.subjects.engine_rank import EngineRank
from harness.verification.verify import GONE, VerifyPlan, verify
from reports.records import read_report, whole_checks
from tests.engine.test_torchrun import torchrun
from tests.harness.checking import check_of
from tests.harness.conftest import MakeModel
from tests.harness.test_cli import run
from tests.reference.tiny import small_config

CONFIG = small_config("llama", num_q_heads=4, num_kv_heads=2)


@pytest.mark.multirank
@pytest.mark.endurance
def test_verify_runs_on_the_ranks_of_two_hosts(tiny_model: MakeModel, tmp_path: Path) -> None:
    words = ["-m", "harness", "verify", str(tiny_model(CONFIG, "bfloat16")), "--check", "weights", "--check", "collectives",
             "--check", "logits", "--out", str(tmp_path)]
    (code_0, output_0, _), (code_1, output_1, _) = torchrun(words, hosts=2, ranks_a_host=1)
    assert (code_0, code_1) == (0, 0), output_0 + output_1
    assert "all green" in output_0
    assert "tp 2" not in output_1, "rank 0 alone reports"
    rows = whole_checks(read_report(tmp_path).checks)
    assert [(row.check, row.tp_size, row.fabric, row.verdict) for row in rows] == [
        (check, 2, "gloo", "pass") for check in ("weights", "collectives", "logits")]


@pytest.mark.parametrize(("tp", "tp_sizes"), [(None, (2,)), ("2", (2,)), ("3", None), ("1,2", None)])
def test_the_number_of_ranks_is_torchruns(tp: str | None, tp_sizes: tuple[int, ...] | None) -> None:
    with Ranks(2, fabric="threads") as ranks:
        if tp_sizes is None:
            with pytest.raises(ValueError, match=f"tp='{tp}', but torchrun started 2 ranks: leave --tp out"):
                tp_sizes_of(tp, ranks)
        else:
            assert tp_sizes_of(tp, ranks) == tp_sizes
    assert tp_sizes_of(None, None) == (1, 2, 3, 4)


def test_a_case_is_not_run_again_under_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    code, _, stderr = run("verify", "--case", tmp_path / "case.safetensors")
    assert code == 2
    assert "start --case without torchrun" in stderr


def test_a_host_without_the_checkpoint_is_named(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = on_ranks._find

    def find_on_rank_0_alone(rank: RankContext, folder: Path) -> None:
        clean(rank, folder if rank.tp.rank == 0 else folder / "not here")

    monkeypatch.setattr(on_ranks, "_find", find_on_rank_0_alone)
    plan = VerifyPlan(model="tiny", folder=tiny_model(CONFIG), tp_sizes=(2,), checks=("weights",))
    with Ranks(2, fabric="threads") as ranks, pytest.raises(SubjectFailure, match=r"rank 1 on host .* finds no checkpoint at"):
        verify(plan, ranks=ranks)


def test_given_ranks_must_be_as_many_as_the_plan_says(tiny_model: MakeModel) -> None:
    plan = VerifyPlan(model="tiny", folder=tiny_model(CONFIG), tp_sizes=(2, 3), checks=("weights",))
    with Ranks(2, fabric="threads") as ranks, pytest.raises(ValueError, match=r"tp_sizes=\(2, 3\), but the ranks at hand are 2"):
        verify(plan, ranks=ranks)


def test_a_subject_with_ranks_of_its_own_takes_none(tiny_model: MakeModel) -> None:
    plan = VerifyPlan(model="tiny", folder=tiny_model(CONFIG), tp_sizes=(2,), subject="tests.harness.hand_cut:HandCut")
    with Ranks(2, fabric="threads") as ranks, pytest.raises(ValueError, match="brings its own ranks: start it without torchrun"):
        verify(plan, ranks=ranks)


def leave_one_behind(rank: EngineRank) -> None:
    if rank.tp_rank == 0:
        rank.tp.barrier()
    raise ValueError("planted")


def break_ranks(context: CheckContext) -> Outcome:
    context.subject.run(leave_one_behind)
    raise AssertionError("the job failed on every rank")


@pytest.mark.parametrize("can_restart", [True, False])
def test_ranks_that_broke_and_cannot_be_replaced_leave_the_rest_skipped(
    tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, can_restart: bool,
) -> None:
    monkeypatch.setitem(all_checks(), "weights", check_of(break_ranks))
    monkeypatch.setattr(Ranks, "can_restart", can_restart)
    plan = VerifyPlan(model="tiny", folder=tiny_model(CONFIG), tp_sizes=(2,), checks=("weights", "collectives"))
    with Ranks(2, fabric="threads", auto_restart=True) as ranks:
        report = verify(plan, ranks=ranks)
    first, second = report.checks
    assert first.verdict == "finding"
    assert "planted" in first.message
    assert (second.verdict, second.message) == (("pass", "") if can_restart else ("skipped", GONE))
    assert report.exit_code == 1
