"""Streams: token ids and the log-probability of each, as JSON Lines. The file format of ``verdict`` and ``collect``.

The first line says what the file is, each other line is one sequence::

    {"format": "shardproof-logprobs", "format_version": 1, "source": "my trainer", "dtype": "bfloat16", "tp_size": 1}
    {"token_ids": [5, 9, 2], "logprobs": [null, -1.25, -0.5]}

``logprobs[i]`` is the natural logarithm of the probability of ``token_ids[i]`` after the tokens before it, of the model itself:
no temperature, no filter. Tokens at the beginning that were not scored, the first of all at least, have null. Imports no torch: a
trainer writes with it in three lines::

    with StreamWriter("trainer.jsonl", source="my trainer", dtype="bfloat16") as stream:
        for token_ids, logprobs in batches:
            stream.write(token_ids, logprobs)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from harness.errors import CouldNotRunError

FORMAT, FORMAT_VERSION = "shardproof-logprobs", 1
LONGEST_LINE = 256 * 2**20
"""Bytes of a line that are read at most: a million tokens with their twenty best."""
LIKELIEST = 1e-3
"""A log-probability may be above 0 by so much where the sum of a softmax was rounded; more is none."""


class StreamError(CouldNotRunError):
    """A stream can't be read, or two can't be compared. The message is for users: where, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamInfo:
    """What a whole stream has in common; all but ``source`` may be unknown.

    source      for people: where the numbers come from; holds no key and no user or query part of a URL
    model       its name
    dtype       in which the model computed, as torch names it
    tp_size     number of ranks
    block_size  tokens of a block of the KV cache
    vocab_size  of the model
    """

    source: str
    model: str | None = None
    dtype: str | None = None
    tp_size: int | None = None
    block_size: int | None = None
    vocab_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One sequence: T tokens with the log-probability of each after those before it.

    logprobs      None for tokens at the beginning that were not scored: the first one always
    decoded_from  place of the first token that was generated, one a step; None: all were in the prompt
    batch_size    sequences that ran together
    chunk         most tokens of a step of the prefill; None: unknown, or all in one
    cached        tokens that came from a prefix cache
    top           by place: the most probable tokens there with their log-probabilities; empty: not asked for
    rounding      by place: how far off rounding puts the log-probability of a correct model, root mean square; references' alone
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    decoded_from: int | None = None
    batch_size: int | None = None
    chunk: int | None = None
    cached: int = 0
    top: tuple[dict[int, float], ...] = ()
    rounding: tuple[float, ...] = ()

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens that were not generated."""
        return self.token_ids[: self.decoded_from]

    def check(self, where: str) -> Self:
        """Raise StreamError, beginning with ``where``, for what can't be."""
        length = len(self.token_ids)
        if length < 2:
            raise StreamError(f"{where}: {length} tokens: a sequence has two or more, for the first is never scored")
        if len(self.logprobs) != length:
            raise StreamError(f"{where}: {len(self.logprobs)} logprobs for {length} token_ids: there is one a token, null for "
                              "the first; shift them if yours are of the next token")
        if any(not _is_id(token_id) for token_id in self.token_ids):
            raise StreamError(f"{where}: token_ids must be whole numbers from 0 up: text is no stream, for two tokenizers may "
                              "cut it in two ways")
        first = next((at for at, value in enumerate(self.logprobs) if value is not None), length)
        for at in range(first, length):
            value = self.logprobs[at]
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value > LIKELIEST:
                raise StreamError(f"{where}: logprobs[{at}]={value} must be a finite number that is not above 0: after the first "
                                  "token that is scored all are. A model that gives NaN or infinity here has a bug of its own")
        if first in (0, length):
            raise StreamError(f"{where}: " + ("no logprob at all" if first else "logprobs[0] must be null: nothing is before the "
                                              "first token"))
        for name in ("top", "rounding"):
            if (found := len(getattr(self, name))) not in (0, length):
                raise StreamError(f"{where}: {name} has {found} entries for {length} tokens: there is one a token")
        if self.decoded_from is not None and not 1 <= self.decoded_from <= length:
            raise StreamError(f"{where}: decoded_from={self.decoded_from} must be from 1 to {length}")
        if any(not math.isfinite(value) or value < 0 for value in self.rounding):
            raise StreamError(f"{where}: rounding must be finite and not negative")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A whole stream. No two sequences have the same tokens: nobody could tell which is which on the other side."""

    info: StreamInfo
    sequences: tuple[Scored, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that were scored."""
        return sum(value is not None for sequence in self.sequences for value in sequence.logprobs)

    @property
    def is_reference(self) -> bool:
        """Whether it says how far off rounding puts each token."""
        return bool(self.sequences) and all(sequence.rounding for sequence in self.sequences)


