import csv
import io
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.compare import compare
from reports.records import NotMeasured, whole_checks
from reports.render import write_all, write_comparison
from reports.tables import bench_table, bench_tables, checks_pivot, checks_table, rows_table, to_csv
from reports.text_tables import escape_markdown, format_number, printable, to_markdown, to_text
from tests.reports.builders import a_bench, a_check, a_full_report, a_report


def rows_of(table: pd.DataFrame, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(line[name] for name in names) for line in table.to_dict("records")]


def test_checks_keep_the_order_of_their_first_row_and_sort_by_tp_size_within() -> None:
    rows = [a_check("weights", 4), a_check("collectives", 2), a_check("weights", 1)]
    expected = [("weights", 1), ("weights", 4), ("collectives", 2)]
    assert rows_of(checks_table(rows), "check", "tp_size") == expected
    assert rows_of(checks_table(rows[::-1]), "check", "tp_size") == [*expected[:2], expected[2]]


def test_a_rank_stays_a_whole_number_beside_rows_without_one() -> None:
    table = checks_table([a_check(tp_size=2, rank=1), a_check(tp_size=4)])
    assert rows_of(table, "rank") == [(1,), (None,)]
    assert isinstance(table["rank"].iloc[0], int)


def test_the_pivot_has_a_row_a_check_and_a_column_a_tp_size() -> None:
    rows = [
        a_check("weights", 1, fabric="solo"),
        a_check("weights", 2),
        a_check("logits", 2, error_over_budget=0.12345),
        a_check("logits", 4, "finding", error_over_budget=math.inf),
    ]
    pivot = checks_pivot(rows).astype(object).where(lambda table: table.notna(), None)
    assert list(pivot.columns) == ["check", "tp 1", "tp 2", "tp 4"]
    assert rows_of(pivot, *pivot.columns) == [
        ("weights", "pass", "pass", None),
        ("logits", None, "pass 0.123", "finding ∞"),
    ]


def test_a_kind_of_a_check_is_a_row_with_its_own_cases_and_values() -> None:
    rows = [a_check("layers", tp_size, kind=kind, cases=cases, compared=10 * cases)
            for tp_size in (1, 2) for kind, cases in (("row with bias", 3), ("column", 4))]
    rows.insert(2, a_check("logits", 1))
    assert rows_of(checks_table(rows), "check", "tp_size", "cases", "compared") == [
        ("layers: row with bias", 1, 3, 30), ("layers: row with bias", 2, 3, 30),
        ("layers: column", 1, 4, 40), ("layers: column", 2, 4, 40), ("logits", 1, 10, 1000),
    ]
    assert rows_of(checks_pivot(rows), "check", "tp 2")[:2] == [("layers: row with bias", "pass"), ("layers: column", "pass")]
    table = rows_table(a_report(*rows))
    assert rows_of(table, "kind", "check", "cases")[0] == ("check", "layers: row with bias", 3)


def test_the_kinds_of_a_check_together_are_as_bad_as_the_worst() -> None:
    rows = [a_check("layers", kind="a", error_over_budget=0.2), a_check("layers", kind="b", error_over_budget=0.9),
            a_check("logits"), a_check("layers", 4, kind="a"),
            a_check("layers", 4, "finding", kind="b", message="off", compared=7, error_over_budget=2.0, rank=3),
            a_check("layers", 4, "error", kind="c")]
    whole = whole_checks(rows)
    assert [(row.name, row.tp_size, row.verdict, row.error_over_budget, row.cases, row.compared) for row in whole] == [
        ("layers", 2, "pass", 0.9, 20, 2000), ("logits", 2, "pass", None, 10, 1000), ("layers", 4, "finding", 2.0, 30, 1007)]
    assert (whole[2].message, whole[2].rank) == ("b: off", 3)
    assert whole[1] is rows[2]


def test_the_pivot_tells_fabrics_apart_where_one_layout_ran_on_two() -> None:
    pivot = checks_pivot([a_check(fabric="threads"), a_check(fabric="gloo", verdict="finding")])
    assert sorted(rows_of(pivot, "check", "fabric", "tp 2")) == [
        ("weights", "gloo", "finding"),
        ("weights", "threads", "pass"),
    ]


