import html
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from reports.compare import compare
from reports.markdown import comparison_markdown
from reports.pages import comparison_html, report_html
from reports.plots import bench_plots
from reports.records import BenchRow, NotMeasured, Report, read_report
from reports.render import write_all, write_comparison
from reports.tables import checks_pivot
from reports.text_tables import to_text
from tests.reports.builders import GPU, a_bench, a_check, a_full_report, a_report

VOID = {"meta", "br", "img", "input", "link", "hr", "col"}


class Page(HTMLParser):
    """Checks that tags are balanced, and collects text, ids and whatever would be fetched."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def full_comparison_html() -> str:
    new = a_full_report()
    old = a_report(
        *(a_check(row.check, row.tp_size, kind=row.kind, fabric=row.fabric) for row in new.checks),
        *new.benches[:-1],
        machine=GPU,
    )
    return comparison_html(compare(old, new, allow_unlike=True))


PAGES: dict[str, Callable[[], str]] = {
    "full": lambda: report_html(a_full_report()),
    "peer": lambda: report_html(a_full_report(), peers=["peer <&>"]),
    "checks": lambda: report_html(a_report(a_check())),
    "benches": lambda: report_html(a_report(a_bench())),
    "empty": lambda: report_html(a_report()),
    "comparison": full_comparison_html,
    "nothing to compare": lambda: comparison_html(compare(a_report(), a_report())),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_balanced_and_needs_nothing_from_elsewhere(name: str) -> None:
    source = PAGES[name]()
    page = Page(source)
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "img"}
        assert not {"src", "onload", "onerror"} & attrs.keys()
        for link in ("href", "xlink:href"):
            assert (attrs.get(link) or "#").startswith("#")
    assert "@import" not in source
    assert "url(h" not in source
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)), "two plots share ids, and one would be drawn with the other's parts"


def test_the_page_check_notices_an_unbalanced_page_and_an_unescaped_message() -> None:
    with pytest.raises(AssertionError, match="closes something else"):
        Page("<div><p></div>")
    with pytest.raises(AssertionError, match="never closed"):
        Page("<div>")
    assert ("script", {}) in Page("<p><script></script></p>").tags


@pytest.mark.parametrize("html", [PAGES["full"], PAGES["comparison"]])
def test_messages_are_shown_as_they_are_and_cannot_break_out(html: Callable[[], str]) -> None:
    text = Page(html()).text
    assert 'y[3] <script>alert("x")</script> & `code` | pipe\n```\nsecond line \\x1b[31m \\udc80' in text
    assert "shardproof <x>" in text
    assert "peer <&>" in text


def test_findings_come_first_then_what_could_not_run_then_the_rest() -> None:
    text = Page(PAGES["full"]()).text
    positions = [text.index(word) for word in ("2 findings", "Findings", "Could not run", "Checks", "Skipped", "Benchmarks")]
    assert positions == sorted(positions)
    for word in (
        "rank 1",
        "model.layers.0.mlp",
        "needs <2> GPUs",
        "rank 1 died",
        "0123456789ab",
        "torch",
        "allow_tf32",
    ):
        assert word in text


def an_error() -> Report:
    where = "Traceback (most recent call last):\n  File \"check.py\", line 3\nKeyError: 'lm_head'"
    return a_report(
        a_check("logits", 2, "error", message="KeyError: 'lm_head'", extra={"traceback": where}), a_check("weights"),
        NotMeasured(workload="w1", engine="vllm", verdict="error", reason="7 tokens came back of 8", traceback=f"short\n{where}"))


def test_an_error_is_told_with_its_reason_in_every_form_and_its_traceback_is_folded(tmp_path: Path) -> None:
    paths = write_all(an_error(), tmp_path)
    texts = {suffix: path.read_text() for suffix, path in paths.items()}
    for suffix in ("md", "html", "csv"):
        assert "error" in texts[suffix]
        assert "KeyError: 'lm_head'" in html.unescape(texts[suffix])
        assert "7 tokens came back of 8" in texts[suffix]
    assert "error" in to_text(checks_pivot(an_error().checks))
    for suffix in ("md", "html"):
        folded = re.findall(r"<details><summary>Traceback.*?</details>", texts[suffix], re.DOTALL)
        assert len(folded) == 2, "one of the check, one of the peer"
        assert all('File "check.py", line 3' in html.unescape(text) for text in folded)
        assert texts[suffix].count("most recent call last") == 2, "nowhere but there"


def test_a_check_that_broke_brings_its_traceback_into_the_comparison() -> None:
    comparison = compare(a_report(a_check("logits", 2)), an_error())
    for text in (comparison_html(comparison), comparison_markdown(comparison)):
        assert re.search(r"<details><summary>Traceback.*most recent call last.*</details>", text, re.DOTALL)


def test_equal_skips_are_one_line_with_all_their_sizes(tmp_path: Path) -> None:
    skipped = [a_check("lifecycle", size, "skipped", message="needs gloo") for size in (1, 3, 4)]
    other = a_check("lifecycle", 5, "skipped", message="another reason")
    missing = [NotMeasured(workload="w1", engine="vllm", tp_size=size, reason="not installed") for size in (1, 2)]
    paths = write_all(a_report(a_check(), *skipped, other, *missing), tmp_path)
    rows = re.findall(r"<tr><td class=\"text\">lifecycle</td>.*?</tr>", paths["html"].read_text())
    assert [Page(row).text for row in rows[-2:]] == ["lifecycle1, 3, 4needs gloo", "lifecycle5another reason"]
    for suffix in ("md", "html"):
        assert paths[suffix].read_text().count("needs gloo") == paths[suffix].read_text().count("not installed") == 1
    assert paths["csv"].read_text().count("needs gloo") == 3, "a table for programs has a line for each"


def test_the_decimal_points_of_a_column_stand_below_each_other() -> None:
    errors = [0.5, 0.0625, 12.0, 3.25]
    rows = [a_check(f"c{i}", 1, "finding", error_over_budget=error, seconds=seconds)
            for i, (error, seconds) in enumerate(zip(errors, (0.25, 12.0, 3.5, 100.0), strict=True))]
    source = report_html(a_report(*rows, *(a_bench(str(i), samples={"step_ms": [value]}) for i, value in enumerate(errors))))
    # Medians; then how long the checks took. What is in brackets is not seen.
    for column in (["[1]0.5[625]", "[1]0.0625", "12[.0625]", "[1]3.25[25]"],
                   ["[1 min 4]0.25 s", "[1 min ]12 s[.25]", "[1 min 4]3.5 s[5]", "1 min 40 s[.25]"]):
        for number in column:
            cell = re.sub(r"\[(.*?)\]", r'<i class="unseen">\1</i>', number)
            assert f'<td class="number">{cell}</td>' in source, number
    assert "font-variant-numeric: tabular-nums" in source
    assert ".unseen { visibility: hidden;" in source


def test_a_command_wraps_and_one_click_selects_all_of_it() -> None:
    source = PAGES["full"]()
    rules = dict(re.findall(r"^(pre(?:\.command)?) \{([^}]*)\}", source, re.MULTILINE))
    assert "user-select: all" in rules["pre.command"]
    assert "white-space: pre-wrap" in rules["pre"]
    assert "overflow-wrap: anywhere" in rules["pre"]
    assert "white-space" not in rules["pre.command"], "a line that is not broken is clipped on a narrow screen"
    assert '<pre class="command">shardproof &lt;x&gt;</pre>' in source


def test_every_verdict_is_told_in_words() -> None:
    badges = re.findall(r'<span class="badge (\w+)">([^<]+)</span>', PAGES["full"]())
    assert {("good", "pass"), ("bad", "finding"), ("quiet", "skipped"), ("warn", "error")} <= set(badges)


@pytest.mark.parametrize(("error", "text", "percent", "over"), [
    (0.0, "0", 0.0, False), (0.5, "0.5", 37.5, False), (1.0, "1", 75.0, False), (9.0, "9", 100.0, True),
    (math.inf, "∞", 100.0, True), (math.nan, "NaN", 100.0, True)])
def test_the_bar_of_an_error_ends_its_budget_at_three_quarters(error: float, text: str, percent: float, over: bool) -> None:
    source = report_html(a_report(a_check(verdict="finding", error_over_budget=error)))
    bars = re.findall(r'<span class="bar( over)?" role="img" aria-label="(\S+) of its budget"><i style="width: (\S+)%">', source)
    assert set(bars) == {(" over" if over else "", text, str(percent))}


def sized(engine: str = "shardproof", **changes: Any) -> list[BenchRow]:
    return [
        a_bench(
            f"{size} bytes",
            engine=engine,
            workload="all_reduce",
            samples={"all_reduce_us": [5.0 + size / 1e5]},
            axes={"message_bytes": size},
            **changes,
        )
        for size in (2048, 1 << 20)
    ]


def scaled(**changes: Any) -> list[BenchRow]:
    return [a_bench(tp_size=size, fabric="solo" if size == 1 else "nccl", **changes) for size in (1, 2, 4)]


def test_plots_are_drawn_only_for_what_was_varied() -> None:
    assert bench_plots([a_bench()]) == []
    plots = bench_plots([*scaled(), *sized(), *sized("nccl", metrics={"bound_all_reduce_us": 2.0})])
    assert [(plot.title, plot.legend, plot.has_bound) for plot in plots] == [
        ("W1: output tokens/s over tp_size", ["shardproof"], False),
        ("all_reduce: all reduce over message size", ["shardproof", "nccl"], True),
    ]
    assert "all reduce, µs" in plots[1].svg
    assert "1 MiB" in plots[1].svg


def test_one_line_runs_from_one_rank_alone_to_many_and_fabrics_part_where_both_ran() -> None:
    both = [*scaled(), a_bench(tp_size=2, fabric="gloo")]
    (plot,) = bench_plots(both)
    assert sorted(plot.legend) == ["shardproof · gloo", "shardproof · nccl", "shardproof · solo"]


def test_plots_take_their_colours_from_the_page_and_leave_no_setting_behind() -> None:
    before = dict(mpl.rcParams)
    (plot,) = bench_plots(scaled(engine="costs $5 and $6"))
    assert dict(mpl.rcParams) == before
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", plot.svg)) == set()
    assert "var(--series-0)" in plot.svg
    assert "<metadata" not in plot.svg
    assert plot.legend == ["costs $5 and $6"]
    assert bench_plots(scaled(engine="costs $5 and $6"))[0].svg == plot.svg


def test_write_all_writes_four_files_and_the_records_can_be_read_back(tmp_path: Path) -> None:
    report = a_full_report()
    paths = write_all(report, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report.csv", "report.html", "report.json", "report.md",
    ]  # fmt: skip
    assert set(paths) == {"csv", "html", "json", "md"}
    assert read_report(paths["json"]) == report


def test_an_unknown_peer_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="peer='vllm'"):
        write_all(a_full_report(), tmp_path / "out", peers=["vllm"])
    assert not (tmp_path / "out").exists()


def test_write_comparison_writes_five_files(tmp_path: Path) -> None:
    paths = write_comparison(compare(a_full_report(), a_full_report()), tmp_path)
    assert sorted(paths) == ["csv", "html", "json", "md", "xml"]
    assert all(path.stat().st_size > 0 for path in paths.values())
