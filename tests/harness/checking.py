"""One check on thread ranks, for tests that plant a fault into the engine or leave it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from engine.parallel.group import TPGroup
from engine.ranks.ranks import RankContext
from harness.checks import all_checks
from harness.checks.base import Check, CheckContext, Outcome, Whole, together
from harness.subjects.base import Placement
from harness.subjects.engine import EngineSubject
from harness.subjects.engine_rank import EngineRank
from harness.verification.reference_results import ReferenceResults

OPTIONS = {"block_size": 16, "num_kv_blocks": 20, "max_num_batched_tokens": 64, "max_num_seqs": 8}


def on_threads(tp_size: int) -> EngineSubject:
    """The engine on ranks that are threads of this process: what a test patches, they all see."""
    return EngineSubject(Placement(tp_size=tp_size, fabric="threads" if tp_size > 1 else "solo"))


def alone() -> EngineRank:
    """The engine on one rank that has no others."""
    return EngineRank(RankContext(tp=TPGroup(0, 1, "alone"), device=torch.device("cpu")))


@contextmanager
def context_of(folder: Path, dtype: str, *, tp_size: int = 2, seed: int = 0, case: Mapping[str, Any] | None = None,
               kind: str | None = None, is_loaded: bool = True) -> Iterator[CheckContext]:
    """What a check is given, on threads."""
    with on_threads(tp_size) as subject:
        results = ReferenceResults(folder, dtype=dtype, seed=seed)
        if is_loaded:
            subject.load(folder, dtype=dtype, options=OPTIONS)
        yield CheckContext(results=results, subject=subject, options=OPTIONS, seed=seed, case=case, kind=kind)


def outcome_of(check: str, context: CheckContext) -> Outcome:
    """All kinds of a check's cases as one."""
    return together(list(all_checks()[check].run(context)))


def run_kinds(name: str, folder: Path, dtype: str = "float32", **how: Any) -> list[Outcome]:
    """What the check says, kind by kind; ``how`` as in ``context_of``."""
    with context_of(folder, dtype, is_loaded=all_checks()[name].needs_model, **how) as context:
        return list(all_checks()[name].run(context))


def run_check(name: str, folder: Path, dtype: str = "float32", **how: Any) -> Outcome:
    """The same together."""
    return together(run_kinds(name, folder, dtype, **how))


def assert_green(outcome: Outcome) -> None:
    """Something was compared, and nothing was wrong."""
    assert outcome.finding is None, outcome.finding
    assert outcome.error is None, outcome.error
    assert outcome.compared > 0


def again(name: str, folder: Path, outcome: Outcome, dtype: str = "float32", **how: Any) -> Outcome:
    """The finding's own case alone, as ``verify --case`` runs it: of that kind, where the outcome is of one."""
    assert outcome.finding is not None
    return run_check(name, folder, dtype, case=outcome.case, kind=outcome.kind, **how)


def check_of(*judges: Callable[[CheckContext], Outcome], name: str = "weights", **how: Any) -> Check:
    """A check that does as the test says."""
    return Check(name=name, question="?", parts=tuple(Whole(judge=judge, kind=f"part {number}" if number else "")
                                                       for number, judge in enumerate(judges)), **how)
