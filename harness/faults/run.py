"""``shardproof faults``: plant each fault, run the checks, and see whether those that must see it do.

The checks are held to what they are for: a fault that they miss is a finding, and so is a control that they mind, and so is a
localisation that names the wrong module too often.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from harness.checks import CHECK_NAMES, all_checks
from harness.checks.base import TRACEBACK, CheckContext, Outcome, raised, together
from harness.errors import UsageError
from harness.faults import FAULTS, Fault
from harness.faults.base import LOAD
from harness.faults.catalogue import BUGS, NOT_PLANTED
from harness.faults.models import FABRIC, FaultModels, Planted
from harness.interrupted import WHY, Interrupted
from harness.machine import run_info
from harness.verification.verify import refuse_repeats
from reports.records import CheckRow, Report, Verdict

logger = logging.getLogger(__name__)

LEAST_NAMED = 0.9
"""Share of the faults with a module of their own for which localisation must name it."""
LOCALISATION = "localisation"
"""Stands in the place of a fault's name for all faults together."""

OnRow = Callable[[CheckRow], None]
OnStart = Callable[[str, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPlan:
    """Which faults to plant on how many ranks. Empty: all of them, each on the fewest ranks that show it."""

    only: tuple[str, ...] = ()
    tp_sizes: tuple[int, ...] = ()
    seed: int = 0
    device: str = "cpu"
    """``cuda`` plants what only a captured graph can get wrong, and nothing else: the other faults patch what runs on a CPU."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.only if name not in FAULTS]:
            raise UsageError(f"only={unknown} are no faults; there are: {', '.join(FAULTS)}")
        if self.tp_sizes and min(self.tp_sizes) < 2:
            raise UsageError(f"tp_sizes={self.tp_sizes} must be 2 or more: a fault of tensor parallelism needs ranks")
        refuse_repeats("only", self.only)
        refuse_repeats("tp_sizes", self.tp_sizes)
        if self.device not in ("cpu", "cuda"):
            raise UsageError(f"device={self.device!r} must be cpu or cuda")

    @property
    def faults(self) -> list[Fault]:
        """Those that are meant, planted or not."""
        return [FAULTS[name] for name in self.only] or list(FAULTS.values())

    def cases(self) -> tuple[list[tuple[Fault, int]], list[tuple[Fault, str]]]:
        """What to plant on how many ranks; and what can't be, and why."""
        reasons = {fault.name: self._why_not(fault) for fault in self.faults}
        cases = [(fault, tp_size) for fault in self.faults if reasons[fault.name] is None for tp_size in self._sizes_of(fault)]
        return cases, [(fault, reason) for fault in self.faults if (reason := reasons[fault.name]) is not None]

    def _why_not(self, fault: Fault) -> str | None:
        """Why this plan does not plant a fault; None if it does."""
        if fault.device != self.device:
            return "not planted: it needs CUDA graphs" if fault.device == "cuda" else "not planted: it is one of a CPU"
        if not (sizes := self._sizes_of(fault)):
            return f"asked for tp_sizes={self.tp_sizes}, and it shows at tp_sizes={fault.tp_sizes} alone"
        if self.device == "cuda" and max(sizes) > torch.cuda.device_count():
            return f"not planted: it needs {max(sizes)} GPUs, and there are {torch.cuda.device_count()}"
        return None

    def _sizes_of(self, fault: Fault) -> tuple[int, ...]:
        if not self.tp_sizes:
            return fault.tp_sizes[:1]
        return tuple(tp_size for tp_size in fault.tp_sizes if tp_size in self.tp_sizes)


def run_faults(plan: FaultPlan, *, on_row: OnRow = lambda row: None,
             on_start: OnStart = lambda name, tp_size: None) -> Report:
    """Run the plan. One row a fault and tp_size, one for localisation, and one for each public bug that is not planted.

    Args:
        plan: which faults, on which numbers of ranks.
        on_row: gets the row of each fault as it is done.
        on_start: told of each fault before it is planted.

    Raises:
        Interrupted: on Ctrl-C, with the report as far as it is done.

    An exception is a row with the verdict "error". If there can't be ranks any more, that is the reason of all rows that are
    missing; it is raised if there are none yet.
    """
    started_at = datetime.now(UTC)
    rows: list[CheckRow] = []
    cases, invisible = plan.cases()
    try:
        with FaultModels(seed=plan.seed, device=plan.device) as models:
            for fault, tp_size in cases:
                on_start(fault.name, tp_size)
                try:
                    row = _row(fault, models.context(fault.layout, tp_size), _examine(models, fault, tp_size))
                except Exception as error:
                    logger.exception("fault %s could not be examined", fault.name)
                    row = _not_run(fault.name, raised(error), tp_size)
                    models.subject(tp_size).restart()  # nobody knows what is still planted in these
                rows.append(row)
                on_row(row)
    except KeyboardInterrupt as stop:
        rows += _rows_not_done(cases, rows, Outcome(cases=0, compared=0, error=WHY))
        raise Interrupted(Report(run=run_info("faults", started_at=started_at, seed=plan.seed), checks=rows)) from stop
    except Exception as error:
        if not rows:
            raise
        rows += _rows_not_done(cases, rows, raised(error))
    rows += [_not_done(fault.name, reason) for fault, reason in invisible]
    if (summary := _localisation(rows)) is not None:
        rows.append(summary)
    if not plan.only:
        rows += [_not_done(f"bug {number}: {BUGS[number]}", f"not planted: {reason}") for number, reason in NOT_PLANTED.items()]
    return Report(run=run_info("faults", started_at=started_at, seed=plan.seed), checks=rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """What the checks said of one fault."""

    outcomes: Mapping[str, Outcome]
    crashed: Mapping[str, Outcome]
    """Of checks that raised instead of answering: a fault must make them red, not break them."""
    seconds: float

    @property
    def red(self) -> dict[str, str]:
        return {name: outcome.finding for name, outcome in self.outcomes.items() if outcome.finding is not None}

    @property
    def smallest(self) -> str:
        """The smallest case that is red, of a check that tells its own; else what the first red check found, if any is."""
        told = {name: case for name, outcome in self.outcomes.items() if (case := outcome.extra.get("smallest_case"))}
        return next((f"{name}: {text.splitlines()[0]}" for name, text in (told or self.red).items()), "")


def _examine(models: FaultModels, fault: Fault, tp_size: int) -> Examination:
    started = time.perf_counter()
    context = models.context(fault.layout, tp_size)
    outcomes: dict[str, Outcome] = {}
    crashed: dict[str, Outcome] = {}
    with Planted(models.subject(tp_size), fault) as planted:
        refusal = planted.load(context)
        if refusal is not None:
            outcomes[LOAD] = Outcome(cases=1, compared=0, finding=refusal)
        for name in checks_of(fault):
            if refusal is None or not all_checks()[name].needs_model:
                outcome = together(planted.run(name, context))
                (crashed if outcome.error is not None and outcome.finding is None else outcomes)[name] = outcome
    return Examination(outcomes=outcomes, crashed=crashed, seconds=time.perf_counter() - started)


def checks_of(fault: Fault) -> list[str]:
    """What to run: the checks that must see it, ``logits`` among them where it has a module; for a control all of them."""
    if not fault.is_control:
        return [name for name in all_checks() if name in fault.checks]
    # One that starts ranks of its own, again and again, tells nothing of what is planted in others.
    return [name for name, check in all_checks().items()
            if name in CHECK_NAMES and not (check.owns_ranks and fault.where == "ranks")]


def _row(fault: Fault, context: CheckContext, examination: Examination) -> CheckRow:
    red = examination.red
    missed = [name for name in fault.checks if name not in red]
    place = examination.outcomes.get("logits", Outcome(cases=0, compared=0))
    module, effect = (place.module, place.extra.get("effect")) if "logits" in red else (None, None)
    verdict: Verdict = "error" if examination.crashed else "finding" if missed or (fault.is_control and red) else "pass"
    return CheckRow(
        check="faults", fault=fault.name, model=fault.layout, tp_size=context.tp_size, fabric=context.subject.fabric,
        dtype=context.dtype, cases=len(examination.outcomes) + len(examination.crashed), compared=len(examination.outcomes),
        verdict=verdict, seconds=round(examination.seconds, 3), rank=place.rank if module else None, module=module,
        message=_message(fault, red, missed, examination.crashed), replay=_replay(fault, context),
        extra={
            "what": fault.what, "bugs": {str(number): BUGS[number] for number in fault.rows}, "control": fault.is_control,
            "patched": fault.layer, "expected": list(fault.checks), "red": red, "missed": missed,
            "smallest": examination.smallest, "module_expected": fault.module, "effect_expected": fault.effect,
            "effect": effect, "effect_text": place.extra.get("effect_text") if module else None,
            **{f"{TRACEBACK} of {name}": outcome.extra[TRACEBACK] for name, outcome in examination.crashed.items()
               if TRACEBACK in outcome.extra},
        },
    )


def _message(fault: Fault, red: Mapping[str, str], missed: Sequence[str], crashed: Mapping[str, Outcome]) -> str:
    if crashed:
        return "checks raised instead of answering: " + " | ".join(f"{name}: {it.error}" for name, it in crashed.items())
    if fault.is_control:
        return f"no check minds it: {fault.what}" if not red else "a control must stay green: " + _findings(red)
    if missed:
        seen = f"; seen by {', '.join(red)}: {_findings(red)}" if red else ""
        return f"missed by {', '.join(missed)}: {fault.what}{seen}"
    return f"seen by {', '.join(red)}: {fault.what}"


def _findings(red: Mapping[str, str]) -> str:
    return " | ".join(f"{name}: {finding.splitlines()[0]}" for name, finding in red.items())


def _replay(fault: Fault, context: CheckContext) -> str:
    tp = f" --tp {context.tp_size}" if context.tp_size > 1 else ""
    device = f" --device {fault.device}" if fault.device != "cpu" else ""
    return f"shardproof faults --only {fault.name}{tp} --seed {context.seed}{device}"


def _not_done(name: str, reason: str, tp_size: int = 1, *, verdict: Verdict = "skipped",
              extra: Mapping[str, Any] | None = None) -> CheckRow:
    return CheckRow(check="faults", fault=name, model="", tp_size=tp_size, fabric=FABRIC, dtype="", cases=0, compared=0,
                    verdict=verdict, seconds=0.0, message=f"{name}, {reason}", extra=dict(extra or {}))


def _rows_not_done(cases: Iterable[tuple[Fault, int]], done: Iterable[CheckRow], why: Outcome) -> list[CheckRow]:
    keys = {(row.fault, row.tp_size) for row in done}
    return [_not_run(fault.name, why, tp_size) for fault, tp_size in cases if (fault.name, tp_size) not in keys]


def _not_run(name: str, why: Outcome, tp_size: int) -> CheckRow:
    return _not_done(name, why.error or "", tp_size, verdict="error", extra=dict(why.extra))


def _localisation(rows: Iterable[CheckRow]) -> CheckRow | None:
    """One row for all: how often the module named is the one that the fault is in."""
    placed = [row for row in rows if row.extra.get("module_expected") and row.verdict != "error"]
    if not placed:
        return None
    wrong = [row for row in placed if row.module != row.extra["module_expected"]]
    named = len(placed) - len(wrong)
    classed = [row for row in placed if row.extra["effect_expected"]]
    right_effect = sum(row.extra["effect"] == row.extra["effect_expected"] for row in classed)
    message = (f"the right module named for {named} of {len(placed)} faults, the right effect for {right_effect} of "
               f"{len(classed)}" + "".join(f"; {row.fault}: {row.module} for {row.extra['module_expected']}" for row in wrong))
    return CheckRow(check="faults", fault=LOCALISATION, model="", tp_size=max(row.tp_size for row in placed), fabric=FABRIC,
                    dtype="", cases=len(placed), compared=len(placed),
                    verdict="pass" if named >= LEAST_NAMED * len(placed) else "finding",
                    seconds=0.0, message=message)

