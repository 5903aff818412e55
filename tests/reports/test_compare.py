import json
import math
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from reports import metrics
from reports.compare import HARDWARE, Comparison, UnlikeMachinesError, compare, fingerprint
from reports.comparison_data import comparison_json, comparison_junit
from reports.markdown import comparison_markdown
from reports.records import BenchRow, CheckRow, Report, read_report
from reports.summary import comparison_headline
from tests.reports.builders import CPU, GPU, a_bench, a_check, a_report, a_run

QUIET = [1.0, 1.004, 0.996, 1.002, 0.998, 1.006, 0.994, 1.001, 0.999, 1.003]


def timed(level: float, metric: str = "step_ms", **changes: Any) -> BenchRow:
    return a_bench(samples={metric: [level * value for value in QUIET]}, **changes)


def speeds(baseline: BenchRow, candidate: BenchRow, **settings: Any) -> Comparison:
    return compare(a_report(baseline), a_report(candidate), **settings)


@pytest.mark.parametrize(
    ("metric", "level", "verdict"),
    [
        ("step_ms", 110.0, "slower"),
        ("step_ms", 90.0, "faster"),
        ("step_ms", 101.0, "same"),
        ("output_tokens_per_s", 90.0, "slower"),
        ("output_tokens_per_s", 110.0, "faster"),
        ("peak_memory_gib", 110.0, "slower"),
    ],
)
def test_a_clear_change_is_told_by_the_direction_of_its_metric(metric: str, level: float, verdict: str) -> None:
    (change,) = speeds(timed(100.0, metric), timed(level, metric)).speeds
    assert change.verdict == verdict
    assert change.low is not None
    assert change.high is not None
    assert change.gain is not None
    assert change.low <= change.gain <= change.high


def test_a_clear_change_too_small_to_matter_is_the_same_until_it_matters() -> None:
    assert speeds(timed(100.0), timed(103.0)).speeds[0].verdict == "same"
    assert speeds(timed(100.0), timed(103.0), smallest_effect=0.02).speeds[0].verdict == "slower"


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_handful_of_rounds_is_too_noisy_however_far_apart(rounds: int) -> None:
    few = a_bench(samples={"step_ms": [1000.0] * rounds})
    for pair in ((timed(100.0), few), (few, timed(100.0))):
        assert speeds(*pair).speeds[0].verdict == "too noisy"


def test_four_rounds_a_side_cannot_be_sure_and_ten_can() -> None:
    four = [a_bench(samples={"step_ms": [level] * 4}) for level in (1.0, 2.0)]
    assert speeds(*four).speeds[0].verdict == "too noisy"  # 1 in C(8, 4) = 70 by chance, and 1 in 200 is allowed
    ten = [a_bench(samples={"step_ms": [level] * 10}) for level in (1.0, 2.0)]
    assert speeds(*ten).speeds[0].verdict == "slower"


def test_more_rows_ask_for_more_evidence() -> None:
    def rows(level: float, count: int) -> list[BenchRow]:
        return [a_bench(str(i), samples={"step_ms": [level + i / 50 for i in range(6)]}) for i in range(count)]

    alone = compare(a_report(*rows(1.0, 1)), a_report(*rows(2.0, 1)))
    among_many = compare(a_report(*rows(1.0, 50)), a_report(*rows(2.0, 50)))
    assert [change.verdict for change in alone.speeds] == ["slower"]
    assert {change.verdict for change in among_many.speeds} == {"too noisy"}


def test_rows_are_matched_by_case_and_layout() -> None:
    old = a_report(timed(100.0, case="a"), timed(100.0, case="gone"))
    new = a_report(timed(100.0, case="a"), timed(100.0, case="a", tp_size=2), timed(100.0, case="a", dtype="float16"))
    verdicts = {(c.case, c.tp_size, c.dtype): c.verdict for c in compare(old, new).speeds}
    assert verdicts == {
        ("a", 1, "bfloat16"): "same",
        ("gone", 1, "bfloat16"): "only in baseline",
        ("a", 2, "bfloat16"): "only in candidate",
        ("a", 1, "float16"): "only in candidate",
    }


