"""What a request asks for. How a token is drawn stands in ``layers/sampler.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Below the first, logits divided by the temperature may overflow; above the second, they no longer make a difference.
GREEDY_BELOW = 1e-5
MAX_TEMPERATURE = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Names and defaults as in vLLM.

    Attributes:
        temperature: below 1e-5 is greedy; otherwise logits are divided by it.
        top_k: keep the k best tokens; -1 or 0 keeps all.
        top_p: keep the smallest set of best tokens whose probability reaches top_p (nucleus sampling, Holtzman et al. 2020).
        seed: the same seed and prompt give the same text at any tp_size and in any batch, up to rounding of the logits;
            without one, the engine's seed and the request's number are used.
        max_tokens: most tokens to generate; ``None``: up to the model's length.
        min_tokens: no stop token is drawn before so many tokens were.
        stop_token_ids: end the sequence, beside the model's own end-of-sequence tokens.
        ignore_eos: do not stop at the model's end-of-sequence tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(f"temperature={self.temperature} must lie in [0, {MAX_TEMPERATURE:g}]; 0 is greedy")
        if self.top_k < -1:
            raise ValueError(f"top_k={self.top_k} must be -1 or 0 (all), or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1, or None")
        if self.min_tokens < 0 or (self.max_tokens is not None and self.min_tokens > self.max_tokens):
            raise ValueError(f"min_tokens={self.min_tokens} must lie between 0 and max_tokens={self.max_tokens}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must lie in [0, 2**63)")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW
