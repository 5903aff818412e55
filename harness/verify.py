"""``shardproof verify``: every check on every tp_size, one row each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from engine.config import ModelConfig
from engine.parallel.fabric import choose_fabric
from engine.parallel.ranks import RankFailure, Ranks
from harness import jobs
from harness.cases import SavedCase, compare_replay, save_case
from harness.checks import CHECKS
from harness.checks.base import PRELOAD, CheckContext, Outcome
from harness.interrupted import WHY, Interrupted
from harness.machine import run_info
from harness.preflight import check_checkpoint
from harness.truth import Truth
from reports.records import CheckRow, Report, Verdict

LARGEST_GLOO = 4
"""More ranks than this run as threads on a CPU: gloo with many more processes than cores is slow."""
JOB_TIMEOUT_S = 1800.0
"""No job takes so long, loading included; one that does hangs, in a replayed graph perhaps: its collectives have no deadline."""
GONE = "ranks broke in an earlier check, and those that torchrun started can't be replaced"

OnRow = Callable[[CheckRow], None]
OnStart = Callable[[str, int], None]
OnOutcome = Callable[[Outcome], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyPlan:
    """What to verify, and on what.

    Args:
        model: as the user named it, for the report.
        fabric: ``auto`` picks by tp_size and device.
        dtype: ``auto`` is the checkpoint's.
        case: only this drawn case, of the one check in ``checks`` (``Outcome.case``).
        cases_folder: where findings are saved so that they can be run again; None: nowhere.
    """

    model: str
    folder: Path
    tp_sizes: tuple[int, ...]
    fabric: str = "auto"
    device: str = "cpu"
    dtype: str = "auto"
    checks: tuple[str, ...] = tuple(CHECKS)
    subject: str = "engine"
    seed: int = 0
    case: dict[str, Any] | None = None
    cases_folder: Path | None = None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.checks if name not in CHECKS]:
            raise ValueError(f"checks={unknown} are unknown; there are: {', '.join(CHECKS)}")
        if not self.tp_sizes or min(self.tp_sizes) < 1:
            raise ValueError(f"tp_sizes={self.tp_sizes} must be one or several numbers of at least 1")
        if self.case is not None and len(self.checks) != 1:
            raise ValueError(f"checks={self.checks}: a case is one check's")

    def fabric_of(self, tp_size: int) -> str:
        """Real processes where that is quick enough, threads above."""
        if tp_size == 1:
            return "solo"
        if self.fabric != "auto":
            return self.fabric
        if self.device.startswith("cuda"):
            return "auto"
        return "gloo" if tp_size <= LARGEST_GLOO else "threads"


def verify(plan: VerifyPlan, *, ranks: Ranks | None = None, on_row: OnRow = lambda row: None,
           on_start: OnStart = lambda check, tp_size: None, on_outcome: OnOutcome = lambda outcome: None) -> Report:
    """Run the plan. Findings are rows of the report; what is wrong with the plan itself is raised.

    Args:
        ranks: those to run on, which live elsewhere (torchrun's); None: start some for each of the plan's tp_sizes. The caller
            closes them.

    Raises:
        RankFailure: if given ranks can't read the checkpoint on their hosts.
        UnsupportedModelError: if the engine can't run such a model.
        CheckpointError: if the checkpoint is damaged, or not whole.
        ValueError: if the plan does not fit the model.
        Interrupted: on Ctrl-C, with the report as far as it is done.
    """
    started_at = datetime.now(UTC)
    model_config = ModelConfig.from_folder(plan.folder)
    if too_many := [tp_size for tp_size in plan.tp_sizes if tp_size > model_config.num_q_heads]:
        raise ValueError(f"tp_sizes={too_many} are above num_q_heads={model_config.num_q_heads} of the model: every rank needs "
                         "at least one query head")
    check_checkpoint(plan.folder)
    if ranks is not None:
        if plan.tp_sizes != (ranks.tp_size,):
            raise ValueError(f"tp_sizes={plan.tp_sizes}, but the ranks at hand are {ranks.tp_size}")
        ranks.run(jobs.find_checkpoint, plan.folder)
    dtype = str(model_config.dtype).removeprefix("torch.") if plan.dtype == "auto" else plan.dtype
    truth = Truth(plan.folder, dtype=dtype, seed=plan.seed, device=plan.device)
    rows: list[CheckRow] = []
    try:
        for tp_size in plan.tp_sizes:
            for row in _verify_one(plan, truth, tp_size, ranks, on_start, on_outcome):
                rows.append(row)
                on_row(row)
    except KeyboardInterrupt as stop:
        rows += _rows_not_done(plan, truth, ranks, {(row.check, row.tp_size) for row in rows})
        raise Interrupted(Report(run=run_info("verify", started_at=started_at, seed=plan.seed), checks=rows)) from stop
    return Report(run=run_info("verify", started_at=started_at, seed=plan.seed), checks=rows)


def _verify_one(plan: VerifyPlan, truth: Truth, tp_size: int, given: Ranks | None, on_start: OnStart,
                on_outcome: OnOutcome) -> Iterable[CheckRow]:
    with nullcontext(given) if given is not None else Ranks(tp_size, fabric=plan.fabric_of(tp_size), device=plan.device,
                                                            job_timeout_s=JOB_TIMEOUT_S, auto_restart=True,
                                                            preload=PRELOAD) as ranks:
        options = _options(truth)
        context = CheckContext(truth=truth, ranks=ranks, subject=plan.subject, options=options, seed=plan.seed, case=plan.case)
        loaded = False
        for name in plan.checks:
            if not (ranks.healthy or ranks.can_restart):
                yield _row(name, plan, truth, ranks, Outcome(cases=0, compared=0, skipped=GONE), 0.0)
                continue
            on_start(name, tp_size)
            started = time.perf_counter()
            try:
                if not (loaded and ranks.healthy):
                    ranks.run(jobs.load, plan.subject, truth.folder, truth.dtype, options)
                    loaded = True
                outcome = CHECKS[name](context)
            except RankFailure as failure:
                outcome = Outcome(cases=1, compared=0, finding=str(failure), rank=min(failure.failures, default=None))
            on_outcome(outcome)
            yield _row(name, plan, truth, ranks, outcome, time.perf_counter() - started)


def _rows_not_done(plan: VerifyPlan, truth: Truth, given: Ranks | None, done: set[tuple[str, int]]) -> Iterable[CheckRow]:
    for tp_size in plan.tp_sizes:
        fabric = choose_fabric(tp_size, plan.fabric_of(tp_size), torch.device(plan.device))[0] if given is None else given.fabric
        for name in plan.checks:
            if (name, tp_size) not in done:
                yield CheckRow(check=name, model=plan.model, tp_size=tp_size, fabric=fabric, dtype=truth.dtype, cases=0,
                               compared=0, verdict="error", seconds=0.0, message=WHY)


def _options(truth: Truth) -> dict[str, int]:
    """A cache of small blocks, just large enough for the script and the prompts."""
    longest = [*map(len, truth.script.sequences), *map(len, truth.greedy_sequences)]
    block_size = 16
    return {"block_size": block_size, "num_kv_blocks": sum(-(-(length + 1) // block_size) for length in longest) + 1,
            "max_num_batched_tokens": 64, "max_num_seqs": 8}


def _row(name: str, plan: VerifyPlan, truth: Truth, ranks: Ranks, outcome: Outcome, seconds: float) -> CheckRow:
    verdict: Verdict = "finding" if outcome.finding is not None else "skipped" if outcome.skipped is not None else "pass"
    return CheckRow(
        check=name, model=plan.model, tp_size=ranks.tp_size, fabric=ranks.fabric, dtype=truth.dtype, cases=outcome.cases,
        verdict=verdict, compared=outcome.compared, seconds=round(seconds, 3), error_over_budget=outcome.error_over_budget,
        rank=outcome.rank, module=outcome.module, message=outcome.finding or outcome.skipped or "", excused=outcome.excused,
        extra=outcome.extra, replay=None if outcome.finding is None else _replay(name, plan, truth, ranks, outcome),
    )


def _replay(name: str, plan: VerifyPlan, truth: Truth, ranks: Ranks, outcome: Outcome) -> str:
    """The one command that runs the finding again."""
    if plan.cases_folder is None:
        words = ("shardproof", "verify", plan.model, "--tp", str(ranks.tp_size), "--check", name, "--dtype", plan.dtype,
                 "--device", plan.device, "--seed", str(plan.seed), "--fabric", ranks.fabric)
        return " ".join(words)
    model = str(plan.folder.resolve()) if Path(plan.model).is_dir() else plan.model
    path = save_case(plan.cases_folder, SavedCase(
        check=name, model=model, tp_size=ranks.tp_size, fabric=ranks.fabric, device=plan.device, dtype=truth.dtype,
        subject=plan.subject, seed=plan.seed, case=outcome.case, finding=outcome.finding or "", tensors=outcome.tensors,
    ))
    return f"shardproof verify --case {path}"


def replay(saved: SavedCase, folder: Path) -> tuple[Report, str]:
    """Run a saved finding again, alone. The report, and in words how it compares with what was saved.

    Raises:
        as ``verify``.
    """
    outcomes: list[Outcome] = []
    plan = VerifyPlan(model=saved.model, folder=folder, tp_sizes=(saved.tp_size,), fabric=saved.fabric, device=saved.device,
                      dtype=saved.dtype, checks=(saved.check,), subject=saved.subject, seed=saved.seed, case=saved.case or None)
    report = verify(plan, on_outcome=outcomes.append)
    (outcome,) = outcomes
    return report, compare_replay(saved, outcome.finding, outcome.tensors)
