"""The answer on two streams: rounding, a bug, or nobody can tell; by each yardstick, with bugs of each shape planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

from engine import LLM, SamplingParams
from harness.cli import app
from harness.subjects.base import Placement
from harness.subjects.engine import EngineSubject
from harness.verdict.scoring import Way, logprobs_of, schedule, score, score_exactly, scored
from harness.verdict.sides import SideOptions, limits_of
from harness.verdict.statistics import judge, last_digits, looks_like, units
from harness.verdict.streams import Scored, Stream, StreamError, StreamInfo, StreamWriter, read_stream, write_stream
from harness.verdict.tokens import Tokens, align
from harness.verdict.verdict import verdict_row
from harness.verification.budgets import UNIT_ROUNDOFF
from reference.hf import Reference
from reports.records import read_report
from tests.harness.conftest import MakeModel
from tests.reference.tiny import small_config

VOCABULARY = 96
Bug = Callable[[Tokens], "np.ndarray[tuple[int], np.dtype[np.float64]]"]


def drawn(seed: int = 0, *, num_sequences: int = 24, length: int = 65) -> Stream:
    """Log-probabilities like those of a model."""
    draw = np.random.default_rng(seed)
    sequences = []
    for _ in range(num_sequences):
        ids = tuple(draw.integers(0, VOCABULARY, length).tolist())
        values = -draw.exponential(3.0, length - 1) - 1e-3
        sequences.append(Scored(token_ids=ids, logprobs=(None, *values.tolist()), batch_size=2, decoded_from=length - 12))
    return Stream(info=StreamInfo(source="A", dtype="bfloat16", vocab_size=VOCABULARY, block_size=16), sequences=tuple(sequences))


def moved(stream: Stream, by: Callable[[Tokens], object], source: str = "B") -> Stream:
    """The same with something added to each log-probability."""
    change = np.asarray(by(align(stream, stream)))
    at, sequences = 0, []
    for sequence in stream.sequences:
        count = len(sequence.token_ids) - 1
        values = np.minimum(0.0, np.array(sequence.logprobs[1:], dtype=np.float64) + change[at : at + count])
        sequences.append(replace(sequence, logprobs=(None, *values.tolist())))
        at += count
    return Stream(info=replace(stream.info, source=source), sequences=tuple(sequences))


def rounded(stream: Stream, seed: int, times: float = 1.0) -> Stream:
    """With what rounding of bfloat16 does: so many units of it, normally distributed."""
    draw = np.random.default_rng(seed)
    return moved(stream, lambda tokens: times * units(tokens, "bfloat16", "dtype") * draw.standard_normal(len(tokens)))


def test_rounding_is_called_rounding_by_every_yardstick() -> None:
    for seed in range(20):
        a = drawn(seed)
        b, again = rounded(a, seed + 100), rounded(a, seed + 200)
        tokens = align(a, b)
        assert judge(tokens, dtype="bfloat16").answer == "rounding"
        assert judge(tokens, dtype="bfloat16", noise=align(a, again)).answer == "rounding"
        measured = replace(tokens, rounding=units(tokens, "bfloat16", "dtype"))
        assert judge(measured, dtype="bfloat16").answer == "rounding"
        assert judge(align(a, a), dtype="bfloat16").answer == "rounding"


SHAPES: dict[str, tuple[Bug, str, str]] = {
    "everywhere": (lambda t: 0.7 * np.sin(np.arange(len(t)) * 1.7), "size", "scattered"),
    "one token": (lambda t: -3.0 * (np.arange(len(t)) == 700), "peak", "a few tokens"),
    "part 2 of 3 of the vocabulary": (lambda t: -0.3 * (t.token_id // 32 == 1), "where", "one part of the vocabulary"),
    "token id 17": (lambda t: -0.35 * (t.token_id == 17), "where", "single token ids"),
    "decode steps": (lambda t: 0.25 * np.where(t.phase == 1, np.sin(np.arange(len(t)) * 1.7), 0.0), "where", "only decode steps"),
    "the first token of a cache block": (lambda t: 0.3 * np.where(t.block == 0, np.cos(np.arange(len(t)) * 1.1), 0.0), "where",
                                         "borders of cache blocks"),
    "positions from 32 on": (lambda t: 0.12 * np.where(t.position >= 32, np.sin(np.arange(len(t)) * 1.7), 0.0), "where",
                             "only after so many tokens"),
    "sequence 5": (lambda t: 0.3 * np.where(t.sequence == 5, np.sin(np.arange(len(t)) * 1.7), 0.0), "where", "single sequences"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_bug_of_each_shape_is_seen_and_told_as_what_it_is(shape: str) -> None:
    bug, test, words = SHAPES[shape]
    a = drawn(1)
    judgement = judge(align(a, moved(rounded(a, 2, times=0.8), bug)), dtype="bfloat16", noise=align(a, rounded(a, 3, times=0.8)),
                      vocab_size=VOCABULARY)
    assert judgement.answer == "bug"
    found = {one.name: one for one in judgement.tests}[test]
    assert found.value > 1
    if test == "where":
        assert shape in found.group
    assert words in looks_like(judgement)


def test_a_shift_to_one_side_is_a_bug_even_where_it_is_small() -> None:
    a = drawn(1)
    shifted = moved(rounded(a, 2), lambda t: 0.9 * units(t, "bfloat16", "dtype"))
    judgement = judge(align(a, shifted), dtype="bfloat16", noise=align(a, rounded(a, 3)))
    assert judgement.answer == "bug"
    assert judgement.worst.name == "shift"


@pytest.mark.parametrize(("shared", "answer"), [(True, "rounding"), (False, "bug")])
def test_a_prefix_of_many_sequences_is_one_value_told_again(shared: bool, answer: str) -> None:
    """Three tokens that begin every sequence are off to one side by 1.5 units: chance, unless they are others each time."""
    draw = np.random.default_rng(0)
    sequences = []
    for one in drawn(1, num_sequences=12, length=33).sequences:
        first = (7, 8, 9, 10) if shared else tuple(draw.integers(0, VOCABULARY, 4).tolist())
        sequences.append(replace(one, token_ids=first + one.token_ids[4:], logprobs=(None, -3.0, -4.0, -5.0, *one.logprobs[4:])))
    a = replace(drawn(1), sequences=tuple(sequences))
    b, again = (moved(rounded(a, seed), lambda t: np.where(t.position <= 3, t.a - t.b, 0.0)) for seed in (2, 3))
    tokens, noise = (align(a, other) for other in (b, again))
    unit = units(tokens, "bfloat16", "dtype")
    off = np.where(tokens.position <= 3, np.where(shared, 1.5, 1.5 + 0.3 * draw.standard_normal(len(tokens))) * unit, 0.0)
    quiet = np.where(noise.position <= 3, 0.3 * draw.standard_normal(len(tokens)) * unit, 0.0)
    judgement = judge(replace(tokens, b=np.where(tokens.position <= 3, tokens.a - off, tokens.b)), dtype="bfloat16",
                      noise=replace(noise, b=np.where(noise.position <= 3, noise.a - quiet, noise.b)), vocab_size=VOCABULARY)
    assert judgement.answer == answer
    assert shared or "positions 1 to 3" in judgement.worst.group


def test_what_is_large_everywhere_and_larger_at_a_few_tokens_is_no_matter_of_a_few_tokens() -> None:
    """As a server's shard with its rows at the wrong place was: 7 units everywhere, a hundred at one place."""
    a = drawn(1)
    units_off = 60 * np.sin(np.arange(24 * 64) * 1.7)
    units_off[9] = -4000
    off = moved(a, lambda t: units(t, "bfloat16", "dtype") * units_off)
    judgement = judge(align(a, off), dtype="bfloat16")
    values = {test.name: test.value for test in judgement.tests}
    assert values["size"] > values["peak"] > 1
    assert looks_like(judgement).startswith("scattered over all tokens")