def test_the_same_reports_always_compare_alike() -> None:
    old, new = a_report(timed(100.0)), a_report(timed(107.0))
    assert compare(old, new) == compare(old, new)
    first, other = (compare(old, new, seed=seed).speeds[0] for seed in (0, 1))
    assert (first.low, first.high) == pytest.approx((other.low, other.high), rel=0.005)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"machine": CPU | {"type": "cpu-64core"}}, "machine type: cpu-2core against cpu-64core"),
        ({"machine": CPU | {"cpu": "Another CPU"}}, "CPU: Some CPU against Another CPU"),
        ({"machine": CPU | {"cores": 4}}, "cores: 2 against 4"),
        ({"machine": CPU | {"instruction_set": "AVX2"}}, "instruction set: unknown against AVX2"),
        ({"machine": GPU}, "GPUs: none against 1 × NVIDIA H200"),
        ({"versions": {"torch": "2.13.0", "nccl": "2.28.9"}}, r"torch: 2\.11\.0 against 2\.13\.0"),
        ({"versions": {"torch": "2.11.0"}}, r"NCCL: 2\.28\.9 against none"),
    ],
)
def test_speeds_of_unlike_machines_are_refused_by_the_field_that_differs(changes: Any, field: str) -> None:
    old, new = a_report(timed(100.0)), a_report(timed(100.0), **changes)
    with pytest.raises(UnlikeMachinesError, match=field):
        compare(old, new)
    allowed = compare(old, new, allow_unlike=True)
    assert allowed.differences
    assert allowed.speeds[0].verdict == "same"


def test_another_driver_is_another_machine() -> None:
    other = GPU | {"gpus": [{"name": "NVIDIA H200", "driver": "590.2"}]}
    assert fingerprint(a_run(machine=GPU)) != fingerprint(a_run(machine=other))


def test_checks_of_unlike_machines_are_compared() -> None:
    comparison = compare(a_report(a_check()), a_report(a_check(), machine=GPU))
    assert comparison.exit_code == 0
    assert "GPUs" in comparison.differences


def test_hardware_that_was_slower_explains_and_fails_nothing() -> None:
    slow, fast = ({"copy_gb_per_s": [value] * 8} for value in (50.0, 100.0))
    old, new = (a_report(a_bench(workload=HARDWARE, samples=samples)) for samples in (fast, slow))
    comparison = compare(old, new, gate=True)
    assert [change.verdict for change in comparison.speeds] == ["slower"]
    assert (comparison.regressions, comparison.exit_code) == ([], 0)


@pytest.mark.parametrize(("machine", "gate", "level", "exit_code"), [
    (CPU, None, 120.0, 0), (CPU, None, 200.0, 1), (CPU, True, 120.0, 1), (CPU, False, 200.0, 0),
    (GPU, None, 120.0, 1), (GPU, False, 200.0, 0)])
def test_a_slower_row_fails_on_gpus_and_on_cpus_if_clearly_slower_or_on_request(
    machine: Any, gate: bool | None, level: float, exit_code: int
) -> None:
    old, new = a_report(timed(100.0), machine=machine), a_report(timed(level), machine=machine)
    comparison = compare(old, new, gate=gate)
    assert comparison.speeds[0].verdict == "slower"
    assert comparison.exit_code == exit_code


def test_a_cpu_run_whose_rows_are_all_twice_as_slow_is_a_regression() -> None:
    baseline = read_report("reports/baselines/cpu-2core-amd-epyc/smollm2-quick.json")
    slower = [row if row.workload == HARDWARE else replace(row, samples={
        metric: [value / 2 if metrics.direction(metric) == "higher" else 2 * value for value in values]
        for metric, values in row.samples.items()}) for row in baseline.benches]
    assert compare(baseline, replace(baseline, benches=slower)).exit_code == 1
    assert compare(baseline, baseline).exit_code == 0


