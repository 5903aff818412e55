"""Transformers models are built in turn, and what fails then is said to be the checkpoint's."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from engine.checkpoint.checkpoint_files import CheckpointError, one_line

# While it builds a model, transformers sets torch's default dtype, which all threads share, and sets it back
# to what it found: two at once would leave one model's dtype behind as the default of the process.
_TURN = threading.RLock()


def raise_interrupt(error: BaseException) -> None:
    """Raise the interrupt that led to ``error``: where Ctrl-C stops a library, its clean-up may raise an error of its own.

    Raises:
        KeyboardInterrupt: if one led to ``error``.
    """
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        behind = behind.__cause__ or behind.__context__


@contextmanager
def building(what: str) -> Iterator[None]:
    """Wait for this thread's turn to build a model.

    Raises:
        CheckpointError: if transformers cannot do what is done inside; ``what`` begins the message.
    """
    with _TURN:
        try:
            yield
        except (CheckpointError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # there is no saying what transformers makes of values that cannot be
            raise_interrupt(error)
            raise CheckpointError(f"{what}: {type(error).__name__}: {one_line(error)}") from error


def read_config(folder: str | Path) -> Any:
    """The transformers config of ``folder``.

    Raises:
        CheckpointError: if transformers cannot read it.
    """
    with building(f"transformers cannot read the config.json in folder={folder}"):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def longest_sequence(text_config: Any, *, beyond_windows: bool = False) -> int:
    """Tokens of the longest sequence that every implementation of a model takes, by its text config.

    Longrope's own length ends it, and a sliding window unless ``beyond_windows``: some engines have no windows.
    """
    limits = ["max_position_embeddings", "original_max_position_embeddings", *([] if beyond_windows else ["sliding_window"])]
    return min(int(getattr(text_config, limit, None) or sys.maxsize) for limit in limits)
