"""Figures follow from times, computed here by hand."""

from __future__ import annotations

import pytest

from harness.bench import figures


def test_the_time_between_tokens_counts_only_while_all_requests_decode() -> None:
    # The first request has a slow gap before the other has begun, and the second goes on after the first is done.
    times = [[1.0, 4.0, 4.5, 5.0], [4.0, 4.5, 5.0, 9.0]]
    assert figures.inter_token_figures(times) == {"itl_ms": 500.0, "itl_ms_p99": 500.0}


def test_the_tail_of_the_time_between_tokens_is_seen() -> None:
    even = [float(number) for number in range(200)]
    assert figures.inter_token_figures([even]) == {"itl_ms": 1000.0, "itl_ms_p99": 1000.0}
    with_a_pause = figures.inter_token_figures([[*even[:50], *(time + 100 for time in even[50:54])]])
    assert with_a_pause["itl_ms"] == 1000.0
    assert with_a_pause["itl_ms_p99"] > 10_000


def test_requests_that_never_decode_together_have_no_time_between_tokens() -> None:
    with pytest.raises(ValueError, match="generate more tokens"):
        figures.inter_token_figures([[1.0, 2.0], [3.0, 4.0]])


def test_prompt_figures_tell_when_all_prompts_were_done() -> None:
    assert figures.prompt_figures([[0.1], [0.3], [0.5]], 1000) == {"prompt_tokens_per_s": 2000.0, "ttft_ms": 300.0}


def test_time_a_token_leaves_the_first_one_out() -> None:
    assert figures.per_token_figures([[9.0, 9.1, 9.2]])["tpot_ms"] == pytest.approx(100.0, rel=1e-9)


def test_decode_time_is_what_more_tokens_took_longer() -> None:
    assert figures.decode_figures(1.0, 3.0, 4) == {"ms_per_token": 500.0}
    with pytest.raises(ValueError, match="took no longer"):
        figures.decode_figures(2.0, 2.0, 4)