@pytest.mark.parametrize(("machine_lost", "exit_code"), [(1.0, 1), (2.0, 0), (0.5, 1)])
def test_what_the_machine_itself_lost_is_allowed_for_on_a_cpu(machine_lost: float, exit_code: int) -> None:
    def report(level: float, rate: float) -> Report:
        return a_report(timed(level), a_bench(workload=HARDWARE, samples={"copy_gb_per_s": [rate] * 3}))

    comparison = compare(report(100.0, 50.0), report(200.0, 50.0 / machine_lost))
    assert comparison.exit_code == exit_code
    assert ("the machine itself was up to 2 times slower" in comparison_headline(comparison).detail) == (machine_lost == 2.0)


@pytest.mark.parametrize("spread", [1.0, 1.1, 1.2, 1.3])
def test_the_same_code_on_a_cpu_whose_speed_changes_from_run_to_run_fails_nothing(spread: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        old, new = (a_report(*(timed(100 * float(np.exp(rng.uniform(0, np.log(spread)))), case=str(i)) for i in range(12)))
                    for _ in range(2))
        assert compare(old, new).exit_code == 0


def test_a_comparison_of_unlike_machines_says_so_where_it_says_anything() -> None:
    old, new = a_report(timed(100.0)), a_report(timed(300.0), machine=CPU | {"cores": 64})
    comparison = compare(old, new, allow_unlike=True)
    assert comparison.exit_code == 0
    assert "unlike machines: cores 2 → 64" in comparison_headline(comparison).detail
    assert "The machines differ" in comparison_markdown(comparison)


def test_a_slower_row_on_an_unlike_gpu_machine_does_not_fail() -> None:
    other = GPU | {"type": "nvidia-other"}
    comparison = compare(a_report(timed(1.0), machine=GPU), a_report(timed(2.0), machine=other), allow_unlike=True)
    assert comparison.speeds[0].verdict == "slower"
    assert comparison.exit_code == 0


def check_with(verdict: str, error: float | None = None) -> CheckRow:
    return a_check(verdict=verdict, error_over_budget=error)


@pytest.mark.parametrize(
    ("before", "after", "verdict", "exit_code"),
    [
        (check_with("pass"), check_with("finding"), "broken", 1),
        (check_with("pass"), check_with("error"), "broken", 1),
        (check_with("skipped"), check_with("finding"), "new finding", 1),
        (None, check_with("finding"), "new finding", 1),
        (check_with("finding"), check_with("finding"), "still failing", 0),
        (check_with("error"), check_with("finding"), "still failing", 0),
        (check_with("finding"), check_with("pass"), "fixed", 0),
        (check_with("error"), check_with("pass"), "fixed", 0),
        (check_with("pass"), check_with("skipped"), "no longer compared", 0),
        (check_with("finding"), check_with("skipped"), "no longer compared", 0),
        (check_with("skipped"), check_with("pass"), "now compared", 0),
        (check_with("skipped"), check_with("skipped"), "same", 0),
        (check_with("pass", 0.2), check_with("pass", 0.44), "same", 0),
        (check_with("pass", 0.2), check_with("pass", 0.46), "worse error", 0),
        (check_with("pass"), check_with("pass", 0.3), "worse error", 0),
        (check_with("pass", 0.9), check_with("pass", 0.1), "same", 0),
        (check_with("pass"), None, "only in baseline", 3),
        (None, check_with("pass"), "only in candidate", 3),
        (None, check_with("error"), "only in candidate", 3),
    ],
)
def test_a_check_is_told_by_what_it_was_and_is(
    before: CheckRow | None, after: CheckRow | None, verdict: str, exit_code: int
) -> None:
    comparison = compare(a_report(*filter(None, [before])), a_report(*filter(None, [after])))
    assert [change.verdict for change in comparison.checks] == [verdict]
    assert comparison.exit_code == exit_code


def of_kind(kind: str, verdict: str = "pass", error: float | None = 0.2) -> CheckRow:
    return a_check("layers", kind=kind, verdict=verdict, error_over_budget=error)


@pytest.mark.parametrize(("before", "after", "verdicts"), [
    # Kind by kind where both sides have them.
    ([of_kind("row"), of_kind("row with bias")], [of_kind("row"), of_kind("row with bias", "finding", 3.0)],
     {"layers: row": "same", "layers: row with bias": "broken"}),
    ([of_kind("row"), of_kind("column")], [of_kind("row")], {"layers: row": "same", "layers: column": "only in baseline"}),
    # All kinds together where one side has none: a check that could not run, a record from before there were kinds.
    ([of_kind("row"), of_kind("row with bias")], [of_kind("", "error", None)], {"layers": "broken"}),
    ([of_kind("")], [of_kind("row"), of_kind("row with bias")], {"layers": "same"}),
    ([of_kind("")], [of_kind("row"), of_kind("row with bias", error=0.9)], {"layers": "worse error"}),
    ([of_kind("")], [of_kind("row"), of_kind("row with bias", "finding", None)], {"layers": "broken"}),
    ([of_kind("")], [], {"layers": "only in baseline"}),
])
def test_kinds_of_a_check_are_held_against_their_own(before: list[CheckRow], after: list[CheckRow],
                                                     verdicts: dict[str, str]) -> None:
    comparison = compare(a_report(*before), a_report(*after))
    assert {change.name: change.verdict for change in comparison.checks} == verdicts
    assert all(f"| {name} " in comparison_markdown(comparison) for name in verdicts)


def test_the_spread_of_errors_that_counts_is_a_setting() -> None:
    old, new = a_report(check_with("pass", 0.2)), a_report(check_with("pass", 0.46))
    assert compare(old, new, error_spread=0.3).checks[0].verdict == "same"


@pytest.mark.parametrize("settings", [{"smallest_effect": 0.0}, {"confidence": 1.0}, {"confidence": 0.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive and"):
        compare(a_report(), a_report(), **settings)  # type: ignore[arg-type]


def test_two_empty_reports_compare_nothing() -> None:
    assert compare(a_report(), a_report()).exit_code == 3


def test_junit_counts_regressions_as_failures_and_the_uncompared_as_skipped() -> None:
    old = a_report(a_check(), a_check("kv"), a_check("gone"), timed(1.0), timed(1.0, case="b"), machine=GPU)
    broken = a_check("kv", verdict="finding", message="a < b & \x1b[31m \udc80", replay="shardproof verify")
    new = a_report(a_check(), broken, timed(1.2), timed(1.0, case="b"), machine=GPU)
    root = ElementTree.fromstring(comparison_junit(compare(old, new)))
    counts = {s.get("name"): tuple(s.get(k) for k in ("tests", "failures", "skipped")) for s in root}
    assert counts == {"checks": ("3", "1", "1"), "speed": ("2", "1", "0")}
    for suite in root:
        for kind in ("failure", "skipped"):
            assert len(suite.findall(f"testcase/{kind}")) == int(suite.get(f"{kind}s".replace("skippeds", "skipped"), ""))
    failure = root.find(".//failure")
    assert failure is not None
    assert failure.text == "pass before, finding now\na < b & \\x1b[31m \\udc80\nRun it again: shardproof verify"


def test_the_json_of_a_comparison_has_every_row_and_the_exit_code() -> None:
    old = a_report(check_with("pass"), timed(1.0))
    new = a_report(check_with("finding", math.inf), timed(1.0))
    data = json.loads(comparison_json(compare(old, new)))
    assert (data["format"], data["exit_code"]) == ("shardproof-comparison", 1)
    assert data["checks"][0]["candidate_error"] == "inf"
    assert data["speeds"][0]["verdict"] == "same"
    assert data["baseline"]["machine"]["type"] == "cpu-2core"