class StreamWriter:
    """Writes a stream sequence by sequence: what was written is whole, whatever happens next. A context manager.

    Args:
        path: of the file; what is there is replaced, or gone on from if ``resume``.
        resume: go on after the sequences that are there; a line that was cut short is dropped.
        info: the fields of ``StreamInfo``, ``source`` at least.

    Raises:
        StreamError: if what is to be gone on from is of something else.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False, **info: Any) -> None:
        self.path = Path(path)
        self.info = StreamInfo(**info)
        self.done: tuple[Scored, ...] = ()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume and self.path.is_file() and self.path.stat().st_size:
            self._cut_off()
            before = read_stream(self.path, may_be_empty=True)
            if before.info != self.info:
                raise StreamError(f"{self.path}: holds {before.info}, this is {self.info}: begin another file")
            self.done = before.sequences
            self._file = self.path.open("a", encoding="utf-8")
        else:
            self._file = self.path.open("w", encoding="utf-8")
            known = {item.name: value for item in fields(StreamInfo) if (value := getattr(self.info, item.name)) is not None}
            self._line({"format": FORMAT, "format_version": FORMAT_VERSION, **known})
        self._tokens = {sequence.token_ids for sequence in self.done}

    def write(self, token_ids: Sequence[int], logprobs: Sequence[float | None], **more: Any) -> None:
        """One more sequence; ``more``: the other fields of ``Scored``. Arrays and tensors of one dimension are taken too.

        Raises:
            StreamError: if it breaks a rule of ``Scored``, or its tokens were written before.
        """
        ids, values = _plain(token_ids), _plain(logprobs)
        if values and isinstance(values[0], float) and math.isnan(values[0]):
            values = (None, *values[1:])  # of an array, which knows no None
        self.put(Scored(token_ids=ids, logprobs=values, **more))

    def put(self, sequence: Scored) -> None:
        """The same of a sequence that is made already."""
        sequence.check(f"{self.path}: sequence {len(self._tokens)}")
        if sequence.token_ids in self._tokens:
            raise StreamError(f"{self.path}: sequence {len(self._tokens)} has the same tokens as one before it")
        self._tokens.add(sequence.token_ids)
        values: dict[str, Any] = {"token_ids": sequence.token_ids, "logprobs": sequence.logprobs}
        for name in ("decoded_from", "batch_size", "chunk"):
            if getattr(sequence, name) is not None:
                values[name] = getattr(sequence, name)
        if sequence.cached:
            values["cached"] = sequence.cached
        for name in ("top", "rounding"):
            if getattr(sequence, name):
                values[name] = getattr(sequence, name)
        self._line(values)

    def _line(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values, allow_nan=False) + "\n")
        self._file.flush()

    def _cut_off(self) -> None:
        """Drop a last line that has no end."""
        with self.path.open("rb+") as file:
            content = file.read()
            if not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def write_stream(path: Path, stream: Stream) -> Path:
    """A whole stream as a file."""
    with StreamWriter(path, **asdict(stream.info)) as writer:
        for sequence in stream.sequences:
            writer.put(sequence)
    return path


def read_stream(path: str | os.PathLike[str], *, may_be_empty: bool = False) -> Stream:
    """Read a stream that ``StreamWriter`` or another program wrote; ``.parquet`` needs the extra shardproof[parquet].

    Raises:
        StreamError: naming file, line, and what is wrong.
        OSError: without a file.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        info, rows = _parquet(path)
    else:
        lines = _lines(path)
        info, rows = _head(path, next(lines, (1, None))[1]), lines
    sequences: list[Scored] = []
    seen: dict[tuple[int, ...], int] = {}
    for number, values in rows:
        where = f"{path}: line {number}"
        sequence = _sequence(where, values)
        if (before := seen.setdefault(sequence.token_ids, number)) != number:
            raise StreamError(f"{where}: the same tokens as in line {before}: write each prompt once, or nobody can tell which "
                              "of them is which on the other side")
        sequences.append(sequence)
    if not sequences and not may_be_empty:
        raise StreamError(f"{path}: no sequence in it")
    return Stream(info=info, sequences=tuple(sequences))


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            where = f"{path}: line {number}"
            if len(line) > LONGEST_LINE:
                raise StreamError(f"{where}: longer than {LONGEST_LINE >> 20} MiB: no stream of ours")
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                rule = "cut short: write it again, or delete this line" if not line.endswith(b"\n") else f"no JSON ({error})"
                raise StreamError(f"{where}: {rule}") from error


