"""The way from a model's name to its folder, and what is downloaded on it."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from engine import LLM, CheckpointError, SamplingParams
from reference.checkpoints import resolve
from tests.engine.conftest import MakeCheckpoint

NOT_SHARDS = ["config.json", "tokenizer.json", "chat_template.jinja", "modeling.py", "pytorch_model.bin",
              "consolidated.safetensors", "original/model.safetensors", "onnx/config.json"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for a model's repository: ``snapshot_download`` copies what is asked for."""
    repository, snapshot = tmp_path / "repository", tmp_path / "snapshot"
    for name in NOT_SHARDS:
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text("{}")

    def snapshot_download(model: str, *, revision: str | None, allow_patterns: list[str],
                          ignore_patterns: list[str] | None = None) -> str:
        if revision is not None:
            (repository / "tokenizer.json").write_text(f'"{revision}"')
        for file in repository.rglob("*"):
            name = str(file.relative_to(repository))
            if file.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns) and not any(
                    fnmatch(name, pattern) for pattern in ignore_patterns or []):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, snapshot / name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return repository


def downloaded(repository: Path) -> set[str]:
    snapshot = resolve("some/model")
    assert snapshot == repository.parent / "snapshot"
    return {str(file.relative_to(snapshot)) for file in snapshot.rglob("*") if file.is_file()}


SMALL = {"config.json", "tokenizer.json", "chat_template.jinja"}


def test_one_file_is_downloaded_without_the_second_copies_of_it(hub: Path) -> None:
    (hub / "model.safetensors").touch()
    assert downloaded(hub) == SMALL | {"model.safetensors"}


@pytest.mark.parametrize("folder", ["", "parts/"])
def test_the_shards_that_an_index_names_are_downloaded_wherever_they_are(hub: Path, folder: str) -> None:
    names = [f"{folder}model-{number}-of-2.safetensors" for number in (1, 2)]
    for name in [*names, f"{folder}another.safetensors"]:
        (hub / name).parent.mkdir(exist_ok=True)
        (hub / name).touch()
    index = {"metadata": {}, "weight_map": dict(zip("ab", names, strict=True))}
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    assert downloaded(hub) == SMALL | {"model.safetensors.index.json", *names}


def test_an_index_that_leaves_the_folder_is_refused_and_not_followed(hub: Path) -> None:
    (hub / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(CheckpointError, match="leaves the folder"):
        resolve("some/model")


def test_smollm2_is_the_fetched_one(checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDPROOF_CACHE", str(tmp_path))
    with pytest.raises((CheckpointError, FileNotFoundError)) as refusal:
        LLM("smollm2")
    assert str(refusal.value) == "model='smollm2' is not on this machine yet: fetch it once by `shardproof fetch smollm2`"
    shutil.copytree(checkpoint(), tmp_path / "smollm2-135m-instruct")
    with LLM("smollm2", device="cpu", num_kv_blocks=8) as llm:
        (output,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 2


@pytest.mark.parametrize("find", [LLM, resolve])
@pytest.mark.parametrize("name", ["", " ", "\n"])
def test_an_empty_name_is_refused(find: Any, name: str, monkeypatch: pytest.MonkeyPatch, checkpoint: MakeCheckpoint) -> None:
    monkeypatch.chdir(checkpoint())  # which is not what was meant
    with pytest.raises(CheckpointError, match="model='' is empty: give smollm2, a Hugging Face folder, or a hub id"):
        find(name)
