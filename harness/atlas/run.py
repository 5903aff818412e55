"""``shardproof atlas``: architectures × layouts × numbers of ranks, a row each, on ranks that stay alive between rows."""

from __future__ import annotations

import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path

from transformers.utils import logging as transformers_logging

from harness.atlas.judge import Judged, judge, reason
from harness.atlas.layouts import Layout, layouts_of
from harness.errors import CouldNotRunError, UsageError
from harness.interrupted import Interrupted
from harness.machine import run_info
from harness.names import DTYPES
from harness.subjects import subject_class
from harness.subjects.base import Placement, Subject
from harness.subjects.transformers import TransformersSubject
from harness.verification.reference_results import ReferenceResults
from harness.verification.verify import refuse_repeats
from reference.shrink import causal_lm_types, shrink
from reports.records import AtlasRow, Report

SCHEDULE_LENGTHS = (24, 13)
"""Tokens of its two sequences: longer than the windows of tiny models."""
JOB_TIMEOUT_S = 120.0
"""No job of a tiny model takes so long."""

OnRow = Callable[[AtlasRow], None]
OnStart = Callable[[str, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A row that is to be computed."""

    architecture: str
    layout: Layout
    dtype: str
    tp_size: int
    subject: str

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """As ``AtlasRow.key``."""
        return (self.architecture, self.layout.name, self.subject, self.dtype, self.tp_size)

    @property
    def checkpoint(self) -> str:
        """The same for rows of one checkpoint, whatever ranks compute it."""
        return repr((self.architecture, sorted(self.layout.changes.items()), self.layout.own_names, self.dtype))

    @property
    def name(self) -> str:
        """As ``AtlasRow.name``."""
        return self.architecture if self.layout.name == "base" else f"{self.architecture}: {self.layout.name}"


@dataclass(frozen=True)
class AtlasPlan:
    """What to try. Empty ``architectures`` and ``layouts``: all that there are."""

    subject: str = "transformers"
    architectures: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    tp_sizes: tuple[int, ...] = (2, 3, 4)
    dtypes: tuple[str, ...] = ("float32",)
    seed: int = 0
    python: Path | None = None

    def __post_init__(self) -> None:
        least = self.make.atlas_from
        if least is None:
            raise UsageError(f"subject={self.subject!r}: the atlas knows the architectures of transformers and vllm alone; use "
                             "verify")
        self.versions  # noqa: B018 - refuses what is not installed
        known = causal_lm_types()
        if unknown := [name for name in self.architectures if name not in known]:
            raise UsageError(f"architectures={unknown} are unknown; the installed transformers has: {', '.join(known)}")
        if not self.tp_sizes or min(self.tp_sizes) < least:
            raise UsageError(f"tp_sizes={self.tp_sizes} must be {least} or more" + (
                ": one rank is what the others are held against" if least > 1 else ""))
        if unknown := [name for name in self.dtypes if name not in DTYPES]:
            raise UsageError(f"dtypes={unknown} are unknown; supported: {', '.join(DTYPES)}")
        for name in ("architectures", "layouts", "tp_sizes", "dtypes"):
            refuse_repeats(name, getattr(self, name))
        if not self.entries:
            raise UsageError(f"layouts={self.layouts} are none of these architectures'")

    @property
    def make(self) -> type[Subject]:
        """The subject."""
        return subject_class(self.subject)

    @cached_property
    def versions(self) -> dict[str, str]:
        """Of the libraries of another interpreter.

        Raises:
            UsageError: if what it takes is not installed.
        """
        if issubclass(self.make, TransformersSubject):
            self.make.check_installed()
        return self.make.versions(self.placement(self.tp_sizes[0] if self.tp_sizes else 1))

    def placement(self, tp_size: int) -> Placement:
        """Where the ranks of a row live."""
        return Placement(tp_size=tp_size, fabric="gloo" if tp_size > 1 else "solo", job_timeout_s=JOB_TIMEOUT_S,
                         python=self.python)

    @cached_property
    def entries(self) -> list[Entry]:
        """The rows, those of one checkpoint one after the other."""
        return [entry for architecture in self.architectures or causal_lm_types() for dtype in self.dtypes
                for entry in self._entries_of(architecture, dtype)]

    def _entries_of(self, architecture: str, dtype: str) -> list[Entry]:
        by_checkpoint: dict[str, list[Entry]] = {}
        for layout in layouts_of(architecture, self.make.tiny_sizes):
            if layout.expert_parallel and not issubclass(self.make, TransformersSubject):
                continue
            if not self.layouts or layout.name in self.layouts:
                rows = [Entry(architecture=architecture, layout=layout, dtype=dtype, tp_size=tp_size,
                              subject="transformers-ep" if layout.expert_parallel else self.subject) for tp_size in self.tp_sizes]
                by_checkpoint.setdefault(rows[0].checkpoint, []).extend(rows)
        return [entry for entries in by_checkpoint.values() for entry in entries]

    def left(self, done: Sequence[AtlasRow]) -> list[Entry]:
        """What is not done yet."""
        keys = {row.key for row in done}
        return [entry for entry in self.entries if entry.key not in keys]


def run_atlas(plan: AtlasPlan, *, done: Report | None = None, on_row: OnRow = lambda row: None,
              on_start: OnStart = lambda name, tp_size: None, save: Callable[[Report], None] = lambda report: None) -> Report:
    """Compute the rows that ``done`` lacks, and return them with those that it has.

    Args:
        plan: which rows there are to be.
        done: an earlier report of the same plan, which this one goes on from.
        on_row: gets each row that is done.
        on_start: gets the name and the tp_size of each row that begins.
        save: gets the report after each row.

    Raises:
        CouldNotRunError: if ``done`` is of another seed, or of other versions of the libraries.
        Interrupted: on Ctrl-C, with the report as far as it is done.
    """
    started_at = datetime.now(UTC)
    rows = [] if done is None else list(done.atlas)
    before_s = 0.0 if done is None else done.run.seconds

    def report() -> Report:
        info = run_info("atlas", started_at=started_at, seed=plan.seed)
        return Report(run=replace(info, seconds=info.seconds + before_s, versions=info.versions | plan.versions), atlas=rows)

    if done is not None:
        _check_same(done, report())
    try:
        with _Atlas(plan) as atlas:
            for entry in plan.left(rows):
                on_start(entry.name, entry.tp_size)
                rows.append(atlas.row(entry))
                on_row(rows[-1])
                save(report())
    except KeyboardInterrupt as stop:
        raise Interrupted(report()) from stop
    return report()


def _check_same(before: Report, now: Report) -> None:
    old, new = ({"seed": report.run.seed, **{name: report.run.versions.get(name) for name in ("torch", "transformers", "vllm")}}
                for report in (before, now))
    if old != new:
        raise CouldNotRunError(f"the rows that are there are of {old}, this is {new}: start anew, without --resume")


class _Atlas(ExitStack):
    """Live ranks for each tp_size, and one tiny checkpoint with the reference's answers: that of the row before."""

    def __init__(self, plan: AtlasPlan) -> None:
        super().__init__()
        self._plan = plan
        self._subjects: dict[tuple[str, int], Subject] = {}
        self._checkpoint = ""
        self._results: ReferenceResults | str = ""
        self._folder = Path()

    def __enter__(self) -> _Atlas:
        transformers_logging.disable_progress_bar()
        self.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
        transformers_logging.set_verbosity_error()  # in this process; what ranks are told is in their rows
        self._scratch = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="shardproof-")))
        return self

    def row(self, entry: Entry) -> AtlasRow:
        started = time.perf_counter()
        results = self._reference(entry)
        if isinstance(results, str):
            judged = Judged(verdict="not compared", message=results)
        else:
            try:
                judged = judge(results, self._subject(entry.subject, entry.tp_size), partial(self._one_rank, entry.subject))
            except Exception as error:  # ours, or a library's: a row of many must not end them all
                judged = Judged(verdict="not compared", message=f"the comparison itself raised {reason(error)}")
        message = judged.message.replace(f"{self._folder}", "its folder")  # a record is for other machines too
        words = ("shardproof", "atlas", "--arch", entry.architecture, "--layout", entry.layout.name, "--tp", str(entry.tp_size),
                 "--dtype", entry.dtype, "--seed", str(self._plan.seed),
                 *(() if self._plan.subject == "transformers" else ("--subject", self._plan.subject)),
                 *(() if self._plan.python is None else ("--python", str(self._plan.python))))
        return AtlasRow(architecture=entry.architecture, layout=entry.layout.name, changes=dict(entry.layout.changes),
                        subject=entry.subject, tp_size=entry.tp_size, dtype=entry.dtype, replay=shlex.join(words),
                        seconds=round(time.perf_counter() - started, 3), **asdict(replace(judged, message=message)))

    def _reference(self, entry: Entry) -> ReferenceResults | str:
        """Of the row's checkpoint; or why there is none."""
        if entry.checkpoint != self._checkpoint:
            if self._checkpoint:
                shutil.rmtree(self._folder, ignore_errors=True)  # some have parts of their published size
            self._checkpoint = entry.checkpoint
            folder = self._folder = Path(tempfile.mkdtemp(dir=self._scratch))
            try:
                shrink(entry.architecture, folder, seed=self._plan.seed, dtype=entry.dtype, own_names=entry.layout.own_names,
                       **entry.layout.changes)
                self._results = ReferenceResults(folder, dtype=entry.dtype, seed=self._plan.seed,
                                                 schedule_lengths=SCHEDULE_LENGTHS, beyond_windows=True)
            except Exception as error:  # a library's, over a config that it does not take
                self._results = f"no such checkpoint can be made: {reason(error)}"
        return self._results

    def _subject(self, name: str, tp_size: int) -> Subject:
        """On the ranks for this tp_size, which subjects share that can."""
        key = name, tp_size
        if key not in self._subjects:
            others = (subject for (_, size), subject in self._subjects.items() if size == tp_size and subject.takes_ranks)
            shared = next((getattr(subject, "ranks", None) for subject in others), None)
            placement = replace(self._plan.placement(tp_size), ranks=shared)
            self._subjects[key] = self.enter_context(subject_class(name)(placement))
        return self._subjects[key]

    @contextmanager
    def _one_rank(self, name: str) -> Iterator[Subject]:
        """This process, or the one that is there for rows of one rank: starting another library takes long."""
        make = subject_class(name)
        if not make.takes_ranks:
            yield self._subject(name, 1)
            return
        with make(replace(self._plan.placement(1), job_timeout_s=None)) as subject:
            yield subject