def _head(path: Path, values: Any) -> StreamInfo:
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise StreamError(f'{path}: line 1 must be {{"format": "{FORMAT}", "format_version": {FORMAT_VERSION}, "source": …}}: '
                          "docs/verdict.md has the format")
    if values.get("format_version") != FORMAT_VERSION:
        raise StreamError(f"{path}: format_version={values.get('format_version')!r}: this code reads {FORMAT_VERSION}")
    types = {"source": str, "model": str, "dtype": str}
    known: dict[str, Any] = {}
    for item in fields(StreamInfo):
        value = values.get(item.name)
        if value is not None and (type(value) is not types.get(item.name, int)):
            raise StreamError(f"{path}: line 1: {item.name}={value!r} must be {types.get(item.name, int).__name__}")
        known[item.name] = value
    return StreamInfo(**(known | {"source": known["source"] or path.name}))


def _sequence(where: str, values: Any) -> Scored:
    if not isinstance(values, dict):
        raise StreamError(f"{where}: must be an object with token_ids and logprobs")
    if unknown := sorted(set(values) - {item.name for item in fields(Scored)}):
        text = "; text is no stream: two tokenizers may cut it in two ways" if "token_ids" not in values else ""
        raise StreamError(f"{where}: nobody knows {', '.join(map(str, unknown))}{text}")
    for name in ("token_ids", "logprobs"):
        if not isinstance(values.get(name), list):
            raise StreamError(f"{where}: {name} must be a list")
    for name in ("decoded_from", "batch_size", "chunk", "cached"):
        if values.get(name) is not None and not _is_id(values[name]):
            raise StreamError(f"{where}: {name}={values[name]!r} must be a whole number from 0 up")
    try:
        top = tuple({int(token_id): float(value) for token_id, value in (at or {}).items()} for at in values.get("top") or ())
        rounding = tuple(float(value) for value in values.get("rounding") or ())
    except (TypeError, ValueError, AttributeError) as error:
        raise StreamError(f"{where}: top must be a list of objects from token id to logprob, rounding one of numbers") from error
    sequence = Scored(token_ids=tuple(values["token_ids"]), logprobs=tuple(values["logprobs"]), top=top, rounding=rounding,
                      decoded_from=values.get("decoded_from"), batch_size=values.get("batch_size"), chunk=values.get("chunk"),
                      cached=values.get("cached") or 0)
    return sequence.check(where)


def _parquet(path: Path) -> tuple[StreamInfo, Iterator[tuple[int, Any]]]:
    """A table with a row a sequence and the columns of ``Scored``; its first row's ``source`` and the like are the stream's."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise StreamError(f"{path}: Parquet needs pyarrow: pip install 'shardproof[parquet]'") from error
    try:
        table = parquet.read_table(path).to_pylist()
    except ValueError as error:
        raise StreamError(f"{path}: no Parquet ({error})") from error
    of_stream = {item.name for item in fields(StreamInfo)}
    head = {name: value for name, value in table[0].items() if name in of_stream} if table else {}

    def rows() -> Iterator[tuple[int, Any]]:
        for number, row in enumerate(table, start=1):
            # An index of pandas that is no plain count is a column too.
            values = {name: _whole(value) for name, value in row.items() if name not in of_stream and not name.startswith("__")}
            if isinstance(logprobs := values.get("logprobs"), list) and logprobs and logprobs[0] != logprobs[0]:
                values["logprobs"] = [None, *logprobs[1:]]  # a column of numbers has NaN for null
            if values.get("top"):  # structs have a field for each token id of the whole column
                values["top"] = [{token_id: value for token_id, value in dict(at or {}).items() if value is not None}
                                 for at in values["top"]]
            yield number, values

    return _head(path, {"format": FORMAT, "format_version": FORMAT_VERSION, **head}), rows()


def _whole(value: Any) -> Any:
    """A whole number that pandas made a float of, since others of its column are missing."""
    if not isinstance(value, float):
        return value
    return None if math.isnan(value) else int(value) if value.is_integer() else value


def _plain(values: Any) -> tuple[Any, ...]:
    return tuple(values.tolist() if hasattr(values, "tolist") else values)


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0