def test_few_tokens_an_unknown_dtype_and_sizes_in_between_tell_nothing() -> None:
    a = drawn(1)
    few = Stream(info=a.info, sequences=(replace(a.sequences[0], token_ids=a.sequences[0].token_ids[:20],
                                                 logprobs=a.sequences[0].logprobs[:20]),))
    assert judge(align(few, few), dtype="bfloat16").would_tell == ("more tokens",)
    assert "--dtype" in judge(align(a, a), dtype=None).would_tell[0]
    between = judge(align(a, rounded(a, 2, times=12.0)), dtype="bfloat16")
    assert between.answer == "can't tell"
    assert "--noise" in between.would_tell[0]
    assert between.would_tell[-1] == "both sides in float32"


def test_a_noise_run_without_noise_is_no_yardstick() -> None:
    a = drawn(1)
    judgement = judge(align(a, rounded(a, 2)), dtype="bfloat16", noise=align(a, a))
    assert (judgement.answer, judgement.yardstick) == ("rounding", "dtype")
    assert "differs from A in 0 tokens alone" in judgement.why


def test_numbers_with_few_decimals_are_not_called_a_bug_of_float32() -> None:
    a = drawn(1)
    a = replace(a, info=replace(a.info, dtype="float32"))
    printed = moved(a, lambda t: np.round(t.a, 4) - t.a)
    assert judge(align(a, printed), dtype="float32").answer == "rounding"
    assert judge(align(a, moved(a, lambda t: 1e-4 * np.sin(np.arange(len(t))))), dtype="float32").answer == "bug"


