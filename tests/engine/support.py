"""What the engine's tests share: ranks as threads, hypothesis settings, whole layers computed in integers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from engine.config import EngineConfig, ModelConfig
from engine.execution.runner import Runner
from engine.frontend.sampling import SamplingParams
from engine.layers.attention_backends import select_backend
from engine.layers.attention_layout import AttentionLayout
from engine.models.decoder import DecoderForCausalLM
from engine.parallel.group import SoloGroup, ThreadGroup, TPGroup
from engine.parallel.sharding import head_shard
from engine.scheduling.batch import build_batch
from engine.scheduling.scheduler import Chunk
from engine.scheduling.sequence import Request
from engine.scheduling.sequence import Sequence as EngineSequence
from harness.verification.budgets import EXACT_INTEGER_LIMIT, UNIT_ROUNDOFF

T = TypeVar("T")
Integers = NDArray[np.int64]

# A busy machine must not decide whether an example passes.
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(FEW, max_examples=100)

TP_SIZES = st.integers(1, 8)


def on_ranks(tp_size: int, job: Callable[[TPGroup], T]) -> list[T]:
    """``job(group)`` on ranks that are threads (on a solo rank for tp_size 1), results in rank order."""
    if tp_size == 1:
        return [job(SoloGroup())]
    groups = ThreadGroup.create(tp_size, timeout_s=60.0)
    results: dict[int, T] = {}
    failures: list[BaseException] = []

    def live(group: ThreadGroup) -> None:
        try:
            results[group.rank] = job(group)
        except BaseException as failure:
            failures.append(failure)
            group.leave(repr(failure))

    threads = [threading.Thread(target=live, args=(group,), daemon=True) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [results[rank] for rank in range(tp_size)]


def lone_group(rank: int, size: int) -> TPGroup:
    """A rank's place in a group whose other ranks are not there: for whatever needs no collective."""
    return TPGroup(rank, size, "alone")


def draw_integers(rng: np.random.Generator, shape: Sequence[int], most: int) -> Integers:
    """Integers in ``[-most, most]``."""
    return rng.integers(-most, most, size=tuple(shape), endpoint=True, dtype=np.int64)


def magnitudes(num_terms: int, dtype: str) -> tuple[int, int, int]:
    """Largest |x|, |w| and |b| for which a sum of ``num_terms`` products and a bias is exact in ``dtype``."""
    limit = EXACT_INTEGER_LIMIT[dtype]
    most_b = limit // 8
    each = (limit - most_b) // num_terms
    most_x = max(1, int(each**0.5))
    return most_x, each // most_x, most_b


def whole_linear(x_TI: Integers, weight_OI: Integers, bias_O: Integers | None, dtype: str) -> Integers:
    """The unsharded layer in int64, once it is seen that every order of summation is exact in ``dtype``."""
    reach = np.abs(x_TI) @ np.abs(weight_OI).T + (0 if bias_O is None else np.abs(bias_O))
    assert reach.max(initial=0) <= EXACT_INTEGER_LIMIT[dtype], f"sums reach {reach.max()} in {dtype}"
    return x_TI @ weight_OI.T + (0 if bias_O is None else bias_O)


def as_tensor(values: Integers, dtype: str) -> Tensor:
    return torch.from_numpy(values).to(getattr(torch, dtype))


def as_integers(x: Tensor) -> Integers:
    """``x`` as int64; NaN and fractions are refused, not rounded."""
    values = x.double()
    assert torch.equal(values, values.round()), f"not integers: {x}"
    return values.to(torch.int64).numpy()


