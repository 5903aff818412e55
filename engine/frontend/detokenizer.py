"""Token ids to text, piece by piece: no part of a character and nothing after a stop string ever comes out."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
NUM_CONTEXT_TOKENS = 8
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


class Kind(enum.Enum):
    """What a token can do to the text around it."""

    WHOLE = enum.auto()
    """Text of its own. What stands before it can't change any more."""
    PART = enum.auto()
    """Bytes of a byte-level vocabulary that are no text alone: a part of a character, or nothing that can be read."""
    BYTE = enum.auto()
    """One byte, as vocabularies with a fall-back to bytes have them. A run of these is read as a whole: as text or not at all."""
    NOTHING = enum.auto()
    """Left out of every text: a special token that is skipped, or an id that the tokenizer does not know."""


class Pieces:
    """What the single tokens of a vocabulary are. One for all completions: each token is looked at once.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool) -> None:
        self.tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._special = {number for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
        self._known: dict[int, tuple[Kind, str]] = {}
        self._alone: dict[int, str] = {}

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
        return text

    def alone(self, token_id: int) -> str:
        """What the tokenizer makes of the token by itself, special ones too."""
        text = self._alone.get(token_id)
        if text is None:
            text = self._alone[token_id] = str(self.tokenizer.decode([token_id]))
        return text

    def __getitem__(self, token_id: int) -> tuple[Kind, str]:
        """The token's kind, and its text where it stands alone."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._look_at(token_id)
        return known

    def _look_at(self, token_id: int) -> tuple[Kind, str]:
        piece, alone = self.tokenizer.convert_ids_to_tokens(token_id), self.decode([token_id])
        if not alone and (piece is None or (self._skip and token_id in self._special)):
            return Kind.NOTHING, alone
        if piece is not None and _BYTE.fullmatch(piece) and alone != piece:
            return Kind.BYTE, alone
        if REPLACEMENT in alone and REPLACEMENT not in (piece or ""):
            return Kind.PART, alone
        return Kind.WHOLE, alone


class Detokenizer:
    """The text of one completion, which only ever grows. In the end it is what the tokenizer makes of all tokens at once.

    A token is decoded together with the one before it, since what it stands for may depend on that: the first token of a text
    often loses its space. What the next tokens may still change is kept back: U+FFFD for the beginning of a character, and runs
    of single bytes. However many come, each token is decoded a few times only.

    Args:
        pieces: of the tokenizer.
        prompt_token_ids: what stands before the completion.
        stop: strings that end the text.
        include_stop: whether the stop string belongs to the text.
        min_tokens: a stop string that ends in the text of the first so many tokens does not count.

    Attributes:
        text: all text so far, up to the stop string.
        num_safe: so many characters of it will stand, whatever comes; those after them may be the beginning of a stop string.
        stop_string: the one that was found. Nothing may be pushed after that.
    """

    def __init__(self, pieces: Pieces, prompt_token_ids: Sequence[int] = (), *, stop: Sequence[str] = (),
                 include_stop: bool = False, min_tokens: int = 0) -> None:
        self.text = ""
        self.num_safe = 0
        self.stop_string: str | None = None
        self._pieces = pieces
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._num_exempt_tokens = min_tokens
        self._num_exempt = 0  # characters in which a stop string may not end
        self._num_tokens = 0
        # A window on the tokens: the context, whose text is out, and then those of whose text something may not be out.
        self._ids = list(prompt_token_ids[-NUM_CONTEXT_TOKENS:])
        self._num_context, self._context_text = len(self._ids), pieces.decode(self._ids)
        self._num_out = 0  # characters after the context's that are out
        self._last_text: str | None = self._context_text  # of the window up to now, where that is known
        if self._context_text.endswith(REPLACEMENT) and pieces[self._ids[-1]][0] is not Kind.WHOLE:
            self._set_window([], 0)  # the prompt itself ends inside a character

    def push(self, token_id: int) -> None:
        """Take the next token."""
        assert self.stop_string is None, f"token_id={token_id} comes after the stop string {self.stop_string!r}"
        self._num_tokens += 1
        kind, alone = self._pieces[token_id]
        if kind is Kind.NOTHING:
            return
        self._ids.append(token_id)
        if kind is Kind.BYTE:
            self._last_text = None
            return
        before, text = self._last_text, self._window_text()
        whole = text[len(self._context_text) :]
        if kind is Kind.PART and text.endswith(REPLACEMENT):
            # Only the last one may be the beginning of a character: what came before it, this token has settled.
            self._put_out(whole[:-1])
            self._last_text = text
            if before is not None and before + alone == text:  # the token continues nothing: a character may begin with it
                self._set_window([token_id], 0)
                self._num_out, self._last_text = len(alone) - 1, alone
            return
        self._put_out(whole)
        if whole:
            self._set_window([] if kind is Kind.PART else [token_id], 0 if kind is Kind.PART else 1)
        else:
            self._last_text = text

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take all tokens that are left. ``finish`` must follow.

        The text is the same as by ``push``, in a fraction of the time where there are no stop strings.
        """
        if not self._stop:
            self._num_tokens += len(token_ids)
            self._ids.extend(token_ids)
            return
        for token_id in token_ids:
            if self.stop_string is None:
                self.push(token_id)

    def finish(self) -> None:
        """No token follows: what was held back comes out."""
        if self.stop_string is None and len(self._ids) > self._num_context:
            self._put_out(self._window_text()[len(self._context_text) :])
            self._set_window([], 0)
        self.num_safe = len(self.text)

    def _window_text(self) -> str:
        text = self._pieces.decode(self._ids)
        if not text.startswith(self._context_text):
            # The prompt ended in bytes, and these turn them into something else. That is not for us to show.
            self._set_window(self._ids[self._num_context :], 0)
            text = self._pieces.decode(self._ids)
        return text

    def _set_window(self, token_ids: list[int], num_context: int) -> None:
        self._ids, self._num_context, self._num_out = token_ids, num_context, 0
        self._context_text = self._pieces[token_ids[0]][1] if num_context else ""
        self._last_text = self._context_text

    def _put_out(self, whole: str) -> None:
        """``whole``: the text after the context that will stand."""
        self._take(whole[self._num_out :])
        self._num_out = max(self._num_out, len(whole))

    def _take(self, new: str) -> None:
        """Add text, stop at a stop string, hold back what may become one."""
        self.text += new
        if self._num_tokens <= self._num_exempt_tokens:
            self._num_exempt = len(self.text)
        if found := self._find_stop():
            end, self.stop_string = found
            self.text = self.text[: end if self._include_stop else end - len(self.stop_string)]
            self.num_safe = len(self.text)
        else:
            self.num_safe = len(self.text) - self._num_held()

    def _find_stop(self) -> tuple[int, str] | None:
        """(end, string) of the stop string that ends first; the longest one of several."""
        ends = []
        for stop in self._stop:
            # Nothing safe is part of a stop string.
            start = self.text.find(stop, max(self.num_safe, self._num_exempt - len(stop) + 1))
            if start >= 0:
                ends.append((start + len(stop), -len(stop), stop))
        return (min(ends)[0], min(ends)[2]) if ends else None

    def _num_held(self) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        return max((length for stop in self._stop for length in range(1, min(len(stop) - 1, len(self.text)) + 1)
                    if self.text.endswith(stop[:length])), default=0)
