"""``shardproof verify``: every check on every tp_size, one row each, or one a kind of its cases."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from harness.checks import CHECK_NAMES, ON_REQUEST, all_checks
from harness.checks.base import Check, CheckContext, Outcome, raised
from harness.errors import UsageError
from harness.interrupted import WHY, Interrupted
from harness.machine import run_info
from harness.names import DTYPES, FABRICS
from harness.subjects import subject_class
from harness.subjects.base import Placement, Subject, SubjectFailure
from harness.verification.cases import SavedCase, compare_replay, save_case
from harness.verification.reference_results import ReferenceResults
from reference.checkpoints import CheckpointError, checkpoint_dtype, read_config, weight_shapes
from reports.records import CheckRow, RecordError, Report, Verdict, whole_checks

logger = logging.getLogger(__name__)

LARGEST_GLOO = 4
"""More ranks than this run as threads on a CPU: gloo with many more processes than cores is slow."""
JOB_TIMEOUT_S = 1800.0
"""No job takes so long, loading included; one that does hangs, in a replayed graph perhaps: its collectives have no deadline."""
GONE = "ranks broke in an earlier check, and those that torchrun started can't be replaced"

OnRow = Callable[[CheckRow], None]
OnStart = Callable[[str, int], None]
OnOutcomes = Callable[[list[Outcome]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyPlan:
    """What to verify, and on what.

    Args:
        model: as the user named it, for the report.
        subject: what to verify, as ``harness.subjects.subject_class`` takes it.
        kind: only this kind of the one check's cases.
        fabric: ``auto`` picks by tp_size and device.
        dtype: ``auto`` is the checkpoint's.
        case: only this drawn case, of the one check in ``checks`` (``Outcome.case``).
        python: the interpreter of a subject that runs in one of its own.
        cases_folder: where findings are saved so that they can be run again; None: nowhere.
    """

    model: str
    folder: Path
    tp_sizes: tuple[int, ...]
    fabric: str = "auto"
    device: str = "cpu"
    dtype: str = "auto"
    checks: tuple[str, ...] = CHECK_NAMES
    subject: str = "engine"
    python: Path | None = None
    seed: int = 0
    kind: str | None = None
    case: Mapping[str, Any] | None = None
    cases_folder: Path | None = None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.checks if name not in (*CHECK_NAMES, *ON_REQUEST)]:
            raise UsageError(f"checks={unknown} are unknown; there are: {', '.join((*CHECK_NAMES, *ON_REQUEST))}")
        if not self.tp_sizes or min(self.tp_sizes) < 1:
            raise UsageError(f"tp_sizes={self.tp_sizes} must be one or several numbers of at least 1")
        refuse_repeats("tp_sizes", self.tp_sizes)
        refuse_repeats("checks", self.checks)
        if self.dtype not in ("auto", *DTYPES):
            raise UsageError(f"dtype={self.dtype!r} is unknown; supported: auto, {', '.join(DTYPES)}")
        if self.fabric not in (*FABRICS, "solo"):
            raise UsageError(f"fabric={self.fabric!r} is unknown; supported: {', '.join(FABRICS)}")
        if self.device not in ("cpu", "cuda"):
            raise UsageError(f"device={self.device!r} is unknown; supported: cpu, cuda")
        if self.case is not None and len(self.checks) != 1:
            raise UsageError(f"checks={self.checks}: a case is one check's")

    def fabric_of(self, tp_size: int) -> str:
        """Real processes where that is quick enough, threads above."""
        if tp_size == 1:
            return "solo"
        if self.fabric != "auto":
            return self.fabric
        if self.device.startswith("cuda"):
            return "auto"
        return "gloo" if tp_size <= LARGEST_GLOO else "threads"

    def placement(self, tp_size: int, ranks: Any = None) -> Placement:
        """Where the subject's ranks are to live."""
        return Placement(tp_size=tp_size, fabric=self.fabric_of(tp_size), device=self.device, job_timeout_s=JOB_TIMEOUT_S,
                         ranks=ranks, python=self.python)


