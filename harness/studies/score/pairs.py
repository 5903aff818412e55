"""Pairs of streams whose answer is known: clean code on other numbers of ranks, and code with a planted fault.

Each pair has its own random model, from 2 to 24 layers, half of them ill-conditioned, and its own sequences, batches and chunks.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.faults import FAULTS
from harness.faults.base import Fault
from harness.faults.layouts import LAYOUTS
from harness.faults.models import FaultModels, Planted
from harness.strategies import random_config
from harness.studies.calibrate.draws import LARGEST_TP, written
from harness.subjects.base import Placement, Subject, SubjectFailure
from harness.subjects.engine import EngineSubject
from harness.verdict.scoring import BLOCK_SIZE, Way, decode_start, logprobs_of, schedule, score_exactly, scored
from harness.verdict.streams import Stream, StreamError, StreamInfo
from reference.checkpoints import CheckpointError, random_checkpoint
from reference.hf import Reference
from reference.writing import edited

DTYPES = ("bfloat16", "float16", "float32")
TP_SIZES = (2, 3, 4, 8)
LAYERS = (2, 2, 2, 2, 4, 4, 4, 8, 8, 16, 24)
WIDTHS = (32, 64, 128)
VOCABULARIES = (100, 300, 1000)
SHARPNESS = (1.0, 1.0, 2.0, 4.0)
"""Times the weights of the LM head: real models are surer of the next token than random ones."""
SAMPLED = 0.4
"""Share of the models whose sequences they have written themselves; the others' are random ids."""
NUM_TOP = 2
FITTED_SEED, JUDGED_SEED = 0, 1
"""Of clean models: those that the bounds of ``verdict`` were fitted on, which are counted apart, and others."""
NUM_TOKENS = 300
"""Of a pair with a fault, at least."""
CLEAN_TOKENS = (128, 256, 512)
SINGLE_TOKENS = (128, 256)
"""Of a clean pair, at least: one of these; fewer where a pair is judged whole, not in parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """What only whole logits tell, for the rules that need them."""

    mean_kl: float
    cosine: float
    """The smallest of a token."""
    relative: float
    """The smallest rtol with which ``allclose(rtol=..., atol=rtol)`` holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Streams of one model.

    planted    the fault in ``b``; empty: clean
    a, b       the two sides; None where ``b`` gave what no stream can hold
    noise      another correct run of the same model, in other batches and chunks and on another number of ranks
    reference  the exact one, with what rounding does; None where it was not made
    whole      of ``a`` and ``b``; None where ``b`` has none, or logits of another number of tokens
    """

    name: str
    planted: str
    dtype: str
    tp_size: int
    num_layers: int
    a: Stream
    b: Stream | None
    noise: Stream
    reference: Stream | None
    whole: Whole | None


def draw_sequences(draw: random.Random, vocab_size: int, num_tokens: int, longest: int) -> list[tuple[int, ...]]:
    """Random ids, some sequences with a prefix in common, all different."""
    sequences: list[tuple[int, ...]] = []
    total = 0
    while total < num_tokens:
        length = draw.randint(8, longest)
        shared = draw.choice(sequences)[: length // 2] if sequences and draw.random() < 0.3 else ()
        sequences.append((*shared, *(draw.randrange(vocab_size) for _ in range(length - len(shared)))))
        total += length - 1
    return list(dict.fromkeys(sequences))


def sampled(subject: Subject, folder: Path, sequences: Sequence[tuple[int, ...]], dtype: str) -> list[tuple[int, ...]]:
    """As many and as long, but each token drawn from the model itself: text is what a model finds likely."""
    load(subject, folder, sequences, dtype)
    longest = max(map(len, sequences))
    params = [{"temperature": 1.0, "max_tokens": len(ids) - 4, "ignore_eos": True, "seed": number}
              for number, ids in enumerate(sequences)]
    found = subject.generate([ids[:4] for ids in sequences], params, {"num_kv_blocks": 16 * (longest // BLOCK_SIZE + 2),
                                                                      "block_size": BLOCK_SIZE, "max_model_len": longest + 1})
    return list(dict.fromkeys((*ids[:4], *more) for ids, more in zip(sequences, found, strict=True)))


def draw_way(draw: random.Random) -> Way:
    """Batches, chunks and decoded tokens."""
    return Way(batch_size=draw.choice((1, 2, 4, 7)), chunk=draw.choice((None, None, 16, 24)), decoded=draw.choice((0, 0, 0, 6)))


def logits_of(subject: Subject, sequences: Sequence[tuple[int, ...]], way: Way) -> list[Tensor]:
    """Rank 0's, ``[T, V]`` a sequence."""
    found = []
    for at in range(0, len(sequences), way.batch_size):
        found += subject.logits(schedule(sequences[at : at + way.batch_size], way))[0]
    return found


