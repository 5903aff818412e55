"""What a metric's name says: its unit and which way is better."""

from __future__ import annotations

import re
from typing import Literal

Direction = Literal["higher", "lower"]

_RATE = re.compile(r"_per_s(_p\d+)?$")
_COST = re.compile(r"(?:^|_)(ns|us|ms|s|bytes|kib|mib|gib)(_per_[a-z]+)?(_p\d+)?$")
_TIME = re.compile(r"(?:^|_)(ns|us|ms|s)(_per_[a-z]+)?(_p\d+)?$")
_ACRONYMS = ("ttft", "tpot", "itl", "kv", "gpu")
_SHOWN_UNIT = {
    "us": "µs", "bytes": "bytes", "kib": "KiB", "mib": "MiB", "gib": "GiB", "gb": "GB", "tflop": "TFLOP",
}  # fmt: skip


def direction(metric: str) -> Direction | None:
    """Whether more of ``metric`` is better or worse; None if its name carries no unit that says so.

    >>> direction("output_tokens_per_s"), direction("ttft_ms"), direction("ms_per_token"), direction("speed")
    ('higher', 'lower', 'lower', None)
    """
    if _RATE.search(metric) or metric.startswith("percent_of_"):
        return "higher"
    return "lower" if _COST.search(metric) else None


def is_time(metric: str) -> bool:
    """Whether ``metric`` is a duration, for which tails (p99) matter."""
    return not _RATE.search(metric) and bool(_TIME.search(metric))


def is_percentile(metric: str) -> bool:
    """Whether ``metric`` is itself a percentile of what one round saw, such as ``itl_ms_p99``."""
    return bool(re.search(r"_p\d+$", metric))


def label(metric: str) -> str:
    """A metric's name for people, with its unit at the end.

    >>> label("output_tokens_per_s"), label("ttft_ms"), label("ms_per_token"), label("all_reduce_us")
    ('output tokens/s', 'TTFT, ms', 'ms/token', 'all reduce, µs')
    """
    percentile = re.search(r"_p(\d+)$", metric)
    name = metric[: percentile.start()] if percentile else metric
    if _RATE.search(name):
        words = name.removesuffix("_per_s").split("_")
        shown = " ".join(_SHOWN_UNIT.get(word, word) for word in words) + "/s"
    elif match := _COST.search(name):
        unit = _SHOWN_UNIT.get(match[1], match[1]) + (match[2] or "").replace("_per_", "/")
        words = name[: match.start()].split("_")
        what = " ".join(word.upper() if word in _ACRONYMS else word for word in words)
        shown = f"{what}, {unit}" if what else unit
    elif name.startswith("percent_of_"):
        shown = f"% of {name.removeprefix('percent_of_').replace('_', ' ')}"
    else:
        shown = name.replace("_", " ")
    return f"{shown}, p{percentile[1]}" if percentile else shown


def gain(metric: str, candidate: float, baseline: float) -> float:
    """How many times better ``candidate`` is than ``baseline``: above 1 is better, whatever the metric."""
    return candidate / baseline if direction(metric) == "higher" else baseline / candidate
