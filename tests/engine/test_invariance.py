"""``tp_invariant=True``: the same bits at any tp_size, in any batch, chunking, block size, with prefix hits and preemption."""

from __future__ import annotations

import math
import random
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import LLM, RequestOutput, SamplingParams
from engine.kernels import ieee, invariant_attention
from engine.kernels.invariant_attention import paged_attention_in_order_torch
from engine.kernels.invariant_matmul import (
    leaf_sums_torch,
    linear_in_order_torch,
    quantum_exponent,
    value_of_sums_torch,
)
from engine.kernels.rms_norm import rms_norm_torch
from engine.layers.invariant import INVARIANT, InvariantRMSNorm
from engine.parallel.group import SoloGroup
from engine.parallel.linear import RowParallelLinear
from engine.parallel.sharding import leaf_range, leaf_width
from harness.strategies import pick_config
from harness.verification.budgets import bits
from reference.checkpoints import random_checkpoint
from tests.engine.conftest import MakeCheckpoint
from tests.engine.support import Schedule, logits_of, make_runner, on_ranks

PAGE = Path(__file__).parents[2] / "docs" / "invariance.md"
LENGTHS = (37, 9, 70)
WHOLE: Schedule = [[(0, 37)], [(1, 9)], [(2, 70)]]
MIXED: Schedule = [[(0, 5), (1, 9)], [(0, 1), (2, 60)], *[[(0, 1), (2, 1)]] * 10, [(0, 21)]]
DECODES: Schedule = [*[[(0, 1)]] * 37, *[[(1, 1)]] * 9, [(2, 35)], [(2, 35)]]


