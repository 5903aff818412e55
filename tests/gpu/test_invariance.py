"""``tp_invariant=True`` on one GPU: the same bits at any tp_size (ranks are threads), in any batch, eager and in graphs."""

from __future__ import annotations

import itertools
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import LLM, SamplingParams
from engine.kernels import invariant_attention_gpu, invariant_matmul_gpu
from engine.kernels.invariant_attention_gpu import DecodeLaunch
from engine.kernels.invariant_matmul_gpu import Launch, add_leaves, linear_in_leaves, linear_in_order
from engine.kernels.invariant_row_gpu import RowCut, row_in_order, sums_of_row
from engine.kernels.peer_all_reduce import FLAG_BYTES, MAX_PROGRAMS, PeerMemory, Way, peer_all_reduce
from engine.kernels.quanta import row_peaks, unit_exponents, value_of_sums
from engine.kernels.rms_norm import add_rms_norm, add_rms_norm_of_quanta
from engine.kernels.rope import rope_store_kv
from engine.parallel.group import SoloGroup, TPGroup
from harness.strategies import pick_config
from harness.verification.budgets import bits
from tests.engine.kernels.problems import attention_budget, attention_problem, exact_attention, over_budget
from tests.engine.support import Schedule, logits_of, make_runner, on_ranks
from tests.gpu.support import DEVICE, MakeModel
from tests.gpu.test_thread_ranks import head_dim_of
from tests.reference.tiny import small_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

LENGTHS = (37, 9, 300)
WHOLE: Schedule = [[(0, 37)], [(1, 9)], [(2, 300)]]
MIXED: Schedule = [[(0, 5), (1, 9)], [(0, 1), (2, 60)], *[[(0, 1), (2, 1)]] * 10, [(0, 21)], [(2, 230)]]
DECODES: Schedule = [*[[(0, 1), (1, 1)]] * 9, *[[(0, 1)]] * 28, [(2, 150)], *[[(2, 1)]] * 150]
OPTIONS: dict[str, Any] = {"num_kv_blocks": 80, "max_num_seqs": 8, "max_model_len": 320, "max_num_batched_tokens": 512}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).bfloat16()


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


def leaf_sums(x: Tensor, weight: Tensor, peak: Tensor, unit: Tensor, shares: int = 1) -> Tensor:
    sums = torch.zeros((x.shape[0], weight.shape[0]), dtype=torch.int32, device=DEVICE)
    add_leaves(x, weight, peak, unit, sums, leaf=256, shares=shares)
    return sums


LAUNCHES = [
    Launch(16, 64, 128, 4, 5, weight_first=True), Launch(32, 64, 128, 4, 4, weight_first=True), Launch(64, 64, 64, 4, 5),
    Launch(64, 128, 64, 8, 3), Launch(128, 128, 64, 8, 4, bulk=True), Launch(128, 64, 32, 4, 3), Launch(64, 32, 128, 4, 4),
    Launch(128, 256, 64, 8, 3, bulk=True, persistent=True),
    Launch(16, 64, 64, 4, 4),  # fewer than 64 rows of the first operand: the older instruction, which does the same
]


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_a_product_has_the_same_bits_in_every_tile_and_in_any_company(monkeypatch: pytest.MonkeyPatch, launch: Launch) -> None:
    x, weight = drawn(300, 4096), drawn(520, 4096, seed=1)
    peak, unit = row_peaks(x), unit_exponents(weight, 256)
    expected = (linear_in_order(x, weight), leaf_sums(x, weight, peak, unit),
                linear_in_leaves(x, weight, peak, unit, None, leaf=256))
    monkeypatch.setattr(invariant_matmul_gpu, "launch_of", lambda *sizes: launch)
    for rows, outputs in ((300, 520), (1, 520), (7, 33), (65, 104)):
        assert same(linear_in_order(x[:rows], weight[:outputs]), expected[0][:rows, :outputs])
        if launch.outputs == 256:  # which has registers for one chain alone
            continue
        for shares in (1, 3):
            sums = leaf_sums(x[:rows], weight[:outputs], peak[:rows], unit[:outputs], shares)
            assert torch.equal(sums, expected[1][:rows, :outputs])
        y = linear_in_leaves(x[:rows], weight[:outputs], peak[:rows], unit[:outputs], None, leaf=256)
        assert same(y, expected[2][:rows, :outputs])


@pytest.mark.parametrize("cut", [RowCut(8, 512), RowCut(16, 1024), RowCut(32, 1024, 8), RowCut(64, 256, 4, 3),
                                 RowCut(8, 2048, 8, 1)], ids=str)
