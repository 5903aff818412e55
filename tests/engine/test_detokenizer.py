"""Text piece by piece: whatever the split into tokens, whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer

from engine.detokenizer import REPLACEMENT, Detokenizer
from reference.checkpoints import resolve
from tests.engine.support import MANY

Decode = Callable[[list[int]], str]
MakeDecode = Callable[[Sequence[bytes]], Decode]

# Characters of one to four bytes, in texts and stop strings of few letters: beginnings of stop strings are everywhere.
TEXTS = st.text(alphabet="ab漢é😀", max_size=30)
# Bytes that are no text alone, some never, and pieces of text.
BYTES_AND_TEXTS = [bytes([byte]) for byte in "漢😀".encode()] + [b"\xff", b"\xc3", b"a", b" ", b" b", "é".encode(), "漢".encode()]
STOPS = st.lists(st.text(alphabet="ab漢é😀", min_size=1, max_size=4), max_size=3)


def byte_level(tokens: Sequence[bytes]) -> Decode:
    """Decodes as a byte-level BPE does: the tokens' bytes, one U+FFFD for what is no character."""
    return lambda token_ids: b"".join(tokens[token_id] for token_id in token_ids).decode("utf-8", errors="replace")


def byte_fallback(tokens: Sequence[bytes]) -> Decode:
    """Decodes as Llama 2 does: a text's first space goes, and a run of bytes is a text or all of it is U+FFFD."""
    pieces = [token.decode().replace(" ", "▁") if is_text(token) else None for token in tokens]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for piece in filter(None, pieces):
        vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    ids = [[vocabulary[piece]] if piece else list(token) for piece, token in zip(pieces, tokens, strict=True)]

    def decode(token_ids: list[int]) -> str:
        text: str = tokenizer.decode([number for token_id in token_ids for number in ids[token_id]])
        return text

    return decode


def is_text(token: bytes) -> bool:
    try:
        return bool(token.decode())
    except UnicodeDecodeError:
        return False


@st.composite
def splits(draw: st.DrawFn, texts: st.SearchStrategy[bytes]) -> list[bytes]:
    """A text's bytes cut anywhere, in the middle of characters too."""
    data = draw(texts)
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(data) - 1)), max_size=len(data))))
    borders = [0, *(cut for cut in cuts if cut < len(data)), len(data)]
    return [data[start:end] for start, end in pairwise(borders) if end > start]


