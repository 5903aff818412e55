"""Streams of log-probabilities: written and read back, resumed, and refused with the line and the reason."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from harness.verdict.streams import Scored, Stream, StreamError, StreamInfo, StreamWriter, read_stream, write_stream
from harness.verdict.tokens import DECODE, PREFILL, align

HEAD = {"format": "shardproof-logprobs", "format_version": 1, "source": "test"}
GOOD = {"token_ids": [5, 9, 2], "logprobs": [None, -1.25, -0.5]}


def a_file(folder: Path, *lines: Any) -> Path:
    path = folder / "stream.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def a_stream(*sequences: Scored, **info: Any) -> Stream:
    return Stream(info=StreamInfo(**({"source": "test"} | info)), sequences=sequences)


def a_sequence(token_ids: tuple[int, ...] = (5, 9, 2), **more: Any) -> Scored:
    return Scored(token_ids=token_ids, logprobs=(None, *(-0.5 for _ in token_ids[1:])), **more)


def test_a_trainer_writes_a_stream_in_three_lines_and_arrays_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "trainer.jsonl"
    with StreamWriter(path, source="my trainer", dtype="bfloat16") as stream:
        stream.write([5, 9, 2], [None, -1.25, -0.5])
        stream.write(np.array([5, 9, 3]), np.array([math.nan, -1.25, -0.75]))
    found = read_stream(path)
    assert found.info == StreamInfo(source="my trainer", dtype="bfloat16")
    assert [sequence.logprobs for sequence in found.sequences] == [(None, -1.25, -0.5), (None, -1.25, -0.75)]
    assert found.num_tokens == 4


def test_all_that_a_stream_can_say_comes_back(tmp_path: Path) -> None:
    sequence = a_sequence(decoded_from=2, batch_size=4, chunk=16, cached=1, top=({}, {9: -0.5, 1: -1.0}, {2: -0.5, 3: -2.0}),
                          rounding=(0.0, 1e-3, 2e-3))
    stream = a_stream(sequence, model="m", dtype="float16", tp_size=2, block_size=16, vocab_size=10)
    assert read_stream(write_stream(tmp_path / "s.jsonl", stream)) == stream


def test_a_parquet_table_is_a_stream_with_a_row_a_sequence(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed here: Parquet is an extra, parquet")
    path = tmp_path / "a.parquet"
    stream = a_stream(a_sequence((5, 9, 2), decoded_from=2, batch_size=4, top=({}, {9: -0.5, 1: -1.0}, {2: -0.5, 3: -2.0})),
                      a_sequence((5, 9, 3), batch_size=4, top=({}, {9: -0.5, 1: -1.0}, {3: -0.5})), dtype="float16", tp_size=2)
    info = {"source": "test", "dtype": "float16", "tp_size": 2}
    table = pd.DataFrame([{**info, "token_ids": list(one.token_ids), "logprobs": list(one.logprobs), "batch_size": 4,
                           "decoded_from": one.decoded_from, "top": [{str(k): v for k, v in at.items()} for at in one.top]}
                          for one in stream.sequences])
    assert table["decoded_from"].dtype == float  # what a missing one makes of whole numbers
    table.to_parquet(path)
    assert read_stream(path) == stream
    # By arrays, whose null is NaN.
    table["logprobs"] = pd.Series([np.array([math.nan, *values[1:]]) for values in table["logprobs"]])
    table["token_ids"] = pd.Series([np.array(ids) for ids in table["token_ids"]])
    table.to_parquet(path)
    assert read_stream(path) == stream
    assert parquet.read_table(path).num_rows == 2
    pd.concat([table, table.head(1)]).to_parquet(path)
    with pytest.raises(StreamError, match=r"line 3: the same tokens as in line 1"):
        read_stream(path)
    table.assign(logprobs=pd.Series([[None, -0.5], [None, 0.5, -0.5]])).to_parquet(path)
    with pytest.raises(StreamError, match=r"line 1: 2 logprobs for 3 token_ids"):
        read_stream(path)
    path.write_text("PAR1")
    with pytest.raises(StreamError, match="no Parquet"):
        read_stream(path)


def test_parquet_without_pyarrow_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(StreamError, match=r"pip install 'shardproof\[parquet\]'"):
        read_stream(tmp_path / "a.parquet")


def test_what_was_cut_short_is_gone_on_from_its_last_whole_line(tmp_path: Path) -> None:
    path = a_file(tmp_path, HEAD, GOOD, '{"token_ids": [1, 2')
    with pytest.raises(StreamError, match="line 3: cut short"):
        read_stream(path)
    with StreamWriter(path, resume=True, source="test") as stream:
        assert [sequence.token_ids for sequence in stream.done] == [(5, 9, 2)]
        stream.write([1, 2], [None, -3.0])
    assert [sequence.token_ids for sequence in read_stream(path).sequences] == [(5, 9, 2), (1, 2)]
    with pytest.raises(StreamError, match="begin another file"):
        StreamWriter(path, resume=True, source="another")


@pytest.mark.parametrize(("line", "says"), [
    ({"token_ids": [5, 9], "logprobs": [None, math.nan]}, r"logprobs\[1\]=nan must be a finite number"),
    ({"token_ids": [5, 9], "logprobs": [None, -math.inf]}, r"logprobs\[1\]=-inf must be"),
    ({"token_ids": [5, 9], "logprobs": [None, 0.5]}, "not above 0"),
    ({"token_ids": [5, 9, 2], "logprobs": [None, -1.0, None]}, r"logprobs\[2\]=None must be"),
    ({"token_ids": [5, 9, 2], "logprobs": [-1.0, -1.0]}, "2 logprobs for 3 token_ids"),
    ({"token_ids": [5, 9], "logprobs": [-1.0, -1.0]}, r"logprobs\[0\] must be null"),
    ({"token_ids": [5, 9], "logprobs": [None, None]}, "no logprob at all"),
    ({"token_ids": [5], "logprobs": [None]}, "two or more"),
    ({"token_ids": ["a", "b"], "logprobs": [None, -1.0]}, "text is no stream"),
    ({"prompt": "Hello", "logprobs": [None, -1.0]}, "text is no stream"),
    ({"token_ids": [5, 9], "logprobs": [None, -1.0], "top": [{}]}, "top has 1 entries for 2 tokens"),
    ({"token_ids": [5, 9], "logprobs": [None, -1.0], "top": [{}, {"x": "y"}]}, "top must be a list of objects"),
    ({"token_ids": [5, 9], "logprobs": [None, -1.0], "decoded_from": -1}, "decoded_from=-1 must be a whole number"),
    ({"token_ids": [5, 9], "logprobs": [None, -1.0], "decoded_from": 7}, "decoded_from=7 must be from 1 to 2"),
    ({"token_ids": "59", "logprobs": [None, -1.0]}, "token_ids must be a list"),
    ([1, 2], "must be an object"),
    (GOOD, "the same tokens as in line 2"),
    ("{]\n", "no JSON"),
], ids=str)
def test_what_is_no_sequence_is_refused_with_its_line(tmp_path: Path, line: Any, says: str) -> None:
    with pytest.raises(StreamError, match=f"line 3: .*{says}"):
        read_stream(a_file(tmp_path, HEAD, GOOD, line))


@pytest.mark.parametrize(("lines", "says"), [
    ([], "line 1 must be"), ([GOOD], "line 1 must be"), ([HEAD], "no sequence"),
    ([HEAD | {"format_version": 9}, GOOD], "reads 1"),
    ([HEAD | {"tp_size": "two"}, GOOD], "tp_size='two' must be int"),
], ids=str)
def test_what_is_no_stream_is_refused(tmp_path: Path, lines: list[Any], says: str) -> None:
    with pytest.raises(StreamError, match=says):
        read_stream(a_file(tmp_path, *lines))


def test_a_sequence_that_breaks_a_rule_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    with StreamWriter(path, source="test") as stream:
        stream.write([5, 9], [None, -1.0])
        for token_ids, logprobs, says in (([5, 9], [None, -1.0], "same tokens"), ([5, 8], [None, math.nan], "finite")):
            with pytest.raises(StreamError, match=says):
                stream.write(token_ids, logprobs)
    assert len(read_stream(path).sequences) == 1


def test_only_tokens_that_both_sides_scored_are_compared() -> None:
    a = a_stream(a_sequence((1, 2, 3, 4)), a_sequence((7, 8)), block_size=2)
    b = a_stream(Scored(token_ids=(1, 2, 3, 4), logprobs=(None, None, -1.0, -1.5)), a_sequence((7, 9)))
    tokens = align(a, b)
    assert tokens.position.tolist() == [2, 3]
    assert tokens.difference.tolist() == [0.5, 1.0]
    assert tokens.block.tolist() == [1, 0]  # of the token before, after which the logits are
    assert tokens.left_out == ("1 sequences are in A alone", "1 sequences are in B alone")
    with pytest.raises(StreamError, match="no scored token in common"):
        align(a_stream(a_sequence((1, 2))), a_stream(a_sequence((1, 3))))


def test_two_generations_are_compared_up_to_their_first_different_token() -> None:
    a = a_stream(a_sequence((1, 2, 3, 4, 5), decoded_from=2))
    b = a_stream(a_sequence((1, 2, 3, 9, 5), decoded_from=2))
    tokens = align(a, b)
    assert tokens.position.tolist() == [1, 2]
    assert tokens.phase.tolist() == [PREFILL, PREFILL]  # the first generated token comes of the prompt's last row
    assert "first different token" in tokens.left_out[0]
    assert align(a, a).phase.tolist() == [PREFILL, PREFILL, DECODE, DECODE]


def test_a_flip_is_told_with_the_margin_that_it_had_to_overcome() -> None:
    tops = ({1: -0.5, 2: -0.7}, {2: -0.4, 1: -0.9})
    a, b = (a_stream(a_sequence((1, 2), top=({}, top))) for top in tops)
    tokens = align(a, b)
    assert tokens.has_top
    assert tokens.flip.tolist() == pytest.approx([0.2])
    assert np.isnan(align(a, a).flip).all()


def test_a_prefix_that_was_there_before_is_known() -> None:
    stream = a_stream(a_sequence((1, 2, 3, 4, 5, 6)), a_sequence((1, 2, 3, 4, 9, 6)))
    assert align(stream, stream).repeated.tolist() == [0] * 5 + [1] * 3 + [0] * 2