def test_a_token_that_is_almost_certain_hardly_moves() -> None:
    a = drawn(1)
    sure = moved(a, lambda t: -t.a - 1e-4 / 3)
    unit = units(align(sure, sure), "bfloat16", "dtype")
    assert unit.max() < 2e-3 * UNIT_ROUNDOFF["bfloat16"] + 1e-6


class _AllButCertain:
    """A reference whose model finds one token of four thousand all but certain, and all others as unlikely as each other."""

    def logits(self, sequences: list[tuple[int, ...]]) -> list[torch.Tensor]:
        draw = torch.Generator().manual_seed(0)
        logits_TV = torch.randn(len(sequences[0]), 4000, generator=draw, dtype=torch.float64) * 0.1
        logits_TV[torch.arange(len(sequences[0]) - 1), torch.tensor(sequences[0][1:])] = 17.0
        return [logits_TV]

    def copies_of_logits(self, token_ids: tuple[int, ...], copies: int) -> torch.Tensor:
        return self.logits([token_ids])[0].expand(copies, -1, -1)


def test_the_sum_over_the_vocabulary_rounds_in_float32_too() -> None:
    """What is small beside the largest term gets lost in the sum: here that is more than a last digit of the log-probability."""
    ids = tuple((37 * k) % 4000 for k in range(80))
    exact = cast("Reference", _AllButCertain())
    reference = Stream(info=StreamInfo(source="reference", dtype="float32", vocab_size=4000),
                       sequences=tuple(score_exactly(exact, [ids], dtype="float32")))
    logits_TV = exact.logits([ids])[0]
    computed = Stream(info=StreamInfo(source="B", dtype="float32", vocab_size=4000),
                      sequences=(scored(ids, logprobs_of(logits_TV.float(), ids, 0)),))
    tokens = align(computed, reference)
    assert np.abs(tokens.difference).max() > last_digits(tokens).max()
    assert judge(tokens, dtype="float32", vocab_size=4000).answer == "rounding"
    assert judge(replace(tokens, b=tokens.b + 4 * tokens.rounding), dtype="float32", vocab_size=4000).answer == "bug"


def test_a_schedule_runs_chunks_first_and_then_one_token_a_step() -> None:
    steps = schedule([tuple(range(10)), tuple(range(4))], Way(batch_size=2, chunk=4, decoded=3)).steps
    assert steps == (((0, 4), (1, 1)), ((0, 3), (1, 1)), ((0, 1), (1, 1)), ((0, 1), (1, 1)), ((0, 1),))


@pytest.fixture(scope="module")
def model(tiny_model: MakeModel) -> Path:
    return tiny_model(small_config("llama", vocab_size=VOCABULARY, max_position_embeddings=64), "bfloat16")