def test_one_row_gets_the_same_bits_in_programs_of_its_own(cut: RowCut) -> None:
    x, weight = drawn(300, 3840), torch.nn.Parameter(drawn(520, 3840, seed=1), requires_grad=False)
    peak, unit = row_peaks(x), unit_exponents(weight, 256)
    expected, expected_sums = linear_in_order(x, weight), leaf_sums(x, weight, peak, unit)
    for row in range(0, 300, 23):
        own = slice(row, row + 1)
        assert same(row_in_order(x[own], weight, cut=cut), expected[own])
        for given in (None, peak[own]):
            sums, found = sums_of_row(x[own], weight, unit, cut, leaf=256, peak_T=given)
            assert torch.equal(sums, expected_sums[own])
            assert torch.equal(found, peak[own])


def test_another_order_of_sums_gives_other_bits() -> None:
    x, weight = drawn(16, 4096), drawn(520, 4096, seed=1)
    order = torch.arange(4096, device=DEVICE).view(2, 2048).T.flatten()
    assert not same(linear_in_order(x[:, order].contiguous(), weight[:, order].contiguous()), linear_in_order(x, weight))


def test_a_norm_of_quanta_is_that_of_what_they_stand_for_and_of_each_row_alone() -> None:
    x, weight, residual, scale = drawn(300, 1024), drawn(4096, 1024, seed=1), drawn(300, 4096, seed=2), drawn(4096, seed=3)
    peak, unit = row_peaks(x), unit_exponents(weight, 256)
    sums = leaf_sums(x, weight, peak, unit)
    normed, total = add_rms_norm_of_quanta(sums, peak, unit, residual, scale, 1e-6)
    y = value_of_sums(sums, peak, unit, None, x.dtype)
    expected = add_rms_norm(y, residual, scale, 1e-6)
    assert same(total, expected[1])
    assert torch.allclose(normed, expected[0], rtol=2**-7)
    for row in range(0, 300, 37):
        own = slice(row, row + 1)
        alone = add_rms_norm_of_quanta(sums[own], peak[own], unit, residual[own], scale, 1e-6)
        assert same(alone[0][0], normed[row])


@pytest.mark.parametrize("large_channel", [False, True])
def test_every_row_is_as_accurate_as_the_library_s_but_for_half_a_quantum_a_leaf(large_channel: bool) -> None:
    x, weight = drawn(320, 12_288), drawn(512, 12_288, seed=1)
    for group, exponent in zip(x.split(64), (-12, -6, 0, 6, 12), strict=True):
        group *= 2.0**exponent
    if large_channel:
        x[:, 17] *= 1000
    exact, ordinary = x.double() @ weight.double().T, torch.nn.functional.linear(x, weight)
    peak, unit = row_peaks(x), unit_exponents(weight, 256)
    # A rounding to whole quanta is off by at most half of one, and by 1 / sqrt(12) in the mean.
    quanta = (peak.view(torch.float32).frexp().exponent[:, None] - unit).double().exp2().square().mean(1) * (48 / 12)
    for found, rounded in ((linear_in_order(x, weight), 0.0),
                           (linear_in_leaves(x, weight, peak, unit, None, leaf=256), 1.1 * quanta)):
        own, other = ((y.double() - exact).square().mean(1) for y in (found, ordinary))
        assert (own <= 1.02 * other + rounded).all()
        assert (own <= 1.1 * other).all()


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("block_size", [5, 64, 256])
def test_a_query_gets_the_same_from_prompts_and_decode_steps(monkeypatch: pytest.MonkeyPatch, head_dim: int,
                                                             block_size: int) -> None:
    lengths = (1000, 5, 129)
    problem = attention_problem(query_lens=lengths, context_lens=lengths, head_dim=head_dim, block_size=block_size,
                                dtype=torch.bfloat16, device=DEVICE)
    cache = (problem.k_cache, problem.v_cache)

    def prompts(rows: int) -> Tensor:
        out = torch.full(problem.q.shape, math.nan, dtype=problem.q.dtype, device=DEVICE)
        invariant_attention_gpu.prefill_in_order(problem.q, *cache, problem.block_tables, problem.cu_seqlens_q,
                                                 problem.context_lens, problem.kv_of_q, problem.scale, out_TQH=out, rows=rows)
        return out

    out = prompts(128)
    exact, scale = exact_attention(problem)
    assert over_budget(out, exact, attention_budget(exact, scale, torch.bfloat16, rounded_weights=True)) <= 1
    assert same(prompts(64), out)
    draw = random.Random(0)
    seqs = [draw.randrange(3) for _ in range(100)]
    contexts = [draw.randint(1, lengths[seq]) for seq in seqs]
    rows = [sum(lengths[:seq]) + context - 1 for seq, context in zip(seqs, contexts, strict=True)]
    launches = (DecodeLaunch(), DecodeLaunch(rows=16, num_stages=2, together=16, fetches=False))
    for programs, launch in itertools.product((1, 3, 40), launches):
        monkeypatch.setattr(invariant_attention_gpu, "decode_launch_of", lambda *sizes, launch=launch: launch)
        step = torch.full((100, *out.shape[1:]), math.nan, dtype=out.dtype, device=DEVICE)
        invariant_attention_gpu.decode_in_order(
            problem.q[rows], *cache, problem.block_tables[seqs], torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
            problem.q_start, problem.q_count, problem.scale, out_SQH=step, max_context=1024, max_group=3, programs=programs)
        assert same(step, out[rows])


