"""An OpenAI-compatible server as a side: token ids in, the log-probability of each out. vLLM, SGLang and their like.

Prompts go to ``/v1/completions`` as token ids, several in one request. Their log-probabilities come back as vLLM's
``prompt_logprobs``, or where a server has none by ``echo`` and ``logprobs``. A key goes in the header of requests to the origin
that was named, and nowhere else: redirects are refused.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from harness.errors import UsageError
from harness.verdict.streams import Scored, StreamError

MOST_BYTES = 256 * 2**20
"""Of an answer."""
PIECE = 2**16
RETRIES_S = (1.0, 4.0)
"""Waits before a request is sent again that met a busy server, or none."""
MASKED = -9999.0
"""What vLLM prints for minus infinity."""
ID_PREFIX = "token_id:"


def origin(url: str) -> str:
    """What may be shown of an address: no user, no query.

    >>> origin("https://me:secret@host:8000/v1/?key=secret")
    'https://host:8000/v1'
    """
    parts = urllib.parse.urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"


class Server:
    """One server and the model that it serves.

    Args:
        url: ``http://host:8000`` or ``…/v1``.
        model: as the server names it; empty: the only one that it serves.
        key_env: name of the environment variable with the key; empty: no key.
        timeout_s: for one answer, from the first byte to the last.

    Raises:
        UsageError: for an address with a user in it, or a variable that is not set.
        StreamError: if nobody answers there, or several models are served and none is named.
    """

    def __init__(self, url: str, *, model: str = "", key_env: str = "", timeout_s: float = 120.0,
                 retries_s: Sequence[float] = RETRIES_S) -> None:
        parts = urllib.parse.urlsplit(url)
        try:
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise UsageError("a server's address is http://host:port or https://host:port")
        if parts.username is not None or parts.password is not None:
            raise UsageError(f"the address of {origin(url)} has a user in it: give a key by --key-env, the name of an "
                             "environment variable")
        if key_env and not os.environ.get(key_env):
            raise UsageError(f"key_env={key_env!r}: no such environment variable is set")
        path = parts.path.rstrip("/")
        self._base = parts._replace(path=path if path.endswith("/v1") else f"{path}/v1", fragment="")
        self.shown = origin(urllib.parse.urlunsplit(self._base))
        self._key = os.environ[key_env] if key_env else ""
        self._timeout_s = timeout_s
        self._retries_s = tuple(retries_s)
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._by_echo = False
        self.model = model or self._only_model()

    def score(self, batch: Sequence[tuple[int, ...]], num_top: int) -> list[Scored]:
        """The log-probabilities of prompts that are sent together."""
        if not self._by_echo:
            choices = self._complete(batch, {"max_tokens": 1, "prompt_logprobs": num_top}, may_refuse=True)
            if choices is not None and all(isinstance(choice.get("prompt_logprobs"), list) for choice in choices):
                return [self._scored(ids, self._by_id(choice["prompt_logprobs"], ids), len(batch))
                        for ids, choice in zip(batch, choices, strict=True)]
        choices = self._complete(batch, {"max_tokens": 0, "echo": True, "logprobs": max(1, num_top)})
        assert choices is not None, "a refusal is an error here"
        found = []
        for ids, choice in zip(batch, choices, strict=True):
            values = (choice.get("logprobs") or {}).get("token_logprobs")
            if not isinstance(values, list) or len(values) < len(ids):
                raise self._error("returns no log-probability of each prompt token, neither by prompt_logprobs nor by echo and "
                                  "logprobs: text alone can't be compared. Is that switched off on the server?")
            found.append(self._scored(ids, ([None, *values[1 : len(ids)]], []), len(batch)))
        self._by_echo = True
        return found

    def generate(self, batch: Sequence[tuple[int, ...]], num_tokens: int, num_top: int, seed: int) -> list[Scored]:
        """So many tokens after each prompt, drawn at temperature 1, with the log-probability of each that was drawn."""
        options = {"max_tokens": num_tokens, "temperature": 1.0, "seed": seed, "ignore_eos": True, "logprobs": max(1, num_top),
                   "return_token_ids": True, "return_tokens_as_token_ids": True}
        choices = self._complete(batch, options)
        assert choices is not None, "a refusal is an error here"
        found = []
        for ids, choice in zip(batch, choices, strict=True):
            logprobs = choice.get("logprobs") or {}
            new_ids, values = choice.get("token_ids"), logprobs.get("token_logprobs")
            if new_ids is None and all(str(token).startswith(ID_PREFIX) for token in logprobs.get("tokens") or [""]):
                new_ids = [_as_id(token) for token in logprobs["tokens"]]
            if not isinstance(new_ids, list) or not isinstance(values, list) or len(values) != len(new_ids) or not new_ids:
                raise self._error("does not return the ids of generated tokens (return_token_ids): text alone can't be compared, "
                                  "for it may be cut into other tokens. Compare prompts alone with --generate 0")
            best = _by_ids(logprobs.get("top_logprobs"), len(new_ids))
            found.append(self._checked(Scored(token_ids=(*ids, *new_ids), logprobs=(*(None for _ in ids), *map(_number, values)),
                                              top=(*({} for _ in ids), *best) if best else (), decoded_from=len(ids),
                                              batch_size=len(batch))))
        return found

    def _scored(self, ids: tuple[int, ...], found: tuple[list[Any], list[dict[int, float]]], batch_size: int) -> Scored:
        values, top = found
        return self._checked(Scored(token_ids=ids, logprobs=tuple(map(_number, values)), top=tuple(top), batch_size=batch_size))

    def _checked(self, scored: Scored) -> Scored:
        if any(isinstance(value, float) and value <= MASKED for value in scored.logprobs):
            raise self._error("gives a token the log-probability of minus infinity: the model can't give it, or has a bug of its "
                              "own; leave such ids out of the prompts")
        return scored.check(self.shown)

    def _by_id(self, rows: Sequence[Any], ids: Sequence[int]) -> tuple[list[float | None], list[dict[int, float]]]:
        """VLLM's form: for each prompt token None, or an object from token id to log-probability."""
        if len(rows) != len(ids):
            raise self._error(f"returns {len(rows)} prompt_logprobs for {len(ids)} tokens: does it add tokens of its own?")
        values: list[float | None] = []
        tops: list[dict[int, float]] = []
        for at, (token_id, row) in enumerate(zip(ids, rows, strict=True)):
            if row is None and not at:
                values.append(None)
                tops.append({})
                continue
            try:
                known = {int(key): float(value["logprob"] if isinstance(value, Mapping) else value) for key, value in row.items()}
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise self._error(f"returns prompt_logprobs[{at}] that is no object from token id to logprob") from error
            if token_id not in known:
                raise self._error(f"returns prompt_logprobs[{at}] without token id {token_id} itself: the best alone are no "
                                  "stream, and the tokenizer may be another one")
            values.append(known[token_id])
            tops.append({key: value for key, value in known.items() if math.isfinite(value)})
        return values, tops

    def _complete(self, batch: Sequence[tuple[int, ...]], options: Mapping[str, Any], *,
                  may_refuse: bool = False) -> list[dict[str, Any]] | None:
        """A choice a prompt, in the prompts' order; None where the server refuses the options and that is no error."""
        body = {"model": self.model, "prompt": [list(ids) for ids in batch], "temperature": 0.0, **options}
        answer = self._ask("/completions", body, may_refuse=may_refuse)
        if answer is None:
            return None
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != len(batch) or not all(isinstance(one, dict) for one in choices):
            raise self._error(f"returns no choices, or not one for each of {len(batch)} prompts")
        return sorted(choices, key=lambda choice: choice.get("index") or 0)

    def _only_model(self) -> str:
        answer = self._ask("/models", None)
        data = answer.get("data") if answer else None
        names = [str(one.get("id")) for one in data if isinstance(one, dict)] if isinstance(data, list) else []
        if len(names) != 1:
            raise self._error(f"serves {len(names)} models{': ' + ', '.join(names[:8]) if names else ''}: name one by --model")
        return names[0]

    def _ask(self, path: str, body: Mapping[str, Any] | None, *, may_refuse: bool = False) -> dict[str, Any] | None:
        """One request, sent again where the server is busy or not there."""
        for wait_s in (*self._retries_s, None):
            try:
                return self._ask_once(path, body)
            except urllib.error.HTTPError as error:
                with error:
                    problem = self._told(error)
                if error.code in (400, 404, 422) and may_refuse:
                    return None
                if error.code not in (408, 429, 500, 502, 503, 504) or wait_s is None:
                    raise StreamError(problem) from None
            except (OSError, http.client.HTTPException) as error:
                if wait_s is None:
                    reason = getattr(error, "reason", error)
                    is_slow = isinstance(reason, TimeoutError)
                    what = f"did not answer within {self._timeout_s:g} s" if is_slow else f"can't be reached ({reason})"
                    raise self._error(f"{what}: is the server up? What was collected before is kept") from None
            time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    def _ask_once(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        url = urllib.parse.urlunsplit(self._base._replace(path=self._base.path + path))
        data = None if body is None else json.dumps(body).encode()
        deadline = time.monotonic() + self._timeout_s
        content = bytearray()
        with self._opener.open(urllib.request.Request(url, data=data, headers=headers), timeout=self._timeout_s) as response:
            while piece := response.read1(PIECE):  # as it comes: an answer without end has a deadline all the same
                content += piece
                if len(content) > MOST_BYTES:
                    raise self._error(f"answers with more than {MOST_BYTES >> 20} MiB: no answer of such a server")
                if time.monotonic() > deadline:
                    raise TimeoutError
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self._error("answers with something else than JSON: is it an OpenAI-compatible server?") from error
        if not isinstance(answer, dict):
            raise self._error("answers with JSON that is no object")
        return answer

    def _error(self, what: str) -> StreamError:
        return StreamError(f"{self.shown} {what}")

    def _told(self, error: urllib.error.HTTPError) -> str:
        if 300 <= error.code < 400:
            return f"{self.shown} redirects elsewhere ({error.code}): give the final address; a key is sent to no other origin"
        said = ""
        try:
            answer = json.loads(error.read(PIECE))
            detail = answer.get("error", answer) if isinstance(answer, dict) else answer
            said = str(detail.get("message", detail) if isinstance(detail, dict) else detail)
        except (OSError, ValueError, http.client.HTTPException):
            pass  # the number says enough
        said = said.replace(self._key, "…") if self._key else said
        return f"{self.shown} answers {error.code} {error.reason}{': ' + said[:300] if said else ''}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like any other error."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _by_ids(rows: Any, count: int) -> list[dict[int, float]]:
    """The most probable tokens of each place; none where they are not told by their ids, for two ids may have one text."""
    try:
        best = [{_as_id(token): float(value) for token, value in row.items()} for row in rows]
    except (AttributeError, TypeError, ValueError):
        return []
    return best if len(best) == count else []


def _as_id(token: Any) -> int:
    return int(str(token).removeprefix(ID_PREFIX))