def verify(plan: VerifyPlan, *, ranks: Any = None, on_row: OnRow = lambda row: None,
           on_start: OnStart = lambda check, tp_size: None, on_outcome: OnOutcomes = lambda outcomes: None) -> Report:
    """Run the plan. Findings and exceptions inside checks are rows of the report; what is wrong with the plan is raised.

    Args:
        plan: which checks, on which numbers of ranks.
        on_row: gets one row for each check that is done, whatever kinds it has.
        on_start: told of each check before it begins.
        on_outcome: gets what each check found, kind by kind.
        ranks: those to run on, which live elsewhere (torchrun's); None: start some for each of the plan's tp_sizes. The caller
            closes them.

    Raises:
        UsageError: if the plan does not fit the model, or the fabric the device.
        UnsupportedModelError: if the engine can't run such a model.
        CheckpointError: if the checkpoint is damaged, or not whole, or can't be loaded.
        SubjectFailure: if the ranks can't start, or given ranks can't read the checkpoint on their hosts.
        Interrupted: on Ctrl-C, with the report as far as it is done.

    Whatever is raised once there are rows is the reason of those that are missing instead.
    """
    started_at = datetime.now(UTC)
    subject = subject_class(plan.subject)
    if ranks is not None and not subject.takes_ranks:
        raise UsageError(f"subject={plan.subject!r} brings its own ranks: start it without torchrun")
    subject.check_fit(plan.folder, [plan.placement(tp_size, ranks) for tp_size in plan.tp_sizes])
    if ranks is not None and plan.tp_sizes != (ranks.tp_size,):
        raise UsageError(f"tp_sizes={plan.tp_sizes}, but the ranks at hand are {ranks.tp_size}")
    config = read_config(plan.folder)
    weight_shapes(config)  # a config that the reference can make no model of is told before any rank starts
    dtype = checkpoint_dtype(config) if plan.dtype == "auto" else plan.dtype
    results = ReferenceResults(plan.folder, dtype=dtype, seed=plan.seed, device=plan.device, beyond_windows=subject.has_windows)
    rows: list[CheckRow] = []
    versions = subject.versions(plan.placement(plan.tp_sizes[0], ranks))

    def report() -> Report:
        run = run_info("verify", started_at=started_at, seed=plan.seed)
        return Report(run=replace(run, switches=run.switches | results.switches, versions=run.versions | versions), checks=rows)

    alone = _Alone(plan, results, subject)
    try:
        for tp_size in plan.tp_sizes:
            for of_check in _verify_one(plan, results, subject, plan.placement(tp_size, ranks), on_start, on_outcome, alone):
                rows += of_check
                for row in whole_checks(of_check):
                    on_row(row)
    except KeyboardInterrupt as stop:
        rows += _rows_not_done(plan, results, subject, ranks, rows, Outcome(cases=0, compared=0, error=WHY))
        raise Interrupted(report()) from stop
    except Exception as error:
        if not rows:
            raise
        why = Outcome(cases=0, compared=0, error=str(error)) if isinstance(error, CheckpointError) else raised(error)
        rows += _rows_not_done(plan, results, subject, ranks, rows, why)
    return report()


def refuse_repeats(name: str, values: Sequence[object]) -> None:
    """Refuse a value that is given twice.

    Raises:
        UsageError: if something is named twice: two rows that nobody could tell apart.
    """
    if twice := sorted({str(value) for value in values if values.count(value) > 1}):
        raise UsageError(f"{name}={', '.join(twice)} is named more than once: name it once")


