"""Benchmark rows as line plots: inline SVG that takes its colours from the page, in light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from reports import metrics
from reports.records import BenchRow
from reports.text_tables import format_number

NUM_COLOURS = 6
_MARKERS = "os^Dvp"
GLYPHS = "●■▲◆▼⬟"

# Colours that no plot would use, replaced in the SVG by the page's CSS variables.
_INK, _RULE = "#010203", "#040506"
_AXIS_LABELS = {"tp_size": "tp_size", "batch_size": "batch size", "message_bytes": "message size"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line: ``points`` are (x, median, lower quartile, upper quartile, bound or None), by x."""

    label: str
    points: list[tuple[float, float, float, float, float | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A drawn plot; ``legend`` has the labels of its series, in the order of colours and `GLYPHS`."""

    title: str
    subtitle: str
    svg: str
    legend: list[str]
    has_bound: bool


def bench_plots(rows: Sequence[BenchRow]) -> list[Plot]:
    """Every plot that the rows can fill: rates over tp_size, and times and rates over each of ``axes``.

    An axis needs two different values within one workload, model and dtype. Where the cases of a workload would
    make more lines than there are colours, as the layers of a model do, each kind of case has a plot of its own.
    """
    axes = ["tp_size", *dict.fromkeys(axis for row in rows for axis in row.axes)]
    return [plot for axis in axes for plot in _plots_over(axis, rows)]


def _plots_over(axis: str, rows: Sequence[BenchRow]) -> list[Plot]:
    groups: _Groups = {}
    for row in rows:
        for metric in row.samples:
            wanted = metric.endswith("_per_s") if axis == "tp_size" else axis in row.axes
            if wanted:
                case = row.case if axis == "tp_size" else ""
                groups.setdefault((row.workload, case, row.model, row.dtype, metric), []).append(row)
    plots = []
    for (workload, case, model, dtype, metric), members in _few_lines(axis, groups).items():
        if len({_x(axis, row) for row in members}) < 2:
            continue
        series = _series(axis, metric, members)
        what, *rest = metrics.label(metric).split(", ")
        what += " p99" if "p99" in rest else ""  # the unit stands at the axis
        title = f"{workload}: {what} over {_AXIS_LABELS.get(axis, axis.replace('_', ' '))}"
        subtitle = " · ".join(part for part in (case, model, dtype) if part)
        plots.append(
            Plot(
                title=title,
                subtitle=subtitle,
                svg=_draw(axis, metric, series, salt=f"{title} {subtitle}"),
                legend=[line.label for line in series],
                has_bound=any(point[4] is not None for line in series for point in line.points),
            )
        )
    return plots


_Groups = dict[tuple[str, str, str, str, str], list[BenchRow]]


def _few_lines(axis: str, groups: _Groups) -> _Groups:
    """The groups, those with too many lines split by what their cases say beside the axis."""
    split: _Groups = {}
    for (workload, case, model, dtype, metric), rows in groups.items():
        is_crowded = len(set(_line_names(axis, rows))) > NUM_COLOURS
        for row in rows:
            kind = _kind_of_case(axis, row) if is_crowded else case
            split.setdefault((workload, kind, model, dtype, metric), []).append(row)
    return split


def _kind_of_case(axis: str, row: BenchRow) -> str:
    """The case without the part that spells out the axis: ``qkv_proj, batch 16`` is ``qkv_proj`` over the batch size."""
    if axis == "tp_size":
        return row.case
    value = row.axes[axis]
    spelt = {format_number(value).replace(",", ""), _size(value)}
    parts = [part for part in row.case.split(", ") if not any(re.search(rf"\b{re.escape(text)}\b", part) for text in spelt)]
    return ", ".join(parts)


def _series(axis: str, metric: str, rows: Sequence[BenchRow]) -> list[Series]:
    names = _line_names(axis, rows)
    lines: dict[str, list[tuple[float, float, float, float, float | None]]] = {}
    for row, name in zip(rows, names, strict=True):
        low, median, high = (float(q) for q in np.percentile(row.samples[metric], [25, 50, 75]))
        point = (_x(axis, row), median, low, high, row.metrics.get(f"bound_{metric}"))
        lines.setdefault(name, []).append(point)
    return [Series(label=name, points=sorted(points, key=lambda point: point[0])) for name, points in lines.items()]


def _line_names(axis: str, rows: Sequence[BenchRow]) -> list[str]:
    """The line that each row is on: its engine, and what else differs between the rows of one engine.

    The kind of case and the fabric come in only if two points would otherwise share an x: one rank alone is always
    ``solo``, and a case often just spells out the axis.
    """

    def parts(row: BenchRow) -> list[str]:
        size = [] if axis == "tp_size" else [f"tp {row.tp_size}"]
        others = [f"{name} {format_number(value)}" for name, value in row.axes.items() if name != axis]
        return [row.engine, *size, *others]

    keys = [parts(row) for row in rows]
    extras: tuple[Callable[[BenchRow], str], ...] = (
        lambda row: _kind_of_case(axis, row), lambda row: row.fabric, lambda row: row.case)  # fmt: skip
    for extra in extras:
        if len({(*key, _x(axis, row)) for key, row in zip(keys, rows, strict=True)}) == len(rows):
            break
        keys = [[*key, extra(row)] for key, row in zip(keys, rows, strict=True)]
    common = set.intersection(*map(set, keys)) - {row.engine for row in rows}
    return [" · ".join(part for part in key if part and part not in common) for key in keys]


def style(*, ink: str, rule: str) -> AbstractContextManager[None]:
    """Settings of matplotlib inside a ``with``, alike for all our plots: a light grid, two thin axes."""
    return mpl.rc_context({
        "font.size": 9.5, "axes.grid": True, "axes.axisbelow": True, "grid.color": rule, "grid.linewidth": 0.7,
        "axes.edgecolor": rule, "axes.spines.top": False, "axes.spines.right": False,
        "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink,
    })  # fmt: skip


def as_svg(figure: Figure, *, salt: str, **options: Any) -> str:
    """``figure`` as SVG, the same bytes each time. ``salt`` makes its ids differ from those of other plots on a page."""
    # svg.* can be set only here; the context puts back what was set, and no pyplot state is touched.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")), **options)
    return out.getvalue()


def panel(title: str, subtitle: str, draw: Callable[[Axes], None]) -> Plot:
    """One panel, drawn by ``draw`` in the colours of ``series_colour``, in our style."""
    with style(ink=_INK, rule=_RULE):
        figure = Figure(figsize=(4.8, 3.0), layout="constrained")
        draw(figure.subplots())
        svg = _for_the_page(as_svg(figure, salt=title, transparent=True))
    return Plot(title=title, subtitle=subtitle, svg=svg, legend=[], has_bound=False)


def _draw(axis: str, metric: str, series: Sequence[Series], *, salt: str) -> str:
    with style(ink=_INK, rule=_RULE):
        figure = Figure(figsize=(4.8, 3.0), layout="constrained")
        ax = figure.subplots()
        _draw_lines(ax, series)
        _set_axes(ax, axis, metric, series)
        return _for_the_page(as_svg(figure, salt=salt, transparent=True))


def _draw_lines(ax: Axes, series: Sequence[Series]) -> None:
    for i, line in enumerate(series):
        colour = series_colour(i)
        xs, medians, lows, highs, bounds = zip(*line.points, strict=True)
        ax.vlines(xs, lows, highs, color=colour, linewidth=1.4)
        ax.plot(xs, medians, color=colour, marker=_MARKERS[i % NUM_COLOURS], markersize=5, linewidth=1.8)
        known = [(x, bound) for x, bound in zip(xs, bounds, strict=True) if bound is not None]
        if known:
            ax.plot(*zip(*known, strict=True), color=colour, linestyle=(0, (4, 3)), linewidth=1.2)


def _set_axes(ax: Axes, axis: str, metric: str, series: Sequence[Series]) -> None:
    xs = sorted({point[0] for line in series for point in line.points})
    ys = [value for line in series for point in line.points for value in (point[1], point[4]) if value]
    if min(xs) > 0 and (axis == "tp_size" or max(xs) / min(xs) > 4):
        ax.set_xscale("log", base=2)
    if max(ys) / min(ys) > 30:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if max(ys) / min(ys) < 1000 else (1.0,)))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.set_ylim(0, max(ys) * 1.1)
    ax.set_xticks(_apart(xs, logarithmic=ax.get_xscale() == "log"))
    ax.xaxis.set_minor_locator(NullLocator())
    shown: Callable[[float], str] = _size if axis.endswith("_bytes") else format_number
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(float(value))))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(float(f"{value:.6g}"))))
    ax.set_xlabel(_AXIS_LABELS.get(axis, axis.replace("_", " ")))
    ax.set_ylabel(metrics.label(metric))


def _apart(xs: Sequence[float], *, logarithmic: bool) -> list[float]:
    """Those of the sorted ``xs`` whose labels have room beside each other, the last one always among them."""
    places = [math.log(x) for x in xs] if logarithmic else list(xs)
    room = 0.13 * (places[-1] - places[0])
    kept = [len(xs) - 1]
    for i in range(len(xs) - 2, -1, -1):
        if places[kept[-1]] - places[i] >= room:
            kept.append(i)
    return [xs[i] for i in reversed(kept)]


def _for_the_page(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # numbered from 1 in every plot, and nothing refers to them
    svg = svg.replace(_INK, "var(--ink-soft)").replace(_RULE, "var(--rule)")
    for i in range(NUM_COLOURS):
        svg = svg.replace(series_colour(i), f"var(--series-{i})")
    # The figure's caption carries the title; a screen reader needs no list of glyphs.
    return re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", svg, count=2).replace("<svg", "<svg aria-hidden='true'", 1)


def series_colour(i: int) -> str:
    """Of the i-th series: one that the page replaces by its own."""
    return f"#0a0b{i % NUM_COLOURS:02x}"


def _x(axis: str, row: BenchRow) -> float:
    return float(row.tp_size) if axis == "tp_size" else row.axes[axis]


def _size(num_bytes: float) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= scale:
            return f"{format_number(num_bytes / scale)} {unit}"
    return f"{format_number(num_bytes)} B"
