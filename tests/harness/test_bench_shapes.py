"""Models by the name of their shape: written once, whole or not at all, and the same for every command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from harness.bench import shapes
from harness.bench.shapes import NO_SPECIAL_TOKENS, SHAPES, model_folder
from harness.cli import app
from reference.checkpoints import CheckpointError, as_config, weight_shapes
from reports.records import read_report
from tests.reference.tiny import tiny_config


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(shapes.SHAPES, "tiny-shape", tiny_config())  # type: ignore[arg-type]
    monkeypatch.setenv("SHARDPROOF_CACHE", str(tmp_path))
    return tmp_path


def test_a_shape_is_written_once_in_the_dtype_asked_for(cache: Path) -> None:
    folder = model_folder("tiny-shape")
    assert folder == cache / "shapes" / "tiny-shape-bfloat16"
    assert {str(tensor.dtype) for tensor in load_file(folder / "model.safetensors").values()} == {"torch.bfloat16"}
    written_at = (folder / "model.safetensors").stat().st_mtime_ns
    assert model_folder("tiny-shape") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written_at
    assert model_folder("tiny-shape", dtype="float32") == cache / "shapes" / "tiny-shape-float32"
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] is None


def test_a_shape_that_could_not_be_written_whole_is_not_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(folder: Path, *args: object, **options: object) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("reference.checkpoints.random_checkpoint", half)
    with pytest.raises(KeyboardInterrupt):
        model_folder("tiny-shape")
    assert not list((cache / "shapes").iterdir())


def test_unknown_dtypes_and_models_are_refused(cache: Path) -> None:
    with pytest.raises(ValueError, match="dtype='int8' is unknown"):
        model_folder("tiny-shape", dtype="int8")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        model_folder("./tiny-shape")
    assert not list(cache.iterdir())


def test_the_biased_shape_has_a_bias_beside_every_weight_of_its_layers() -> None:
    config = as_config(dict(SHAPES["llama-3.2-1b-biased"]) | NO_SPECIAL_TOKENS)
    names = set(weight_shapes(config))
    weights = {name for name in names if name.startswith("model.layers.") and name.endswith("_proj.weight")}
    assert len(weights) == 7 * 16
    assert {name.replace(".weight", ".bias") for name in weights} <= names
    plain = weight_shapes(as_config(dict(SHAPES["llama-3.2-1b"]) | NO_SPECIAL_TOKENS))
    assert set(plain) == {name for name in names if not name.endswith(".bias")}


def test_verify_takes_a_shape_by_its_name_and_records_that_name(cache: Path) -> None:
    out = cache / "out"
    result = CliRunner().invoke(app, ["verify", "tiny-shape", "--tp", "2", "--fabric", "threads", "--check", "weights",
                                      "--out", str(out)])
    assert result.exit_code == 0, result.output
    row, *_ = read_report(out).checks
    assert (row.model, row.dtype) == ("tiny-shape", "bfloat16")
    assert (cache / "shapes" / "tiny-shape-bfloat16").is_dir()
