"""Finds a model: smollm2, a folder on disk, or a hub id whose safetensors are fetched (never pickled weights, never code)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from engine.checkpoint.checkpoint_files import CONFIG_FILE, SINGLE_FILE, CheckpointError, DownloadError, named_files

SMOLLM2 = "smollm2"
SMOLLM2_FOLDER = "smollm2-135m-instruct"
# Config and tokenizer; nothing that is code, and nothing that runs code when it is opened.
SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")


def cache_folder() -> Path:
    """Where the project keeps models: ``$SHARDPROOF_CACHE``, or ``~/.cache/shardproof``."""
    return Path(os.environ.get("SHARDPROOF_CACHE") or "~/.cache/shardproof").expanduser()


def find_model(model: str | Path, revision: str | None = None) -> Path:
    """The folder of ``model``: smollm2 as fetched, a folder itself, or the hub's snapshot of that id.

    Args:
        model: its name.
        revision: branch, tag or commit of a hub id; None: its main branch.

    Raises:
        ValueError: for a revision of what has none.
        CheckpointError: if there is no such folder, or a downloaded index is broken.
        DownloadError: if it is not here and can't be downloaded, or smollm2 was not fetched yet.
    """
    folder = _find(model, lambda name: _snapshot(name, revision), "config.json, *.safetensors and tokenizer files")
    if revision is not None and (str(model) == SMOLLM2 or Path(model).expanduser() == folder):
        raise ValueError(f"revision={revision!r} is of a hub id, and model={str(model)!r} is a folder: leave it out")
    return folder


def find_config(model: str | Path) -> Path:
    """The same, where the config alone is asked for: of a hub id nothing else is downloaded. Raises as `find_model` does."""
    return _find(model, lambda name: Path(huggingface_hub.hf_hub_download(name, CONFIG_FILE)).parent, CONFIG_FILE)


def _find(model: str | Path, download: Callable[[str], Path], files: str) -> Path:
    name = str(model)
    if not name.strip():
        raise CheckpointError("model='' is empty: give smollm2, a Hugging Face folder, or a hub id")
    if name == SMOLLM2:
        folder = cache_folder() / SMOLLM2_FOLDER
        if not folder.is_dir():
            raise DownloadError("model='smollm2' is not on this machine yet: fetch it once by `shardproof fetch smollm2`")
        return folder
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(model, Path) or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise CheckpointError(f"model={name!r}: there is no such folder")
    try:
        return download(name)
    except CheckpointError:
        raise
    except (OSError, HFValidationError) as failure:
        raise DownloadError(
            f"model={name!r} is no folder here, and as a model id it could not be downloaded "
            f"({type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]}). Without network: "
            f"copy its {files} into a folder and pass that"
        ) from failure


def _snapshot(name: str, revision: str | None) -> Path:
    """Of the top folder alone, but for weights that are named further down: some models keep a second copy there."""
    folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[*SMALL_FILES, SINGLE_FILE],
                                                    ignore_patterns=["*/*"]))
    if shards := [str(file.relative_to(folder)) for file in named_files(folder) if file != folder / SINGLE_FILE]:
        huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=shards)
    return folder
