"""Markdown as a whole, held against the files under ``golden/``: what changes a page changes a file."""

from pathlib import Path

import pytest

from reports.compare import compare
from reports.markdown import comparison_markdown, fenced, report_markdown
from reports.records import Report
from tests.reports.builders import GPU, a_bench, a_check, a_full_report, a_report

GOLDEN = Path(__file__).parent / "golden"


def a_comparison() -> str:
    old = a_report(
        a_check("weights"), a_check("logits", error_over_budget=0.2), a_check("kv"),
        a_bench(samples={"step_ms": [1.0, 1.01, 0.99] * 4}), a_bench("two"), machine=GPU,
    )  # fmt: skip
    new = a_report(
        a_check("weights"),
        a_check("logits", error_over_budget=0.6),
        a_check(
            "kv",
            verdict="finding",
            message="block 3 is used twice | <here>",
            replay="shardproof verify --seed 7",
        ),
        a_bench(samples={"step_ms": [1.2, 1.21, 1.19] * 4}),
        machine=GPU,
        commit="fedcba9876543210",
        switches={"allow_tf32": True, "NCCL_NVLS_ENABLE": "0"},
    )
    return comparison_markdown(compare(old, new))


@pytest.mark.parametrize(
    ("name", "text"),
    [("report.md", report_markdown(a_full_report(), peers=["peer <&>"])), ("comparison.md", a_comparison())],
)
def test_the_markdown_is_the_golden_one(name: str, text: str) -> None:
    assert text == (GOLDEN / name).read_text()


@pytest.mark.parametrize(
    ("report", "headline"),
    [
        (a_report(a_check()), "# shardproof verify: 1 check passed"),
        (a_report(a_check(), a_check("kv", verdict="error")), "# shardproof verify: 1 check could not run"),
        (a_report(a_check(verdict="skipped")), "# shardproof verify: Nothing was compared"),
        (a_report(), "# shardproof verify: Nothing was compared"),
        (a_report(a_bench()), "# shardproof verify: 1 benchmark case measured"),
    ],
)
def test_the_headline_agrees_with_the_exit_code(report: Report, headline: str) -> None:
    text = report_markdown(report)
    assert text.splitlines()[0] == headline
    assert ("✅" in text.splitlines()[2]) == (report.exit_code == 0)


def test_a_code_block_is_longer_than_any_fence_inside() -> None:
    assert fenced("a\n````\nb") == "`````text\na\n````\nb\n`````\n"