def test_bench_figures_are_computed_from_the_samples() -> None:
    rows = [
        a_bench(tp_size=1, fabric="solo", samples={"output_tokens_per_s": [90, 100, 110], "ttft_ms": [10, 20, 30]}),
        a_bench(
            tp_size=2,
            samples={"output_tokens_per_s": [150, 160, 170], "ttft_ms": [8, 10, 12]},
            first={"ttft_ms": 99.0},
            metrics={"bound_output_tokens_per_s": 200.0, "bound_ttft_ms": 5.0},
        ),
        a_bench(tp_size=2, engine="peer", fabric="own", samples={"output_tokens_per_s": [80], "ttft_ms": [40]}),
    ]
    table = bench_table(rows, peers=["peer"])
    names = (
        "engine",
        "tp_size",
        "metric",
        "rounds",
        "median",
        "iqr",
        "first",
        "times_peer",
        "scaling_efficiency",
    )
    assert rows_of(table, *names) == [
        ("shardproof", 1, "output_tokens_per_s", 3, 100.0, 10.0, None, None, None),
        ("shardproof", 1, "ttft_ms", 3, 20.0, 10.0, None, None, None),
        ("shardproof", 2, "output_tokens_per_s", 3, 160.0, 10.0, None, 2.0, 0.8),
        ("shardproof", 2, "ttft_ms", 3, 10.0, 2.0, 99.0, 4.0, 1.0),
        ("peer", 2, "output_tokens_per_s", 1, 80.0, 0.0, None, 1.0, None),
        ("peer", 2, "ttft_ms", 1, 40.0, 0.0, None, 1.0, None),
    ]
    assert rows_of(table, "percent_of_bound")[2:4] == [(80.0,), (50.0,)]
    assert [p99 for (p99,) in rows_of(table, "p99")[:2]] == [None, pytest.approx(29.8)]


def test_a_percent_of_bound_given_directly_belongs_to_the_first_metric() -> None:
    row = a_bench(samples={"step_ms": [1.0], "ttft_ms": [2.0]}, metrics={"percent_of_bound": 61.0})
    assert rows_of(bench_table([row]), "metric", "percent_of_bound") == [("step_ms", 61.0), ("ttft_ms", None)]


def test_a_size_of_memory_has_no_scaling_and_no_tail() -> None:
    rows = [a_bench(tp_size=tp_size, samples={"peak_memory_gib": [4.0]}) for tp_size in (1, 2)]
    assert rows_of(bench_table(rows), "scaling_efficiency", "p99") == [(None, None)] * 2


def test_a_peer_on_the_same_fabric_is_preferred() -> None:
    peers = [
        a_bench(engine="peer", fabric=fabric, samples={"step_ms": [value]})
        for fabric, value in (("gloo", 30.0), ("threads", 20.0))
    ]
    table = bench_table([*peers, a_bench(samples={"step_ms": [10.0]})], peers=["peer"])
    assert rows_of(table, "times_peer")[-1] == (2.0,)


def test_a_peer_that_ran_with_one_rank_only_stands_at_every_tp_size_and_others_at_their_own() -> None:
    rows = [
        a_bench(engine="single", fabric="own", samples={"step_ms": [40.0]}),
        *(a_bench(engine="scales", fabric="own", tp_size=size, samples={"step_ms": [30.0 / size]}) for size in (1, 2)),
        *(a_bench(tp_size=size, samples={"step_ms": [10.0]}) for size in (1, 2, 4)),
    ]
    table = bench_table(rows, peers=["single", "scales"])
    assert rows_of(table, "times_single", "times_scales")[-3:] == [(4.0, 3.0), (4.0, 1.5), (4.0, None)]


def test_peak_memory_stands_beside_every_metric_of_its_row() -> None:
    rows = [a_bench(samples={"step_ms": [1.0], "ttft_ms": [2.0]}, metrics={"memory_gib": 1.5}), a_bench("other")]
    assert rows_of(bench_table(rows), "memory_gib") == [(1.5,), (1.5,), (None,)]


def test_a_percentile_of_a_round_has_no_percentile_over_rounds() -> None:
    table = bench_table([a_bench(samples={"itl_ms": [1.0, 2.0], "itl_ms_p99": [3.0, 4.0]})])
    assert rows_of(table, "metric", "p99") == [("itl_ms", 1.99), ("itl_ms_p99", None)]


def test_an_unknown_peer_is_refused_with_the_engines_there_are() -> None:
    with pytest.raises(ValueError, match="peer='vllm' is not among the engines of this report: shardproof"):
        bench_table([a_bench()], peers=["vllm"])