class OnDisk:
    """Stands for a checkpoint tensor that is read slice by slice, and remembers how much was read."""

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole
        self.elements_read = 0

    @property
    def shape(self) -> Sequence[int]:
        return self.whole.shape

    def __getitem__(self, index: Any) -> Tensor:
        part = self.whole[index]
        self.elements_read += part.numel()
        return part


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A Llama with every bias it can have, no two sizes alike, none of them a multiple of many tp_sizes.

    No end-of-sequence token, unless asked for: random weights would stop at random.
    """
    config: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 131,
        "hidden_size": 42,
        "intermediate_size": 50,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "max_position_embeddings": 192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if changes.get("model_type", "llama") == "llama":
        config |= {"attention_bias": True, "mlp_bias": True}
    return config | changes


def make_model(
    config: ModelConfig, tp: TPGroup, *, dtype: torch.dtype = torch.float32, max_model_len: int = 64
) -> DecoderForCausalLM:
    """A rank's model on the CPU, its weights not loaded."""
    heads = head_shard(config.num_q_heads, config.num_kv_heads, tp_rank=tp.rank, tp_size=tp.size)
    device = torch.device("cpu")
    layout = AttentionLayout(heads=heads, head_dim=config.head_dim, block_size=16, dtype=dtype, device=device)
    backend = select_backend("torch", layout)
    return DecoderForCausalLM(config, tp=tp, dtype=dtype, device=device, max_model_len=max_model_len, backend=backend)


def make_runner(folder: Path, tp: TPGroup, *, dtype: str = "float32", num_kv_blocks: int = 64, device: str = "cpu",
                **options: Any) -> Runner:
    """A rank's loaded model with an empty cache."""
    model_config = ModelConfig.from_folder(folder)
    config = EngineConfig(
        tensor_parallel_size=tp.size, device=device, dtype=dtype, num_kv_blocks=num_kv_blocks, **options
    ).resolve(model_config)
    runner = Runner(folder, model_config, config, tp, torch.device(device))
    runner.make_cache()
    return runner


Schedule = Sequence[Sequence[tuple[int, int]]]
"""Steps; each runs so many next tokens (second) of some sequences (first)."""


@torch.inference_mode()
def logits_of(runner: Runner, sequences: Sequence[Sequence[int]], schedule: Schedule) -> list[Tensor]:
    """Logits ``[T, V]`` after every token of each sequence, run step by step as ``schedule`` says; decodes by graphs, if any."""
    block_size = runner.config.block_size
    assert block_size is not None
    num_blocks = runner.caches[0].k_PNBH.shape[0]
    # Blocks from both ends in turn, so that no sequence's blocks are neighbours.
    free = [block for pair in zip(range(num_blocks), reversed(range(num_blocks)), strict=True) for block in pair]
    running = []
    for number, token_ids in enumerate(sequences):
        request = Request(
            request_id=number,
            prompt_token_ids=tuple(token_ids),
            params=SamplingParams(),
            seed=0,
            max_tokens=1,
            stop_token_ids=frozenset(),
        )
        sequence = EngineSequence.from_request(request)
        count = -(-len(token_ids) // block_size)
        sequence.blocks, free = free[:count], free[count:]
        sequence.row = number
        running.append(sequence)
    rows: list[list[Tensor]] = [[] for _ in sequences]
    for step in schedule:
        chunks = []
        for number, num_tokens in step:
            sequence = running[number]
            samples = num_tokens == 1 and runner.graphs is not None
            chunks.append(Chunk(sequence, sequence.num_computed, num_tokens, samples=samples, in_flight=False))
            sequence.num_computed += num_tokens
        chunks.sort(key=lambda chunk: chunk.num_tokens > 1)
        # A copy, because a graph's stand until the next step; on the host, because a graph's inputs are a few buffers in turn,
        # which whoever runs further ahead writes over.
        logits_TV = runner.logits(build_batch(chunks, block_size)).to("cpu", copy=True)
        for chunk, part in zip(chunks, logits_TV.split([chunk.num_tokens for chunk in chunks]), strict=True):
            rows[chunk.sequence.request.request_id].append(part)
    return [torch.cat(parts) for parts in rows]


def roundoffs(candidate: Tensor, exact: Tensor, dtype: str = "float64") -> float:
    """The largest difference in units of the dtype's roundoff times the exact values' root mean square."""
    scale = exact.double().square().mean().sqrt()
    return ((candidate.double() - exact.double()).abs().max() / scale).item() / UNIT_ROUNDOFF[dtype]
