"""A verdict as plots: differences over position and over the log-probability, and their quantiles against what rounding does."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from reports.plots import Plot, panel, series_colour
from reports.verdict_rows import VerdictRow

_MOST_SHOWN = 50.0
"""Units of rounding up to which an axis is linear."""


def verdict_plots(row: VerdictRow | None) -> list[Plot]:
    """The plots for which there are numbers."""
    if row is None or not row.places.ratio:
        return []
    few = f"{len(row.places.ratio)} of " if len(row.places.ratio) < row.compared else ""
    shown = f"{few}{row.compared} tokens"
    plots = [
        panel("Difference over position", f"A − B in units of rounding; {shown}", lambda ax: _over(
            ax, row.places.position, row.places.ratio, "position in the sequence, tokens")),
        panel("Difference over log-probability", f"A − B in units of rounding; {shown}", lambda ax: _over(
            ax, row.places.logprob, row.places.ratio, "log-probability by A, nats")),
    ]
    if row.quantiles:
        plots.append(panel("Quantiles against rounding", "the dashed line is a normal distribution of one unit of rounding",
                           lambda ax: _quantiles(ax, row.quantiles)))
    return plots


def _over(ax: Axes, xs: list[int] | list[float], ratios: list[float], label: str) -> None:
    ax.scatter(np.array(xs), np.array(ratios), s=5, color=series_colour(0), linewidths=0, alpha=0.5)
    _set_units(ax, max(map(abs, ratios)))
    ax.set_xlabel(label)
    ax.set_ylabel("A − B, units of rounding")


def _quantiles(ax: Axes, quantiles: list[list[float]]) -> None:
    expected, found = np.array(quantiles).T
    ax.plot(expected, expected, color=series_colour(1), linestyle=(0, (4, 3)), linewidth=1.2)
    ax.plot(expected, found, color=series_colour(0), marker="o", markersize=3, linewidth=1.2)
    _set_units(ax, float(np.abs(found).max()))
    ax.set_xlabel("expected of rounding, units")
    ax.set_ylabel("found, units of rounding")


def _set_units(ax: Axes, largest: float) -> None:
    if largest > _MOST_SHOWN:
        ax.set_yscale("symlog", linthresh=1.0)
