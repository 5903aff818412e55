"""``shardproof generate``: the text alone on standard output, as a chat where the model knows how."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from engine import LLM, SamplingParams
from engine.frontend.outputs import RequestOutput
from engine.llm import Stream
from harness.cli import app
from tests.engine.talking import talking_checkpoint

OPTIONS = ["--device", "cpu", "--max-tokens", "24", "--temperature", "1", "--seed", "7"]
PARAMS = SamplingParams(max_tokens=24, temperature=1.0, seed=7)


@pytest.mark.parametrize("template", ["ab {{ messages[0]['content'] }} a", None], ids=["chat", "plain"])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_text_comes_out_alone(tmp_path: Path, template: str | None, tp_size: int) -> None:
    folder = talking_checkpoint(tmp_path, chat_template=template)
    fabric = ["--tp", str(tp_size), "--fabric", "threads" if tp_size > 1 else "solo"]
    result = CliRunner().invoke(app, ["generate", str(folder), "ba", *OPTIONS, *fabric])
    with LLM(folder, device="cpu") as llm:
        chat = [{"role": "user", "content": "ba"}]
        (expected,) = llm.generate("ba", PARAMS) if template is None else llm.chat(chat, PARAMS)
    assert expected.outputs[0].text
    assert result.stdout == expected.outputs[0].text + "\n"
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [("ba" * 200, [], "leaves no room to generate in max_model_len=192"), ("ba", ["--max-tokens", "0"], "max_tokens=0 must be")],
    ids=["long prompt", "no tokens"],
)
def test_wrong_usage_is_told_on_standard_error(tmp_path: Path, prompt: str, options: list[str], said: str) -> None:
    folder = talking_checkpoint(tmp_path, chat_template=None)
    result = CliRunner().invoke(app, ["generate", str(folder), prompt, *OPTIONS, *options])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert said in result.stderr


def texts_of(folder: Path, params: SamplingParams, prompt: str = "ba") -> list[str]:
    with LLM(folder, device="cpu") as llm:
        (output,) = llm.generate(prompt, params)
    return [completion.text for completion in output.outputs]


def generated(folder: Path, *words: str, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, ["generate", str(folder), *words], input=stdin)
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("plain"), chat_template=None)


@pytest.mark.parametrize("words", [["-"], []], ids=["dash", "left out"])
@pytest.mark.parametrize("stdin", ["ba", "ba\n"])
def test_a_prompt_comes_from_standard_input(plain: Path, words: list[str], stdin: str) -> None:
    assert generated(plain, *words, *OPTIONS, stdin=stdin).stdout == texts_of(plain, PARAMS)[0] + "\n"


def test_an_empty_standard_input_is_no_prompt(plain: Path) -> None:
    result = CliRunner().invoke(app, ["generate", str(plain)], input="")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "prompt is missing" in result.stderr


@pytest.mark.parametrize(("words", "changes"), [
    (["--top-p", "0.5"], {"top_p": 0.5}),
    (["--top-k", "2"], {"top_k": 2}),
    (["--stop", "b", "--stop", "a"], {"stop": ["b", "a"]}),
])
def test_sampling_options_are_the_engines(plain: Path, words: list[str], changes: dict[str, Any]) -> None:
    expected = texts_of(plain, replace(PARAMS, **changes))[0]
    assert expected != texts_of(plain, PARAMS)[0], "the option makes a difference"
    assert generated(plain, "ba", *OPTIONS, *words).stdout == expected + "\n"


@pytest.mark.parametrize("option", ["-n", "--n"])
def test_several_completions_come_in_their_order(plain: Path, option: str) -> None:
    expected = texts_of(plain, replace(PARAMS, n=3))
    assert len(set(expected)) == 3
    assert generated(plain, "ba", *OPTIONS, option, "3").stdout == "\n".join(f"{text}\n" for text in expected)


def test_ctrl_c_ends_the_line_and_says_so(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, items = Stream.__next__, []

    def press_after_three(stream: Stream) -> Any:
        if len(items) == 3:
            raise KeyboardInterrupt
        items.append(real(stream))
        return items[-1]

    monkeypatch.setattr(Stream, "__next__", press_after_three)
    result = CliRunner().invoke(app, ["generate", str(plain), "ba", *OPTIONS])
    text = "".join(completion.text for item in items for completion in item.outputs)
    assert (result.exit_code, result.stdout, result.stderr) == (3, f"{text}\n", "interrupted\n")


def test_a_request_that_ends_with_an_error_is_told(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Stream] = []

    def refused(stream: Stream) -> Any:
        if asked:
            raise StopIteration
        asked.append(stream)
        return RequestOutput(request_id=0, prompt="ba", prompt_token_ids=[1], finished=True, error="planted: step 3")

    monkeypatch.setattr(Stream, "__next__", refused)
    result = CliRunner().invoke(app, ["generate", str(plain), "ba", *OPTIONS])
    assert (result.exit_code, result.stderr) == (3, "error: planted: step 3\n")
