"""DataFrames as aligned text: for a terminal, and as GitHub Markdown."""

from __future__ import annotations

import math
import re
import unicodedata

import pandas as pd

MISSING = "–"

# Messages hold other programs' output. All that XML 1.0 refuses, and the rest of the control codes.
_UNPRINTABLE = re.compile("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def format_number(value: float) -> str:
    """Four significant digits, thousands apart, no exponent where a person would write none.

    >>> [format_number(v) for v in (22734.8, 0.41234, 5.0, 1e-7, 12)]
    ['22,735', '0.4123', '5', '1e-07', '12']
    """
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def format_cell(value: object) -> str:
    """One cell for people: numbers by `format_number`, nothing as a dash."""
    if value is None or value is pd.NA or value == "" or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return format_number(value)
    return printable(str(value))


def printable(text: str) -> str:
    """``text`` with what no page, terminal or XML may hold, such as control codes, written as ``\\x1b``."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def to_text(table: pd.DataFrame) -> str:
    """An aligned table for a terminal; numbers to the right, newlines in cells shown as spaces."""
    names, rows, numeric = _cells(table, lambda text: " ".join(text.split()))
    widths = _widths(names, rows)
    lines = ["  ".join(_pad(*cell) for cell in zip(row, widths, numeric, strict=True)) for row in [names, *rows]]
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines) + "\n"


def to_markdown(table: pd.DataFrame) -> str:
    """A GitHub Markdown table that is aligned in its source too. Cells cannot break out of it."""
    names, rows, numeric = _cells(table, escape_markdown)
    widths = [max(width, 3) for width in _widths(names, rows)]
    rule = ["-" * (width - 1) + ":" if right else "-" * width for width, right in zip(widths, numeric, strict=True)]
    lines = [[_pad(*cell) for cell in zip(row, widths, numeric, strict=True)] for row in [names, *rows]]
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], rule, *lines[1:]])


def escape_markdown(text: str) -> str:
    """``text`` as it reads, on one line, in a GitHub table cell or paragraph."""
    # An underscore inside a word is no mark to GitHub, and names are full of them.
    text = re.sub(r"([\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", printable(text))
    return "<br>".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").splitlines())


def _cells(table: pd.DataFrame, clean: object) -> tuple[list[str], list[list[str]], list[bool]]:
    assert callable(clean), "clean turns a cell's text into what the format allows"
    columns = [table[name].tolist() for name in table.columns]
    numeric = [_is_numeric(column) for column in columns]
    rows = [[clean(format_cell(value)) for value in row] for row in zip(*columns, strict=True)]
    return [clean(str(name)) for name in table.columns], rows, numeric


def _is_numeric(column: list[object]) -> bool:
    values = [value for value in column if format_cell(value) != MISSING]
    return bool(values) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def _widths(names: list[str], rows: list[list[str]]) -> list[int]:
    return [max(map(_width, column)) for column in zip(names, *rows, strict=True)]


def _width(text: str) -> int:
    """Columns that ``text`` takes in a terminal: two for wide characters, none for combining ones."""
    return sum(0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space