def load(subject: Subject, folder: Path, sequences: Sequence[tuple[int, ...]], dtype: str) -> None:
    """With a cache that is large enough for any of the ways."""
    longest = max(map(len, sequences))
    subject.load(folder, dtype=dtype, options={"block_size": BLOCK_SIZE, "num_kv_blocks": 8 * (longest // BLOCK_SIZE + 2),
                                               "max_num_batched_tokens": 8 * longest, "max_num_seqs": 8})


def stream_of(logits: Sequence[Tensor], sequences: Sequence[tuple[int, ...]], way: Way, info: StreamInfo) -> Stream:
    """As ``scoring.score`` gives it.

    Raises:
        StreamError: for logits that no stream can hold, those of too few tokens among them.
    """
    if (width := min(one.shape[-1] for one in logits)) <= max(map(max, sequences)):
        raise StreamError(f"logits of {width} tokens tell nothing of token id {max(map(max, sequences))}")
    return Stream(info=info, sequences=tuple(
        scored(ids, logprobs_of(one, ids, NUM_TOP), decoded_from=decode_start(len(ids), way) if way.decoded else None,
               batch_size=min(way.batch_size, len(sequences)), chunk=way.chunk).check("pair")
        for one, ids in zip(logits, sequences, strict=True)))


def whole_of(a: Sequence[Tensor], b: Sequence[Tensor]) -> Whole:
    """Of logits ``[T, V]`` a sequence."""
    a_TV, b_TV = torch.cat(list(a)).double(), torch.cat(list(b)).double()
    log_a, log_b = a_TV.log_softmax(-1), b_TV.log_softmax(-1)
    kl = (log_a.exp() * (log_a - log_b)).sum(-1).mean().item()
    cosine = torch.nn.functional.cosine_similarity(a_TV, b_TV, dim=-1).min().item()
    return Whole(mean_kl=kl, cosine=cosine, relative=((a_TV - b_TV).abs() / (1 + b_TV.abs())).max().item())


class Subjects(ExitStack):
    """Thread ranks by tp_size, that stay."""

    def __init__(self) -> None:
        super().__init__()
        self._subjects: dict[int, EngineSubject] = {}

    def __call__(self, tp_size: int) -> EngineSubject:
        if tp_size not in self._subjects:
            placement = Placement(tp_size=tp_size, fabric="threads" if tp_size > 1 else "auto")
            self._subjects[tp_size] = self.enter_context(EngineSubject(placement))
        return self._subjects[tp_size]


def clean_pairs(subjects: Subjects, seed: int, number: int, *, single: bool = False) -> Iterator[Pair]:
    """The engine on one rank against the engine on each of ``TP_SIZES``, with one model; every fourth has a reference.

    Args:
        subjects: live ranks.
        seed: of all models.
        number: of this one.
        single: one pair alone, on a number of ranks that is drawn, a noise run on another, and always a reference.
    """
    draw = random.Random(f"{seed}/{number}")
    dtype = DTYPES[number % len(DTYPES)]
    config = random_config(draw, LARGEST_TP, max_width=draw.choice(WIDTHS)) | {"num_hidden_layers": draw.choice(LAYERS),
                                                                               "vocab_size": draw.choice(VOCABULARIES)}
    with written(draw, config, dtype, draw.randrange(2**31)) as folder:
        _sharpen(folder, draw.choice(SHARPNESS))
        sequences = draw_sequences(draw, config["vocab_size"], draw.choice(SINGLE_TOKENS if single else CLEAN_TOKENS), 120)
        if draw.random() < SAMPLED:
            sequences = sampled(subjects(1), folder, sequences, dtype)
        info = {"model": f"random {config['model_type']}", "dtype": dtype, "block_size": BLOCK_SIZE,
                "vocab_size": config["vocab_size"]}

        def of(tp_size: int) -> tuple[list[Tensor], Stream]:
            way = draw_way(draw)
            logits = logits_of(subjects(tp_size), sequences, way)
            return logits, stream_of(logits, sequences, way, StreamInfo(source=f"engine, tp {tp_size}", tp_size=tp_size, **info))

        tp_sizes = draw.sample(TP_SIZES, 2) if single else TP_SIZES
        runs = {}
        for tp_size in (1, *tp_sizes):
            load(subjects(tp_size), folder, sequences, dtype)
            runs[tp_size] = of(tp_size)
        a_logits, a = runs[1]
        with_reference = single or (number % 4 == 0 and a.num_tokens < 600)
        reference = reference_stream(folder, sequences, dtype, info) if with_reference else None
        for tp_size, other in list(zip(tp_sizes, (*tp_sizes[1:], tp_sizes[0]), strict=True))[: 1 if single else None]:
            b_logits, b = runs[tp_size]
            yield Pair(name=f"clean-{seed}-{number}-{tp_size}", planted="", dtype=dtype, tp_size=tp_size,
                       num_layers=config["num_hidden_layers"], a=a, b=b, noise=runs[other][1], reference=reference,
                       whole=whole_of(a_logits, b_logits))


def reference_stream(folder: Path, sequences: Sequence[tuple[int, ...]], dtype: str, info: Mapping[str, Any]) -> Stream:
    """The exact one."""
    exact = Reference.load(folder, "exact")
    return Stream(info=StreamInfo(source="reference", tp_size=1, **info),
                  sequences=tuple(score_exactly(exact, sequences, dtype=dtype)))


def _sharpen(folder: Path, times: float) -> None:
    if times == 1:
        return
    with edited(folder) as tensors:
        name = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
        tensors[name] *= times


def plantable() -> list[Fault]:
    """The faults that are planted in the ranks of a CPU. Which of them reach the logits is seen when they run."""
    return [fault for fault in FAULTS.values() if fault.device == "cpu" and fault.where != "driver" and not fault.is_control]


def faulty_pair(models: FaultModels, fault: Fault, dtype: str, seed: int, *, num_tokens: int,
                with_reference: bool = True) -> Pair | None:
    """The engine on one rank against the engine on the fewest ranks that show the fault, with it.

    None if no bit of the log-probabilities is another one than without the fault, or the fault does not let the model run.
    """
    draw = random.Random(f"{fault.name}/{dtype}/{seed}")
    tp_size = max(2, fault.tp_sizes[0])
    config = LAYOUTS[fault.layout].config
    with tempfile.TemporaryDirectory(prefix="shardproof-") as scratch:
        folder = random_checkpoint(Path(scratch) / "model", config, dtype=dtype, seed=seed)
        sequences = draw_sequences(draw, config["vocab_size"], num_tokens, 120)
        a_way, noise_way, b_way = (draw_way(draw) for _ in range(3))
        info = {"model": fault.layout, "dtype": dtype, "block_size": BLOCK_SIZE, "vocab_size": config["vocab_size"]}

        def of(subject: Subject, way: Way, size: int) -> tuple[list[Tensor], Stream]:
            logits = logits_of(subject, sequences, way)
            return logits, stream_of(logits, sequences, way, StreamInfo(source=f"engine, tp {size}", tp_size=size, **info))

        one, several = models.subject(1), models.subject(tp_size)
        load(one, folder, sequences, dtype)
        a_logits, a = of(one, a_way, 1)
        load(several, folder, sequences, dtype)
        clean, (_, noise) = logits_of(several, sequences, b_way), of(several, noise_way, tp_size)
        b_logits: list[Tensor] | None = None
        b: Stream | None = None
        with Planted(several, fault) as planted:
            planted.plant()
            try:
                load(several, folder, sequences, dtype)
                b_logits, b = of(several, b_way, tp_size)
            except (SubjectFailure, CheckpointError):
                return None
            except StreamError:  # NaN: everybody sees that
                b_logits = None
        if b_logits is not None and all(torch.equal(x, y) for x, y in zip(clean, b_logits, strict=True)):
            return None
        return Pair(name=f"{fault.name}-{dtype}-{seed}", planted=fault.name, dtype=dtype, tp_size=tp_size,
                    num_layers=config["num_hidden_layers"], a=a, b=b, noise=noise,
                    whole=whole_of(a_logits, b_logits) if b_logits and b_logits[0].shape[-1] == a_logits[0].shape[-1] else None,
                    reference=reference_stream(folder, sequences, dtype, info) if with_reference else None)
