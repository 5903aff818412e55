"""DataFrames as aligned text: for a terminal, and as GitHub Markdown."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

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
    r"""``text`` with what no page, terminal or XML may hold, such as control codes, written as ``\x1b``."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def is_numeric(column: list[object]) -> bool:
    """Whether all that a column holds is numbers, and it holds one."""
    values = [value for value in column if format_cell(value) != MISSING]
    return bool(values) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def to_text(table: pd.DataFrame) -> str:
    """An aligned table for a terminal; numbers to the right, newlines in cells shown as spaces."""
    return _draw(table, lambda text: " ".join(text.split()), box.SIMPLE_HEAD)


def to_markdown(table: pd.DataFrame) -> str:
    """A GitHub Markdown table that is aligned in its source too. Cells cannot break out of it."""
    head, rule, rest = _draw(table, escape_markdown, box.MARKDOWN).split("\n", 2)
    columns = zip(rule.split("|")[1:-1], table.columns, strict=True)
    ruled = [dashes[:-1] + (":" if is_numeric(table[name].tolist()) else "-") for dashes, name in columns]
    return f"{head}\n|{'|'.join(ruled)}|\n{rest}"


def escape_markdown(text: str) -> str:
    """``text`` as it reads, on one line, in a GitHub table cell or paragraph."""
    # An underscore inside a word is no mark to GitHub, and names are full of them.
    text = re.sub(r"([\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", printable(text))
    return "<br>".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").splitlines())


def _draw(table: pd.DataFrame, clean: Callable[[str], str], lines: box.Box) -> str:
    is_markdown = lines is box.MARKDOWN
    drawn = Table(box=lines, show_edge=is_markdown, pad_edge=is_markdown, collapse_padding=not is_markdown)
    for name in table.columns:
        drawn.add_column(Text(clean(str(name))), no_wrap=True, justify="right" if is_numeric(table[name].tolist()) else "left")
    for row in table.itertuples(index=False, name=None):
        drawn.add_row(*(Text(clean(format_cell(value))) for value in row))
    out = io.StringIO()
    Console(file=out, width=10**6, color_system=None, force_terminal=False).print(drawn, crop=False)
    text = out.getvalue().strip() if is_markdown else out.getvalue().removesuffix("\n")  # above and below Markdown's: spaces
    return "".join(f"{line.rstrip()}\n" for line in text.split("\n"))
