"""Text piece by piece: whatever the split into tokens, whole characters only, and nothing from a stop string on."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from engine.frontend.detokenizer import REPLACEMENT, Detokenizer, Pieces
from reference.checkpoints import resolve
from tests.engine.support import MANY

MakePieces = Callable[[Sequence[bytes]], Pieces]

# Characters of one to four bytes, in texts and stop strings of few letters: beginnings of stop strings are everywhere.
TEXTS = st.text(alphabet="ab漢é😀", max_size=30)
# Bytes that are no text alone, some never, and pieces of text.
BYTES_AND_TEXTS = [bytes([byte]) for byte in "漢😀".encode()] + [b"\xff", b"\xc3", b"a", b" ", b" b", "é".encode(), "漢".encode()]
STOPS = st.lists(st.text(alphabet="ab漢é😀", min_size=1, max_size=4), max_size=3)


class Renumbered:
    """Tokens by their place in a list, as a tokenizer of them. Several may be the same one of the vocabulary."""

    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def __init__(self, tokenizer: Tokenizer, ids: list[int]) -> None:
        self.tokenizer = tokenizer
        self.ids = ids
        self.num_decoded = 0

    def decode(self, token_ids: Sequence[int], **options: bool) -> str:
        self.num_decoded += len(token_ids)
        text: str = self.tokenizer.decode([self.ids[token_id] for token_id in token_ids], skip_special_tokens=False)
        return text

    def convert_ids_to_tokens(self, token_id: int) -> str:
        piece: str = self.tokenizer.id_to_token(self.ids[token_id])
        return piece


def byte_level(tokens: Sequence[bytes]) -> Pieces:
    """A byte-level BPE: the tokens' bytes, one U+FFFD for what is no character."""
    mapping = bytes_to_unicode()
    pieces = ["".join(mapping[byte] for byte in token) for token in tokens]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return Pieces(Renumbered(tokenizer, [vocabulary[piece] for piece in pieces]), skip_special_tokens=True)


def byte_fallback(tokens: Sequence[bytes]) -> Pieces:
    """As Llama 2: a text's first space goes, and a run of bytes is a text or all of it is U+FFFD. Every token is one piece."""
    pieces = [token.decode().replace(" ", "▁") if is_text(token) else f"<0x{token[0]:02X}>" for token in tokens]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for piece in pieces:
        vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return Pieces(Renumbered(tokenizer, [vocabulary[piece] for piece in pieces]), skip_special_tokens=True)


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
        self._take(self._pieces.decode([token_id]))


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
def test_all_tokens_at_once_give_the_same_text_as_one_by_one(tokens: list[bytes], make: MakePieces, data: st.DataObject) -> None:
    pieces, num_prompt = make(tokens), data.draw(st.integers(0, len(tokens)))
    prompt, generated = list(range(num_prompt)), list(range(num_prompt, len(tokens)))
    at_once = Detokenizer(pieces, prompt)
    at_once.extend(generated)
    at_once.finish()
    one_by_one = Detokenizer(pieces, prompt)
    shown = [one_by_one.text]
    for token_id in generated:
        one_by_one.push(token_id)
        shown.append(one_by_one.text)
    one_by_one.finish()
    check_shown([*shown, one_by_one.text], at_once.text)


@MANY
@given(splits(st.lists(st.sampled_from(BYTES_AND_TEXTS), max_size=8).map(b"".join)))
def test_bytes_that_are_no_text_come_out_as_a_byte_level_tokenizer_shows_them(tokens: list[bytes]) -> None:
    shown = emitted(Detokenizer(byte_level(tokens)), tokens)
    check_shown(shown, b"".join(tokens).decode("utf-8", errors="replace"))
    for count, text in enumerate(shown[:-1], start=1):
        settled = codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(tokens[:count]))
        # A character that is whole, and is U+FFFD or bytes that begin none, may be taken for the beginning of one.
        assert text in (settled, settled.removesuffix(REPLACEMENT)), "what can't change any more was held back"


def test_a_run_of_bytes_is_shown_when_it_is_known_whether_it_is_text() -> None:
    tokens = [bytes([byte]) for byte in "你\n".encode()] + [b"x", b"\xff", b"x"]
    shown = emitted(Detokenizer(byte_fallback([*tokens[:3], b"\xff"])), tokens[:4])
    assert shown == ["", "", "", "", REPLACEMENT * 4]
    shown = emitted(Detokenizer(byte_fallback([*tokens[:3], *tokens[4:]])), [*tokens[:3], *tokens[4:]])
    assert shown == ["", "", "", "你x", "你x", f"你x{REPLACEMENT}x", f"你x{REPLACEMENT}x"]


SPECIAL = [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]


def real_byte_level() -> Tokenizer:
    """Bytes, pieces of characters and words; the normalizer of none."""
    mapping = bytes_to_unicode()
    tokens = [bytes([byte]) for byte in range(256)] + BYTES_AND_TEXTS
    tokens += ["漢字".encode()[1:], " 😀".encode()[:3], REPLACEMENT.encode()]
    pieces = dict.fromkeys("".join(mapping[byte] for byte in token) for token in tokens)
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def real_byte_fallback(decoder: Any) -> Tokenizer:
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", "▁a", "b", "漢", REPLACEMENT, "a▁", "<0x41>b", "▁<0x41>"]
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoder
    return tokenizer


