import doctest

import pytest

from reports import metrics, summary, text_tables


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("output_tokens_per_s", "higher"),
        ("output_tokens_per_s_p50", "higher"),
        ("sent_gib_per_s", "higher"),
        ("percent_of_bound", "higher"),
        ("ttft_ms", "lower"),
        ("ttft_ms_p99", "lower"),
        ("start_s", "lower"),
        ("all_reduce_us", "lower"),
        ("ms_per_token", "lower"),
        ("peak_memory_gib", "lower"),
        ("sent_bytes", "lower"),
        ("layers", None),
        ("ratio", None),
        ("items", None),
    ],
)
def test_a_metric_says_by_its_unit_which_way_is_better(metric: str, better: str | None) -> None:
    assert metrics.direction(metric) == better


def test_a_gain_above_one_is_better_whichever_way_the_metric_goes() -> None:
    assert metrics.gain("output_tokens_per_s", 200.0, 100.0) == 2.0
    assert metrics.gain("ttft_ms", 50.0, 100.0) == 2.0


def test_units_are_shown_as_they_are_written() -> None:
    assert [metrics.label(name) for name in ("copy_gb_per_s", "matmul_tflop_per_s")] == ["copy GB/s", "matmul TFLOP/s"]


def test_only_durations_have_tails() -> None:
    assert [metrics.is_time(name) for name in ("ttft_ms", "tokens_per_s", "peak_gib")] == [True, False, False]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4217, "0.42 s"), (12.3, "12 s"), (59.7, "1 min 0 s"), (185, "3 min 5 s"), (7265, "2 h 1 min")],
)
def test_a_duration_is_told_as_people_tell_it(seconds: float, shown: str) -> None:
    assert summary.duration(seconds) == shown


@pytest.mark.parametrize("module", [metrics, text_tables])
def test_the_examples_in_docstrings_hold(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted > 0
    assert result.failed == 0
