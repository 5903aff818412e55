"""What faults are planted on: live ranks, tiny models and the reference's answers, made once and used again."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType

from engine.ranks.ranks import RankFailure
from harness.checks import all_checks
from harness.checks.base import CheckContext, Outcome
from harness.faults.base import Fault, Patches, plant, planted_in_driver, remove
from harness.faults.layouts import LAYOUTS
from harness.subjects.base import Placement, SubjectFailure
from harness.subjects.engine import EngineSubject
from harness.verification.reference_results import ReferenceResults
from reference.checkpoints import CheckpointError, random_checkpoint

FABRIC = "gloo"
FABRICS = {"cpu": FABRIC, "cuda": "auto"}
"""By device. Ranks that are threads share what a fault patches, and capture no graphs."""
COLLECTIVE_TIMEOUT_S = 10.0
"""A fault that makes ranks wait for each other is seen after this at the latest."""
JOB_TIMEOUT_S = 120.0
"""The same where ranks wait in a captured graph, whose collectives have no deadline of their own."""


class FaultModels(AbstractContextManager["FaultModels"]):
    """A context manager; its end ends all ranks and removes all models."""

    def __init__(self, *, seed: int = 0, device: str = "cpu") -> None:
        self.seed = seed
        self.device = device
        self._scratch = tempfile.TemporaryDirectory(prefix="shardproof-faults-")
        self._subjects: dict[int, EngineSubject] = {}
        self.context = cache(self._make_context)

    def subject(self, tp_size: int) -> EngineSubject:
        """On processes: a patch of one rank must not reach another."""
        if tp_size not in self._subjects:
            self._subjects[tp_size] = EngineSubject(Placement(
                tp_size=tp_size, fabric=FABRICS[self.device], device=self.device, collective_timeout_s=COLLECTIVE_TIMEOUT_S,
                job_timeout_s=JOB_TIMEOUT_S, auto_restart=False))
        return self._subjects[tp_size]

    def _make_context(self, layout_name: str, tp_size: int) -> CheckContext:
        """What the checks get for a model of this layout, on these ranks."""
        return CheckContext(results=self._results(layout_name), subject=self.subject(tp_size), seed=self.seed,
                            options={"block_size": 16, "num_kv_blocks": 20, "max_num_batched_tokens": 64, "max_num_seqs": 8})

    def _results(self, layout_name: str) -> ReferenceResults:
        layout = LAYOUTS[layout_name]
        folder = Path(self._scratch.name) / layout_name
        if not folder.is_dir():
            random_checkpoint(folder, layout.config, dtype=layout.dtype, seed=self.seed)
        return ReferenceResults(folder, dtype=layout.dtype, seed=self.seed, device=self.device)

    def close(self) -> None:
        """End the ranks and remove the models."""
        while self._subjects:
            self._subjects.popitem()[1].close()
        self._scratch.cleanup()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Planted:
    """A subject with a fault in its ranks. A context manager; its end takes the fault out, whatever became of the ranks."""

    def __init__(self, subject: EngineSubject, fault: Fault) -> None:
        self._subject = subject
        self._ranks = subject.ranks
        self._fault = fault
        self._driver_patches = Patches()
        self._is_planted = False

    def load(self, context: CheckContext) -> str | None:
        """Plant the fault, and load the context's model under it. What went wrong in loading, if it did.

        Raises:
            RankFailure: the fault could not be planted. Nothing can be said of the checks then.
        """
        self.plant()
        try:
            self._load(context)
        except (SubjectFailure, CheckpointError) as failure:
            self._subject.loaded = None
            return str(failure)
        return None

    def run(self, name: str, context: CheckContext) -> list[Outcome]:
        """One check under the fault. A failing rank is a finding, as in ``verify``; not one that fails while it is planted."""
        self.plant()
        check = all_checks()[name]
        try:
            if check.needs_model:
                self._load(context)
            return list(check.run(context))
        except SubjectFailure as failure:
            return [Outcome(cases=1, compared=0, finding=str(failure), rank=min(failure.failures, default=None))]

    def plant(self) -> None:
        """Plant it, unless it is planted already; new ranks take the place of broken ones."""
        if not self._ranks.healthy:
            self._ranks.restart()
            self._is_planted = False
        if not self._is_planted:
            self._subject.loaded = None
            self._ranks.run(plant, self._fault.name)
            self._is_planted = True

    def _load(self, context: CheckContext) -> None:
        loaded, results = self._subject.loaded, context.results
        if loaded is None or (loaded.folder, loaded.dtype) != (results.folder, results.dtype):
            self._subject.load(results.folder, dtype=results.dtype, options=context.options)

    def __enter__(self) -> Planted:
        self._driver_patches = planted_in_driver(self._fault)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._driver_patches.close()
        if kind is not None and not issubclass(kind, Exception):
            return  # on Ctrl-C the ranks end, and nothing may hide it
        self._subject.forget()
        with suppress(RankFailure):  # of a rank that the fault has killed, and nobody has asked since
            if self._ranks.healthy:
                self._ranks.run(remove)
        if not self._ranks.healthy:  # new processes have no patches
            self._ranks.restart()