def test_the_engine_is_scored_by_the_logits_that_a_check_sees(model: Path) -> None:
    sequences = [tuple((7 * n + k * k) % VOCABULARY for k in range(20 + n)) for n in range(3)]
    way = Way(batch_size=2, chunk=8, decoded=2)
    with EngineSubject(Placement(tp_size=2, fabric="threads")) as subject:
        found = list(score(subject, model, sequences, way, dtype="bfloat16", vocab_size=VOCABULARY, num_top=2))
        logits = subject.logits(schedule(sequences[:2], way))[0]
    assert [one.token_ids for one in found] == sequences
    for one, of_one in zip(found, logits, strict=False):
        assert one.logprobs[1:] == tuple(logprobs_of(of_one, one.token_ids, 0).logprob_T.tolist())
        assert one.decoded_from == len(one.token_ids) - 2
        assert all(len(top) == 2 for top in one.top[1:])


def test_what_a_request_is_told_of_its_prompt_is_what_verdict_scores(model: Path) -> None:
    """``SamplingParams(prompt_logprobs=...)``, which has no decode steps: to the bit, where the same sequences share a step."""
    sequences = [tuple((7 * n + k * k) % VOCABULARY for k in range(20 + n)) for n in range(3)]
    params = SamplingParams(max_tokens=1, prompt_logprobs=2, temperature=0.0)
    with EngineSubject(Placement(tp_size=2, fabric="threads")) as subject:
        found = list(score(subject, model, sequences, Way(batch_size=3), dtype="bfloat16", vocab_size=VOCABULARY, num_top=2))
        with LLM(model, ranks=subject.ranks, skip_tokenizer_init=True, tensor_parallel_size=2, block_size=16, num_kv_blocks=12,
                 max_num_seqs=4, dtype="bfloat16") as llm:
            outputs = llm.generate([{"prompt_token_ids": list(ids)} for ids in sequences], params, use_tqdm=False)
    for one, output in zip(found, outputs, strict=True):
        told = [{token_id: entry.logprob for token_id, entry in (row or {}).items()} for row in output.prompt_logprobs or ()]
        assert len(told) == len(one.token_ids)
        assert [row[token_id] for row, token_id in zip(told[1:], one.token_ids[1:], strict=True)] == list(one.logprobs[1:])
        assert all(top.items() <= row.items() for top, row in zip(one.top[1:], told[1:], strict=True))


def test_of_two_dtypes_the_coarser_rounds_and_an_unknown_one_or_another_ones_reference_is_refused() -> None:
    a = drawn(1)

    def of(stream: Stream, dtype: str | None) -> Stream:
        return replace(stream, info=replace(stream.info, dtype=dtype))

    assert verdict_row(of(a, "float32"), of(rounded(a, 2), "bfloat16"), None).dtype == "bfloat16"
    assert verdict_row(of(a, None), of(rounded(a, 2), None), None).answer == "can't tell"
    with pytest.raises(StreamError, match=r"'A': 'fp8'.*give --dtype"):
        verdict_row(of(a, "fp8"), a, None)
    exact = tuple(replace(one, rounding=(0.01,) * len(one.token_ids)) for one in a.sequences)
    reference = of(replace(a, sequences=exact), "float16")
    with pytest.raises(StreamError, match="rounding of float16 does, and the other side computes in bfloat16"):
        verdict_row(a, reference, None)
    assert verdict_row(of(a, None), reference, None).yardstick == "reference"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["verdict", *map(str, arguments)])