class _Alone:
    """What the subject's logits are on one rank: a subject that is wrong there is, for all that is known, no matter of TP."""

    def __init__(self, plan: VerifyPlan, results: ReferenceResults, make: type[Subject]) -> None:
        self._plan, self._results, self._make = plan, results, make
        self._seen: dict[str, Outcome | None] = {}

    def told(self, check: str, outcome: Outcome, placement: Placement) -> Outcome:
        """The same outcome; a finding that is there on one rank too says so, and where that one is wrong first."""
        if check != "logits":
            return outcome
        if placement.tp_size == 1:
            self._seen[outcome.kind] = outcome
        if outcome.finding is None or self._results.wrongly_loaded:
            return outcome
        if placement.ranks is not None:  # torchrun's: they are as many as they are
            return outcome
        own = self._on_one_rank(outcome.kind)
        if own is None or own.finding is None:
            return outcome
        where = f", first at {own.module}" if own.module else ""
        return replace(outcome, finding=f"not TP: differs at tp_size=1 too{where}; {outcome.finding}",
                       extra={**outcome.extra, "not_tp": True})

    def _on_one_rank(self, kind: str) -> Outcome | None:
        if kind not in self._seen:
            alone = replace(self._plan, tp_sizes=(1,), kind=kind, case=None)
            outcomes: list[Outcome] = []
            with suppress(SubjectFailure, CheckpointError), self._make(alone.placement(1)) as subject:  # then it is not known
                context = CheckContext(results=self._results, subject=subject, options=_options(self._results),
                                       seed=alone.seed, kind=kind)
                outcomes = _run(all_checks()["logits"], context, needs_model=True)
            self._seen[kind] = next((outcome for outcome in outcomes if outcome.kind == kind), None)
        return self._seen[kind]


def _verify_one(plan: VerifyPlan, results: ReferenceResults, make: type[Subject], placement: Placement, on_start: OnStart,
                on_outcome: OnOutcomes, alone: _Alone) -> Iterable[list[CheckRow]]:
    """The rows of each check."""
    with make(placement) as subject:
        if placement.ranks is not None:
            subject.find(plan.folder)
        checks = [all_checks()[name] for name in plan.checks]
        needs_model = any(check.needs_model for check in checks)
        options = _options(results) if needs_model else {}
        context = CheckContext(results=results, subject=subject, options=options, seed=plan.seed, kind=plan.kind, case=plan.case)
        for check in checks:
            if not subject.is_usable:
                gone = Outcome(cases=0, compared=0, skipped=GONE)
                yield [_row(check.name, plan, results, subject.fabric, subject.tp_size, gone)]
                continue
            on_start(check.name, subject.tp_size)
            started = time.perf_counter()
            outcomes = [alone.told(check.name, outcome, placement) for outcome in _run(check, context, needs_model=needs_model)]
            on_outcome(outcomes)
            seconds = time.perf_counter() - started
            yield [_row(check.name, plan, results, subject.fabric, subject.tp_size, outcome, seconds) for outcome in outcomes]


def _run(check: Check, context: CheckContext, *, needs_model: bool) -> list[Outcome]:
    """What the check says, the model being loaded before the first one if any needs it: one that can't be is told at once."""
    if needs_model and context.subject.loaded is None:
        try:
            context.subject.load(context.results.folder, dtype=context.dtype, options=context.options)
        except SubjectFailure as failure:
            context.subject.loaded = None
            return [Outcome(cases=1, compared=0, finding=str(failure), rank=min(failure.failures, default=None))]
    return list(check.run(context))


def _rows_not_done(plan: VerifyPlan, results: ReferenceResults, make: type[Subject], given: Any, done: Sequence[CheckRow],
                   why: Outcome) -> list[CheckRow]:
    keys = {(row.check, row.tp_size) for row in done}
    return [_row(name, plan, results, make.fabric_of(plan.placement(tp_size, given)), tp_size, why)
            for tp_size in plan.tp_sizes for name in plan.checks if (name, tp_size) not in keys]


