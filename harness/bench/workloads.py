"""Every workload with its exact parameters. What is measured stands here and nowhere else.

All requests of a case arrive at once, with token ids that repeat from run to run; no engine may cache prefixes, stop at an
end-of-sequence token, or draw greedily (some engines can't). A round is one run of the case.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Requests = list[tuple[list[int], int]]
"""(prompt token ids, number of tokens to generate) of each request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an engine is started with. Its cache holds the largest case of the workload, so that nothing is preempted."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCase:
    """Requests for an engine.

    draw        gives the requests
    figures     what is reported: ``throughput`` (output tokens a second), ``decode`` (milliseconds a token, nobody
                watching), ``prompt`` (prompt tokens a second and time to first token), ``itl`` (time between two tokens of
                a request), ``ttft`` and ``tpot`` (time to first token, and mean time a token after it)
    rounds      runs after the first one
    axes        what was varied, for plots
    reference   whether the Hugging Face reference runs it unasked; false where it takes many minutes
    """

    case: str
    draw: Callable[[], Requests]
    figures: tuple[str, ...]
    rounds: int
    axes: dict[str, float] = field(default_factory=dict, hash=False)
    temperature: float = 0.6
    reference: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratePart:
    """Cases that one start of an engine serves."""

    workload: str
    limits: Limits
    cases: tuple[GenerateCase, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersPart:
    """Each parallel layer of the model alone, one thread a rank on a CPU.

    A round times every layer and batch once, for ``slice_s``: the fastest of groups of calls that last ``group_s`` each.
    Calls go round through copies of the weights that fill ``rotate_bytes``: more than any cache holds, as in a model
    whose other layers run in between; or 0, which leaves the weights in the cache. On a GPU a group is one CUDA graph.
    There are so many sets of weights as ``placements``, equal and at different places in memory; rounds take them in turns.
    After ``fresh_every`` rounds come fresh ranks (0: never), for all memory of a process may lie where it suits the cache badly.
    What speed memory gives by chance, up to 10 % on a CPU, is then part of the spread and no bias of the run.
    A vocabulary above ``most_vocab`` is cut to it.
    """

    layers: tuple[str, ...] = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head")
    batch_sizes: tuple[int, ...]
    rounds: int
    slice_s: float
    group_s: float = 0.0005
    rotate_bytes: int = 128 * 2**20
    placements: int = 1
    fresh_every: int = 0
    most_vocab: int | None = None
    workload: str = "layers"


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectivesPart:
    """All-reduce by message size: as the engine calls it, and every other way there is; eager, and on GPUs in graphs.

    A round times every size and way once: the mean of ``calls`` calls, all ranks having met before.
    """

    message_bytes: tuple[int, ...]
    rounds: int
    calls: int
    workload: str = "collectives"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPart:
    """Checkpoint to shards on fresh ranks: with its files dropped from the page cache, and with them in it."""

    rounds: int
    cases: tuple[str, ...] = ("files not in memory", "files in memory")
    workload: str = "load"


@dataclass(frozen=True, slots=True, kw_only=True)
class StartPart:
    """From starting a fresh process to its first token, with imports, load, cache and graphs."""

    limits: Limits
    rounds: int
    prompt_len: int = 16
    workload: str = "start"


Part = GeneratePart | LayersPart | CollectivesPart | LoadPart | StartPart

REFERENCE_ROUNDS = 3
"""The Hugging Face reference is many times slower, and its figure is a yardstick: it runs so many rounds at most."""

LARGEST_TOKEN_ID = 10_000
"""As in nano-vllm's benchmark. Models of a smaller vocabulary get ids modulo its size."""


def w1_requests() -> Requests:
    """nano-vllm's own benchmark: ``seed(0)``, 256 prompts, then 256 output lengths; 142,827 tokens in, 133,966 out."""
    draw = random.Random(0)
    prompts = [[draw.randint(0, LARGEST_TOKEN_ID) for _ in range(draw.randint(100, 1024))] for _ in range(256)]
    return [(prompt, draw.randint(100, 1024)) for prompt in prompts]


def equal_requests(num_requests: int, prompt_len: int, output_len: int) -> Callable[[], Requests]:
    """Requests of one size with random prompts."""

    def draw_requests() -> Requests:
        draw = random.Random(f"{num_requests} {prompt_len} {output_len}")
        return [([draw.randint(0, LARGEST_TOKEN_ID) for _ in range(prompt_len)], output_len) for _ in range(num_requests)]

    return draw_requests


def ragged_requests(num_requests: int, prompt_lens: tuple[int, int], output_lens: tuple[int, int]) -> Callable[[], Requests]:
    """As ``w1_requests``, smaller."""

    def draw_requests() -> Requests:
        draw = random.Random(0)
        prompts = [[draw.randint(0, LARGEST_TOKEN_ID) for _ in range(draw.randint(*prompt_lens))] for _ in range(num_requests)]
        return [(prompt, draw.randint(*output_lens)) for prompt in prompts]

    return draw_requests


def _decode_case(batch_size: int, context: int, num_tokens: int, rounds: int, figures: tuple[str, ...]) -> GenerateCase:
    # The median token sees context + num_tokens / 2 tokens: the prompt is that much shorter.
    prompt_len = context - num_tokens // 2
    return GenerateCase(
        case=f"batch {batch_size}, context {context}", draw=equal_requests(batch_size, prompt_len, num_tokens + 1),
        figures=figures, rounds=rounds, axes={"batch_size": batch_size},
    )


def _prefill_case(num_prompts: int, prompt_len: int, rounds: int, *, reference: bool = True) -> GenerateCase:
    return GenerateCase(
        case=f"{num_prompts} × {prompt_len}", draw=equal_requests(num_prompts, prompt_len, 1), figures=("prompt",),
        rounds=rounds, reference=reference,
    )


def _mixed_case(prompt_len: int, output_len: int, concurrency: int, rounds: int, *, reference: bool = True) -> GenerateCase:
    return GenerateCase(
        case=f"{prompt_len} in, {output_len} out, {concurrency} at once",
        draw=equal_requests(concurrency, prompt_len, output_len), figures=("throughput", "ttft", "tpot"), rounds=rounds,
        axes={"concurrency": concurrency}, reference=reference,
    )


_GPU_LIMITS = Limits(max_model_len=16_896, max_num_seqs=256, max_num_batched_tokens=16_384)
_QUICK_LIMITS = Limits(max_model_len=512, max_num_seqs=8, max_num_batched_tokens=512)

QUICK_LAYERS = LayersPart(layers=("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"), batch_sizes=(1, 16), rounds=40,
                          slice_s=0.005, rotate_bytes=0, placements=4, fresh_every=8, most_vocab=4096)
"""Also what the A/A script measures: with one rank a run takes less than 5 s. Weights stay in the cache, because a shared
machine's memory is as fast as its neighbours let it be: 2 % of spread become 10 %. The embedding stays out: on a CPU its 5 µs
are the interpreter's, which is 5 % faster or slower from one process to the next by where its memory happens to lie."""

WORKLOADS: dict[str, tuple[Part, ...]] = {
    "w1": (
        GeneratePart(
            workload="w1", limits=Limits(max_model_len=4_096, max_num_seqs=512, max_num_batched_tokens=16_384),
            cases=(GenerateCase(case="256 requests of 100 to 1024 in, 100 to 1024 out", draw=w1_requests,
                                figures=("throughput",), rounds=8, reference=False),),
        ),
    ),
    "decode": (
        GeneratePart(
            workload="decode", limits=_GPU_LIMITS,
            cases=tuple(_decode_case(batch_size, 1_024, 96, 8, ("decode", "itl")) for batch_size in (1, 8, 64, 256)),
        ),
    ),
    "prefill": (
        GeneratePart(workload="prefill", limits=_GPU_LIMITS, cases=(_prefill_case(16, 1_024, 9), _prefill_case(1, 16_384, 9))),
    ),
    "mixed": (
        GeneratePart(
            workload="mixed", limits=_GPU_LIMITS,
            cases=tuple(_mixed_case(prompt_len, output_len, concurrency, rounds=5, reference=concurrency < 64)
                        for prompt_len, output_len in ((1_024, 128), (128, 1_024)) for concurrency in (1, 16, 128)),
        ),
    ),
    "collectives": (CollectivesPart(message_bytes=tuple(2**power for power in (11, 13, 15, 17, 19, 21, 23, 24, 26)),
                                    rounds=20, calls=100),),
    "layers": (LayersPart(batch_sizes=(1, 16, 64, 256), rounds=30, slice_s=0.02),),
    "layers-subset": (QUICK_LAYERS,),
    "load": (
        LoadPart(rounds=9),
        StartPart(limits=_GPU_LIMITS, rounds=2),
    ),
    "quick": (
        GeneratePart(
            workload="throughput", limits=_QUICK_LIMITS,
            cases=(GenerateCase(case="4 requests of 8 to 32 in, 8 to 24 out", draw=ragged_requests(4, (8, 32), (8, 24)),
                                figures=("throughput",), rounds=8),),
        ),
        GeneratePart(
            workload="decode", limits=_QUICK_LIMITS,
            cases=tuple(_decode_case(batch_size, 32, 8, 8, ("itl",)) for batch_size in (1, 4, 8)),
        ),
        GeneratePart(workload="prefill", limits=_QUICK_LIMITS, cases=(_prefill_case(1, 128, 8),)),
        CollectivesPart(message_bytes=tuple(2**power for power in (10, 12, 14, 16, 18, 20, 22)), rounds=20, calls=20),
        QUICK_LAYERS,
        LoadPart(rounds=8),
    ),
}


def parts_of(names: Sequence[str]) -> list[Part]:
    """The parts of all named workloads, none twice.

    Raises:
        ValueError: for a name that is no workload's.
    """
    if unknown := [name for name in names if name not in WORKLOADS]:
        raise ValueError(f"workloads={unknown} are unknown; there are: {', '.join(WORKLOADS)}")
    return list(dict.fromkeys(part for name in names for part in WORKLOADS[name]))
