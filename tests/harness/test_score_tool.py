"""Another tool scored on pairs of streams: what it is given, what it may answer, and what is counted."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness.cli import app
from harness.errors import CouldNotRunError
from harness.studies.score.pairs import Pair
from harness.studies.score.tool import BESIDE, Blind, ScorePlan, ask, blinded, score_tool
from harness.verdict.streams import Scored, Stream, StreamInfo
from reports.verdict_tables import faults_table, scores_table

PAGE = Path(__file__).parents[2] / "docs" / "scoreboard.md"


def a_stream(source: str, off: float = 0.0) -> Stream:
    sequences = tuple(Scored(token_ids=(1, 2, last), logprobs=(None, -1.0, -2.0 - off), batch_size=2) for last in range(3, 60))
    return Stream(info=StreamInfo(source=source, model="uneven heads", dtype="float32", tp_size=4, block_size=16, vocab_size=96),
                  sequences=sequences)


@pytest.fixture
def pair() -> Pair:
    return Pair(name="lost-float32-0", planted="lost", dtype="float32", tp_size=4, num_layers=2, a=a_stream("engine, tp 1"),
                b=a_stream("engine, tp 4", 0.5), noise=a_stream("engine, tp 4", 1e-7), reference=None, whole=None)


def a_tool(folder: Path, source: str) -> Path:
    path = folder / "tool.py"
    path.write_text(source)
    return path


def test_a_tool_is_given_two_files_that_say_nothing_of_where_they_come_from(tmp_path: Path, pair: Pair) -> None:
    faulty, clean = blinded(pair)
    assert (faulty.planted, clean.planted) == ("lost", "")
    assert (faulty.b.sequences, clean.b.sequences) == (pair.b and pair.b.sequences, pair.noise.sequences)
    keeps = "import sys, json, pathlib\nout = pathlib.Path(__file__).parent\n" \
            "texts = [pathlib.Path(path).read_text() for path in sys.argv[1:]]\n" \
            "(out / sys.argv[0].replace('/', '_')[-3:]).write_text('')\n" \
            "(out / 'seen.json').write_text(json.dumps([sys.argv[1:], texts]))\nprint('rounding\\n')\n"
    heads = []
    for one in (faulty, clean):
        assert ask(a_tool(tmp_path, keeps), one) == "rounding"
        paths, texts = json.loads((tmp_path / "seen.json").read_text())
        assert [Path(path).name for path in paths] == ["a.jsonl", "b.jsonl"]
        assert not any(word in text for text in texts for word in ("lost", "uneven", "engine", "tp_size"))
        heads.append([text.splitlines()[0] for text in texts])
        assert [text.count("token_ids") for text in texts] == [57, 57]
    assert heads[0] == heads[1]


@pytest.mark.parametrize(("source", "answer"), [
    ("print('bug')", "bug"), ("print('looking at it'); print(\"can't tell\"); print()", "can't tell"),
])
def test_the_last_line_that_is_printed_is_the_answer(tmp_path: Path, pair: Pair, source: str, answer: str) -> None:
    assert ask(a_tool(tmp_path, source), blinded(pair)[0]) == answer


@pytest.mark.parametrize(("source", "says"), [
    ("1 / 0", r"exit code 1 and '' as its last line.*it says: ZeroDivisionError"),
    ("print('bug'); raise SystemExit(1)", "exit code 1 and 'bug'"),
    ("print('maybe')", "exit code 0 and 'maybe' as its last line: it must end with 0 and print bug, rounding or can't tell"),
    ("import time; time.sleep(60)", "did not answer within 0.5 s"),
], ids=["crashes", "by exit code", "another word", "hangs"])
def test_a_tool_that_does_not_answer_is_told(tmp_path: Path, pair: Pair, source: str, says: str) -> None:
    with pytest.raises(CouldNotRunError, match=says):
        ask(a_tool(tmp_path, source), blinded(pair)[0], timeout_s=0.5 if "sleep" in source else 60.0)


def test_answers_are_counted_by_dtype_and_fault(tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs are told apart by what is in them alone: the tool calls 0.5 a bug, and what has no log-probability of its own."""
    tool = a_tool(tmp_path, "import sys\nprint('bug' if '-2.5' in open(sys.argv[2]).read() else 'rounding')\n")
    found: dict[tuple[str, str], Pair | None] = {
        ("reduced-twice", "bfloat16"): replace(pair, planted="reduced-twice", dtype="bfloat16"),
        ("reduced-twice", "float32"): replace(pair, planted="reduced-twice"),
        ("never-reduced", "float32"): replace(pair, planted="never-reduced", b=pair.noise),
        ("never-reduced", "bfloat16"): replace(pair, planted="never-reduced", b=None),  # NaN
    }
    monkeypatch.setattr("harness.studies.score.tool.faulty_pair", lambda models, fault, dtype, seed, **options:
                        found.get((fault.name, dtype)))
    told: list[tuple[str, int, int]] = []
    report = score_tool(ScorePlan(tool=tool, only=("reduced-twice", "never-reduced")), lambda *step: told.append(step))
    assert told[-1] == ("pairs judged", 6, 6)
    table = scores_table(report.scores).set_index("rule")
    counted = table.loc["tool.py"].to_dict()
    assert [counted[name] for name in ("clean pairs", "called a bug", "faulty pairs")] == [3, 0, 3]
    assert (counted["percent of faults seen, float32"], counted["percent of faults seen, bfloat16"]) == (50, 100)
    assert set(table.index) == {"tool.py", BESIDE}
    assert faults_table(report.scores).set_index("fault")["tool.py"].to_dict() == {"reduced-twice": "2/2", "never-reduced": "0/1"}
    assert report.exit_code == 0
    found.clear()
    with pytest.raises(CouldNotRunError, match="none of them changes a log-probability"):
        score_tool(ScorePlan(tool=tool, only=("reduced-twice",)))


