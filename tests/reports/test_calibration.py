import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from reports.calibration import alarms_table, calibration_tables, settings_table
from reports.calibration_plots import calibration_plots, write_calibration_plots
from reports.markdown import report_markdown
from reports.pages import report_html
from reports.records import Calibration, ErrorRow, PowerRow, Report, Tolerance, read_report, write_report
from reports.typed_json import RecordError
from reports.verdict_rows import at_most
from tests.reports.builders import a_check, a_report, a_run

QUANTILES = {"0.5": 1.0, "0.99": 2.0, "1": 3.0}
TOLERANCE = Tolerance(statistic="row", k=3.0, c=2.0, fitted_k=3.0, fitted_c=2.0, margin=1.5, samples=12, worst=0.66,
                      precision="bfloat16, float16")
ERRORS = ErrorRow(kind="logits, drawn orders", statistic="row", dtype="bfloat16", tp_size=2, samples=12, lucky=1,
                  candidate=QUANTILES, baseline=QUANTILES, ratio=QUANTILES, needs_k=2.5, needs_c=1.0,
                  cloud=[[-4, 0, 8], [0, 4, 4]])
POWER = PowerRow(check="layers", values="reals", dtype="bfloat16", tp_size=2, cases=9, per_run=8, half=0.0078125, most=None,
                 run=0.03125, seen=[[0.0078125, 0.5], [0.03125, 0.875]])


def calibrated() -> Report:
    rows = [a_check("layers", tp_size, cases=150, extra={"runs": 3, "false_alarms": 0}) for tp_size in (1, 2)]
    return Report(run=a_run(command="calibrate"), checks=rows,
                  calibration=Calibration(tolerances=[TOLERANCE], errors=[ERRORS], powers=[POWER]))


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = write_report(tmp_path, calibrated())
    assert read_report(path) == calibrated()
    lines = path.read_text().splitlines()
    assert sum(line.startswith('      {"kind": "logits') for line in lines) == 1, "rows stand one a line"


def test_other_reports_say_nothing_of_calibration(tmp_path: Path) -> None:
    path = write_report(tmp_path, a_report())
    assert '"calibration"' not in path.read_text()
    assert calibration_tables(a_report()) == {}


def test_two_rows_of_one_key_are_refused() -> None:
    with pytest.raises(RecordError, match=r"powers\[1\]: is the same row as powers\[0\]"):
        Calibration(powers=[POWER, POWER])


def test_all_tables_stand_in_the_markdown_and_on_the_page() -> None:
    text, page = report_markdown(calibrated()), report_html(calibrated())
    for heading in ("Tolerances", "False alarms", "False alarms by setting", "Power", "Errors of correct code"):
        assert f"## {heading}\n" in text
        assert f"<h2>{heading}</h2>" in page
    assert page.count("data:image/svg+xml;base64,") == 2


def test_red_runs_are_counted_over_all_layouts_and_settings_of_a_check() -> None:
    rows = [replace(a_check("layers", 1, cases=100, extra={"runs": 10, "false_alarms": 0}), model="AVX2"),
            replace(a_check("layers", 2, "finding", cases=200, message="x", extra={"runs": 20, "false_alarms": 3}), model="SSE4"),
            a_check("fit", 1, cases=5)]
    (line,) = alarms_table(rows).to_dict("records")
    assert (line["check"], line["runs"], line["red runs"], line["cases"]) == ("layers", 30, 3, 300)
    assert line["rate at most"] == at_most(3, 30)
    assert line["rate a case at most"] == at_most(3, 300)
    (line,) = settings_table(rows).to_dict("records")
    assert (line["AVX2"].split()[0], line["SSE4"].split()[0]) == ("0/10", "3/20")


def test_plots_name_what_they_show_and_their_units(tmp_path: Path) -> None:
    paths = write_calibration_plots(calibrated().calibration or Calibration(), tmp_path)
    assert [path.name for path in paths] == ["errors.svg", "power.svg"]
    for path, words in zip(paths, (("row: the worst row", "roundoffs of its scale", "k = 3, c = 2", "logits, drawn orders",
                                    "bfloat16, float16"),
                                   ("layers: one case", "relative error in one rank's part", "bfloat16, tp 2")), strict=True):
        root = ET.fromstring(path.read_text())
        text = " ".join("".join(item.itertext()) for item in root.iter())
        assert all(word in text for word in words), path.name


def test_without_rows_there_is_no_plot() -> None:
    assert calibration_plots(Calibration()) == {}


def test_a_plot_is_the_same_bytes_each_time() -> None:
    calibration = calibrated().calibration or Calibration()
    assert calibration_plots(calibration) == calibration_plots(calibration)
