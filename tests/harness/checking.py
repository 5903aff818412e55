"""One check on thread ranks, for tests that plant a fault into the engine or leave it alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.ranks.ranks import Ranks
from harness import jobs
from harness.checks import CHECKS, WITHOUT_SUBJECT
from harness.checks.base import CheckContext, Outcome
from harness.verification.truth import Truth

OPTIONS = {"block_size": 16, "num_kv_blocks": 20, "max_num_batched_tokens": 64, "max_num_seqs": 8}


@contextmanager
def context_of(folder: Path, dtype: str, *, tp_size: int = 2, seed: int = 0, case: dict[str, Any] | None = None,
               is_loaded: bool = True) -> Iterator[CheckContext]:
    """What a check is given, on ranks that are threads of this process: what a test patches, they all see."""
    with Ranks(tp_size, fabric="threads" if tp_size > 1 else "solo") as ranks:
        truth = Truth(folder, dtype=dtype, seed=seed)
        if is_loaded:
            ranks.run(jobs.load, "engine", folder, dtype, OPTIONS)
        yield CheckContext(truth=truth, ranks=ranks, subject="engine", options=OPTIONS, seed=seed, case=case)


def run_check(name: str, folder: Path, dtype: str = "float32", **how: Any) -> Outcome:
    """What the check says; ``how`` as in ``context_of``."""
    with context_of(folder, dtype, is_loaded=name not in WITHOUT_SUBJECT, **how) as context:
        return CHECKS[name](context)


def assert_green(outcome: Outcome) -> None:
    """Something was compared, and nothing was wrong."""
    assert outcome.finding is None, outcome.finding
    assert outcome.compared > 0


def again(name: str, folder: Path, outcome: Outcome, dtype: str = "float32", **how: Any) -> Outcome:
    """The finding's own case alone, as ``verify --case`` runs it."""
    assert outcome.finding is not None
    return run_check(name, folder, dtype, case=outcome.case, **how)
