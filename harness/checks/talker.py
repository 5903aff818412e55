"""A small model that talks: random, of the layout under test, with a tokenizer and many end-of-sequence tokens.

All its logits are negative and its vocabulary is padded, so that padding would win if it were let in. So many of its tokens end a
sequence, or are special, that each kind comes up in every few tokens that are drawn at a high temperature.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from harness.checks.semantics import Model
from harness.checks.weights import narrow_config
from harness.verification.budgets import near_tie_margins
from harness.verification.simulated import SimulatedRounding
from reference.checkpoints import random_checkpoint
from reference.hf import Reference
from reference.writing import edited

SMALLEST_VOCABULARY = 60
MAX_MODEL_LEN = 64
NUM_OF_A_KIND = 6
"""Tokens that end a sequence, that would by ``config.json`` alone, and that are special."""
LETTERS = "abcdeĠ"
"""The last one stands for a space."""
PIECES = ("Ã", "©")
"""Two bytes that are a character together, and none alone."""


class Talker:
    """The checkpoint of such a model in ``folder``, and its exact logits.

    Args:
        config: of the model under test, as transformers reads it.
        dtype: to write the weights in, and to draw in.
    """

    def __init__(self, folder: Path, config: dict[str, Any], *, tp_size: int, dtype: str, seed: int, device: str) -> None:
        self.folder = folder
        self.dtype = dtype
        self._device = device
        self._logits: dict[tuple[int, ...], Tensor] = {}
        draw = random.Random(f"talker {seed}")
        vocab_size = SMALLEST_VOCABULARY + (tp_size > 1 and SMALLEST_VOCABULARY % tp_size == 0)
        negative_logits_checkpoint(folder, talker_config(config, tp_size, vocab_size), dtype=dtype, seed=seed)
        ids = draw.sample(range(vocab_size), 3 * NUM_OF_A_KIND + len(LETTERS) + len(PIECES))
        self.eos_token_ids, self.config_eos_token_ids, special, *rest = (
            ids[kind * NUM_OF_A_KIND : (kind + 1) * NUM_OF_A_KIND] for kind in range(-(-len(ids) // NUM_OF_A_KIND)))
        self.letters, self.pieces = rest[0], ids[-len(PIECES) :]
        self.tokenizer = write_tokenizer(folder, vocab_size, special=special, letters=self.letters, pieces=self.pieces, draw=draw)
        # The second has the last word.
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": self.config_eos_token_ids}))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": self.eos_token_ids}))

    @cached_property
    def model(self) -> Model:
        """What the semantics of requests need to know."""
        draw = random.Random("what rounding does")
        token_ids = [draw.randrange(self.exact.vocab_size) for _ in range(MAX_MODEL_LEN)]
        exact = self.logits(token_ids)
        with SimulatedRounding(self.dtype, seed=0):
            rounded = self.exact.logits([token_ids])[0]
        tie = float(near_tie_margins(rounded, exact, self.dtype).max())
        return Model(vocab_size=self.exact.vocab_size, eos_token_ids=frozenset(self.eos_token_ids), max_model_len=MAX_MODEL_LEN,
                     tokenizer=self.tokenizer, dtype=self.dtype, tie=tie, logits=self.logits)

    @cached_property
    def exact(self) -> Reference:
        return Reference.load(self.folder, "exact", device=self._device)

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Exact logits after each token. Computed once."""
        key = tuple(token_ids)
        if key not in self._logits:
            self._logits[key] = self.exact.logits([key])[0]
        return self._logits[key]


def talker_config(config: dict[str, Any], tp_size: int, vocab_size: int) -> dict[str, Any]:
    """The narrow form of a config with this vocabulary, and with ``MAX_MODEL_LEN`` positions in whatever way it counts them."""
    narrow = {**narrow_config(config, tp_size), "vocab_size": vocab_size, "max_position_embeddings": MAX_MODEL_LEN}
    rope = dict(narrow.get("rope_parameters") or {})
    if rope.get("rope_type") == "yarn":
        rope |= {"factor": 4.0, "original_max_position_embeddings": MAX_MODEL_LEN // 4}
    return narrow | ({"rope_parameters": rope} if rope else {})


def negative_logits_checkpoint(folder: Path, config: dict[str, Any], *, dtype: str, seed: int) -> Path:
    """A random model whose logits are about -18, give or take 2.

    Feature 0 is 4 in every hidden state, and the final norm turns its sign round before the LM head multiplies it by 4 again.
    """
    random_checkpoint(folder, config, dtype=dtype, seed=seed)
    with edited(folder) as tensors:
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")):
                tensor[0] = 0
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                tensor[:, 0] = 4
        tensors["model.norm.weight"][0] = -2
    return folder


def write_tokenizer(folder: Path, vocab_size: int, *, special: Sequence[int], letters: Sequence[int], pieces: Sequence[int],
                    draw: random.Random) -> Any:
    """A byte-level tokenizer: letters, drawn words of two or three, special tokens, and two parts of a character."""
    token_of = dict(zip([*letters, *pieces, *special], [*LETTERS, *PIECES, *(f"<{number}>" for number in range(len(special)))],
                        strict=True))
    words: list[str] = []
    while len(words) < vocab_size - len(token_of):
        word = "".join(draw.choice(LETTERS) for _ in range(draw.randint(2, 3)))
        if word not in words:
            words.append(word)
    token_of |= dict(zip((number for number in range(vocab_size) if number not in token_of), words, strict=True))
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in token_of.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False,
                                   additional_special_tokens=[token_of[number] for number in special])
    fast.save_pretrained(folder)
    return fast
