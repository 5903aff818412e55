"""Is the KV cache's bookkeeping right, and the same on every rank?

Every rank runs the subject's scheduler and block manager, over a device that is made up (``device.py``), through drawn
schedules: requests that come and are aborted, shared prefixes, a cache so small that sequences give way. (The real model in
a cache that is too small is part of ``generation``.) Two ranks whose steps differ in anything are the finding,
whatever the output says; so are ranks that hold caches of different sizes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from harness.checks.base import Answer, Cases, Check, CheckContext, Outcome, Whole
from harness.checks.fake_device import VOCAB_SIZE, DisagreementError, FakeDevice, continuation
from harness.subjects.rank import Rank, SchedulerAlone, SchedulerLimits

NUM_CASES = 35


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCase:
    """A schedule: when requests come, and when they are given up."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    chunked_prefill: bool
    prefix_caching: bool
    requests: tuple[tuple[int, tuple[int, ...], int], ...]
    """(step at which it comes, prompt, tokens to generate)"""
    aborts: tuple[tuple[int, int], ...]
    """(step, number of the request)"""

    kind: ClassVar[str] = "schedules"
    module: ClassVar[str] = "scheduler and block manager"

    @property
    def size(self) -> int:
        """Tokens, those of the prompts included."""
        return sum(len(prompt) + count for _, prompt, count in self.requests)

    @property
    def limits(self) -> SchedulerLimits:
        return SchedulerLimits(block_size=self.block_size, num_blocks=self.num_blocks, max_num_seqs=self.max_num_seqs,
                               max_num_batched_tokens=self.max_num_batched_tokens, enable_chunked_prefill=self.chunked_prefill,
                               enable_prefix_caching=self.prefix_caching)

    def __str__(self) -> str:
        return (f"{len(self.requests)} requests in {self.num_blocks} blocks of {self.block_size}, {self.max_num_seqs} at a time, "
                f"{self.max_num_batched_tokens} tokens a step, {'' if self.chunked_prefill else 'no '}chunked prefill, "
                f"{'' if self.prefix_caching else 'no '}prefix caching, {len(self.aborts)} aborts")


def _draw(context: CheckContext) -> list[KVCase]:
    return draw_cases(random.Random(context.seed))


def draw_cases(draw: random.Random, num_cases: int = NUM_CASES) -> list[KVCase]:
    """Schedules in caches that are small enough for sequences to give way, and in turns with them kinds of their own."""
    kinds = (_draw_crowded, _draw_case, _draw_crowded, _draw_case, _draw_recurring)
    return [kinds[number % len(kinds)](draw) for number in range(num_cases)]


def _draw_recurring(draw: random.Random) -> KVCase:
    """Prompts of two blocks in any order: a block comes after the same ones and after others, and at several places."""
    block_size, num_blocks = draw.randint(1, 3), draw.randint(12, 16)
    blocks = [tuple(draw.randrange(VOCAB_SIZE) for _ in range(block_size)) for _ in range(2)]
    requests = []
    for _ in range(12):
        ids = [token_id for _ in range(draw.randint(3, 6)) for token_id in draw.choice(blocks)]
        requests.append((draw.randint(0, 30), (*ids, draw.randrange(VOCAB_SIZE)), draw.randint(1, 3)))
    return KVCase(block_size=block_size, num_blocks=num_blocks, max_num_seqs=3, chunked_prefill=True, max_num_batched_tokens=24,
                  prefix_caching=True, requests=tuple(requests), aborts=())


