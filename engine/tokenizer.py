"""Loads a folder's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from engine.checkpoint_files import CheckpointError, one_line

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def load_tokenizer(folder: Path) -> Any:
    """The folder's Hugging Face tokenizer, or None if it holds none.

    Raises:
        CheckpointError: if it holds one that can't be loaded.
    """
    if not any((folder / name).exists() for name in FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a broken file makes of the libraries that read it
        raise CheckpointError(f"folder={folder}: its tokenizer can't be loaded ({type(error).__name__}: {one_line(error)}): "
                              "fetch its tokenizer files again") from error
    if not len(tokenizer):
        raise CheckpointError(f"folder={folder}: its tokenizer knows no token: fetch its tokenizer files again")
    return tokenizer
