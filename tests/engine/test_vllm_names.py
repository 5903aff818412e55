"""What docs/vllm_names.md says is there is there, and nothing else is; what it says is missing is refused by name."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from typing import Any

import pytest

from engine import LLM, CompletionOutput, EngineConfig, RequestOutput, SamplingParams
from tests.engine.rank_jobs import ROOT

PAGE = (ROOT / "docs" / "vllm_names.md").read_text(encoding="utf-8")


def listed(heading: str, label: str) -> set[str]:
    """The names after a label, up to the paragraph's next label; what stands in brackets explains them."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    text = re.search(rf"^{label}: (.*?)\.$", section, re.MULTILINE | re.DOTALL)
    return set(re.findall(r"`([a-z_]+)`", re.sub(r"\(.*?\)", "", text[1]))) if text else set()


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


OPTIONS = {field.name for field in fields(EngineConfig)} | set(inspect.signature(LLM.__init__).parameters) - {"self", "options"}
SECTIONS: dict[str, set[str]] = {
    "`LLM`: methods": public(LLM), "`LLM`: options": OPTIONS,
    "`SamplingParams`": {field.name for field in fields(SamplingParams)},
    "`RequestOutput`": public(RequestOutput), "`CompletionOutput`": public(CompletionOutput),
}


@pytest.mark.parametrize("heading", SECTIONS)
def test_the_page_lists_every_name_there_is(heading: str) -> None:
    there, own, missing = (listed(heading, label) for label in ("There", "Of our own", "Not there"))
    assert there | own == SECTIONS[heading]
    assert not there & own
    assert missing
    assert not missing & SECTIONS[heading]


@pytest.mark.parametrize("name", sorted(listed("`SamplingParams`", "Not there")))
def test_a_parameter_that_is_missing_is_named(name: str) -> None:
    given: dict[str, Any] = {name: 1}
    with pytest.raises(TypeError, match=name):
        SamplingParams(**given)


@pytest.mark.parametrize("name", sorted(listed("`LLM`: options", "Not there")))
def test_an_option_that_is_missing_is_named_before_the_model_is_looked_for(name: str) -> None:
    given: dict[str, Any] = {name: 1}
    with pytest.raises(TypeError, match=f"LLM has no option {name}: "):
        LLM("/no/such/folder", **given)
