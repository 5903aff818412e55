"""Every workload with its exact parameters. What is measured stands here and nowhere else.

All requests of a case arrive at once, with token ids that repeat from run to run; no engine may cache prefixes, stop at an
end-of-sequence token, or draw greedily (some engines can't). A round is one run of the work.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

Requests = list[tuple[list[int], int]]
"""(prompt token ids, number of tokens to generate) of each request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an engine is started with. Its cache holds the largest case of these limits, so that nothing is preempted."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int

    def within(self, longest: int) -> Limits:
        """For a model of ``longest`` positions."""
        return replace(self, max_model_len=min(self.max_model_len, longest))


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What participants do, round by round.

    workload   the name in the report: a workload of the command line may have works of several names
    case       None where a work is several cases
    rounds     after the first run
    """

    workload: str
    case: str | None = None
    rounds: int

    def axes_of(self, case: str) -> dict[str, float]:
        """What was varied, for plots."""
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateWork(Work):
    """Requests for an engine.

    draw        gives the requests
    figures     what is reported: ``throughput`` (output tokens a second), ``decode`` (milliseconds a token, nobody
                watching), ``prompt`` (prompt tokens a second and time to first token), ``itl`` (time between two tokens of
                a request), ``ttft`` and ``tpot`` (time to first token, and mean time a token after it); or ``start`` alone:
                a fresh process each round, until all is generated, with imports, load, cache and graphs
    axes        what was varied, for plots
    reference   whether the Hugging Face reference runs it unasked; false where it takes many minutes
    """

    case: str
    limits: Limits
    draw: Callable[[], Requests]
    figures: tuple[str, ...]
    axes: dict[str, float] = field(default_factory=dict, hash=False)
    temperature: float = 0.6
    reference: bool = True

    @property
    def is_fresh(self) -> bool:
        """Whether starting is what is measured."""
        return self.figures == ("start",)

    def axes_of(self, case: str) -> dict[str, float]:
        return self.axes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersWork(Work):
    """Each parallel layer of the model alone, one thread a rank on a CPU.

    A round times every layer and batch once, for ``slice_s``: the fastest of groups of calls that last ``group_s`` each.
    Calls go round through copies of the weights that fill ``rotate_bytes``: more than any cache holds, as in a model
    whose other layers run in between; or 0, which leaves the weights in the cache. On a GPU a group is one CUDA graph.
    There are so many sets of weights as ``placements``, equal and at different places in memory; rounds take them in turns.
    After ``fresh_every`` rounds come fresh ranks (0: never), for all memory of a process may lie where it suits the cache badly.
    What speed memory gives by chance, up to 10 % on a CPU, is then part of the spread and no bias of the run.
    A vocabulary above ``most_vocab`` is cut to it.
    """

    workload: str = "layers"
    layers: tuple[str, ...] = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head")
    batch_sizes: tuple[int, ...]
    slice_s: float
    group_s: float = 0.0005
    rotate_bytes: int = 128 * 2**20
    placements: int = 1
    fresh_every: int = 0
    most_vocab: int | None = None

    def axes_of(self, case: str) -> dict[str, float]:
        return {"batch_size": float(case.rpartition(" ")[2])}


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectivesWork(Work):
    """All-reduce by message size: as the engine calls it, and every other way there is; eager, and on GPUs in graphs.

    A round times every size and way once: the mean of ``calls`` calls, all ranks having met before.
    """

    workload: str = "collectives"
    message_bytes: tuple[int, ...]
    calls: int

    def axes_of(self, case: str) -> dict[str, float]:
        return {"message_bytes": float(next(size for size in self.message_bytes if case.startswith(f"{size_name(size)}, ")))}


def size_name(num_bytes: int) -> str:
    """As a case has it: ``64 KiB``."""
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale and num_bytes % scale == 0:
            return f"{num_bytes // scale} {unit}"
    return f"{num_bytes} B"


COLD, WARM = "files not in memory", "files in memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadWork(Work):
    """Checkpoint to shards on fresh ranks: with its files dropped from the page cache (``COLD``), and with them in it."""

    workload: str = "load"
    case: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareWork(Work):
    """The machine itself, whose rows give everybody's bounds. ``num_threads`` on a CPU; None: as many as the engine uses."""

    case: str
    rounds: int = 3
    num_threads: int | None = None


ENGINE_CASE, ONE_THREAD_CASE = "as the engine runs", "one thread"
"""Cases of the hardware's own rows."""
REFERENCE_ROUNDS = 3
"""The Hugging Face reference is many times slower, and its figure is a yardstick: it runs so many rounds at most."""
LARGEST_TOKEN_ID = 10_000
"""As in nano-vllm's benchmark. Models of a smaller vocabulary get ids modulo its size."""


def ragged_requests(num_requests: int, prompt_lens: tuple[int, int], output_lens: tuple[int, int]) -> Requests:
    """All prompts are drawn first, then the output lengths, as nano-vllm's benchmark draws them."""
    draw = random.Random(0)
    prompts = [[draw.randint(0, LARGEST_TOKEN_ID) for _ in range(draw.randint(*prompt_lens))] for _ in range(num_requests)]
    return [(prompt, draw.randint(*output_lens)) for prompt in prompts]