def _draw_crowded(draw: random.Random) -> KVCase:
    """Short prompts with long answers, all at once, few tokens a step: who gives way has much to compute again, in chunks."""
    block_size, num_blocks, max_num_seqs = draw.randint(1, 3), draw.randint(4, 9), draw.randint(2, 4)
    longest = block_size * num_blocks
    requests: list[tuple[int, tuple[int, ...], int]] = []
    for _ in range(draw.randint(3, 5)):
        prompt = tuple(draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, max(1, longest // 4))))
        requests.append((draw.randint(0, 3), prompt, draw.randint((longest - len(prompt)) // 2, longest - len(prompt))))
    return KVCase(block_size=block_size, num_blocks=num_blocks, max_num_seqs=max_num_seqs, chunked_prefill=True,
                  max_num_batched_tokens=max_num_seqs + draw.randint(0, 2), prefix_caching=draw.random() < 0.5,
                  requests=tuple(requests), aborts=())


def _draw_case(draw: random.Random) -> KVCase:
    block_size, num_blocks, max_num_seqs = draw.randint(1, 4), draw.randint(2, 10), draw.randint(1, 5)
    longest = block_size * num_blocks
    chunked = draw.random() < 0.7
    beginnings = [[draw.randrange(VOCAB_SIZE) for _ in range(longest)] for _ in range(2)]
    requests: list[tuple[int, tuple[int, ...], int]] = []
    for _ in range(draw.randint(1, 10)):
        length = draw.randint(1, longest - 1)
        # Prompts that share a beginning, of any length, so that the prefix cache has work.
        shared = draw.randint(0, length)
        prompt = draw.choice(beginnings)[:shared] + [draw.randrange(VOCAB_SIZE) for _ in range(length - shared)]
        if requests and draw.random() < 0.25:  # the same again, so that all of it may be found
            prompt = list(draw.choice(requests)[1])
        requests.append((draw.randint(0, 20), tuple(prompt), draw.randint(1, longest - len(prompt))))
    return KVCase(
        block_size=block_size, num_blocks=num_blocks, max_num_seqs=max_num_seqs, chunked_prefill=chunked,
        max_num_batched_tokens=max(max_num_seqs + draw.randint(0, 8), 0 if chunked else longest),
        prefix_caching=draw.random() < 0.8, requests=tuple(requests),
        aborts=tuple((draw.randint(0, 30), draw.randrange(len(requests))) for _ in range(draw.randint(0, 2))),
    )


def run_case(rank: Rank, case: KVCase) -> list[Answer]:
    """One schedule through this rank's scheduler, block manager and loop."""
    device = FakeDevice(case.limits)
    play = _Play(case, rank.scheduler(case.limits, device.launch))
    problem = None
    try:
        play.run()
    except Exception as failure:  # whatever the bookkeeping trips over is the finding
        problem = f"step {len(device.digests)}: {failure if isinstance(failure, DisagreementError) else repr(failure)}"
    return [Answer(digests=device.digests, compared=play.num_tokens, problem=problem)]


class _Play:
    """One schedule on one rank, held against what each request must bring."""

    def __init__(self, case: KVCase, scheduler: SchedulerAlone) -> None:
        self.case = case
        self.scheduler = scheduler
        self.expected = {number: continuation(prompt, count) for number, (_, prompt, count) in enumerate(case.requests)}
        self.brought: dict[int, list[int]] = {number: [] for number in self.expected}
        self.aborted: set[int] = set()

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.brought.values()))

    def run(self) -> None:
        last_event = max([step for step, _, _ in self.case.requests] + [step for step, _ in self.case.aborts])
        # One after the other and one token at a time, starting over for each token: nothing takes longer.
        most = last_event + 10 + sum((len(prompt) + count) * (count + 1) for _, prompt, count in self.case.requests)
        step = 0
        while step <= last_event or self.scheduler.has_work:
            if step > most:
                raise DisagreementError(f"no end after {most} steps: {self.num_tokens} tokens of "
                                   f"{sum(map(len, self.expected.values()))} have come")
            self._arrive(step)
            if self.scheduler.has_work:
                self._take(self.scheduler.step())
                self._check_blocks()
            step += 1
        for number, expected in self.expected.items():
            if number not in self.aborted and self.brought[number] != expected:
                raise DisagreementError(f"request {number} brought {self.brought[number]}, it must bring {expected}")
        if missing := self.case.num_blocks - self.scheduler.blocks()[2]:
            raise DisagreementError(f"{missing} blocks are still held when all requests are done")

    def _arrive(self, step: int) -> None:
        for number, (at, prompt, count) in enumerate(self.case.requests):
            if at == step:
                self.scheduler.add(number, prompt, count)
        for at, number in self.case.aborts:
            if at == step:
                self.scheduler.abort(number)
                self.aborted.add(number)  # one that comes later runs to its end; nobody counts its tokens

    def _take(self, tokens: list[tuple[int, int]]) -> None:
        for number, token_id in tokens:
            self.brought[number].append(token_id)
            if self.brought[number] != self.expected[number][: len(self.brought[number])]:
                raise DisagreementError(f"request {number} brought {self.brought[number]}, it must bring {self.expected[number]}")

    def _check_blocks(self) -> None:
        """Who holds what, counted again."""
        held, ref_counts, num_free = self.scheduler.blocks()
        counts = [held.count(block) for block in range(self.case.num_blocks)]
        if counts != ref_counts:
            raise DisagreementError(f"blocks are held {counts} times, ref_counts says {ref_counts}")
        if num_free != counts.count(0):
            raise DisagreementError(f"{counts.count(0)} blocks are held by nobody, {num_free} count as free")


def check_cache_sizes(context: CheckContext) -> Outcome:
    """Ranks that hold caches of different sizes, or other ones than they count on."""
    sizes = context.subject.run(cache_sizes)
    wrong = [rank for rank, size in enumerate(sizes) if size != sizes[0] or size[0] != size[1] or size[0] < 1]
    if not wrong:
        return Outcome(cases=1, compared=len(sizes))
    counted, held = sizes[wrong[0]]
    return Outcome(cases=1, compared=len(sizes), rank=wrong[0], module="cache",
                   finding=f"rank {wrong[0]} counts {counted} blocks and holds {held}, rank 0 {sizes[0][0]} and {sizes[0][1]}: "
                           "all must have the same, and some")


def cache_sizes(rank: Rank) -> tuple[int, int]:
    """Job: blocks that the bookkeeping of the loaded model counts on, and blocks that its cache tensors have."""
    return rank.cache_blocks()


CHECK = Check(
    name="kv", question="Is the KV cache's bookkeeping right, and the same on every rank?",
    parts=(Cases(case=KVCase, draw=_draw, run=run_case, kinds=(KVCase.kind,), needs="scheduler"),
           Whole(judge=check_cache_sizes, kind="cache sizes", needs="scheduler")))
