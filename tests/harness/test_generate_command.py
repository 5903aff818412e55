"""``shardproof generate``: the text alone on standard output, as a chat where the model knows how."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine import LLM, SamplingParams
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
