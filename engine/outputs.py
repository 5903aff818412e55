"""What a request gives back. Names as in vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    """``"stop"``, ``"length"`` or ``"abort"``; None while it runs."""


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """A prompt and what came of it, in the order of the prompts."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    error: str | None = None
    """Why the prompt was refused before it ran; ``outputs`` is empty then."""
