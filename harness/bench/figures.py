"""From times of tokens to figures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Figures = dict[str, float]
"""metric -> value of one round; the metric's name ends in its unit"""
Measured = dict[tuple[str, str], Figures]
"""(case, engine) -> figures of one round"""
TokenTimes = Sequence[Sequence[float]]
"""For each request, the seconds after the start at which each of its tokens arrived."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A run that nobody watched: how long it took, and how many tokens came back for each request."""

    seconds: float
    num_tokens: Sequence[int]


def prompt_figures(times: TokenTimes, num_prompt_tokens: int) -> Figures:
    """Of prompts that arrive together: all of them done, and the median time to a first token."""
    first_s = [request[0] for request in times]
    return {"prompt_tokens_per_s": num_prompt_tokens / max(first_s), "ttft_ms": 1e3 * float(np.median(first_s))}


def inter_token_figures(times: TokenTimes) -> Figures:
    """Median and 99th percentile of the time between two tokens of a request, while all requests decode.

    From the moment in which the last request has its first token to the one in which the first has its last: before and
    after it, prompts are computed and fewer requests run.

    Raises:
        ValueError: if there is no such time.
    """
    start, stop = max(request[0] for request in times), min(request[-1] for request in times)
    gaps_s = [later - earlier for request in times for earlier, later in itertools.pairwise(request)
              if earlier >= start and later <= stop]
    if not gaps_s:
        raise ValueError("no two tokens came while all requests were decoding: generate more tokens")
    return _median_and_tail("itl_ms", gaps_s)


def first_token_figures(times: TokenTimes) -> Figures:
    """Time to a first token, over requests."""
    return _median_and_tail("ttft_ms", [request[0] for request in times])


def per_token_figures(times: TokenTimes) -> Figures:
    """Mean time a token after the first, over requests."""
    return _median_and_tail("tpot_ms", [(request[-1] - request[0]) / (len(request) - 1) for request in times])


def decode_figures(short_s: float, long_s: float, num_steps: int) -> Figures:
    """Time a token from two runs that nobody watches, one of a single token and one of ``num_steps`` more.

    Raises:
        ValueError: if the longer run was no slower.
    """
    if long_s <= short_s:
        raise ValueError(f"{num_steps} more tokens took no longer ({long_s:.4g} s against {short_s:.4g} s): generate more tokens")
    return {"ms_per_token": 1e3 * (long_s - short_s) / num_steps}


def _median_and_tail(name: str, seconds: Sequence[float]) -> Figures:
    return {name: 1e3 * float(np.median(seconds)), f"{name}_p99": 1e3 * float(np.percentile(seconds, 99))}
