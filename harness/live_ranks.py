"""Live ranks for a whole test session, and a bound on how long hypothesis may shrink a hang.

An example that hangs costs its whole deadline and new ranks, so that shrinking it as thoroughly as a wrong value would take
minutes. After ``HANG_ATTEMPTS`` runs since the first hang, a test's examples that were not run yet are rejected unseen:
hypothesis goes on with the smallest that did hang, and finds that none smaller does.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import pickle
from typing import Any

import hypothesis
import torch

from engine.ranks.jobs import Job, OnEvent, RankContext
from engine.ranks.ranks import RankFailure, Ranks

HANG_ATTEMPTS = 25
"""Runs of a test's jobs after the first that hung, while new examples are still tried. With a deadline of 1 s and the replays
that follow, hypothesis is done within a minute."""
PRELOAD = ("pytest", "hypothesis")
"""What every test module imports, and what takes long."""


class _Fingerprints(pickle.Pickler):
    """Pickles tensors by their bits. As they are usually pickled, the address of their memory is part of it."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor) and obj.layout is torch.strided and not obj.is_meta:
            elements = obj.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            return tuple, ((type(obj).__name__, str(obj.dtype), tuple(obj.shape), elements),)
        return NotImplemented


def fingerprint(args: tuple[Any, ...]) -> bytes:
    """The same for arguments that hypothesis draws again, and another for others. TypeError for what can't be pickled."""
    buffer = io.BytesIO()
    try:
        _Fingerprints(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(args)
    except Exception as failure:
        raise TypeError(f"the job's arguments can't be sent to the ranks ({type(failure).__name__}: {failure}): "
                        "use plain ones") from failure
    return hashlib.blake2b(buffer.getvalue(), digest_size=16).digest()


class HangBudget:
    """What one test has run, and how much of it since the first hang."""

    def __init__(self, attempts: int = HANG_ATTEMPTS) -> None:
        self._left = attempts
        self._hung = False
        self._known: set[bytes] = set()

    def admit(self, args: tuple[Any, ...]) -> None:
        """Note that a job is to run with a deadline. Rejects the example where hypothesis has seen hangs enough."""
        if not hypothesis.currently_in_test_context():
            return
        key = fingerprint(args)
        if self._hung and key not in self._known:
            if not self._left:
                hypothesis.reject()
            self._left -= 1
        self._known.add(key)

    def note(self, failure: RankFailure) -> None:
        """A job failed: was it a hang?"""
        self._hung = self._hung or any(error.kind == "stuck" and not error.consequence for error in failure.failures.values())


def import_module(rank: RankContext, name: str) -> None:
    """Job: have the module of later jobs ready."""
    rank.phase = f"importing {name}"
    importlib.import_module(name)


class RanksForTests(Ranks):
    """``Ranks`` whose hangs hypothesis shrinks in bounded time, where ``run`` is given a deadline.

    A deadline is for the job alone: what new ranks must import for it has been imported before.
    """

    budget: HangBudget | None = None
    _imported: frozenset[str] = frozenset()

    def restart(self) -> None:
        self._imported = frozenset()
        super().restart()

    def _prepare(self, job: Job) -> None:
        module = str(getattr(getattr(job, "func", job), "__module__", "__main__"))
        if self.fabric in ("gloo", "nccl") and module != "__main__":
            if not self.healthy:
                self.restart()
            if module not in self._imported:
                super().run(import_module, module)
                self._imported |= {module}

    def run(self, job: Job, *args: Any, timeout_s: float | None = None, on_event: OnEvent | None = None) -> list[Any]:
        __tracebackhide__ = True  # for pytest: a failure is shown at the line of the test
        if timeout_s is not None and self.budget is not None:
            self.budget.admit(args)
        try:
            if timeout_s is not None:
                self._prepare(job)
            return super().run(job, *args, timeout_s=timeout_s, on_event=on_event)
        except RankFailure as failure:
            if timeout_s is not None and self.budget is not None:
                self.budget.note(failure)
            raise failure.with_traceback(None) from failure.__cause__


class RankPools:
    """Live ranks by (tp_size, fabric, device), started on first use and kept for the whole session.

    >>> ranks(2).run(job, argument)  # doctest: +SKIP
    """

    def __init__(self, fabric: str | None) -> None:
        self._fabric = fabric
        self._pools: dict[tuple[int, str, str], RanksForTests] = {}
        self._budget = HangBudget()

    def __call__(self, tp_size: int, *, fabric: str | None = None, device: str = "cpu") -> Ranks:
        fabric = fabric or (self._fabric if tp_size > 1 and self._fabric else "auto")
        key = (tp_size, fabric, device)
        if key not in self._pools:
            self._pools[key] = RanksForTests(tp_size, fabric=fabric, device=device, auto_restart=True,
                                             preload=PRELOAD)
        self._pools[key].budget = self._budget
        return self._pools[key]

    def begin_test(self) -> None:
        """Another test has its own patience with hangs."""
        self._budget = HangBudget()

    def close(self) -> None:
        """End all ranks."""
        while self._pools:
            self._pools.popitem()[1].close()
