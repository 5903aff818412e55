"""What A, B and the noise run can be: a file, a model folder on our engine, a reference, a server; each scores given tokens.

A side is opened by how it is written: ``reference:FOLDER``, ``http://…`` or ``https://…``, a file, or else a model's name or
folder.
"""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import ClassVar, NamedTuple, Self

from harness.bench.shapes import model_folder
from harness.errors import UsageError
from harness.verdict.server import Server
from harness.verdict.streams import Scored, StreamError, StreamInfo, read_stream

REFERENCE = "reference:"
BATCH_SIZES = (1, 4, 7)
"""In which a side runs its sequences in turn: a bug of batches shows in none of one."""
CHUNK = 48
"""Tokens of a prefill step of our engine, for every other batch."""
LONGEST = 96
NUM_PROMPTS = 24
SMALLEST_VOCABULARY = 30_000
"""Of a server nobody knows the vocabulary; ids below this are in that of any model that is served."""
DECODED = 8
"""Tokens at the end of every other sequence that our engine runs one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SideOptions:
    """What the command line says of sides.

    tp_size   ranks of a model folder
    dtype     in which folders are computed; ``auto``: the checkpoint's
    num_top   most probable tokens to ask for
    model, key_env, timeout_s  of a server, as ``server.Server`` takes them
    batch_sizes  in which sequences run, in turn
    """

    tp_size: int = 1
    dtype: str = "auto"
    num_top: int = 2
    device: str = "cpu"
    fabric: str = "auto"
    model: str = ""
    key_env: str = ""
    timeout_s: float = 120.0
    batch_sizes: tuple[int, ...] = BATCH_SIZES

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise UsageError(f"batch_sizes={self.batch_sizes} must be 1 or more each")
        if not self.timeout_s > 0:
            raise UsageError(f"timeout_s={self.timeout_s} must be above 0")


class Side(ABC):
    """Where log-probabilities come from. A context manager."""

    info: StreamInfo

    @abstractmethod
    def score(self, sequences: Sequence[tuple[int, ...]]) -> Iterator[Scored]:
        """Each of the sequences, scored, in the order given; those that it can't score are refused with an error."""

    def close(self) -> None:  # noqa: B027 - a default
        """End what runs."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class FileSide(Side):
    """A stream that was written before."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UsageError(f"{path}: there is no such file")
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
        tp_size = options.tp_size if self.kind == "engine" else 1
        self.info = StreamInfo(source=f"{self.kind}, {self.folder.name}, tp {tp_size}, {self.dtype}", model=self.folder.name,
                               dtype=self.dtype, tp_size=tp_size, vocab_size=int(config.vocab_size))


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
        for number, (batch_size, batch) in enumerate(batches(sequences, self.options.batch_sizes)):
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


class ServerSide(Side):
    """An OpenAI-compatible server; a batch is one request."""

    def __init__(self, url: str, options: SideOptions) -> None:
        self._server = Server(url, model=options.model, key_env=options.key_env, timeout_s=options.timeout_s)
        self._options = options
        self.info = StreamInfo(source=f"{self._server.shown}, {self._server.model}", model=self._server.model,
                               dtype=None if options.dtype == "auto" else options.dtype)

    def score(self, sequences: Sequence[tuple[int, ...]]) -> Iterator[Scored]:
        for _, batch in batches(sequences, self._options.batch_sizes):
            yield from self._server.score(batch, self._options.num_top)

    def generate(self, prompts: Sequence[tuple[int, ...]], num_tokens: int) -> Iterator[Scored]:
        """Each prompt with so many tokens more, in the order given."""
        for number, (_, batch) in enumerate(batches(prompts, self._options.batch_sizes)):
            yield from self._server.generate(batch, num_tokens, self._options.num_top, seed=number)


class Limits(NamedTuple):
    """Of the sequences that a model takes."""

    vocab_size: int
    longest: int


def limits_of(text: str, options: SideOptions) -> Limits:
    """Of a model folder or reference, by its config alone.

    Raises:
        CheckpointError: if there is no such model.
    """
    from reference.checkpoints import longest_sequence, read_config

    config = read_config(model_folder(text.removeprefix(REFERENCE), dtype=options.dtype)).get_text_config(decoder=True)
    return Limits(vocab_size=int(config.vocab_size), longest=min(LONGEST, longest_sequence(config) - 1))


def open_side(text: str, options: SideOptions) -> Side:
    """The side that is written so.

    Raises:
        UsageError: if it is written like none.
        StreamError, CheckpointError: if it can't be opened.
    """
    if text.startswith(REFERENCE):
        return ReferenceSide(text.removeprefix(REFERENCE), options)
    if is_server(text):
        return ServerSide(text, options)
    if not is_live(text):
        return FileSide(Path(text).expanduser())
    return EngineSide(text, options)


def is_server(text: str) -> bool:
    """Whether it is an address."""
    return "://" in text


def is_live(text: str) -> bool:
    """Whether it computes, and is no file."""
    if is_server(text) or text.startswith(REFERENCE):
        return True
    path = Path(text).expanduser()
    return not path.is_file() and path.suffix not in (".jsonl", ".parquet")


def is_engine(text: str) -> bool:
    """Whether it is a model that our engine runs."""
    return is_live(text) and not is_server(text) and not text.startswith(REFERENCE)


def batches(sequences: Sequence[tuple[int, ...]], sizes: Sequence[int]) -> Iterator[tuple[int, Sequence[tuple[int, ...]]]]:
    """(batch size, sequences) with these sizes in turn."""
    at, number = 0, 0
    while at < len(sequences):
        size = sizes[number % len(sizes)]
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


def read_prompts(path: Path) -> list[tuple[int, ...]]:
    """Sequences of token ids: a stream, or a line of JSON each, ``[1, 2, 3]``.

    Raises:
        StreamError: naming the line, for all else.
    """
    sequences = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise StreamError(f"{path}: line {number}: no JSON ({error}): a line is a list of token ids") from error
        if isinstance(values, dict):
            values = values.get("token_ids")
        if values is None:
            continue
        if not isinstance(values, list) or len(values) < 2 or any(type(value) is not int or value < 0 for value in values):
            raise StreamError(f"{path}: line {number}: must be a list of two token ids or more")
        sequences.append(tuple(values))
    if len(set(sequences)) != len(sequences):
        raise StreamError(f"{path}: some prompts are there twice: each must be there once")
    if not sequences:
        raise StreamError(f"{path}: no prompt in it")
    return sequences