def _options(results: ReferenceResults) -> dict[str, int]:
    """A cache of small blocks, just large enough for the schedule and the prompts with what is generated."""
    longest = [*map(len, results.schedule.sequences), *(len(prompt) + results.num_new_tokens for prompt in results.prompts)]
    block_size = 16
    return {"block_size": block_size, "num_kv_blocks": sum(-(-(length + 1) // block_size) for length in longest) + 1,
            "max_num_batched_tokens": 64, "max_num_seqs": 8}


def _row(name: str, plan: VerifyPlan, results: ReferenceResults, fabric: str, tp_size: int, outcome: Outcome,
         seconds: float = 0.0) -> CheckRow:
    verdict: Verdict = ("error" if outcome.error is not None else "finding" if outcome.finding is not None
                        else "skipped" if outcome.skipped is not None else "pass")
    row: dict[str, Any] = {
        "check": name, "kind": outcome.kind, "model": plan.model, "tp_size": tp_size, "fabric": fabric, "dtype": results.dtype,
        "cases": outcome.cases, "compared": outcome.compared, "seconds": round(seconds, 3), "module": outcome.module,
        "verdict": verdict,
        "message": outcome.error or outcome.finding or outcome.skipped or "",
        "replay": _replay(name, plan, results, fabric, tp_size, outcome) if verdict == "finding" else None,
    }
    try:
        return CheckRow(**row, error_over_budget=outcome.error_over_budget, rank=outcome.rank, excused=outcome.excused,
                        extra=dict(outcome.extra))
    except RecordError as error:  # a value that no record can hold costs its place in the row, and not the run
        if verdict == "pass":
            row |= {"verdict": "error", "message": f"the check passed with a value that can't be: {error}"}
        return CheckRow(**row, extra={"left_out": str(error)})


def _replay(name: str, plan: VerifyPlan, results: ReferenceResults, fabric: str, tp_size: int, outcome: Outcome) -> str:
    """The one command that runs the finding again."""
    subject = () if plan.subject == "engine" else ("--subject", plan.subject)
    if plan.python is not None:
        subject = (*subject, "--python", str(plan.python))
    words = ("shardproof", "verify", plan.model, "--tp", str(tp_size), "--check", name, "--dtype", plan.dtype, "--device",
             plan.device, "--seed", str(plan.seed), "--fabric", "auto" if fabric in ("solo", "") else fabric, *subject)
    if plan.cases_folder is None:
        return shlex.join(words)
    model = str(plan.folder.resolve()) if Path(plan.model).is_dir() else plan.model
    try:
        path = save_case(plan.cases_folder, SavedCase(
            check=name, model=model, tp_size=tp_size, fabric=fabric, device=plan.device, dtype=results.dtype,
            subject=plan.subject, seed=plan.seed, case=dict(outcome.case), finding=outcome.finding or "", kind=outcome.kind,
            tensors=dict(outcome.tensors),
        ))
    except (OSError, SafetensorError) as error:  # of a full disk, say: the finding matters more
        logger.warning("folder=%s: the case of this finding was not saved: %s", plan.cases_folder, error)
        return shlex.join(words)
    return shlex.join(("shardproof", "verify", "--case", str(path), *subject))


def replay(saved: SavedCase, folder: Path, python: Path | None = None) -> tuple[Report, str]:
    """Run a saved finding again, alone. The report, and in words how it compares with what was saved.

    Args:
        saved: the finding.
        folder: of its model.
        python: as in ``VerifyPlan``: no file names what is run.

    Raises:
        as ``verify``.
    """
    outcomes: list[Outcome] = []
    plan = VerifyPlan(model=saved.model, folder=folder, tp_sizes=(saved.tp_size,), fabric=saved.fabric, device=saved.device,
                      dtype=saved.dtype, checks=(saved.check,), subject=saved.subject, python=python,
                      seed=saved.seed, kind=saved.kind or None, case=saved.case or None)
    report = verify(plan, on_outcome=outcomes.extend)
    outcome = next((part for part in outcomes if part.kind == saved.kind), outcomes[0])
    if outcome.error is not None or outcome.skipped is not None:
        return report, "it did not run"
    return report, compare_replay(saved, outcome.finding, dict(outcome.tensors))
