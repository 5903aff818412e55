"""One case of a workload, or a workload whose cases go together: everybody's first run, then rounds in turns, then rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from harness.bench.collectives import size_of_case
from harness.bench.engines import OWN
from harness.bench.figures import Figures
from harness.bench.participants import Block, Hardware, Participant
from harness.bench.plan import Setting
from harness.bench.serving import ShortAnswerError
from harness.bench.worker import WorkerError
from harness.bench.workloads import CollectivesPart, GenerateCase, LayersPart
from reports.compare import HARDWARE
from reports.metrics import direction
from reports.records import BenchRow, NotMeasured, RecordError


@dataclass(frozen=True, slots=True, kw_only=True)
class Watcher:
    """Whom to tell while a benchmark runs."""

    on_status: Callable[[str], None] = lambda text: None
    on_row: Callable[[str, BenchRow], None] = lambda side, row: None
    on_missing: Callable[[NotMeasured], None] = lambda item: None


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a run has brought so far. ``failed``: some of the project's own engine could not be measured, for it broke."""

    rows: dict[str, list[BenchRow]]
    """By side."""
    watcher: Watcher
    missing: list[NotMeasured] = field(default_factory=list)
    hardware: Hardware = field(default_factory=Hardware)
    failed: bool = False

    def add(self, side: str, row: BenchRow) -> None:
        self.rows[side].append(row)
        self.watcher.on_row(side, row)
        if row.workload == HARDWARE:
            self.hardware.best[row.case] = {name: (max if direction(name) == "higher" else min)(values)
                                            for name, values in row.samples.items()}

    def miss(self, item: NotMeasured) -> None:
        """Note what is not measured, once."""
        if item not in self.missing:
            self.missing.append(item)
            self.watcher.on_missing(item)


@dataclass(slots=True)
class _Samples:
    first: Figures = field(default_factory=dict)
    rounds: list[Figures] = field(default_factory=list)


class Step:
    """Measures one block of work on all participants.

    Args:
        participants: makes them when the step begins.
        rounds: after the first run.
    """

    def __init__(self, setting: Setting, workload: str, block: Block, participants: Callable[[], Sequence[Participant]],
                 rounds: int) -> None:
        self.setting = setting
        self.workload = workload
        self.block = block
        self.rounds = rounds
        self._make_participants = participants
        self._everyone: Sequence[Participant] = []
        self._active: list[Participant] = []
        self._samples: dict[int, dict[tuple[str, str], _Samples]] = {}

    def run(self, outcome: Outcome) -> None:
        """Raises KeyboardInterrupt on Ctrl-C, once what is finished is among the rows."""
        try:
            self._everyone = self._make_participants()
            self._active = list(self._everyone)
            with ExitStack() as stack:
                for participant in self._everyone:
                    outcome.watcher.on_status(f"{self.workload}: starting {participant}")
                    with self._guard(participant, outcome):
                        participant.open()
                        stack.callback(self._close, participant, outcome)
                for turn in range(self.rounds + 1):
                    self._run_turn(turn, outcome)
                self._make_rows(outcome)
        except KeyboardInterrupt:
            # The workers may be in the middle of something: ask them nothing more.
            self._make_rows(outcome, ask_workers=False)
            self.say_interrupted(outcome)
            raise

    def _run_turn(self, turn: int, outcome: Outcome) -> None:
        # Nobody always comes first: who does finds the machine as the last one left it.
        shift = turn % max(1, len(self._active))
        for participant in self._active[shift:] + self._active[:shift]:
            if turn > participant.rounds:
                continue
            what = "first run" if turn == 0 else f"round {turn} of {min(self.rounds, participant.rounds)}"
            outcome.watcher.on_status(f"{self.workload}{f' {self.case}' if self.case else ''}: {participant}, {what}")
            with self._guard(participant, outcome):
                samples = self._samples.setdefault(id(participant), {})
                for key, figures in participant.measure(self.block).items():
                    kept = samples.setdefault(key, _Samples())
                    if turn == 0:
                        kept.first = figures
                    else:
                        kept.rounds.append(figures)

    def _make_rows(self, outcome: Outcome, *, ask_workers: bool = True) -> None:
        for participant in self._everyone:
            memory: Figures = {}
            if ask_workers and participant in self._active:
                with self._guard(participant, outcome):
                    memory = participant.memory()
            for (case, engine), samples in self._samples.get(id(participant), {}).items():
                if not samples.rounds:
                    continue
                try:
                    row = BenchRow(
                        workload=self.workload, case=case, model=self._model, engine=engine, tp_size=participant.tp_size,
                        dtype=self.setting.dtype, fabric=participant.fabric, first=samples.first, axes=_axes(self.block, case),
                        samples={name: [figures[name] for figures in samples.rounds] for name in samples.rounds[0]},
                        metrics=memory | {f"bound_{name}": bound for name, bound
                                          in participant.bounds(self.block, case, outcome.hardware).items()},
                    )
                except RecordError as error:  # a figure that can't be one, such as no time at all
                    outcome.failed |= engine == OWN
                    outcome.miss(NotMeasured(workload=self.workload, case=case, engine=engine, tp_size=participant.tp_size,
                                             verdict="error", reason=f"its figures make no sense: {error}"))
                else:
                    outcome.add(participant.side.name, row)
            for item in participant.not_measured(self.workload):
                outcome.miss(item)

    def say_interrupted(self, outcome: Outcome) -> None:
        """Note what this step would still have measured."""
        if not self._everyone:
            outcome.miss(NotMeasured(workload=self.workload, case=self.case, engine=OWN, reason="interrupted before it began"))
        for participant in self._everyone:
            rounds = min(self.rounds, participant.rounds)
            done = min((len(samples.rounds) for samples in self._samples.get(id(participant), {}).values()), default=0)
            if done < rounds:
                outcome.miss(NotMeasured(workload=self.workload, case=self.case, engine=participant.engine,
                                         tp_size=participant.tp_size, reason=f"interrupted after {done} of {rounds} rounds"))

    @contextmanager
    def _guard(self, participant: Participant, outcome: Outcome) -> Iterator[None]:
        """A participant whose worker fails takes no further part, and the others go on."""
        try:
            yield
        except WorkerError as failure:
            self._active = [other for other in self._active if other is not participant]
            if failure.kind == ShortAnswerError.__name__:
                self._samples.pop(id(participant), None)  # what it did in the other rounds is in doubt as well
            outcome.failed |= participant.engine == OWN
            outcome.miss(NotMeasured(workload=self.workload, case=self.case, engine=participant.engine,
                                     tp_size=participant.tp_size, verdict="error", reason=failure.summary,
                                     traceback=str(failure)))

    def _close(self, participant: Participant, outcome: Outcome) -> None:
        if participant in self._active:
            with self._guard(participant, outcome):
                participant.close()

    @property
    def case(self) -> str | None:
        """The block's case, if it is one."""
        return self.block.case if isinstance(self.block, GenerateCase) else self.block if isinstance(self.block, str) else None

    @property
    def _model(self) -> str:
        # The machine and its collectives are the same for every model.
        return "" if self.workload in (HARDWARE, "collectives") else self.setting.plan.model


def _axes(block: Block, case: str) -> dict[str, float]:
    if isinstance(block, GenerateCase):
        return block.axes
    if isinstance(block, LayersPart):
        return {"batch_size": float(case.rpartition(" ")[2])}
    if isinstance(block, CollectivesPart):
        return {"message_bytes": float(size_of_case(block.message_bytes, case))}
    return {}
