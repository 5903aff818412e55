"""Token ids to text, piece by piece: no part of a character and nothing after a stop string ever comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
NUM_CONTEXT_TOKENS = 8


class Detokenizer:
    """The text of one completion, which only ever grows.

    A token is decoded together with the ones before it, since what it stands for may depend on them: the first token of a
    text often loses its space. U+FFFD at the end is kept back until the rest of the character has come; a character that never
    becomes whole is left out. The text is a function of the token ids, however they arrive.

    Args:
        decode: token ids to text.
        prompt_token_ids: what stands before the completion.
        stop: strings that end the text.
        include_stop: whether the stop string belongs to the text.
        min_tokens: a stop string that ends in the text of the first so many tokens does not count.

    Attributes:
        text: all text so far, up to the stop string.
        num_safe: so many characters of it will stand, whatever comes; those after them may be the beginning of a stop string.
        stop_string: the one that was found. Nothing may be pushed after that.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt_token_ids: Sequence[int] = (), *, stop: Sequence[str] = (),
                 include_stop: bool = False, min_tokens: int = 0) -> None:
        self.text = ""
        self.num_safe = 0
        self.stop_string: str | None = None
        self._decode = decode
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._num_exempt_tokens = min_tokens
        self._num_exempt = 0  # characters in which a stop string may not end
        self._num_tokens = 0
        # Tokens that the next ones are decoded with: the last whose text is out, then those that end inside a character.
        self._ids = list(prompt_token_ids[-NUM_CONTEXT_TOKENS:])
        self._context_text = decode(self._ids)
        if self._context_text.endswith(REPLACEMENT):  # the prompt itself ends inside a character
            self._ids, self._context_text = [], ""
        self._num_context = len(self._ids)
        self._num_out = 0  # characters after the context that are out

    def push(self, token_id: int) -> None:
        """Take the next token."""
        assert self.stop_string is None, f"token_id={token_id} comes after the stop string {self.stop_string!r}"
        self._num_tokens += 1
        self._ids.append(token_id)
        text = self._decode(self._ids)
        whole = self._after_context(text)
        self._take(whole[self._num_out :])
        if whole and not text.endswith(REPLACEMENT):
            self._ids = self._ids[self._num_context :]
            self._num_context, self._context_text, self._num_out = len(self._ids), self._decode(self._ids), 0
        else:
            self._num_out = max(self._num_out, len(whole))

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take all tokens at once: the same text as by ``push``, in a fraction of the time where there are no stop strings."""
        text = self._decode([*self._ids, *token_ids])
        if self._stop or REPLACEMENT in text:
            for token_id in token_ids:
                if self.stop_string is None:
                    self.push(token_id)
            return
        self._num_tokens += len(token_ids)
        self._ids.extend(token_ids)
        whole = self._after_context(text)
        self._take(whole[self._num_out :])
        self._num_out = len(whole)

    def finish(self) -> None:
        """No token follows: what was held back comes out, but for an unfinished character at the end."""
        self.num_safe = len(self.text)

    def _after_context(self, text: str) -> str:
        """The whole characters that the tokens after the context stand for, ``text`` being that of both."""
        if not text.startswith(self._context_text):
            # A byte that fits nowhere can turn what came before it to U+FFFD. That is out already.
            return self._decode(self._ids[self._num_context :]).rstrip(REPLACEMENT)
        return text[len(self._context_text) :].rstrip(REPLACEMENT)

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
