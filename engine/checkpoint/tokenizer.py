"""Loads a folder's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from engine.checkpoint.checkpoint_files import CheckpointError, one_line

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def load_tokenizer(folder: Path) -> Any:
    """The folder's Hugging Face tokenizer, or None if it holds none.

    Raises:
        CheckpointError: if it holds one that can't be loaded.
    """
    if not any((folder / name).exists() for name in FILES):
        return None
    # Seconds of import, which a folder without a tokenizer does without, and which run while the ranks' server starts.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _try(tokenizer)
    except Exception as error:  # whatever a broken file makes of the libraries that read it
        raise CheckpointError(f"folder={folder}: its tokenizer can't be loaded ({type(error).__name__}: {one_line(error)}): "
                              "fetch its tokenizer files again") from error
    if not tokenizer.vocab_size:
        raise CheckpointError(f"folder={folder}: the vocabulary of its tokenizer is empty: fetch its tokenizer files again")
    return tokenizer


def _try(tokenizer: Any) -> None:
    """Use it once: some of what is wrong shows only then."""
    tokenizer("a")
    if tokenizer.chat_template:
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        except TemplateSyntaxError:
            raise
        except TemplateError:
            pass  # it takes conversations, but not this one
