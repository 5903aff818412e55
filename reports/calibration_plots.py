"""A calibration as two plots: what correct code gets wrong and the budgets above it; which planted errors are seen.

Files of their own, on white, so that any page can show them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from reports.files import write_whole
from reports.plots import as_svg, style
from reports.records import Calibration, PowerRow, Tolerance
from reports.text_tables import format_number

_COLOURS = ("#0b62c4", "#b54708", "#147a3c", "#7a3fc9", "#b4236a", "#5b6570")
_INK, _SOFT, _RULE = "#1b1f24", "#59636e", "#dde1e6"
_MARKERS = "o^sDvp"
_TITLES = {"typical": "typical: the median row", "row": "row: the worst row", "element": "element: the worst element"}
_BINS_PER_DOUBLING = 4
_SURE = 0.99
_DPI = 110  # of the clouds, which are thousands of points; the rest is lines and text


def calibration_plots(calibration: Calibration) -> dict[str, str]:
    """File name -> SVG, of the plots for which there are rows."""
    figures = {}
    if calibration.errors:
        figures["errors.svg"] = errors_figure(calibration)
    if calibration.powers:
        figures["power.svg"] = power_figure(calibration.powers)
    return {name: as_svg(figure, salt=name, facecolor="white", dpi=_DPI) for name, figure in figures.items()}


def write_calibration_plots(calibration: Calibration, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the plots beside a report; return their paths."""
    paths = []
    for name, svg in calibration_plots(calibration).items():
        write_whole(path := Path(folder) / name, svg)
        paths.append(path)
    return paths


def errors_figure(calibration: Calibration) -> Figure:
    """The candidate's error over the reference error, a row for each class of dtypes and a panel for each statistic."""
    with style(ink=_SOFT, rule=_RULE):
        classes = list(dict.fromkeys(row.precision for row in calibration.tolerances))
        statistics = list(dict.fromkeys(row.statistic for row in calibration.tolerances))
        figure = Figure(figsize=(10.5, 0.7 + 3.2 * max(1, len(classes))), layout="constrained")
        kinds = sorted({row.kind for row in calibration.errors})
        panels = figure.subplots(max(1, len(classes)), max(1, len(statistics)), sharey=True, squeeze=False)
        for tolerance in calibration.tolerances:
            ax = panels[classes.index(tolerance.precision)][statistics.index(tolerance.statistic)]
            _draw_clouds(ax, {kind: _cloud(calibration, kind, tolerance) for kind in kinds})
            _draw_budget(ax, tolerance)
            title = _TITLES.get(tolerance.statistic, tolerance.statistic)
            ax.set_title(f"{tolerance.precision}\n{title}", color=_INK, loc="left", fontsize=10)
            _set_axes(ax, both_log=True)
        for row in panels:
            row[0].set_ylabel("error of correct sharded code,\nroundoffs of its scale")
        panels[-1][len(statistics) // 2].set_xlabel("reference error, roundoffs of its scale")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, labelcolor=_INK)
    return figure


def power_figure(rows: Sequence[PowerRow]) -> Figure:
    """The share of cases in which a planted error is seen over its size, a panel for each check; sums of reals."""
    reals = [row for row in rows if row.values == "reals"]
    checks = list(dict.fromkeys(row.check for row in reals))
    dtypes, sizes = sorted({row.dtype for row in reals}), sorted({row.tp_size for row in reals})
    with style(ink=_SOFT, rule=_RULE):
        figure = Figure(figsize=(10.5, 3.7), layout="constrained")
        panels = figure.subplots(1, max(1, len(checks)), sharey=True, squeeze=False)[0]
        for ax, check in zip(panels, checks, strict=False):
            for row in (row for row in reals if row.check == check):
                colour, marker = _COLOURS[dtypes.index(row.dtype)], _MARKERS[sizes.index(row.tp_size) % len(_MARKERS)]
                ax.plot(*zip(*row.seen, strict=True), color=colour, marker=marker, markersize=3.5, linewidth=1.2,
                        label=f"{row.dtype}, tp {row.tp_size}")
            ax.axhline(_SURE, color=_SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
            ax.set_xscale("log", base=2)
            ax.set_title(f"{check}: one case", color=_INK, loc="left", fontsize=10)
            _set_axes(ax, both_log=False)
        panels[0].set_ylabel("share of the cases in which it is seen")
        panels[len(panels) // 2].set_xlabel("relative error in one rank's part of a sum")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(sizes)), frameon=False, labelcolor=_INK)
    return figure


def _cloud(calibration: Calibration, kind: str, tolerance: Tolerance) -> Counter[tuple[int, int]]:
    total: Counter[tuple[int, int]] = Counter()
    for row in calibration.errors:
        if (row.kind, row.statistic) == (kind, tolerance.statistic) and tolerance.is_for(row.dtype):
            total.update({(b, e): count for b, e, count in row.cloud})
    return total


def _draw_clouds(ax: Axes, clouds: dict[str, Counter[tuple[int, int]]]) -> None:
    for i, (kind, cloud) in enumerate(clouds.items()):
        if not cloud:
            continue
        places = np.array(list(cloud), dtype=float)
        sizes = 4 + 5 * np.log2(np.array(list(cloud.values()), dtype=float) + 1)
        baseline, candidate = 2.0 ** (places.T / _BINS_PER_DOUBLING)
        ax.scatter(baseline, candidate, s=sizes, color=_COLOURS[i], marker=_MARKERS[i], alpha=0.55,
                   linewidths=0, rasterized=True, label=kind)


def _draw_budget(ax: Axes, tolerance: Tolerance) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    low, high = ax.get_xlim()
    corner = tolerance.c / tolerance.k
    xs = sorted({low, min(max(corner, low), high), high})
    ax.plot(xs, [max(tolerance.k * x, tolerance.c) for x in xs], color=_INK, linewidth=1.6,
            label="budget: max(k × reference error, c)")
    ax.plot([low, high], [low, high], color=_SOFT, linewidth=0.9, linestyle=(0, (4, 3)), label="as far off as the reference")
    ax.set_xlim(low, high)
    ax.annotate(f"k = {tolerance.k:g}, c = {tolerance.c:g}", (0.03, 0.96), xycoords="axes fraction", va="top", color=_INK)


def _set_axes(ax: Axes, *, both_log: bool) -> None:
    for axis in (ax.xaxis, ax.yaxis) if both_log else (ax.xaxis,):
        axis.set_major_locator(LogLocator(base=2, numticks=7))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: _power_of_two(float(value))))


def _power_of_two(value: float) -> str:
    """``1/64`` and ``8``, and ``2⁻²⁴`` where that would be long."""
    exponent = round(np.log2(value))
    if abs(exponent) > 10:
        return f"2{str(exponent).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    return format_number(2.0**exponent) if exponent >= 0 else f"1/{2**-exponent}"
