"""One rank's engine: scheduler and runner in a loop that runs one step ahead of what the host knows.

Every rank runs the same loop on the same requests. Between ranks and driver travel only new requests and aborts one way,
and tokens the other way.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from engine.config import EngineConfig, ModelConfig
from engine.execution.runner import Runner, SamplerOutput
from engine.ranks.ranks import RankContext
from engine.scheduling.batch import build_batch
from engine.scheduling.kv_cache import BlockManager
from engine.scheduling.scheduler import Chunk, Scheduler
from engine.scheduling.sequence import NO_TOKEN, PromptLogprobs, Request, Sequence, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreInfo:
    """What the driver learns when a rank's engine is up."""

    num_kv_blocks: int
    max_model_len: int


class TokenOutput(NamedTuple):
    """A token of a request, and how the request ended if it did with this token."""

    request_id: int
    token_id: int
    """``NO_TOKEN`` where the logits were not finite; the request ends with "error" then."""
    finish_reason: str | None = None
    num_cached_prompt_tokens: int = 0
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    """With the first token of a request that asks for them: of every prompt token but the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What some steps brought. Every rank sends the digest, rank 0 the outputs.

    tokens  of each output its request and its token, in turn: most have nothing more to say, and so they travel fast
    more    the others, by their place
    """

    tokens: array[int]
    more: dict[int, TokenOutput]
    digest: bytes
    has_work: bool
    not_finite_weight: str | None = None
    """Where a request ended with "error": a weight of this rank's that is not finite, if there is one."""

    @property
    def outputs(self) -> Iterator[TokenOutput]:
        """In order."""
        for place, (request_id, token_id) in enumerate(zip(self.tokens[::2], self.tokens[1::2], strict=True)):
            yield self.more.get(place) or TokenOutput(request_id, token_id)


class EngineCore:
    """Scheduler and runner of one rank."""

    def __init__(self, runner: Runner, num_blocks: int) -> None:
        config = runner.config
        assert config.block_size is not None, "config must be resolved"
        assert config.max_num_batched_tokens is not None, "config must be resolved"
        self.runner = runner
        self.block_size = config.block_size
        blocks = BlockManager(num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching)
        self.scheduler = Scheduler(blocks, max_num_seqs=config.max_num_seqs,
                                   max_num_batched_tokens=config.max_num_batched_tokens,
                                   enable_chunked_prefill=config.enable_chunked_prefill)
        self.in_flight: tuple[list[Chunk], SamplerOutput] | None = None

    @property
    def has_work(self) -> bool:
        return self.in_flight is not None or self.scheduler.has_work

    def step(self) -> list[tuple[Sequence, int]]:
        """Launch the next step, then take the tokens of the one before it: the device never waits for the host."""
        chunks = self.scheduler.schedule()
        launched = (chunks, self.runner.launch(build_batch(chunks, self.block_size))) if chunks else None
        finished, self.in_flight = self.in_flight, launched
        if finished is None:
            if launched is None and self.scheduler.has_work:
                raise RuntimeError(f"nothing can run: waiting={len(self.scheduler.waiting)}, "
                                   f"free blocks={self.scheduler.blocks.num_free}")
            return []
        chunks, sampled = finished
        token_ids = self.runner.collect(sampled)
        wanted = [chunk.sequence for chunk in chunks if chunk.samples and chunk.sequence.request.params.logprobs is not None]
        if wanted:
            for sequence, logprobs in zip(wanted, self.runner.collect_logprobs(sampled), strict=True):
                sequence.logprobs = logprobs
        scored = [chunk.sequence for chunk in chunks if chunk.scored]
        if scored:
            for sequence, prompt_logprobs in zip(scored, sampled.prompt_logprobs, strict=True):
                sequence.prompt_logprobs.append(prompt_logprobs)
        return self.scheduler.commit(chunks, token_ids)


def start_core(rank: RankContext, folder: str | Path, model_config: ModelConfig, config: EngineConfig) -> CoreInfo:
    """Job: load this rank's shards, make its cache, keep its engine in the rank's state."""
    rank.phase = "load"
    runner = Runner(folder, model_config, config, rank.tp, rank.device, at_most=rank.at_most)
    num_blocks = runner.make_cache()
    core = EngineCore(runner, num_blocks)
    rank.state["core"] = core
    longest = config.max_model_len or model_config.max_position_embeddings
    return CoreInfo(num_kv_blocks=num_blocks, max_model_len=min(longest, num_blocks * core.block_size))


def stop_core(rank: RankContext) -> None:
    """Job: let go of this rank's engine, with its weights and cache."""
    rank.state.pop("core", None)


def advance(rank: RankContext, requests: list[Request], abort_ids: list[int], num_steps: int) -> Progress:
    """Job: take in requests and aborts, run up to ``num_steps`` steps, say what came out."""
    rank.phase = "generate"
    core: EngineCore = rank.state["core"]
    for request in requests:
        core.scheduler.add(Sequence.from_request(request))
    for request_id in abort_ids:
        core.scheduler.abort(request_id)
    tokens, more = array("q"), dict[int, TokenOutput]()
    for _ in range(num_steps):
        if not core.has_work:
            break
        for sequence, token_id in core.step():
            if (sequence.finish_reason is not None or sequence.num_cached_prompt_tokens or sequence.logprobs is not None
                    or sequence.prompt_logprobs):
                more[len(tokens) // 2] = TokenOutput(sequence.request.request_id, token_id, sequence.finish_reason,
                                                     sequence.num_cached_prompt_tokens, sequence.logprobs,
                                                     tuple(sequence.prompt_logprobs))
                sequence.prompt_logprobs.clear()
            tokens.extend((sequence.request.request_id, token_id))
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
    not_finite = core.runner.not_finite_weight if NO_TOKEN in tokens[1::2] else None
    is_told = rank.tp.rank == 0
    return Progress(tokens=tokens if is_told else array("q"), more=more if is_told else {}, digest=digest,
                    has_work=core.has_work, not_finite_weight=not_finite)
