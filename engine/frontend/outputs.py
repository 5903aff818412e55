"""What a request gives back. Names as in vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's natural log-probability at one place, under the raw logits."""

    logprob: float
    rank: int
    """1 + the number of tokens that are more probable."""
    decoded_token: str | None
    """The token's text by itself; None without a tokenizer or with ``detokenize=False``."""


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One completion of a prompt, or what it has grown by."""

    index: int
    text: str = ""
    """Without the stop string or stop token, unless they were asked for. What is no character is U+FFFD, as the tokenizer's own
    ``decode`` has it."""
    token_ids: list[int] = field(default_factory=list)
    """All tokens drawn up to the end, those of the stop string and the stop token among them."""
    cumulative_logprob: float | None = None
    """Sum of the drawn tokens' log-probabilities so far, if they were asked for."""
    logprobs: list[dict[int, Logprob]] | None = None
    """For each token of ``token_ids``: the drawn token's and those of the best, by token id, the drawn one first."""
    finish_reason: str | None = None
    """``"stop"``, ``"length"``, ``"abort"`` or, where the model's logits are not finite, ``"error"``; None while it runs."""
    stop_reason: int | str | None = None
    """The stop string, or the token of ``stop_token_ids``, that ended it; None for an end-of-sequence token."""

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """A prompt and what came of it."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """If they were asked for: of each prompt token its own and those of the best, by token id, its own first; None for the
    first one, which nothing stands before. They come with the first completion's first token; in a stream with that item."""
    outputs: list[CompletionOutput] = field(default_factory=list)
    """``n`` completions by index; in a stream those with something new."""
    finished: bool = False
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache by the first completion. The others find the first one's."""
    num_generated_tokens: int = 0
    """Tokens of all completions so far."""
    error: str | None = None
    """Why the prompt was refused before it ran (``outputs`` is empty then), or why its last completion with
    ``finish_reason="error"`` could not go on: at which step, and which rank's weight is to blame if one is."""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)
