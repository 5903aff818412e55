"""Options of ``LLM`` by vLLM's names: another dtype's name, no tokenizer, other values for RoPE, a revision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, EngineConfig, SamplingParams
from engine.config import ModelConfig
from tests.engine.served import PROMPTS, open_llm, plain

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=1)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(("name", "dtype"), [("half", "float16"), ("float", "float32"), ("bfloat16", "bfloat16")])
def test_a_dtype_may_have_vllms_name(name: str, dtype: str) -> None:
    assert EngineConfig(dtype=name).dtype == dtype
    assert EngineConfig(dtype=name) == EngineConfig(dtype=dtype)


def test_without_a_tokenizer_tokens_come_and_texts_stay_empty(talking: Path) -> None:
    with open_llm(talking, 1) as llm, open_llm(talking, 1, skip_tokenizer_init=True) as silent:
        assert silent.tokenizer is None
        ids = [[one.token_ids for one in output.outputs] for output in llm.generate(PROMPTS, GREEDY)]
        outputs = silent.generate(PROMPTS, GREEDY)
        assert [[one.token_ids for one in output.outputs] for output in outputs] == ids
        assert {one.text for output in outputs for one in output.outputs} == {""}
        with pytest.raises(ValueError, match="a text prompt needs a tokenizer"):
            silent.generate("ab", GREEDY)
        with pytest.raises(ValueError, match="none was loaded"):
            silent.get_tokenizer()
    with pytest.raises(ValueError, match="skip_tokenizer_init=True and tokenizer='x' exclude each other"):
        LLM(talking, skip_tokenizer_init=True, tokenizer="x", device="cpu")


@pytest.mark.parametrize("overrides", [
    {"rope_theta": 100.0}, {"rope_parameters": YARN}, {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"max_position_embeddings": 96}, {"rope_scaling": YARN, "rope_theta": 500.0, "max_position_embeddings": 64},
], ids=str)
def test_other_values_for_rope_are_those_of_a_config_that_has_them(
    talking: Path, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    folder = tmp_path / "written"
    shutil.copytree(talking, folder)
    config = json.loads((folder / "config.json").read_text())
    theta = config["rope_parameters"]["rope_theta"]
    changed = dict(overrides)
    rope = {**(changed.pop("rope_parameters", None) or changed.pop("rope_scaling", None) or config["rope_parameters"])}
    rope = {"rope_type": rope.pop("type", "default"), "rope_theta": theta, **rope}
    if "rope_theta" in changed:
        rope["rope_theta"] = changed.pop("rope_theta")
    (folder / "config.json").write_text(json.dumps({**config, **changed, "rope_parameters": rope}))
    written, given = ModelConfig.from_folder(folder), ModelConfig.from_folder(talking, overrides)
    assert given.hf_config.rope_parameters == written.hf_config.rope_parameters
    assert given.max_position_embeddings == written.max_position_embeddings
    file = ModelConfig.from_folder(talking)
    assert (given.hf_config.rope_parameters, given.max_position_embeddings) != (
        file.hf_config.rope_parameters, file.max_position_embeddings)


def test_other_values_for_rope_reach_every_rank(talking: Path) -> None:
    with open_llm(talking, 1) as llm:
        before = llm.generate(PROMPTS, GREEDY)
    answers = []
    for tp_size in (1, 2):
        with open_llm(talking, tp_size, hf_overrides={"rope_theta": 3.0}) as llm:
            outputs = llm.generate(PROMPTS, GREEDY)
        answers.append(plain(outputs))
        told = [found for output in outputs for found in (output.prompt_logprobs or [])[1:]]
        told_before = [found for output in before for found in (output.prompt_logprobs or [])[1:]]
        assert told != told_before
    assert answers[0] == answers[1]


@pytest.mark.parametrize("overrides", [{"hidden_size": 8}, {"rope_theta": 1.0, "vocab_size": 3}, ["rope_theta"], "rope_theta", 5])
def test_other_overrides_are_refused(talking: Path, overrides: Any) -> None:
    with pytest.raises(ValueError, match=r"^hf_overrides=.* must be a mapping with no other keys than rope_parameters, "):
        LLM(talking, hf_overrides=overrides, device="cpu")


def test_a_value_that_can_not_be_is_refused_by_its_key(talking: Path) -> None:
    with pytest.raises(ValueError, match="rope_theta"):
        LLM(talking, hf_overrides={"rope_theta": -1.0}, device="cpu")


def test_a_folder_has_no_revision(talking: Path) -> None:
    with pytest.raises(ValueError, match="revision='main' is of a hub id"):
        LLM(talking, revision="main", device="cpu")
