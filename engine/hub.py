"""Finds a model: a folder on disk, or a hub id whose safetensors are fetched (never pickled weights, never code)."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

WANTED = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")


def find_model(model: str | Path) -> Path:
    """The folder of ``model``: itself, or the hub's snapshot of that id.

    Raises:
        FileNotFoundError: if it is neither.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(model), allow_patterns=list(WANTED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FileNotFoundError(f"model={str(model)!r} is neither a folder nor a model that can be fetched from the hub: "
                                f"{reason}") from error