def test_ranks_against_one_rank_and_against_the_reference_are_rounding(model: Path, tmp_path: Path) -> None:
    result = run(model, f"reference:{model}", "--tp", "2", "--fabric", "threads", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    row = read_report(tmp_path).verdict
    assert row is not None
    assert (row.answer, row.yardstick, row.dtype) == ("rounding", "reference", "bfloat16")
    assert row.compared > 500
    assert "decode steps" in row.comparison
    assert (tmp_path / "report.html").is_file()
    result = run(model, model, "--tp", "1,3", "--fabric", "threads", "--out", tmp_path)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("limit", ["sliding_window", "max_position_embeddings"])
def test_a_model_of_short_sequences_is_asked_for_short_ones(tiny_model: MakeModel, limit: str) -> None:
    """Longer ones the engine refuses: it has no windows."""
    model = tiny_model(small_config("mistral", vocab_size=VOCABULARY, max_position_embeddings=64) | {limit: 40})
    assert limits_of(str(model), SideOptions()) == limits_of(f"reference:{model}", SideOptions()) == (VOCABULARY, 39)


def test_other_weights_are_a_bug_and_a_file_is_scored_by_the_other_side(tiny_model: MakeModel, tmp_path: Path) -> None:
    other = tiny_model(small_config("llama", vocab_size=VOCABULARY, max_position_embeddings=64), "bfloat16", 7)
    trainer = replace(drawn(3, num_sequences=4, length=40), info=StreamInfo(source="a trainer"))
    stream = write_stream(tmp_path / "a.jsonl", trainer)
    result = run(stream, other, "--out", tmp_path)
    assert result.exit_code == 1, result.output
    row = read_report(tmp_path).verdict
    assert row is not None
    assert (row.answer, row.a, row.compared) == ("bug", "a trainer", 4 * 39)
    assert row.first.startswith("sequence 0, position 1,")
    assert "BUG" in result.stdout


def test_files_alone_are_judged_without_a_model(tmp_path: Path) -> None:
    a = drawn(1)
    paths = [write_stream(tmp_path / name, stream) for name, stream in (
        ("a.jsonl", a), ("b.jsonl", rounded(a, 2)), ("noise.jsonl", rounded(a, 3)))]
    result = run(paths[0], paths[1], "--noise", paths[2], "--out", tmp_path)
    assert (result.exit_code, result.stdout.splitlines()[0][:9]) == (0, "ROUNDING:")
    assert read_stream(paths[0]) == a
    result = run(paths[0], paths[1], "--out", tmp_path, "--json")
    assert result.stdout == (tmp_path / "report.json").read_text()


@pytest.mark.parametrize(("arguments", "code", "says"), [
    (("no_such.jsonl", "no_such.jsonl"), 2, "there is no such file"),
    (("ftp://host/x", "ftp://host/x", "--dtype", "float32"), 2, "a server's address is http://host:port"),
    (("http://host:1", "http://host:2"), 2, "no server says in which dtype it computes: give --dtype, one of"),
    (("a.jsonl", "b.jsonl", "--tp", "0"), 2, "tp='0'"),
    (("a.jsonl", "b.jsonl", "--dtype", "int4"), 2, "dtype='int4' is unknown"),
    (("STREAM", "STREAM", "--tp", "1,2,4"), 2, "3 numbers for 0 model folders"),
    (("STREAM", "BROKEN"), 3, "line 1 must be"),
])
def test_what_can_not_be_compared_is_told_in_a_line(tmp_path: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    names = {"STREAM": str(write_stream(tmp_path / "s.jsonl", drawn(1))), "BROKEN": str(tmp_path / "broken.jsonl")}
    Path(names["BROKEN"]).write_text("{}\n")
    result = run(*(names.get(word, word) for word in arguments), "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert len(result.stderr.splitlines()) == 1
    assert says in result.stderr


def test_a_trainer_is_rounding_with_equal_weights_and_a_bug_one_step_later(model: Path, tmp_path: Path) -> None:
    """As docs/verdict.md has it: a forward in training mode writes its side, the engine's rollout scores the same tokens."""
    trainer = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).train()
    optimizer = torch.optim.AdamW(trainer.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(0)
    batch = torch.randint(0, VOCABULARY, (12, 48), generator=draw)

    def write(path: Path) -> Path:
        logits = trainer(batch).logits.float()
        logprobs = logits[:, :-1].log_softmax(-1).gather(-1, batch[:, 1:, None]).squeeze(-1)
        with StreamWriter(path, source="a trainer", dtype="bfloat16") as stream:
            for token_ids, values in zip(batch.tolist(), logprobs.tolist(), strict=True):
                stream.write(token_ids, [None, *values])
        loss = -logprobs.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return path

    equal, later = write(tmp_path / "equal.jsonl"), write(tmp_path / "later.jsonl")
    for stream, code in ((equal, 0), (later, 1)):
        result = run(stream, model, "--tp", "2", "--fabric", "threads", "--out", tmp_path)
        assert result.exit_code == code, result.output