def test_a_head_s_norm_is_summed_alike_however_many_heads_a_rank_has() -> None:
    """The ordinary kernel's programs take as many heads as there are, up to eight; this mode's a fixed number."""
    tables, heads, weight = torch.randn(2, 64, 64, device=DEVICE), drawn(40, 10, 128), drawn(128, seed=3)
    positions = torch.arange(40, device=DEVICE)

    def rotated(num_q: int) -> Tensor:
        k_cache, v_cache = torch.zeros(2, 4, 1, 16, 128, dtype=torch.bfloat16, device=DEVICE)
        fused = torch.cat((heads[:, :num_q], heads[:, 8:]), 1).flatten(1)
        return rope_store_kv(fused, positions, tables[0], tables[1], k_cache, v_cache, positions, weight, weight, heads=8)

    assert all(same(rotated(num_q), rotated(8)[:, :num_q]) for num_q in (1, 2, 3, 5))


@pytest.mark.parametrize("two_shot", [False, True])
@pytest.mark.parametrize("largest", [False, True])
def test_integers_in_memory_that_ranks_share_are_added_and_compared_as_such(two_shot: bool, largest: bool) -> None:
    """Two ranks on two streams of one GPU. Of integers that float32 does not tell apart, whose sums wrap."""
    half_bytes = 2**18
    parts = tuple(torch.zeros(FLAG_BYTES + 2 * half_bytes, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    memories = [PeerMemory(rank, 2, half_bytes, parts, torch.zeros(MAX_PROGRAMS, dtype=torch.int64, device=DEVICE))
                for rank in range(2)]
    way, streams = Way(two_shot=two_shot, num_programs=8), [torch.cuda.Stream() for _ in range(2)]
    counts = (1, 1000, 65_536, 7)
    for count in counts:  # compiled and loaded before ranks wait for each other: as if all others were far ahead
        for memory in memories:
            memory.flags(memory.rank).fill_(2**40)
            peer_all_reduce(torch.zeros(count, dtype=torch.int32, device=DEVICE), memory, way, largest=largest)
            torch.cuda.synchronize()
    for memory in memories:
        memory.flags(memory.rank).zero_()
        memory.calls.zero_()
    generator = torch.Generator(DEVICE).manual_seed(0)
    for count in counts:
        x = torch.randint(-2**31, 2**31 - 1, (2, count), generator=generator, device=DEVICE).int()
        torch.cuda.synchronize()
        found = []
        for rank in range(2):
            with torch.cuda.stream(streams[rank]):
                found.append(peer_all_reduce(x[rank].clone(), memories[rank], way, largest=largest))
        torch.cuda.synchronize()
        assert all(torch.equal(each, x.amax(0) if largest else x[0] + x[1]) for each in found)


def expected_and_found(folder: Path, vocab_size: int, cases: Any, **options: Any) -> None:
    draw = random.Random(0)
    sequences = [[draw.randrange(vocab_size) for _ in range(length)] for length in LENGTHS]
    expected: list[Tensor] = []
    for tp_size, schedule, block_size, eager in cases:
        def job(tp: TPGroup, *, schedule: Schedule = schedule, **layout: Any) -> list[Tensor]:
            return logits_of(make_runner(folder, tp, device=DEVICE, dtype="bfloat16", **OPTIONS | options | layout), sequences,
                             schedule)

        for logits in on_ranks(tp_size, partial(job, block_size=block_size, enforce_eager=eager)):
            expected = expected or logits
            assert all(map(same, logits, expected)), f"tp_size={tp_size}, block_size={block_size}, eager={eager}"
    assert all(logits.isfinite().all() for logits in expected)


CASES = [(1, WHOLE, 16, True), (1, MIXED, 5, True), (1, DECODES, 64, False), *((size, MIXED, 16, True) for size in (2, 3, 5, 7)),
         (6, DECODES, 16, True), (8, DECODES, 7, True)]


@pytest.mark.parametrize("seed", range(3))
def test_logits_of_drawn_models_are_the_same_bits_at_any_tp_size_chunking_and_block_size(small_model: MakeModel,
                                                                                         seed: int) -> None:
    draw = random.Random(seed)
    while head_dim_of(config := pick_config(draw.randint, tp_size=8, max_width=64, max_layers=2)) % 16:
        pass
    config["max_position_embeddings"] = 512
    expected_and_found(small_model(config, "bfloat16"), config["vocab_size"], CASES, tp_invariant=True, num_kv_blocks=200)


def test_the_ordinary_engine_does_not_keep_that_promise(small_model: MakeModel) -> None:
    config = small_config("qwen3", num_q_heads=8, num_kv_heads=2) | {"max_position_embeddings": 512}
    with pytest.raises(AssertionError, match="tp_size="):
        expected_and_found(small_model(config, "bfloat16"), 131, CASES, num_kv_blocks=200)


PROMPTS = [[5, 6, 7, 8] * 6, [5, 6, 7, 8] * 6 + [9, 9], [11], [12, 13, 14]]
PARAMS = [SamplingParams(temperature=0, max_tokens=20, logprobs=5, ignore_eos=True),
          SamplingParams(temperature=0.9, seed=1, max_tokens=20, logprobs=0, ignore_eos=True),
          SamplingParams(temperature=1.2, seed=2, top_k=20, top_p=0.9, max_tokens=20, logprobs=3, ignore_eos=True),
          SamplingParams(temperature=1.0, seed=3, top_p=0.5, max_tokens=20, logprobs=0, ignore_eos=True)]
CROWDED: dict[str, Any] = {"num_kv_blocks": 18, "max_num_batched_tokens": 8}
"""Chunks of eight tokens, and a cache that the answers do not fit into together."""


def served(folder: Path, together: bool, **options: Any) -> list[Any]:
    """Of each prompt its tokens and their log-probabilities."""
    with LLM(folder, device=DEVICE, dtype="bfloat16", tp_invariant=True, block_size=4, max_num_seqs=8, max_model_len=60,
             **options) as llm:
        calls = [(PROMPTS, PARAMS)] if together else [([p], [q]) for p, q in zip(PROMPTS, PARAMS, strict=True)]
        return [(output.outputs[0].token_ids, output.outputs[0].logprobs) for some, each in calls
                for output in llm.generate([{"prompt_token_ids": prompt} for prompt in some], each)]


@pytest.mark.parametrize("tp_size", [1, 3])
def test_tokens_and_log_probabilities_are_the_same_to_the_bit(small_model: MakeModel, tp_size: int) -> None:
    """Together in a small cache in chunks, against each by itself."""
    folder = small_model(small_config("qwen3", num_q_heads=8, num_kv_heads=2), "bfloat16")
    found = served(folder, True, tensor_parallel_size=tp_size, fabric="threads" if tp_size > 1 else "solo", **CROWDED)
    assert found == served(folder, False, num_kv_blocks=100)
    assert [len(tokens) for tokens, _ in found] == [20] * 4


def test_a_row_that_is_not_finite_is_nan_and_touches_no_other_sequence(small_model: MakeModel) -> None:
    config = small_config("qwen3", num_q_heads=8, num_kv_heads=2)
    runner = make_runner(small_model(config, "bfloat16"), SoloGroup(), device=DEVICE, dtype="bfloat16", block_size=16,
                         tp_invariant=True, **OPTIONS | {"max_model_len": 128})
    embedding: Any = runner.model.get_submodule("model.embed_tokens")
    steps: Schedule = [[(0, 3), (1, 1)], [(1, 1)], [(1, 1)]]
    fine, clean = logits_of(runner, [[1, 2, 3], [4, 11, 5]], steps)
    embedding.weight.data[11, 3] = math.inf
    same_again, spoilt = logits_of(runner, [[1, 2, 3], [4, 11, 5]], steps)
    assert same(same_again, fine)
    assert same(spoilt[:1], clean[:1])
    assert spoilt[1:].isnan().all()