def drawn(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


# Arithmetic.


def test_functions_of_ieee_are_as_accurate_as_they_say() -> None:
    x = torch.linspace(-708, 700, 20_011, dtype=torch.float64)
    assert ((ieee.exp(x) - x.exp()) / x.exp()).abs().max() < 2 * 2**-52
    assert ieee.exp(torch.tensor([-709.0, -math.inf, 0.0], dtype=torch.float64)).tolist() == [0, 0, 1]
    u = drawn((20_011,), 0).double().abs() + 2**-60
    assert ((ieee.log(u) - u.log()).abs() / u.log().abs().clamp(min=2**-52)).max() < 3 * 2**-52
    assert ieee.tree_sum(torch.arange(9.0, dtype=torch.float64)).item() == 36


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_exact_product_is_that_of_python_s_integers_in_any_shape(dtype: torch.dtype) -> None:
    x, w = drawn((5, 256), 1, dtype).double(), drawn((7, 256), 2, dtype).double()
    x[:, 3] *= 1000
    found = ieee.exact_matmul(x, w)
    exact = torch.tensor([[math.fsum(map(float.__mul__, row, column)) for column in w.tolist()] for row in x.tolist()],
                         dtype=torch.float64)
    scale = x.abs().amax(1)[:, None] * w.abs().amax(1)
    assert ((found - exact).abs() / scale).max() < 256 * 2**-41
    for rows, columns in ((slice(2, 3), slice(None)), (slice(None), slice(4, 5)), (slice(0, 0), slice(None))):
        assert same(ieee.exact_matmul(x[rows], w[columns]), found[rows, columns])
    with pytest.raises(ValueError, match="K=257"):
        ieee.exact_matmul(drawn((1, 257), 0).double(), drawn((1, 257), 0).double())


@pytest.mark.parametrize("scale", [2.0**-12, 1.0, 2.0**12])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("large_channel", [False, True])
def test_every_row_is_as_accurate_as_the_ordinary_layer_s(dtype: torch.dtype, scale: float, large_channel: bool) -> None:
    x, w = (drawn((32, 384), 3) * scale).to(dtype), drawn((65, 384), 4, dtype)
    if large_channel:
        x[:, 17] *= 1000
    exact = x.double() @ w.double().T
    ordinary = torch.nn.functional.linear(x, w).double()
    quantum = quantum_exponent(w)
    sums = leaf_sums_torch(x, w, leaf=128, num_leaves=3, quantum=quantum)
    for found in (linear_in_order_torch(x, w), value_of_sums_torch(sums, quantum, None, dtype)):
        own, other = ((y - exact).square().mean(1).sqrt() for y in (found.double(), ordinary))
        assert (own <= other).all(), f"{(own / other).max():.3f} of the ordinary error"


@pytest.mark.parametrize("tp_size", range(1, 9))
def test_leaves_summed_over_any_split_give_the_same_bits(tp_size: int) -> None:
    x, w, bias = drawn((6, 900), 5), drawn((40, 900), 6), drawn((40,), 7)
    quantum, leaf = quantum_exponent(w), leaf_width(900, num_q_heads=8)
    total = torch.zeros((2, 6, 40), dtype=torch.int64)
    for rank in reversed(range(tp_size)):
        mine = leaf_range(900, leaf, tp_rank=rank, tp_size=tp_size)
        part = slice(mine.start, mine.stop)
        total += leaf_sums_torch(x[:, part], w[:, part], leaf=leaf, num_leaves=-(-900 // leaf), quantum=quantum)
    whole = leaf_sums_torch(x, w, leaf=leaf, num_leaves=-(-900 // leaf), quantum=quantum)
    assert torch.equal(total, whole)
    assert same(*(value_of_sums_torch(sums, quantum, bias, torch.float32) for sums in (total, whole)))


@pytest.mark.parametrize("seed", range(10))
def test_leaves_of_another_width_give_other_sums(seed: int) -> None:
    x, w = drawn((6, 96), seed), drawn((40, 96), seed + 100)
    narrow, wide = (leaf_sums_torch(x, w, leaf=leaf, num_leaves=12, quantum=quantum_exponent(w)) for leaf in (8, 48))
    assert not torch.equal(narrow, wide)


@pytest.mark.parametrize("seed", range(10))
def test_values_scaled_by_those_of_later_keys_tell_a_prompt_from_a_decode_step(seed: int,
                                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (drawn((2, 40, 8), seed + part).double() for part in (0, 100, 200))
    v *= 2.0 ** torch.arange(40, dtype=torch.float64)[:, None]

    def same_both_ways() -> bool:
        prompt = invariant_attention._attend(q, k, v, 0, 0.3)
        decoded = [invariant_attention._attend(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], t, 0.3) for t in range(40)]
        return same(prompt, torch.cat(decoded, dim=1))

    assert same_both_ways()
    monkeypatch.setattr(invariant_attention, "exponent_of",
                        lambda peak: ieee.exponent_of(peak).amax(1, keepdim=True).expand_as(peak))
    assert not same_both_ways()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("tp_size", [1, 3, 7])
def test_a_leaf_that_does_not_fit_is_seen_at_every_tp_size_in_its_row_alone(value: float, tp_size: int) -> None:
    x, w = drawn((3, 64), 8), drawn((5, 64), 9)
    x[1, 20], x[1, 50] = value, -value  # which cancel in a partial sum of one rank, and not in one of seven
    quantum, total = quantum_exponent(w), torch.zeros((2, 3, 5), dtype=torch.int64)
    for rank in range(tp_size):
        mine = leaf_range(64, 8, tp_rank=rank, tp_size=tp_size)
        part = slice(mine.start, mine.stop)
        total += leaf_sums_torch(x[:, part], w[:, part], leaf=8, num_leaves=8, quantum=quantum)
    y = value_of_sums_torch(total, quantum, None, torch.float32)
    assert y.isnan().all(1).tolist() == [False, True, False]


def test_64_ranks_flags_do_not_wrap() -> None:
    bad = leaf_sums_torch(torch.full((1, 1), math.inf), torch.ones(1, 1), leaf=1, num_leaves=64, quantum=-12)
    assert value_of_sums_torch(64 * bad, -12, None, torch.float32).isnan().all()


def test_a_value_that_is_not_finite_is_no_earlier_query_s_trouble() -> None:
    q, k, v = drawn((9, 2, 8), 1), drawn((2, 2, 8, 8), 2), drawn((2, 2, 8, 8), 3)
    tables, starts, lens = torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([0, 9]), torch.tensor([9])
    clean = paged_attention_in_order_torch(q, k, v, tables, starts, lens, (0, 1), 0.3)
    v[1, 0, 5] = math.nan
    spoilt = paged_attention_in_order_torch(q, k, v, tables, starts, lens, (0, 1), 0.3)
    assert same(spoilt[:5], clean[:5])
    assert spoilt[5:, 0].isnan().all()
    assert same(spoilt[:, 1], clean[:, 1])


def test_a_norm_is_the_ordinary_one_up_to_rounding() -> None:
    norm = InvariantRMSNorm(48, 1e-5, dtype=torch.float32)
    norm.weight.data.copy_(drawn((48,), 1))
    x = drawn((4, 48), 2)
    found, exact = norm(x)[0], rms_norm_torch(x.double(), norm.weight, 1e-5)
    assert ((found - exact).abs() <= 2**-23 * exact.abs()).all()


# The whole model.


@pytest.mark.parametrize(("seed", "dtype"), [
    (0, "float32"), (1, "bfloat16"),
    *(pytest.param(seed, dtype, marks=pytest.mark.endurance) for seed in range(2, 12) for dtype in ("bfloat16", "float32"))])
def test_logits_are_the_same_bits_at_any_tp_size_chunking_and_block_size(tmp_path: Path, seed: int, dtype: str) -> None:
    draw = random.Random(seed)
    config = pick_config(draw.randint, tp_size=8, max_width=24, max_layers=1 if seed < 2 else 2)
    folder = random_checkpoint(tmp_path, config, dtype=dtype, seed=seed)
    sequences = [[draw.randrange(config["vocab_size"]) for _ in range(length)] for length in LENGTHS]
    expected: list[Tensor] = []
    sizes = (2, 5, 8) if seed < 2 else (2, 3, 5, 6, 7, 8)
    for tp_size, schedule, block_size in ((1, WHOLE, 16), (1, DECODES, 7), *((size, MIXED, 5) for size in sizes)):
        by_rank = on_ranks(tp_size, lambda tp, schedule=schedule, block_size=block_size: logits_of(
            make_runner(folder, tp, dtype=dtype, block_size=block_size, tp_invariant=True), sequences, schedule))
        for logits in by_rank:
            expected = expected or logits
            assert all(map(same, logits, expected)), f"tp_size={tp_size}, block_size={block_size}"
    assert all(logits.isfinite().all() for logits in expected)


def test_the_ordinary_engine_does_not_keep_that_promise(checkpoint: MakeCheckpoint) -> None:
    sequences = [[n * 7 % 131 for n in range(length)] for length in LENGTHS]
    one, other = (on_ranks(size, lambda tp: logits_of(make_runner(checkpoint(), tp), sequences, WHOLE))[0] for size in (1, 3))
    assert not all(map(same, one, other))


def test_logits_are_right(checkpoint: MakeCheckpoint, reference: Any) -> None:
    sequences = [[n * 7 % 131 for n in range(length)] for length in LENGTHS]
    found = logits_of(make_runner(checkpoint(), SoloGroup(), tp_invariant=True), sequences, WHOLE)
    ordinary = logits_of(make_runner(checkpoint(), SoloGroup()), sequences, WHOLE)
    exact = reference(checkpoint(), "exact").logits(sequences)
    error, other = (max((y - z).abs().max().item() for y, z in zip(all_, exact, strict=True)) for all_ in (found, ordinary))
    assert error <= other


PROMPTS = [[5, 6, 7, 8] * 6, [5, 6, 7, 8] * 6 + [9, 9], [11], [12, 13, 14]]
PARAMS = [SamplingParams(temperature=0, max_tokens=20, logprobs=5),
          SamplingParams(temperature=0.9, seed=1, max_tokens=20, logprobs=0),
          SamplingParams(temperature=1.2, seed=2, top_k=20, top_p=0.9, max_tokens=20, logprobs=3),
          SamplingParams(temperature=1.0, seed=3, top_p=0.5, max_tokens=20)]


def served(folder: Path, tp_size: int, together: bool = True, **options: Any) -> list[list[tuple[Any, ...]]]:
    """Of each prompt its tokens, with the log-probabilities of each."""
    options = {"fabric": "threads" if tp_size > 1 else "solo", "block_size": 4, "num_kv_blocks": 100} | options
    with LLM(folder, tensor_parallel_size=tp_size, device="cpu", tp_invariant=True, max_num_seqs=8, **options) as llm:
        calls = [(PROMPTS, PARAMS)] if together else [([p], [q]) for p, q in zip(PROMPTS, PARAMS, strict=True)]
        outputs: list[RequestOutput] = [output for prompts, params in calls
                                        for output in llm.generate([{"prompt_token_ids": p} for p in prompts], params)]
    return [[(token, *((at.logprob, at.rank) for at in (completion.logprobs or {})[row].values())) if completion.logprobs
             else (token,) for row, token in enumerate(completion.token_ids)]
            for output in outputs for completion in output.outputs]


@cache
def on_one_rank(folder: Path) -> list[list[tuple[Any, ...]]]:
    return served(folder, 1)


@pytest.mark.parametrize("options", [
    pytest.param({"tp_size": 3}, id="tp-3"), pytest.param({"tp_size": 1, "together": False}, id="alone"),
    pytest.param({"tp_size": 1, "enable_prefix_caching": False, "block_size": 16}, id="no-prefix-hits"),
    pytest.param({"tp_size": 2, "num_kv_blocks": 18, "max_model_len": 60}, id="preempted"),
    pytest.param({"tp_size": 6, "max_num_batched_tokens": 8}, id="tp-6-small-chunks", marks=pytest.mark.endurance),
    pytest.param({"tp_size": 2, "fabric": "gloo"}, id="gloo-2", marks=pytest.mark.multirank),
    pytest.param({"tp_size": 3, "fabric": "gloo"}, id="gloo-3", marks=[pytest.mark.multirank, pytest.mark.endurance])])
def test_tokens_and_log_probabilities_are_the_same_to_the_bit(checkpoint: MakeCheckpoint, options: dict[str, Any]) -> None:
    assert served(checkpoint(), **options) == on_one_rank(checkpoint())


@pytest.mark.parametrize("tp_size", [1, 3])
def test_a_leaf_that_is_not_finite_ends_its_request_and_no_other(checkpoint: MakeCheckpoint, tmp_path: Path,
                                                                 tp_size: int) -> None:
    clean = on_one_rank(checkpoint())
    folder = Path(shutil.copytree(checkpoint(), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][11, 3] = math.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with LLM(folder, tensor_parallel_size=tp_size, fabric="threads" if tp_size > 1 else "solo", device="cpu", tp_invariant=True,
             block_size=4, num_kv_blocks=100, max_num_seqs=8) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in (PROMPTS[0], PROMPTS[2])], [PARAMS[0], PARAMS[2]])
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error"]
    assert "not finite" in (outputs[1].error or "")
    assert outputs[0].outputs[0].token_ids == [token for token, *_ in clean[0]]


@pytest.mark.parametrize(("options", "message"), [
    ({"dtype": "float16"}, "dtype=bfloat16 and float32 alone on device=cpu, and dtype=float16"),
    ({"dtype": "float64"}, "dtype=float64"),
    ({"attention_backend": "torch"}, "attention_backend='torch'"),
    ({"tp_invariant": 1}, "tp_invariant=1 must be True or False"),
    ({"device": "cuda", "dtype": "float32"}, "dtype=bfloat16 alone on device=cuda, and dtype=float32"),
    ({"device": "cuda", "dtype": "bfloat16"}, "head_dim=8 is not a multiple of 16")])
def test_what_is_not_promised_is_refused_by_name(checkpoint: MakeCheckpoint, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(checkpoint(), **{"tp_invariant": True, "device": "cpu", **options})


def test_heads_that_are_too_wide_to_be_summed_exactly_are_refused(checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(ValueError, match="head_dim=258 is above 256"):
        LLM(checkpoint(head_dim=258), tp_invariant=True, device="cpu")


def test_ranks_are_cut_between_leaves() -> None:
    with pytest.raises(AssertionError, match="cuts a leaf"):
        INVARIANT.row(64, 8, leaf=16, tp=SoloGroup(), dtype=torch.float32, input_range=range(8))
    assert issubclass(INVARIANT.row, RowParallelLinear)  # type: ignore[arg-type]


def test_the_example_of_the_page_runs(checkpoint: MakeCheckpoint) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (example,) = (block for block in blocks if "def teacher_forced" in block)
    assert len(example.splitlines()) <= 30
    names: dict[str, Any] = {"__name__": "example"}
    exec(example, names)
    assert names["compare"](str(checkpoint()), [[5, 6, 7], [8, 9]]) == 2 * 40
