"""What people hand in as prompts, made into text and token ids, or refused as what it is."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral
from typing import Any

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids (also as an array or a tensor of one dimension), or a mapping with one of them."""

_RULE = "must be text, token ids, or a mapping with one of them"
_KEYS = {"prompt", "prompt_token_ids"}
# Iterable, and yet no list of ids or of prompts: bytes are numbers by accident, and a set has no order.
_NO_LISTS = (bytes, bytearray, memoryview, Set)


def list_prompts(prompts: Any) -> list[Any]:
    """One prompt or several: a flat list of ints is one, and so is an array.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(prompts, (str, Mapping)) or _is_array(prompts):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, _NO_LISTS):
        raise ValueError(f"prompts={reprlib.repr(prompts)} {_RULE}, or a list of such prompts")
    items: list[Any] = list(prompts)
    return [items] if items and all(isinstance(item, Integral) for item in items) else items


def read_prompt(prompt: Any, tokenizer: Any) -> tuple[str | None, list[Any]]:
    """(text if there is one, token ids). The ids are as they were given: whether a model knows them is not looked at.

    Raises:
        ValueError: if it is no prompt, or text and there is no tokenizer.
    """
    text = None
    if isinstance(prompt, Mapping):
        text, prompt = _open_mapping(prompt)
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer, and the model folder holds none: give token ids")
        check_text(prompt, "the prompt")
        return prompt, list(tokenizer(prompt)["input_ids"])
    if _is_array(prompt):
        return text, _open_array(prompt)
    if not isinstance(prompt, Iterable) or isinstance(prompt, (Mapping, *_NO_LISTS)):
        raise ValueError(f"prompt={reprlib.repr(prompt)} {_RULE}")
    return text, list(prompt)


def check_text(text: str, what: str) -> None:
    """Raise ValueError for a lone surrogate, half a character of UTF-16, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} has a lone surrogate {text[error.start]!r} at character {error.start}, which is no text: "
                         "decode it with errors='replace'") from None


def _open_mapping(prompt: Mapping[Any, Any]) -> tuple[str | None, Any]:
    if not _KEYS & set(prompt) or set(prompt) - _KEYS:
        raise ValueError(f"prompt has the keys {sorted(map(str, prompt))} and must have prompt or prompt_token_ids, no others")
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"prompt={reprlib.repr(text)} in a mapping must be text: token ids are prompt_token_ids")
    if ids is None:
        return text, text
    if isinstance(ids, (str, Mapping)):
        raise ValueError(f"prompt_token_ids={reprlib.repr(ids)} must be token ids")
    return text, ids


def _is_array(value: Any) -> bool:
    """An array or tensor of whatever library."""
    return all(hasattr(value, name) for name in ("shape", "dtype", "tolist"))


def _open_array(array: Any) -> list[int]:
    what = f"prompt is a {type(array).__name__} of shape={tuple(array.shape)} and dtype={array.dtype}"
    if len(array.shape) != 1:
        raise ValueError(f"{what}: it must have one dimension; give several prompts as a list")
    try:
        ids: list[Any] = array.tolist()
    except (RuntimeError, TypeError, ValueError) as error:  # a tensor without data, say
        raise ValueError(f"{what}, and can't be read: {error}") from error
    if set(map(type, ids)) - {int}:
        raise ValueError(f"{what}: token ids must be integers")
    return ids
