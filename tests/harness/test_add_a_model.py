"""The page docs/add_a_model.md: its steps, done as they stand, give a family that loads and is green; a mistake is red."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import engine.models
from engine.checkpoint.checkpoint_files import CheckpointError
from engine.config import ModelConfig, UnsupportedModelError
from engine.models.registry import FAMILIES
from harness.verification.verify import VerifyPlan, verify
from reports.records import Report
from tests.harness.conftest import MakeModel

PAGE = Path(__file__).parents[2] / "docs" / "add_a_model.md"
CONFIG = {
    "model_type": "seed_oss", "vocab_size": 131, "hidden_size": 40, "intermediate_size": 53, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 96, "attention_bias": True,
    "attention_out_bias": True, "mlp_bias": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}
AddFamily = Callable[..., None]


@pytest.fixture
def add_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AddFamily:
    """``add_family(change)``: what the page says, its file in a folder of the test's own, with ``change`` made to its text."""

    def add(change: Callable[[str], str] = lambda text: text) -> None:
        page = PAGE.read_text(encoding="utf-8")
        (name,) = re.findall(r"^`engine/models/(\w+\.py)`:$", page, flags=re.MULTILINE)
        file, line = re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
        (tmp_path / name).write_text(change(file))
        monkeypatch.setattr(engine.models, "__path__", [*engine.models.__path__, str(tmp_path)])
        (family,) = ast.literal_eval(f"{{{line}}}").items()
        monkeypatch.setitem(FAMILIES, *family)
        monkeypatch.delitem(sys.modules, family[1], raising=False)

    return add


def verified(folder: Path) -> Report:
    return verify(VerifyPlan(model="seed-oss", folder=folder, tp_sizes=(2,), fabric="threads", checks=("weights", "logits")))


def test_a_family_that_nobody_added_is_refused(tiny_model: MakeModel) -> None:
    with pytest.raises(UnsupportedModelError, match="model_type='seed_oss'"):
        ModelConfig.from_folder(tiny_model(CONFIG))


def test_the_pages_steps_give_a_family_that_is_green(tiny_model: MakeModel, add_family: AddFamily) -> None:
    add_family()
    report = verified(tiny_model(CONFIG))
    assert {row.verdict for row in report.checks} == {"pass"}
    assert sum(row.compared for row in report.checks) > 0


def test_a_field_that_is_read_wrong_is_refused_by_the_name_of_its_tensor(tiny_model: MakeModel, add_family: AddFamily) -> None:
    add_family(lambda text: text.replace("config.attention_out_bias", "False"))
    with pytest.raises(CheckpointError, match=r"not in the model: .*o_proj\.bias"):
        verified(tiny_model(CONFIG))
