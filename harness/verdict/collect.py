"""``shardproof collect``: one side's log-probabilities as a file, sequence by sequence, so that nothing that came is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.errors import UsageError
from harness.verdict.sides import (
    LONGEST,
    NUM_PROMPTS,
    SMALLEST_VOCABULARY,
    Limits,
    ServerSide,
    SideOptions,
    drawn_sequences,
    is_live,
    is_server,
    limits_of,
    open_side,
    read_prompts,
)
from harness.verdict.streams import StreamWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectPlan:
    """What to collect.

    side      as it is written on the command line; it computes
    path      of the file
    prompts   file of sequences; None: drawn ones, ``count`` of up to ``longest`` tokens
    generate  tokens that a server generates after each prompt instead; 0: the prompts themselves are scored
    resume    go on after what is in the file
    """

    side: str
    path: Path
    options: SideOptions
    prompts: Path | None = None
    count: int = NUM_PROMPTS
    longest: int = LONGEST
    generate: int = 0
    resume: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_live(self.side):
            raise UsageError(f"{self.side} is a file already: collect takes a server, a model folder or reference:FOLDER")
        if self.generate < 0 or (self.generate and not is_server(self.side)):
            raise UsageError(f"generate={self.generate}: only a server generates here; 0 scores the prompts")
        if self.count < 1 or self.longest < 2:
            raise UsageError(f"count={self.count} must be 1 or more, longest={self.longest} 2 or more")
        if self.path.suffix != ".jsonl":
            raise UsageError(f"out={str(self.path)!r} must end in .jsonl")
        if self.path.exists() and not self.resume:
            raise UsageError(f"out={str(self.path)!r} is there already: go on from it with --resume, or name another file")


def collect(plan: CollectPlan, on_done: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Collect what the file lacks. Returns how many sequences are in it.

    Raises:
        StreamError, CheckpointError, SubjectFailure: if it could not go on; what came before is in the file.
    """
    prompts = _prompts(plan)
    with closing(open_side(plan.side, plan.options)) as side, \
            StreamWriter(plan.path, resume=plan.resume, **asdict(side.info)) as writer:
        done = {one.prompt if plan.generate else one.token_ids for one in writer.done}
        left = [ids for ids in prompts if ids not in done]
        count = len(prompts) - len(left)
        if not left:
            return count
        for scored in side.generate(left, plan.generate) if isinstance(side, ServerSide) and plan.generate else side.score(left):
            writer.put(scored)
            count += 1
            on_done(count, len(prompts))
        return count


def _prompts(plan: CollectPlan) -> Sequence[tuple[int, ...]]:
    if plan.prompts is not None:
        return read_prompts(plan.prompts)
    known = Limits(vocab_size=SMALLEST_VOCABULARY, longest=plan.longest)
    if not is_server(plan.side):
        known = limits_of(plan.side, plan.options)
    return drawn_sequences(plan.seed, known.vocab_size, count=plan.count, longest=min(known.longest, plan.longest))
