"""Are logits, tokens and log-probabilities the same to the bit at any tp_size and in any batch, where the subject promises that?

What is right is what one rank gives to each sequence by itself, in one piece. Held against it, bit by bit: the ranks under test,
in drawn batches, chunks, decode steps and block sizes (*layouts*, on drawn models; *model*, on the model at hand), and through
the front door, where prompts share prefixes and a small cache makes sequences give way (*served*), and where what was drawn is
scored as a trainer would, each sequence as a prompt (*rollout*). Run when it is asked for by name: it loads with
``tp_invariant=True``, which is another mode of the subject than the one that the other checks verify.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.checks.base import Check, CheckContext, Outcome, Whole
from harness.strategies import pick_config
from harness.subjects.base import Schedule, Subject
from harness.verification.budgets import bits
from harness.verification.reference_results import mixed_steps
from reference.checkpoints import longest_sequence, random_checkpoint, read_config
from reference.hf import Activations

NUM_MODELS = 2
LENGTHS = (29, 7, 18)
MODEL_LENGTHS = (12, 5)
"""The model at hand may be large."""
BLOCK_SIZES = (16, 3)
OPTIONS: dict[str, Any] = {"num_kv_blocks": 40, "max_num_batched_tokens": 128, "max_num_seqs": 8, "tp_invariant": True}
NUM_TOKENS = 12
MAX_MODEL_LEN = 48
CROWDED: dict[str, Any] = {"block_size": 4, "num_kv_blocks": 14, "max_num_batched_tokens": 9, "max_num_seqs": 4,
                           "max_model_len": MAX_MODEL_LEN, "tp_invariant": True}
"""Prompts come in chunks of up to 9 tokens, and the answers of four sequences do not fit together."""
ROOMY: dict[str, Any] = {"block_size": 16, "num_kv_blocks": 12, "max_num_batched_tokens": 128, "max_num_seqs": 4,
                         "enable_prefix_caching": False, "max_model_len": MAX_MODEL_LEN, "tp_invariant": True}

ROLLOUT, LARGE_ROLLOUT = (4, 16), (256, 400)
"""Requests and tokens of each: of a drawn model; of the model at hand where ranks on GPUs of their own replay decode steps."""
PROMPT_TOKENS = (3, 20)


def check_layouts(context: CheckContext) -> Outcome:
    """Models of every kind of layout, in turns in the dtypes that are promised."""
    compared = 0
    for number in range(NUM_MODELS):
        with drawn_model(context, number) as (folder, dtype):
            outcome = compare_logits(context, folder, dtype, LENGTHS, seed=context.seed + number)
        if outcome.finding is not None:
            return outcome
        compared += outcome.compared
    return Outcome(cases=NUM_MODELS, compared=compared)


@contextmanager
def drawn_model(context: CheckContext, number: int) -> Iterator[tuple[Path, str]]:
    """A small random model that the ranks can share, and its dtype. On a GPU heads are as wide as the promise asks for."""
    seed = context.seed * NUM_MODELS + number
    draw, on_gpu = random.Random(seed), context.results.device.startswith("cuda")
    while True:
        config = pick_config(draw.randint, tp_size=max(2, context.tp_size), max_width=24, max_layers=2)
        if not on_gpu or (config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]) % 16 == 0:
            break
    dtype = "bfloat16" if on_gpu else ("bfloat16", "float32")[number % 2]
    with tempfile.TemporaryDirectory(prefix="shardproof-") as scratch:
        yield random_checkpoint(Path(scratch), config, dtype=dtype, seed=seed), dtype


def check_model(context: CheckContext) -> Outcome:
    """The model at hand, in its own dtype; shorter sequences where it takes no longer ones."""
    lengths = tuple(min(length, context.results.longest) for length in MODEL_LENGTHS)
    return compare_logits(context, context.results.folder, context.dtype, lengths, seed=context.seed)


def compare_logits(context: CheckContext, folder: Path, dtype: str, lengths: tuple[int, ...], *, seed: int) -> Outcome:
    """Logits of every token, of every rank, in drawn batches, against those of one rank and one sequence at a time."""
    draw = random.Random(seed)
    vocab_size = read_config(folder).get_text_config(decoder=True).vocab_size
    sequences = tuple(tuple(draw.randrange(vocab_size) for _ in range(length)) for length in lengths)
    alone = Schedule(sequences=sequences, steps=tuple(((number, length),) for number, length in enumerate(lengths)))
    compared = 0
    with context.subject.alone() as one:
        options = OPTIONS | {"block_size": BLOCK_SIZES[0]}
        one.load(folder, dtype=dtype, options=options)
        expected = one.logits(alone)[0]
        for block_size in BLOCK_SIZES:
            schedule = Schedule(sequences=sequences, steps=mixed_steps(lengths, draw))
            with context.subject.beside(folder, dtype=dtype, options=options | {"block_size": block_size}):
                by_rank = context.subject.logits(schedule)
                place = _first_difference(by_rank, expected)
                if place is not None:
                    return _located(context.subject, one, schedule, alone, place, by_rank, expected, folder)
            compared += len(by_rank) * sum(logits.numel() for logits in expected)
    return Outcome(cases=len(lengths) * len(BLOCK_SIZES), compared=compared)


def _first_difference(by_rank: Sequence[Sequence[Tensor]], expected: Sequence[Tensor]) -> tuple[int, int, int] | None:
    """(rank, sequence, token) of the first row with another bit."""
    for rank, found in enumerate(by_rank):
        for sequence, (own, right) in enumerate(zip(found, expected, strict=True)):
            if own.shape != right.shape or own.dtype != right.dtype:
                return rank, sequence, 0
            if (rows := (bits(own) != bits(right)).any(dim=1).nonzero()).numel():
                return rank, sequence, int(rows[0])
    return None


def _located(subject: Subject, one: Subject, schedule: Schedule, alone: Schedule, place: tuple[int, int, int],
             by_rank: Sequence[Sequence[Tensor]], expected: Sequence[Tensor], folder: Path) -> Outcome:
    """The finding with the first module whose output has another bit, where the subject shows one."""
    rank, sequence, token = place
    module, tail = "lm_head", ""
    found, right = subject.activations(schedule, sequence), one.activations(alone, sequence)[0]
    for path in (row.path for row in subject.modules(read_config(folder).to_dict()) if row.has_output):
        if (where := _differs(path, found, right)) is not None:
            module, (rank, token) = path, where
            tail = f"; first in {module} on rank {rank}, token {token}"
            break
    tensors = {"found": by_rank[place[0]][sequence][place[2]], "expected": expected[sequence][place[2]]}
    return Outcome(cases=1, compared=1, rank=rank, module=module, tensors=tensors, finding=(
        f"logits of sequence {sequence}, token {place[2]} on rank {place[0]} have other bits than one rank gives it by itself"
        f"{tail}"))


def _differs(path: str, found: Sequence[Activations], right: Activations) -> tuple[int, int] | None:
    """(rank, token) of the first other bit in a module's output; None too where its shards can't be put together."""
    shards, whole = [rank.outputs.get(path) for rank in found], right.outputs.get(path)
    if whole is None or any(shard is None for shard in shards):
        return None
    widths = [shard.shape[1] for shard in shards if shard is not None]
    if all(width == whole.shape[1] for width in widths):
        parts = [whole] * len(shards)
    elif sum(widths) == whole.shape[1]:
        parts = list(whole.split(widths, dim=1))
    else:  # KV heads that several ranks hold
        return None
    for rank, (shard, part) in enumerate(zip(shards, parts, strict=True)):
        assert shard is not None, "seen above"
        if (rows := (bits(shard) != bits(part)).any(dim=1).nonzero()).numel():
            return rank, int(rows[0])
    return None


def check_served(context: CheckContext) -> Outcome:
    """Requests together in a small cache, against each by itself on one rank in a large one."""
    draw = random.Random(context.seed)
    with drawn_model(context, 1) as (folder, dtype):
        prompts, params = _requests(draw, read_config(folder).get_text_config(decoder=True).vocab_size)
        with context.subject.alone() as one, one.requests(folder, ROOMY | {"dtype": dtype}) as door:
            right = [_answers(door, [prompt], [values])[0] for prompt, values in zip(prompts, params, strict=True)]
        with context.subject.requests(folder, CROWDED | {"dtype": dtype}) as door:
            found = [_answers(door, prompts, params), _answers(door, prompts, params)]  # the second time prefixes are there
    for number, (prompt, expected) in enumerate(zip(prompts, right, strict=True)):
        for answers in found:
            if (row := _other(answers[number], expected)) is not None:
                own, other = answers[number][row : row + 1], expected[row : row + 1]
                return Outcome(cases=1, compared=1, module="lm_head", finding=(
                    f"request {number} of {len(prompt)} prompt tokens, {params[number]}: its token {row} or a log-probability "
                    f"there is another than by itself on one rank: {own} for {other}"))
    return Outcome(cases=len(prompts), compared=2 * sum(map(len, right)))


def check_rollout(context: CheckContext) -> Outcome:
    """Tokens that are drawn together, decoding, with the log-probabilities that one rank gives them in prompts."""
    is_large = context.results.device.startswith("cuda") and context.subject.fabric in ("solo", "nccl")
    num_requests, num_tokens = LARGE_ROLLOUT if is_large else ROLLOUT
    with nullcontext((context.results.folder, context.dtype)) if is_large else drawn_model(context, 0) as (folder, dtype):
        config, draw = read_config(folder).get_text_config(decoder=True), random.Random(context.seed)
        longest = longest_sequence(config)
        fewest, most = (min(number, longest // 2) for number in PROMPT_TOKENS)
        num_tokens = min(num_tokens, longest - most - 1)
        length = most + num_tokens + 1  # one more is drawn where the sequence is scored
        options = {"block_size": 16, "num_kv_blocks": num_requests * (-(-length // 16) + 1), "max_num_seqs": num_requests,
                   "max_model_len": length, "dtype": dtype, "tp_invariant": True}
        prompts = [[draw.randrange(config.vocab_size) for _ in range(draw.randint(fewest, most))] for _ in range(num_requests)]
        params: dict[str, Any] = {"temperature": 1.0, "ignore_eos": True, "max_tokens": num_tokens, "logprobs": 0}
        with context.subject.requests(folder, options) as door:
            drawn = _answers(door, prompts, [{**params, "seed": draw.randrange(2**31)} for _ in prompts])
        sequences = [prompt + [token for token, _ in answer] for prompt, answer in zip(prompts, drawn, strict=True)]
        with context.subject.alone() as one, one.requests(folder, options) as door:
            scored = door.generate([{"prompt_token_ids": sequence} for sequence in sequences],
                                   [door.params({"max_tokens": 1, "prompt_logprobs": 0})] * num_requests)
    for number, (prompt, answer, output) in enumerate(zip(prompts, drawn, scored, strict=True)):
        right = [(token, (token, at[token].logprob)) for (token, _), at in
                 zip(answer, output.prompt_logprobs[len(prompt) :], strict=True)]
        if (row := _other(answer, right)) is not None:
            return Outcome(cases=1, compared=1, module="lm_head", finding=(
                f"request {number} of {len(prompt)} prompt tokens: its token {row} was drawn with another log-probability than "
                f"one rank gives it in a prompt: {answer[row][1]} for {right[row][1]}"))
    return Outcome(cases=num_requests, compared=num_requests * num_tokens)


def _requests(draw: random.Random, vocab_size: int) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Prompts that share a beginning, and parameters greedy, sampled and filtered."""
    start = [draw.randrange(vocab_size) for _ in range(11)]
    prompts = [start + [draw.randrange(vocab_size) for _ in range(draw.randint(1, 12))] for _ in range(4)]
    common = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    params = [{"temperature": 0.0, "logprobs": 3}, {"temperature": 0.9, "logprobs": 0}, {"temperature": 1.3, "top_p": 0.7},
              {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "logprobs": 1}]
    return prompts, [{**common, **values, "seed": draw.randrange(2**31)} for values in params]


def _answers(door: Any, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]]) -> list[list[tuple[Any, ...]]]:
    """Of each request its tokens, each with its log-probabilities."""
    outputs = door.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], [door.params(each) for each in params])
    answers = []
    for output in outputs:
        (completion,) = output.outputs
        told = completion.logprobs or [{}] * len(completion.token_ids)
        answers.append([(token, *((other, at.logprob) for other, at in row.items()))
                        for token, row in zip(completion.token_ids, told, strict=True)])
    return answers


def _other(found: Sequence[tuple[Any, ...]], right: Sequence[tuple[Any, ...]]) -> int | None:
    """The first token that differs in anything. Python compares floats by value, and no log-probability is NaN or -0."""
    return next((row for row in range(max(len(found), len(right))) if found[row : row + 1] != right[row : row + 1]), None)


CHECK = Check(
    name="invariance", needs_model=False,
    question="Are logits, tokens and log-probabilities the same to the bit at any tp_size and in any batch?",
    parts=tuple(Whole(judge=judge, kind=kind, needs="invariance") for kind, judge in (
        ("layouts", check_layouts), ("served", check_served), ("rollout", check_rollout), ("model", check_model))))
