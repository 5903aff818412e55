"""What A, B and the noise run can be: a file, a model folder on our engine, a reference, a server; each scores given tokens.

A side is opened by how it is written: ``reference:FOLDER``, ``http://…`` or ``https://…``, a file, or else a model's name or
folder.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from harness.bench.shapes import model_folder
from harness.errors import UsageError
from harness.verdict.streams import Scored, Stream, StreamInfo, read_stream

REFERENCE = "reference:"
BATCH_SIZES = (1, 4, 7)
"""In which a side runs its sequences in turn: a bug of batches shows in none of one."""
CHUNK = 48
"""Tokens of a prefill step of our engine, for every other batch."""
LONGEST = 96
NUM_PROMPTS = 24
DECODED = 8
"""Tokens at the end of every other sequence that our engine runs one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SideOptions:
    """What the command line says of sides.

    tp_size   ranks of a model folder
    dtype     in which folders are computed; ``auto``: the checkpoint's
    num_top   most probable tokens to ask for
    model     a server's model; empty: the only one that it serves
    key_env   name of the environment variable with the server's key
    timeout_s for each answer of a server
    """

    tp_size: int = 1
    dtype: str = "auto"
    num_top: int = 2
    device: str = "cpu"
    fabric: str = "auto"
    model: str = ""
    key_env: str = ""
    timeout_s: float = 120.0


class Side(ABC):
    """Where log-probabilities come from. A context manager."""

    info: StreamInfo

    @abstractmethod
    def score(self, sequences: Sequence[tuple[int, ...]]) -> Iterator[Scored]:
        """Each of the sequences, scored, in the order given; those that it can't score are refused with an error."""

    @property
    def vocab_size(self) -> int | None:
        """Of the model, if it is known."""
        return self.info.vocab_size

    @property
    def longest(self) -> int:
        """Most tokens of a sequence."""
        return LONGEST

    def close(self) -> None:  # noqa: B027 - a default
        """End what runs."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class FileSide(Side):
    """A stream that was written before."""

    def __init__(self, path: Path) -> None:
        self.stream = read_stream(path)
        self.info = self.stream.info

    def score(self, sequences: Sequence[tuple[int, ...]]) -> Iterator[Scored]:
        """What it holds, whatever is asked for: ``tokens.align`` finds what both sides have."""
        yield from self.stream.sequences


class _FolderSide(Side):
    """What engine and reference have in common."""

    kind: ClassVar[str]

    def __init__(self, name: str, options: SideOptions) -> None:
        from reference.checkpoints import checkpoint_dtype, read_config

        self.folder = model_folder(name, dtype=options.dtype)
        config = read_config(self.folder).get_text_config(decoder=True)
        self.dtype = checkpoint_dtype(config) if options.dtype == "auto" else options.dtype
        self.options = options
        self._longest = min(LONGEST, int(getattr(config, "max_position_embeddings", None) or LONGEST) - 1)
        tp_size = options.tp_size if self.kind == "engine" else 1
        self.info = StreamInfo(source=f"{self.kind}, {self.folder.name}, tp {tp_size}, {self.dtype}", model=self.folder.name,
                               dtype=self.dtype, tp_size=tp_size, vocab_size=int(config.vocab_size))

    @property
    def longest(self) -> int:
        return self._longest


class EngineSide(_FolderSide):
    """Our engine on a model folder: prefill in one step and in chunks, alone and in batches, some tokens one by one."""

    kind = "engine"

    def __init__(self, name: str, options: SideOptions) -> None:
        from harness.subjects.base import Placement
        from harness.subjects.engine import EngineSubject
        from harness.verdict.scoring import BLOCK_SIZE

        super().__init__(name, options)
        self.info = replace(self.info, block_size=BLOCK_SIZE)
        placement = Placement(tp_size=options.tp_size, fabric=options.fabric, device=options.device)
        EngineSubject.check_fit(self.folder, [placement])
        self._subject = EngineSubject(placement)

    def score(self, sequences: Sequence[tuple[int, ...]]) -> Iterator[Scored]:
        from harness.verdict.scoring import Way, score

        assert self.info.vocab_size is not None, "a folder knows its vocabulary"
        for number, (batch_size, batch) in enumerate(batches(sequences)):
            way = Way(batch_size=batch_size, chunk=CHUNK if number % 2 else None, decoded=0 if number % 2 else DECODED)
            yield from score(self._subject, self.folder, batch, way, dtype=self.dtype, vocab_size=self.info.vocab_size,
                             num_top=self.options.num_top)

    def close(self) -> None:
        self._subject.close()


class ReferenceSide(_FolderSide):
    """Transformers on one device in float64, with what rounding of the dtype does to each token."""

    kind = "reference"

    def score(self, sequences: Sequence[tuple[int, ...]]) -> Iterator[Scored]:
        from harness.verdict.scoring import score_exactly
        from reference.hf import Reference

        exact = Reference.load(self.folder, "exact", device=self.options.device)
        yield from score_exactly(exact, sequences, dtype=self.dtype, num_top=self.options.num_top)


def open_side(text: str, options: SideOptions) -> Side:
    """The side that is written so.

    Raises:
        UsageError: if it is written like none.
        StreamError, CheckpointError: if it can't be opened.
    """
    if text.startswith(REFERENCE):
        return ReferenceSide(text.removeprefix(REFERENCE), options)
    if "://" in text:
        raise UsageError(f"{text.partition('://')[0]}://… must be http:// or https://")
    path = Path(text).expanduser()
    if path.is_file():
        return FileSide(path)
    if path.suffix in (".jsonl", ".parquet"):
        raise UsageError(f"{text}: there is no such file")
    return EngineSide(text, options)


def is_live(text: str) -> bool:
    """Whether it computes, and is no file."""
    return text.startswith(REFERENCE) or "://" in text or not Path(text).expanduser().is_file()


def is_engine(text: str) -> bool:
    """Whether it is a model that our engine runs."""
    is_other = "://" in text or text.startswith(REFERENCE) or Path(text).suffix in (".jsonl", ".parquet")
    return is_live(text) and not is_other


def batches(sequences: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, Sequence[tuple[int, ...]]]]:
    """(batch size, sequences) in turn."""
    at, number = 0, 0
    while at < len(sequences):
        size = BATCH_SIZES[number % len(BATCH_SIZES)]
        yield size, sequences[at : at + size]
        at, number = at + size, number + 1


def drawn_sequences(seed: int, vocab_size: int, *, count: int = NUM_PROMPTS, longest: int = LONGEST) -> list[tuple[int, ...]]:
    """Sequences of random ids, short and long; a quarter of them begin as one before does, as prompts to a server do."""
    draw = random.Random(seed)
    sequences: list[tuple[int, ...]] = []
    for number in range(count):
        length = draw.randint(max(2, longest // 8), longest)
        shared = draw.choice(sequences)[: length // 2] if number % 4 == 3 else ()
        sequences.append((*shared, *(draw.randrange(vocab_size) for _ in range(length - len(shared)))))
    return list(dict.fromkeys(sequences))


def stream_of(side: Side, sequences: Sequence[tuple[int, ...]], on_done: Any = lambda: None) -> Stream:
    """All that a side says of the sequences."""
    found = []
    with closing(side):
        for number, scored in enumerate(side.score(sequences)):
            found.append(scored.check(f"{side.info.source}: sequence {number}"))
            on_done()
    return Stream(info=side.info, sequences=tuple(found))
