"""Requests under way, as the driver sees them: tokens come in, outputs grow."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

from engine.execution.core import TokenOutput
from engine.frontend.detokenizer import Detokenizer, Pieces
from engine.frontend.outputs import CompletionOutput, Logprob, RequestOutput
from engine.scheduling.sequence import PromptLogprobs, Request, TokenLogprobs

logger = logging.getLogger(__name__)


class OngoingCompletion:
    """One completion of a prompt.

    Args:
        request: as the ranks know it.
        pieces: of the tokenizer; None without one, or for a request that wants no text: texts stay empty then.
        eos_token_ids: those of its stop tokens that are the model's own.
        streams: whether somebody reads the text while it grows. If not, and if no stop string is asked for, it is made at the
            end, in a fraction of the time.
    """

    def __init__(self, request: Request, index: int, pieces: Pieces | None, eos_token_ids: Sequence[int], *,
                 streams: bool) -> None:
        params = request.params
        self.request = request
        self.output = CompletionOutput(index=index)
        self.is_watched = streams or bool(params.stop_strings)
        self._eos_token_ids = eos_token_ids
        self._pieces = pieces
        self._detokenizer: Detokenizer | None = None
        if pieces is not None:
            self._detokenizer = Detokenizer(pieces, request.prompt_token_ids, stop=params.stop_strings,
                                            include_stop=params.include_stop_str_in_output, min_tokens=params.min_tokens)
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0
        self._num_shown, self._num_tokens_shown, self._end_shown = 0, 0, False

    def take(self, token: TokenOutput) -> None:
        """Add a token, or end without one."""
        if token.finish_reason == "error":
            self.finish("error")
            return
        output = self.output
        output.token_ids.append(token.token_id)
        if token.logprobs is not None:
            self._take_logprobs(token.token_id, token.logprobs)
        if self._detokenizer is not None and self.is_watched:
            if not self._is_hidden(token):
                self._detokenizer.push(token.token_id)
            output.text = self._detokenizer.text[: self._detokenizer.num_safe]
            if self._detokenizer.stop_string is not None:
                self.finish("stop")
                return
        if token.finish_reason is not None:
            self.finish(token.finish_reason)

    def finish(self, reason: str) -> None:
        """Settle the text and the reasons. A stop string may be found in what was held back."""
        output, detokenizer = self.output, self._detokenizer
        output.finish_reason = reason
        last = output.token_ids[-1] if output.token_ids else None
        if reason == "stop" and last in self.request.params.stop_token_ids and last not in self._eos_token_ids:
            output.stop_reason = last
        if detokenizer is None:
            return
        if not self.is_watched:
            hides_last = reason == "stop" and not self.request.params.include_stop_str_in_output
            detokenizer.extend(output.token_ids[:-1] if hides_last else output.token_ids)
        detokenizer.finish()
        output.text = detokenizer.text
        if detokenizer.stop_string is not None:
            output.finish_reason, output.stop_reason = "stop", detokenizer.stop_string

    def delta(self) -> CompletionOutput | None:
        """What is new since the last call: text or the end. Without a tokenizer, every token is."""
        output = self.output
        text = output.text[self._num_shown :]
        num_tokens = len(output.token_ids) - self._num_tokens_shown
        is_new = bool(text) or (output.finished() and not self._end_shown) or (self._detokenizer is None and num_tokens > 0)
        if not is_new:
            return None
        start = self._num_tokens_shown
        self._num_shown += len(text)
        self._num_tokens_shown += num_tokens
        self._end_shown = output.finished()
        logprobs = None if output.logprobs is None else output.logprobs[start:]
        return replace(output, text=text, token_ids=output.token_ids[start:], logprobs=logprobs)

    def _is_hidden(self, token: TokenOutput) -> bool:
        """Whether the token is a stop token, which is no part of the text."""
        return token.finish_reason == "stop" and not self.request.params.include_stop_str_in_output

    def _take_logprobs(self, token_id: int, at: TokenLogprobs) -> None:
        assert self.output.logprobs is not None, f"request_id={self.request.request_id} did not ask for logprobs"
        assert self.output.cumulative_logprob is not None, "set with logprobs"
        self.output.logprobs.append(self._by_token(token_id, at, at.top[: self.request.params.logprobs]))
        self.output.cumulative_logprob += at.logprob

    def prompt_logprobs(self, parts: Sequence[PromptLogprobs]) -> list[dict[int, Logprob] | None]:
        """As a request's output has them."""
        rows = (at for part in parts for at in part.rows)
        return [None, *(self._by_token(token_id, at, at.top)
                        for token_id, at in zip(self.request.prompt_token_ids[1:], rows, strict=True))]

    def _by_token(self, token_id: int, at: TokenLogprobs, top: Iterable[tuple[int, float, int]]) -> dict[int, Logprob]:
        by_token = {token_id: Logprob(at.logprob, at.rank, self._text_of(token_id))}
        for other, logprob, rank in top:
            if other != token_id:
                by_token[other] = Logprob(logprob, rank, self._text_of(other))
        return by_token

    def _text_of(self, token_id: int) -> str | None:
        return None if self._pieces is None else self._pieces.alone(token_id)