def test_pairs_come_in_an_order_that_tells_nothing(tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def note(tool: Path, one: Blind, timeout_s: float) -> str:
        asked.append(one.planted)
        return "rounding"

    monkeypatch.setattr("harness.studies.score.tool.ask", note)
    monkeypatch.setattr("harness.studies.score.tool.faulty_pair", lambda *arguments, **options: pair)
    orders = []
    for seed in (0, 1):
        asked.clear()
        score_tool(ScorePlan(tool=a_tool(tmp_path, ""), only=("reduced-twice", "never-reduced"), seed=seed))
        orders.append(list(asked))
    assert sorted(orders[0]) == sorted(orders[1]) == ["", "", "", "", "", "", *(["lost"] * 6)]
    assert orders[0] != orders[1] != sorted(orders[1])


@pytest.mark.slow
@pytest.mark.multirank
def test_the_tool_on_the_page_sees_a_sum_that_is_doubled_and_leaves_the_clean_pair_alone(tmp_path: Path) -> None:
    (source,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(source.splitlines()) <= 10
    report = score_tool(ScorePlan(tool=a_tool(tmp_path, source), only=("reduced-twice",), dtypes=("float32",)))
    said = {(row.planted, row.rule): (row.bug, row.runs) for row in report.scores}
    for rule in ("tool.py", BESIDE):
        assert said["", rule] == (0, 1)
        assert said["reduced-twice", rule] == (1, 1)


@pytest.mark.parametrize(("arguments", "says"), [
    (["--score", "no_such.py"], "there is no such file"),
    (["--score", __file__, "--tp", "2"], "leave out --tp"),
    (["--score", __file__, "--only", "aborted-request-goes-on"], "can't be planted for log-probabilities"),
])
def test_what_can_not_be_scored_is_refused_before_anything_runs(tmp_path: Path, arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["faults", *arguments, "--out", str(tmp_path)])
    assert result.exit_code == 2, result.output
    assert says in result.stderr
