"""One request's state: its tokens, its blocks, how far it has been computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from engine.frontend.sampling import SamplingParams

NO_TOKEN = -1
"""What is drawn from logits that are not finite. All ranks see the same logits, and hence the same of this."""
IN_FLIGHT = -1
"""In a step's inputs, a token that the host does not know yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What travels to the ranks: plain data, the same on each of them."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    """Key of the request's random numbers, below 2**63."""
    max_tokens: int
    """Most tokens to generate: the parameters' limit and the model's length, whichever is smaller."""
    stop_token_ids: frozenset[int]
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token ids of each, as the tokenizer writes them."""
    num_prompt_logprobs: int | None = None
    """Of each prompt token, log-probabilities of so many best beside its own; -1: of all; None: none at all. Of a prompt's
    completions the first alone asks for them."""
    changes_logits: bool = field(init=False)
    """Whether its parameters change logits before the temperature. Asked of every row in every step, so found out once."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "changes_logits", bool(self.bad_words) or self.params.changes_logits)


class TokenLogprobs(NamedTuple):
    """Natural log-probabilities where a token was drawn. A rank is 1 + the number of tokens that are more probable."""

    logprob: float
    """Of the drawn token."""
    rank: int
    top: tuple[tuple[int, float, int], ...]
    """(token id, logprob, rank) of the most probable tokens, best first."""


class PromptLogprobs(NamedTuple):
    """The same of P prompt tokens one after another: numpy arrays, for K may be the whole vocabulary."""

    logprob_P: Any
    rank_P: Any
    top_token_PK: Any
    top_logprob_PK: Any
    top_rank_PK: Any

    @property
    def rows(self) -> Iterator[TokenLogprobs]:
        """One a prompt token."""
        for logprob, rank, *top in zip(*(column.tolist() for column in self), strict=True):
            yield TokenLogprobs(logprob, rank, tuple(zip(*top, strict=True)))


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way through the engine.

    ``token_ids`` are the tokens the host knows. Steps are launched one ahead of the host, so up to two more may be *in
    flight*: drawn, or being drawn, on the device and not read back yet. ``num_tokens`` counts them all.
    """

    request: Request
    token_ids: list[int]
    num_in_flight: int = 0
    num_computed: int = 0
    """Tokens whose keys and values are in the cache, or will be after the steps launched so far."""
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hash of each full block of known tokens."""
    num_registered: int = 0
    """Leading blocks that the prefix cache knows."""
    row: int = -1
    """Place in the device's per-sequence state while running, else -1."""
    finish_reason: str | None = None
    num_cached_prompt_tokens: int = 0
    num_preemptions: int = 0
    logprobs: TokenLogprobs | None = None
    """Of the newest known token, if the request wants them."""
    num_scored: int = 0
    """Prompt tokens scored by the steps launched so far, the first one not counted. A preemption leaves it."""
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    """What those steps have brought so far."""

    @classmethod
    def from_request(cls, request: Request) -> Sequence:
        return cls(request=request, token_ids=list(request.prompt_token_ids))

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_to_score(self) -> int:
        """Prompt tokens whose log-probabilities are wanted: all but the first, or none."""
        return 0 if self.request.num_prompt_logprobs is None else self.num_prompt_tokens - 1

    @property
    def num_sharable(self) -> int:
        """First tokens that need not run where the prefix cache holds them: what logits are still needed of is not among them."""
        return self.num_scored if self.num_scored < self.num_to_score else len(self.token_ids) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_generated(self) -> int:
        """Tokens drawn so far, those in flight included."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Tokens to run before the next one can be drawn; 0 when the last token allowed is already in flight."""
        num_tokens = self.num_tokens
        if num_tokens - len(self.request.prompt_token_ids) >= self.request.max_tokens:
            return 0
        return num_tokens - self.num_computed

    def append(self, token_id: int) -> bool:
        """Take a token that was in flight, and finish if it is the last one. Returns whether it was."""
        self.num_in_flight -= 1
        if token_id == NO_TOKEN:
            self.finish_reason = "error"
            return True
        self.token_ids.append(token_id)
        num_known = len(self.token_ids) - self.num_prompt_tokens
        if token_id in self.request.stop_token_ids:
            self.finish_reason = "stop"
        elif num_known >= self.request.max_tokens:
            self.finish_reason = "length"
        return self.finish_reason is not None
