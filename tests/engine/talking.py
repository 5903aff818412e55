"""A small random model that talks: few tokens, among them letters, words and parts of characters."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from harness.verification.budgets import near_tie_margins
from reference.checkpoints import random_checkpoint
from reference.hf import Reference
from tests.engine.support import tiny_config

# A byte-level vocabulary: 漢 and 😀 in pieces, letters and words. The last one is special.
TOKENS = ["æ", "¼¢", "¼", "¢", "ð", "Ł", "ĺĢ", "ab", "a", "b", "Ġ", "ba", "Ġc", "<end>"]
EOS = TOKENS.index("<end>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'nobody' %}{{ raise_exception('who is that?') }}{% endif %}"
    "{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}ab{% endif %}{{ suffix }}"
)


def talking_checkpoint(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Write the model, with its tokenizer, into ``folder`` and return the folder.

    The tokenizer puts its special token before a text, as others put a beginning of sequence; the template does not.
    """
    random_checkpoint(folder, tiny_config(vocab_size=len(TOKENS), eos_token_id=EOS), seed=3)
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(TOKENS)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", EOS)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", clean_up_tokenization_spaces=False)
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return folder


class Exact:
    """What the reference gives to each token of a text, and by how much rounding may change it."""

    def __init__(self, folder: Path) -> None:
        self.reference = Reference.load(folder, "exact")
        text = [token for token in range(len(TOKENS)) for _ in range(5)]
        (baseline_TV,) = Reference.load(folder, "float32").logits([text])
        # A log-probability is off by its logit's error and by that of the logarithm of the sum, which is no larger than the
        # largest logit's: twice an element's budget. That is taken from many rows: by chance one row can be all but exact.
        self.margin = float(near_tie_margins(baseline_TV, self.logits(text), "float32").max())

    def logits(self, ids: list[int]) -> Tensor:
        """``[len(ids), vocabulary]`` float64."""
        return self.reference.logits([ids])[0]
