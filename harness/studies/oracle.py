"""Bit-equality as an oracle: each planted fault in the invariant mode, on one rank and on several, and whether any bit differs.

``python -m harness.studies.oracle`` prints a Markdown table, a row a fault. No reference and no tolerance are asked: a fault is
seen if the ranks' logits differ in some bit from those of one rank *with the same fault*. So a fault that does the same on one
rank as on several can't be seen, nor one that patches what this mode does not run.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial

from engine.ranks.ranks import RankFailure
from harness.checks.base import CheckContext, together
from harness.checks.invariance import CHECK, OPTIONS
from harness.faults import FAULTS, Fault
from harness.faults.base import plant, remove
from harness.faults.models import FaultModels, Planted
from harness.subjects.base import Placement, Schedule, SubjectFailure
from harness.subjects.engine import EngineSubject
from harness.verification.budgets import digest
from reference.checkpoints import CheckpointError


def planted_alone(fault: Fault) -> EngineSubject:
    """One rank with the fault, which is planted in this process until it is closed."""

    class Alone(EngineSubject):
        def close(self) -> None:
            self.ranks.run(remove)
            super().close()

    alone = Alone(Placement(tp_size=1, fabric="auto"))
    alone.ranks.run(plant, fault.name)
    return alone


def asked_of(fault: Fault) -> bool:
    """Whether it is a bug in what ranks compute: not of the driver, of requests, of CUDA graphs or of a process's life."""
    return fault.where == "ranks" and fault.device == "cpu" and bool(set(fault.checks) - {"lifecycle", "kv", "generation"})


def examine(models: FaultModels, fault: Fault) -> str:
    """What bit-equality says of one fault: refused, seen at a module, or not seen."""
    context = replace(models.context(fault.layout, fault.tp_sizes[0]), kind="model")
    subject = models.subject(fault.tp_sizes[0])
    with Planted(subject, fault) as planted:
        planted.plant()
        setattr(subject, "alone", partial(planted_alone, fault))  # noqa: B010 - an instance's, in place of its class's
        try:
            outcome = together(list(CHECK.run(context)))
        except (SubjectFailure, CheckpointError, RankFailure) as failure:
            return f"refused: {str(failure).splitlines()[0][:80]}"
        finally:
            del subject.alone
    if outcome.error is not None:
        return f"refused: {outcome.error[:80]}"
    if outcome.finding is None:
        return f"not seen: {why_not(fault, context)}"
    return f"seen: {outcome.module}" if outcome.tensors else f"seen: {outcome.finding.splitlines()[0][:60]}"


def why_not(fault: Fault, context: CheckContext) -> str:
    """Why ranks and rank agree: the fault is in both, or what it patches does not run in this mode."""
    with EngineSubject(Placement(tp_size=1)) as one:  # before the fault is planted: both live in this process
        clean = _logits(one, context)
    with planted_alone(fault) as one:
        return "one rank does the same" if _logits(one, context) != clean else "it changes nothing in this mode"


def _logits(subject: EngineSubject, context: CheckContext) -> bytes:
    """Digest of the logits of the context's sequences."""
    sequences = context.results.schedule.sequences
    subject.load(context.results.folder, dtype=context.dtype, options=OPTIONS)
    return digest(subject.logits(Schedule(sequences=sequences, steps=tuple(
        ((number, len(sequence)),) for number, sequence in enumerate(sequences))))[0])


def main() -> None:
    """Examine the faults that the command line names, or all that can be asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", action="append", default=[], help="this fault alone (again for more)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    faults = [FAULTS[name] for name in arguments.only] or [fault for fault in FAULTS.values() if asked_of(fault)]
    sys.stdout.write("| fault | tp | layout | the checks that see it | bit-equality |\n|---|---|---|---|---|\n")
    with FaultModels(seed=arguments.seed) as models:
        for fault in faults:
            said = examine(models, fault)
            sys.stdout.write(f"| `{fault.name}` | {fault.tp_sizes[0]} | {fault.layout} | {', '.join(fault.checks)} | {said} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