def up_to_stop(text: str, stops: Sequence[str], *, include: bool, exempt: int = 0) -> tuple[str, str | None]:
    """The text that must come out, found character by character, and the stop string that ends it."""
    for end in range(exempt + 1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


def whole_characters(tokens: Sequence[bytes]) -> str:
    """The text of the tokens but for an unfinished character at its end."""
    return b"".join(tokens).decode("utf-8", errors="ignore")


def emitted(detokenizer: Detokenizer, tokens: Sequence[bytes]) -> list[str]:
    """What a reader has been shown after each token, and at the end."""
    shown = []
    for token_id in range(len(tokens)):
        detokenizer.push(token_id)
        shown.append(detokenizer.text[: detokenizer.num_safe])
        if detokenizer.stop_string is not None:
            break
    detokenizer.finish()
    return [*shown, detokenizer.text[: detokenizer.num_safe]]


def check_shown(shown: list[str], expected: str) -> None:
    """What is shown only grows, and is at no time more than what must come out."""
    for before, after in pairwise(shown):
        assert after.startswith(before), f"{before!r} was shown and taken back"
    for text in shown:
        assert expected.startswith(text), f"{text!r} was shown of {expected!r}"
    assert shown[-1] == expected


@MANY
@given(splits(TEXTS.map(str.encode)), STOPS, st.booleans())
def test_text_ends_at_the_first_stop_string_whatever_the_split(tokens: list[bytes], stops: list[str], include: bool) -> None:
    expected, stop = up_to_stop(b"".join(tokens).decode(), stops, include=include)
    detokenizer = Detokenizer(byte_level(tokens), stop=stops, include_stop=include)
    check_shown(emitted(detokenizer, tokens), expected)
    assert detokenizer.stop_string == stop


class NothingHeldBack(Detokenizer):
    def _num_held(self) -> int:
        return 0


class PartsOfCharacters(Detokenizer):
    def push(self, token_id: int) -> None:
        self._take(self._decode([token_id]))


@pytest.mark.parametrize(("faulty", "tokens"), [(NothingHeldBack, [b"xa", b"b"]), (PartsOfCharacters, [b"\xc3", b"\xa9"])])
def test_the_check_sees_text_that_came_too_early(faulty: type[Detokenizer], tokens: list[bytes]) -> None:
    expected, _ = up_to_stop(b"".join(tokens).decode(), ["ab"], include=False)
    check_shown(emitted(Detokenizer(byte_level(tokens), stop=["ab"]), tokens), expected)
    with pytest.raises(AssertionError, match="was shown"):
        check_shown(emitted(faulty(byte_level(tokens), stop=["ab"]), tokens), expected)


@MANY
@given(splits(TEXTS.map(str.encode)))
def test_without_stop_strings_every_whole_character_comes_at_once(tokens: list[bytes]) -> None:
    shown = emitted(Detokenizer(byte_level(tokens)), tokens)
    for count, text in enumerate(shown[:-1], start=1):
        assert text == whole_characters(tokens[:count])


@MANY
@given(splits(TEXTS.map(str.encode)), STOPS)
def test_only_what_may_begin_a_stop_string_is_held_back(tokens: list[bytes], stops: list[str]) -> None:
    detokenizer = Detokenizer(byte_level(tokens), stop=stops)
    for token_id in range(len(tokens)):
        detokenizer.push(token_id)
        if detokenizer.stop_string is not None:
            break
        held = detokenizer.text[detokenizer.num_safe :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


@MANY
@given(splits(TEXTS.map(str.encode)), STOPS, st.integers(0, 12))
def test_a_stop_string_counts_once_it_ends_beyond_min_tokens(tokens: list[bytes], stops: list[str], min_tokens: int) -> None:
    text = b"".join(tokens).decode()
    exempt = len(whole_characters(tokens[:min_tokens]))
    expected, stop = up_to_stop(text, stops, include=False, exempt=exempt)
    detokenizer = Detokenizer(byte_level(tokens), stop=stops, min_tokens=min_tokens)
    check_shown(emitted(detokenizer, tokens), expected)
    assert detokenizer.stop_string == stop


@MANY
@given(st.lists(st.sampled_from(BYTES_AND_TEXTS), max_size=12), st.sampled_from([byte_level, byte_fallback]), st.data())
def test_all_tokens_at_once_give_the_same_text_as_one_by_one(tokens: list[bytes], make: MakeDecode, data: st.DataObject) -> None:
    decode, num_prompt = make(tokens), data.draw(st.integers(0, len(tokens)))
    prompt, generated = list(range(num_prompt)), list(range(num_prompt, len(tokens)))
    at_once = Detokenizer(decode, prompt)
    at_once.extend(generated)
    at_once.finish()
    one_by_one = Detokenizer(decode, prompt)
    shown = [one_by_one.text]
    for token_id in generated:
        one_by_one.push(token_id)
        shown.append(one_by_one.text)
    one_by_one.finish()
    check_shown(shown, at_once.text)
    assert one_by_one.text == at_once.text


@MANY
@given(splits(st.lists(st.sampled_from(BYTES_AND_TEXTS), max_size=8).map(b"".join)))
def test_bytes_that_are_no_text_come_out_as_a_byte_level_tokenizer_shows_them(tokens: list[bytes]) -> None:
    expected = b"".join(tokens).decode("utf-8", errors="replace").rstrip(REPLACEMENT)
    check_shown(emitted(Detokenizer(byte_level(tokens)), tokens), expected)


def test_a_byte_that_fits_nowhere_takes_nothing_back() -> None:
    tokens = ["你".encode(), b"\xff", b"x", "好".encode()]
    decode = byte_fallback([bytes([byte]) for token in tokens[:2] for byte in token] + tokens[2:])
    detokenizer = Detokenizer(decode)
    for token_id in range(6):
        detokenizer.push(token_id)
    assert decode([0, 1, 2, 3]) == REPLACEMENT * 4
    assert detokenizer.text == f"你{REPLACEMENT}x好"


def test_the_first_word_keeps_its_space_after_a_prompt() -> None:
    decode = byte_fallback([b" Paris", b" is", b"a"])
    assert decode([1]) == "is"
    detokenizer = Detokenizer(decode, [0])
    detokenizer.push(1)
    assert detokenizer.text == " is"


def test_a_prompt_that_ends_inside_a_character_is_left_alone() -> None:
    tokens = ["é".encode()[:1], "é".encode()[1:], b"a"]
    detokenizer = Detokenizer(byte_level(tokens), [0])
    detokenizer.push(1)
    detokenizer.push(2)
    assert detokenizer.text == f"{REPLACEMENT}a"


def test_nothing_is_taken_after_a_stop_string() -> None:
    detokenizer = Detokenizer(byte_level([b"ab"]), stop=["a"])
    detokenizer.push(0)
    with pytest.raises(AssertionError, match="after the stop string 'a'"):
        detokenizer.push(0)


REAL_TEXTS = {
    "scripts": "Grüße aus Köln: 漢字かな交じり文, 한국어, עברית 👩‍👩‍👧‍👦 and 🏳️‍🌈!",
    "code": "naïve  café\n\n\tx = {'a': [1, 2]}  # ₿ → ∞",
    "emoji": "🌟🌈🔥" * 5,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve("smollm2"))


@pytest.mark.parametrize("text", REAL_TEXTS.values(), ids=REAL_TEXTS)
@pytest.mark.parametrize("num_prompt", [0, 7])
def test_the_real_tokenizer_gives_every_character_whole_and_in_time(tokenizer: Any, text: str, num_prompt: int) -> None:
    ids = tokenizer(text)["input_ids"]
    assert any(REPLACEMENT in tokenizer.decode([token_id]) for token_id in ids), "the text has no character of several tokens"
    while REPLACEMENT in tokenizer.decode(ids[:num_prompt]):
        num_prompt += 1
    detokenizer = Detokenizer(tokenizer.decode, ids[:num_prompt])
    before = tokenizer.decode(ids[:num_prompt])
    for count, token_id in enumerate(ids[num_prompt:], start=num_prompt + 1):
        detokenizer.push(token_id)
        assert before + detokenizer.text == tokenizer.decode(ids[:count]).rstrip(REPLACEMENT)
    assert before + detokenizer.text == text


def test_special_tokens_are_left_out_or_kept_as_asked(tokenizer: Any) -> None:
    ids = tokenizer("Hi<|im_end|> <|im_start|>there 😀")["input_ids"]
    for skip, expected in ((True, "Hi there 😀"), (False, "Hi<|im_end|> <|im_start|>there 😀")):
        detokenizer = Detokenizer(partial(tokenizer.decode, skip_special_tokens=skip))
        for token_id in ids:
            detokenizer.push(token_id)
        assert detokenizer.text == expected