def test_each_workload_has_a_table_of_its_own() -> None:
    tables = bench_tables([a_bench(workload="b"), a_bench(workload="a"), a_bench("two", workload="b")])
    assert {name: len(table) for name, table in tables.items()} == {"b": 2, "a": 1}


def test_csv_holds_every_row_in_full_precision() -> None:
    report = a_full_report()
    lines = list(csv.DictReader(io.StringIO(to_csv(rows_table(report)))))
    assert [line["kind"] for line in lines] == ["check"] * 9 + ["bench"] * 6 + ["not_measured"] * 3
    assert float(lines[9]["iqr"]) == 1.0
    by_check = {(line["check"], line["tp_size"]): line for line in lines[:9]}
    assert by_check["weights", "2"]["message"] == report.checks[1].message
    assert by_check["logits", "2"]["error_over_budget"] == "inf"
    assert by_check["weights", "1"]["rank"] == ""


def test_every_row_of_a_csv_names_its_commit_and_date(tmp_path: Path) -> None:
    old = a_report(a_check(), a_bench(), commit="b" * 40, started_at="2026-01-30T12:00:00+00:00")
    new = a_report(a_check(), a_bench(), NotMeasured(workload="w1", engine="vllm", reason="missing"), dirty=True)
    lines = list(csv.DictReader(io.StringIO(write_all(new, tmp_path)["csv"].read_text())))
    assert len(lines) == 3
    for line in lines:
        assert line.get("commit") == f"{new.run.commit}-dirty"
        assert (line.get("started_at"), line.get("version")) == (new.run.started_at, "")
    text = write_comparison(compare(old, new), tmp_path / "compare")["csv"].read_text()
    changes = list(csv.DictReader(io.StringIO(text)))
    assert len(changes) == 2
    for line in changes:
        assert (line.get("baseline_commit"), line.get("baseline_started_at")) == ("b" * 40, old.run.started_at)
        assert (line.get("candidate_commit"), line.get("baseline_version")) == (f"{new.run.commit}-dirty", "")
    assert ",0.1.0\n" in to_csv(rows_table(a_report(a_check(), version="0.1.0")))


cells = st.one_of(st.none(), st.integers(), st.floats(), st.booleans(), st.text(max_size=12))


@settings(deadline=None)
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=5))
def test_any_table_is_aligned_markdown_with_the_same_columns_on_every_line(
    rows: list[tuple[Any, Any]],
) -> None:
    markdown = to_markdown(pd.DataFrame(rows, columns=["a", "b|c"], dtype=object))
    lines = markdown.removesuffix("\n").split("\n")
    assert len(lines) == len(rows) + 2
    for line in lines:
        assert line.replace("\\\\", "").replace("\\|", "").count("|") == 3, line


def test_numbers_stand_to_the_right_and_words_to_the_left() -> None:
    table = pd.DataFrame({"name": ["a", "longer"], "value": [1.5, 12345.6]}, dtype=object)
    assert to_text(table) == "name     value\n──────────────\na          1.5\nlonger  12,346\n"
    assert to_markdown(table) == ("| name   |  value |\n|--------|-------:|\n| a      |    1.5 |\n| longer | 12,346 |\n")


def test_a_table_without_rows_is_a_head() -> None:
    assert to_text(pd.DataFrame(columns=["a"])) == "a\n─\n"


def test_wide_characters_take_two_columns_in_a_terminal() -> None:
    assert to_text(pd.DataFrame({"a": ["日本", "x"], "b": ["c", "d"]})) == "a     b\n───────\n日本  c\nx     d\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", "a\\|b"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("two\nlines", "two<br>lines"),
        ("*bold* `code` _it_", "\\*bold\\* \\`code\\` \\_it\\_"),
        ("tp_size", "tp_size"),
        ("\x1b[31m", "\\\\x1b\\[31m"),
    ],
)
def test_text_cannot_break_out_of_a_markdown_cell(text: str, shown: str) -> None:
    assert escape_markdown(text) == shown


def test_control_codes_and_lone_surrogates_are_spelt_out() -> None:
    assert printable("ok\ttab\nline \x00\x1b\x7f\udc80\ufffe é 😀") == "ok\ttab\nline \\x00\\x1b\\x7f\\udc80\\ufffe é 😀"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (5.0, "5"), (-1234.5, "-1,234"), (0.000123456, "0.0001235"), (3e-9, "3e-09"), (math.inf, "∞")],
)
def test_numbers_have_four_digits_that_count(value: float, shown: str) -> None:
    assert format_number(value) == shown
