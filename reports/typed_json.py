"""Values checked against the type hints of a dataclass, with the path of whatever does not fit.

One function serves both directions: records made in Python and records read from a file pass the same check.

JSON has no infinity and no NaN. Where a number is declared they are the strings ``"inf"``, ``"-inf"`` and ``"nan"``; among
free values, where such a string may be a text, the object ``{"float": "nan"}``.
"""

from __future__ import annotations

import math
import sys
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_origin

# NaN is this one object in every record, so that a record equals what comes back from its file.
_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_TAG = "float"


class RecordError(ValueError):
    """A record that breaks the format. ``where``: a JSON path or a line; ``file``: the file, if read."""

    def __init__(self, problem: str, *, where: str = "", file: str = "") -> None:
        self.problem, self.where, self.file = problem, where, file
        super().__init__(": ".join(part for part in (file, where, problem) if part))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_error, (self.problem, self.where, self.file)

    def inside(self, prefix: str) -> RecordError:
        """The same error seen from one level further out."""
        return RecordError(self.problem, where=join(prefix, self.where), file=self.file)


def _rebuild_error(problem: str, where: str, file: str) -> RecordError:
    return RecordError(problem, where=where, file=file)


def join(prefix: str, rest: str) -> str:
    """``checks[3]`` and ``tp_size`` make ``checks[3].tp_size``."""
    return prefix + rest if not prefix or not rest or rest.startswith("[") else f"{prefix}.{rest}"


def conform(hint: Any, value: Any, where: str) -> Any:
    """``value`` as ``hint`` wants it: containers copied, ints made floats, dicts made dataclasses.

    Raises RecordError naming ``where`` if it does not fit. Knows what records use: str, bool, int, float,
    None, unions, ``Literal``, ``list[T]``, ``dict[str, T]``, dataclasses, and ``Any`` for "any JSON value".
    """
    origin = get_origin(hint)
    if hint is Any:
        return _json_value(value, where)
    if is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else _build(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        return _one_of(get_args(hint), value, where)
    if origin is typing.Literal:
        if value not in get_args(hint):
            known = ", ".join(map(repr, get_args(hint)))
            raise RecordError(f"must be one of {known}, got {value!r:.80}", where=where)
        return value
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise _wrong_type("a list", value, where)
        return [conform(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong_type("an object", value, where)
        for key in value:
            if not isinstance(key, str):
                raise _wrong_type("a string as its key", key, where)
        return {key: conform(get_args(hint)[1], item, join(where, key)) for key, item in value.items()}
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    # bool is an int to Python, and True as a count is always a mistake.
    if hint is float:
        if isinstance(value, str) and value in _NOT_FINITE:
            return _NOT_FINITE[value]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if isinstance(value, int) and abs(value) > sys.float_info.max:
                raise RecordError("is too large for a number", where=where)
            return math.nan if math.isnan(value) else float(value)
        raise _wrong_type("a number", value, where)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if hint in (str, bool) and isinstance(value, hint):
        return value
    raise _wrong_type({int: "a whole number", str: "a string", bool: "true or false"}[hint], value, where)


def _one_of(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in hints:
        return None
    hints = tuple(hint for hint in hints if hint is not types.NoneType)
    for hint in hints:
        try:
            return conform(hint, value, where)
        except RecordError:
            if hint is hints[-1]:
                raise
    raise AssertionError(f"a union of nothing but None at {where}")


def _build(cls: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong_type(f"an object ({cls.__name__})", value, where)
    known = {field.name for field in fields(cls)}
    needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in value]:
        raise RecordError(f"{cls.__name__} lacks {', '.join(missing)}", where=where)
    if unknown := sorted(set(map(str, value)) - known):
        raise RecordError(f"{cls.__name__} has no field {', '.join(unknown)}", where=where)
    try:
        return cls(**value)
    except RecordError as error:
        raise error.inside(where) from None


def _json_value(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return math.nan if math.isnan(value) else value
    if isinstance(value, dict):
        if value.keys() == {_TAG} and isinstance(value[_TAG], str) and value[_TAG] in _NOT_FINITE:
            return _NOT_FINITE[value[_TAG]]
        return conform(dict[str, Any], value, where)
    return conform(list[Any], value, where)


def plain(value: Any, hint: Any = float) -> Any:
    """``value`` as JSON can hold it: dataclasses as objects, numbers that are not finite as `conform` reads them back."""
    if is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        return {field.name: plain(getattr(value, field.name), hints[field.name]) for field in fields(value)}
    if isinstance(value, dict):
        inner = (get_args(hint) or (hint,))[-1]
        return {key: plain(item, inner) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        inner = (get_args(hint) or (hint,))[0]
        return [plain(item, inner) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_TAG: str(value)} if hint is Any else str(value)
    return value


def _wrong_type(wanted: str, value: Any, where: str) -> RecordError:
    return RecordError(f"must be {wanted}, got {type(value).__name__} {value!r:.80}", where=where)
