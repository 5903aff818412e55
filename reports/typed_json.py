"""Values checked against the type hints of a dataclass, with the path of whatever does not fit; and JSON with a row a line.

One function serves both directions: records made in Python and records read from a file pass the same check.

JSON has no infinity and no NaN. Where a number is declared they are the strings ``"inf"``, ``"-inf"`` and ``"nan"``; among
free values, where such a string may be a text, the object ``{"float": "nan"}``.
"""

from __future__ import annotations

import json
import math
import sys
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_origin

# NaN is this one object in every record, so that a record equals what comes back from its file.
_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_TAG = "float"
_SCALARS = {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}


class RecordError(ValueError):
    """A record that breaks the format. ``where``: a JSON path or a line; ``file``: the file, if read."""

    def __init__(self, problem: str, where: str = "", file: str = "") -> None:
        super().__init__(problem, where, file)
        self.problem, self.where, self.file = problem, where, file

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.where, self.problem) if part)


def join(prefix: str, rest: str) -> str:
    """``checks[3]`` and ``tp_size`` make ``checks[3].tp_size``."""
    return prefix + rest if not prefix or not rest or rest.startswith("[") else f"{prefix}.{rest}"


def conform(hint: Any, value: Any, where: str) -> Any:
    """``value`` as ``hint`` wants it: containers copied, ints made floats, dicts made dataclasses.

    Knows what records use: str, bool, int, float, ``T | None``, ``Literal``, ``list[T]``, ``dict[str, T]``, dataclasses, and
    ``Any`` for "any JSON value".

    Raises:
        RecordError: naming ``where``, if it does not fit.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return _json_value(value, where)
    if is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else _build(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else conform(inner[0], value, where)
    if origin is typing.Literal:
        if value not in inner:
            raise RecordError(f"must be one of {', '.join(map(repr, inner))}, got {value!r:.80}", where)
        return value
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise _wrong_type("a list", value, where)
        return [conform(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong_type("an object", value, where)
        for key in value:
            if not isinstance(key, str):
                raise _wrong_type("a string as its key", key, where)
        return {key: conform(inner[1], item, join(where, key)) for key, item in value.items()}
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    # bool is an int to Python, and True as a count is always a mistake.
    if not isinstance(value, (int, float) if hint is float else hint) or (isinstance(value, bool) and hint is not bool):
        raise _wrong_type(_SCALARS[hint], value, where)
    if hint is not float:
        return value
    if abs(value) > sys.float_info.max and isinstance(value, int):
        raise RecordError("is too large for a number", where)
    return math.nan if math.isnan(value) else float(value)


def _build(cls: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong_type(f"an object ({cls.__name__})", value, where)
    needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in value]:
        raise RecordError(f"{cls.__name__} lacks {', '.join(missing)}", where)
    if unknown := sorted(set(map(str, value)) - {field.name for field in fields(cls)}):
        raise RecordError(f"{cls.__name__} has no field {', '.join(unknown)}", where)
    try:
        return cls(**value)
    except RecordError as error:
        raise RecordError(error.problem, join(where, error.where)) from None


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


def to_json(value: Any, *, level: int = 0) -> str:
    """What `plain` gave as JSON: two levels of objects have a line a field, lists of objects a line an item."""
    if isinstance(value, dict) and value and level < 2:
        lines, ends = [f"{to_json(name)}: {to_json(item, level=level + 1)}" for name, item in value.items()], "{}"
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        lines, ends = [to_json(item, level=2) for item in value], "[]"
    else:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    indent = "\n" + "  " * level
    return ends[0] + ",".join(f"{indent}  {line}" for line in lines) + indent + ends[1]


def _wrong_type(wanted: str, value: Any, where: str) -> RecordError:
    return RecordError(f"must be {wanted}, got {type(value).__name__} {value!r:.80}", where)