def equal_requests(num_requests: int, prompt_len: int, output_len: int) -> Requests:
    """Requests of one size with random prompts."""
    draw = random.Random(f"{num_requests} {prompt_len} {output_len}")
    return [([draw.randint(0, LARGEST_TOKEN_ID) for _ in range(prompt_len)], output_len) for _ in range(num_requests)]


w1_requests = partial(ragged_requests, 256, (100, 1024), (100, 1024))
"""nano-vllm's own benchmark: 142,827 tokens in, 133,966 out."""


def _decode(batch_size: int, context: int, num_tokens: int, **options: Any) -> GenerateWork:
    # The median token sees context + num_tokens / 2 tokens: the prompt is that much shorter.
    prompt_len = context - num_tokens // 2
    return GenerateWork(workload="decode", case=f"batch {batch_size}, context {context}", axes={"batch_size": batch_size},
                        draw=partial(equal_requests, batch_size, prompt_len, num_tokens + 1), **options)


def _prefill(num_prompts: int, prompt_len: int, **options: Any) -> GenerateWork:
    return GenerateWork(workload="prefill", case=f"{num_prompts} × {prompt_len}", figures=("prompt",),
                        draw=partial(equal_requests, num_prompts, prompt_len, 1), **options)


def _mixed(prompt_len: int, output_len: int, concurrency: int) -> GenerateWork:
    return GenerateWork(workload="mixed", case=f"{prompt_len} in, {output_len} out, {concurrency} at once", limits=_GPU_LIMITS,
                        draw=partial(equal_requests, concurrency, prompt_len, output_len), rounds=5,
                        figures=("throughput", "ttft", "tpot"), axes={"concurrency": concurrency}, reference=concurrency < 64)


_GPU_LIMITS = Limits(max_model_len=16_896, max_num_seqs=256, max_num_batched_tokens=16_384)
_QUICK_LIMITS = Limits(max_model_len=512, max_num_seqs=8, max_num_batched_tokens=512)

QUICK_LAYERS = LayersWork(layers=("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"), batch_sizes=(1, 16), rounds=40,
                          slice_s=0.005, rotate_bytes=0, placements=4, fresh_every=8, most_vocab=4096)
"""Also what the A/A script measures: with one rank a run takes less than 5 s. Weights stay in the cache, because a shared
machine's memory is as fast as its neighbours let it be: 2 % of spread become 10 %. The embedding stays out: on a CPU its 5 µs
are the interpreter's, which is 5 % faster or slower from one process to the next by where its memory happens to lie."""

WORKLOADS: dict[str, tuple[Work, ...]] = {
    "w1": (
        GenerateWork(workload="w1", case="256 requests of 100 to 1024 in, 100 to 1024 out", draw=w1_requests, rounds=8,
                     limits=Limits(max_model_len=4_096, max_num_seqs=512, max_num_batched_tokens=16_384),
                     figures=("throughput",), reference=False),
    ),
    "decode": tuple(_decode(batch_size, 1_024, 96, rounds=8, figures=("decode", "itl"), limits=_GPU_LIMITS)
                    for batch_size in (1, 8, 64, 256)),
    "prefill": (_prefill(16, 1_024, rounds=9, limits=_GPU_LIMITS), _prefill(1, 16_384, rounds=9, limits=_GPU_LIMITS)),
    "mixed": tuple(_mixed(prompt_len, output_len, concurrency)
                   for prompt_len, output_len in ((1_024, 128), (128, 1_024)) for concurrency in (1, 16, 128)),
    "collectives": (CollectivesWork(message_bytes=tuple(2**power for power in (11, 13, 15, 17, 19, 21, 23, 24, 26)),
                                    rounds=20, calls=100),),
    "layers": (LayersWork(batch_sizes=(1, 16, 64, 256), rounds=30, slice_s=0.02),),
    "layers-subset": (QUICK_LAYERS,),
    "load": (
        LoadWork(case=COLD, rounds=9), LoadWork(case=WARM, rounds=9),
        GenerateWork(workload="start", case="start to first token", draw=partial(equal_requests, 1, 16, 1), rounds=2,
                     limits=_GPU_LIMITS, figures=("start",), reference=False),
    ),
    "quick": (
        GenerateWork(workload="throughput", case="4 requests of 8 to 32 in, 8 to 24 out", figures=("throughput",), rounds=8,
                     draw=partial(ragged_requests, 4, (8, 32), (8, 24)), limits=_QUICK_LIMITS),
        *(_decode(batch_size, 32, 8, rounds=8, figures=("itl",), limits=_QUICK_LIMITS) for batch_size in (1, 4, 8)),
        _prefill(1, 128, rounds=8, limits=_QUICK_LIMITS),
        CollectivesWork(message_bytes=tuple(2**power for power in (10, 12, 14, 16, 18, 20, 22)), rounds=20, calls=20),
        QUICK_LAYERS,
        LoadWork(case=COLD, rounds=8), LoadWork(case=WARM, rounds=8),
    ),
}


def works_of(names: Sequence[str]) -> list[Work]:
    """The works of all named workloads, none twice.

    Raises:
        ValueError: for a name that is no workload's.
    """
    if unknown := [name for name in names if name not in WORKLOADS]:
        raise ValueError(f"workloads={unknown} are unknown; there are: {', '.join(WORKLOADS)}")
    return list(dict.fromkeys(work for name in names for work in WORKLOADS[name]))