class OngoingRequest:
    """A prompt with its completions, by the number under which the ranks know each.

    ``inbox`` takes what comes for it, from any thread; None asks for its abort. Whoever owns the request empties it.
    """

    def __init__(self, output: RequestOutput, completions: dict[int, OngoingCompletion]) -> None:
        self.output = output
        self.completions = completions
        self.inbox: deque[TokenOutput | None] = deque()
        self._shows_prompt_logprobs = True
        self.cause = ""  # why the ranks could go on no more
        output.outputs = [completion.output for completion in completions.values()]

    @property
    def is_watched(self) -> bool:
        """Whether its text is looked at while it grows."""
        return any(completion.is_watched for completion in self.completions.values())

    def empty_inbox(self) -> list[int]:
        """Take in what has come. Returns the numbers of completions that ended without the ranks knowing."""
        ended: list[int] = []
        while self.inbox:
            token = self.inbox.popleft()
            if token is None:
                ended += self._abort()
                continue
            completion = self.completions[token.request_id]
            if completion.output.finished():  # the ranks have run ahead of a stop string
                continue
            completion.take(token)
            if completion.request.num_prompt_logprobs is not None and self.output.prompt_logprobs is None:
                self.output.prompt_logprobs = completion.prompt_logprobs(token.prompt_logprobs)
            if completion.output.finish_reason == "error":
                self._tell_error(completion.output)
                continue
            self.output.num_generated_tokens += 1
            if completion.output.index == 0:
                self.output.num_cached_tokens = token.num_cached_prompt_tokens
            if completion.output.finished() and token.finish_reason is None:
                ended.append(token.request_id)
        self.output.finished = all(completion.finished() for completion in self.output.outputs)
        return ended

    def delta(self) -> RequestOutput | None:
        """What is new since the last call, if anything is."""
        deltas = [delta for completion in self.completions.values() if (delta := completion.delta()) is not None]
        if not deltas:
            return None
        prompt_logprobs = self.output.prompt_logprobs if self._shows_prompt_logprobs else None
        self._shows_prompt_logprobs &= prompt_logprobs is None
        return replace(self.output, outputs=deltas, prompt_logprobs=prompt_logprobs)

    def _tell_error(self, completion: CompletionOutput) -> None:
        self.output.error = (f"request_id={self.output.request_id}, completion {completion.index}: logits are not finite at step "
                             f"{len(completion.token_ids)}: {self.cause}; `shardproof verify` says more")
        logger.warning("%s", self.output.error)

    def _abort(self) -> list[int]:
        running = [number for number, completion in self.completions.items() if not completion.output.finished()]
        for number in running:
            self.completions[number].finish("abort")
        return running