def real_words(cleanup: bool) -> Tokenizer:
    pieces = ["a", "##b", "##漢", ".", ",", "'", "n't", "'s", "do", "not", REPLACEMENT, f"##{REPLACEMENT}", "<0x41>", "[UNK]"]
    tokenizer = Tokenizer(models.WordPiece(vocab={piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    return tokenizer


LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
REAL_TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": real_byte_level,
    "llama 2": lambda: real_byte_fallback(decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)])),
    "gemma": lambda: real_byte_fallback(decoders.Sequence(LLAMA)),
    "metaspace": lambda: real_byte_fallback(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
    "metaspace alone": lambda: real_byte_fallback(decoders.Metaspace()),
    "word pieces": lambda: real_words(cleanup=False),
    "word pieces, cleaned up": lambda: real_words(cleanup=True),
}


class Counting:
    """A tokenizer that counts the tokens it is given to decode."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.num_decoded = 0

    def decode(self, token_ids: Sequence[int], **options: bool) -> str:
        self.num_decoded += len(token_ids)
        text: str = self.tokenizer.decode(token_ids, **options)
        return text

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@pytest.fixture(scope="module")
def real() -> dict[str, Any]:
    tokenizers = {}
    for name, make in REAL_TOKENIZERS.items():
        tokenizer = make()
        tokenizer.add_special_tokens(SPECIAL)
        tokenizers[name] = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    return tokenizers


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", REAL_TOKENIZERS)
@settings(MANY, max_examples=60)
@given(data=st.data())
def test_the_text_is_what_the_tokenizer_makes_of_all_tokens(
    real: dict[str, Any], name: str, skip: bool, data: st.DataObject
) -> None:
    tokenizer = real[name]
    # The last ids are specials, and beyond them there are some that the tokenizer does not know.
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 1) | st.integers(max(0, len(tokenizer) - 16), len(tokenizer) + 1),
                             max_size=30))
    counting = Counting(tokenizer)
    detokenizer = Detokenizer(Pieces(counting, skip_special_tokens=skip))
    shown = []
    for token_id in ids:
        detokenizer.push(token_id)
        shown.append(detokenizer.text[: detokenizer.num_safe])
    detokenizer.finish()
    check_shown([*shown, detokenizer.text], tokenizer.decode(ids, skip_special_tokens=skip))
    assert counting.num_decoded <= 8 * len(ids)
    at_once = Detokenizer(Pieces(tokenizer, skip_special_tokens=skip))
    at_once.extend(ids)
    at_once.finish()
    assert at_once.text == detokenizer.text


RUNS = {
    "invalid": [0xFF], "beginnings": [0xE6], "middles": [0xBC], "halves": [0xE6, 0xBC], "all but the end": [0xF0, 0x9F, 0x98],
    "whole": [0xE6, 0xBC, 0xA2], "skipped": [0xE6, -2], "unknown": [0xE6, -3], "text": [0x61], "mixed": [0x61, 0xFF, 0x0A],
}


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("name", ["byte level", "llama 2", "metaspace", "metaspace alone"])
def test_the_work_grows_with_the_tokens_and_not_with_their_square(
    real: dict[str, Any], name: str, run: list[int], skip: bool
) -> None:
    tokenizer = real[name]

    def number_of(byte: int) -> int:
        if byte < 0:  # -2 is the last special token, -3 none at all
            return len(tokenizer) + {-2: -1, -3: 1}[byte]
        piece = bytes_to_unicode()[byte] if name == "byte level" else f"<0x{byte:02X}>"
        return int(tokenizer.convert_tokens_to_ids(piece))

    ids = [number_of(byte) for byte in run] * 300
    counting = Counting(tokenizer)
    detokenizer = Detokenizer(Pieces(counting, skip_special_tokens=skip))
    for token_id in ids:
        detokenizer.push(token_id)
    detokenizer.finish()
    assert detokenizer.text == tokenizer.decode(ids, skip_special_tokens=skip)
    assert counting.num_decoded <= 8 * len(ids)


@pytest.mark.parametrize("name", REAL_TOKENIZERS)
@settings(MANY, max_examples=50)
@given(data=st.data())
def test_what_follows_a_prompt_is_what_the_two_together_have_more(real: dict[str, Any], name: str, data: st.DataObject) -> None:
    tokenizer = real[name]
    known = st.lists(st.integers(max(0, len(tokenizer) - 14), len(tokenizer) - 3), min_size=1, max_size=12)
    prompt, ids = data.draw(known), data.draw(known)
    detokenizer = Detokenizer(Pieces(tokenizer, skip_special_tokens=True), prompt)
    for token_id in ids:
        detokenizer.push(token_id)
    detokenizer.finish()
    before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
    if whole.startswith(before) and not before.endswith(REPLACEMENT):
        assert before + detokenizer.text == whole


def test_the_first_word_keeps_its_space_after_a_prompt() -> None:
    pieces = byte_fallback([b" Paris", b" is", b"a"])
    assert pieces.decode([1]) == "is"
    detokenizer = Detokenizer(pieces, [0])
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
    detokenizer = Detokenizer(Pieces(tokenizer, skip_special_tokens=False), ids[:num_prompt])
    before = tokenizer.decode(ids[:num_prompt])
    for count, token_id in enumerate(ids[num_prompt:], start=num_prompt + 1):
        detokenizer.push(token_id)
        assert before + detokenizer.text == tokenizer.decode(ids[:count]).rstrip(REPLACEMENT)
    assert before + detokenizer.text == text


def test_special_tokens_are_left_out_or_kept_as_asked(tokenizer: Any) -> None:
    ids = tokenizer("Hi<|im_end|> <|im_start|>there 😀")["input_ids"]
    for skip, expected in ((True, "Hi there 😀"), (False, "Hi<|im_end|> <|im_start|>there 😀")):
        detokenizer = Detokenizer(Pieces(tokenizer, skip_special_tokens=skip))
        for token_id in ids:
            detokenizer.push(token_id)
        assert detokenizer.text == expected
