"""Kernels on a GPU at real shapes, in every dtype, against float64; outputs and free slots start as NaN."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from engine.kernels.common import HAVE_TRITON
from engine.kernels.decode_inputs import decode_inputs, decode_inputs_torch
from engine.kernels.gemv import HalfNormed, gemv, gemv_add_norm, gemv_torch
from engine.kernels.matmul_few_rows import Tiles, matmul_few_rows, tiles_for
from engine.kernels.paged_decode import paged_decode
from engine.kernels.paged_prefill import paged_prefill
from engine.kernels.philox import gumbel_argmax, gumbel_argmax_torch, philox_uniform, philox_uniform_triton
from engine.kernels.rms_norm import add_rms_norm, add_rms_norm_torch, rms_norm, rms_norm_torch
from engine.kernels.rope import apply_rope_torch, rope_store_kv
from engine.kernels.silu_mul import silu_mul, silu_mul_torch
from engine.kernels.store_kv import store_kv, store_kv_torch
from engine.layers.matmul import is_ours, linear
from tests.engine.kernels.problems import (
    AttentionProblem,
    attention_budget,
    attention_problem,
    decode_inputs_problem,
    exact_attention,
    over_budget,
    rounding_budget,
)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: kernels cannot run"),
    pytest.mark.skipif(not HAVE_TRITON, reason="Triton cannot be imported: kernels cannot run"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = 1e-6


@pytest.fixture(autouse=True)
def _quiet_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    # triton 3.9 warns that a default will change; warnings are errors here.
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def _normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def _decode(problem: AttentionProblem, **options: Any) -> torch.Tensor:
    out = torch.full(problem.q.shape, float("nan"), dtype=problem.q.dtype, device="cuda")
    return paged_decode(
        problem.q,
        problem.k_cache,
        problem.v_cache,
        problem.block_tables,
        problem.context_lens,
        problem.q_start,
        problem.q_count,
        problem.scale,
        out_SQH=out,
        **options,
    )


def _prefill(problem: AttentionProblem, **options: Any) -> torch.Tensor:
    out = torch.full(problem.q.shape, float("nan"), dtype=problem.q.dtype, device="cuda")
    return paged_prefill(
        problem.q,
        problem.k_cache,
        problem.v_cache,
        problem.block_tables,
        problem.cu_seqlens_q,
        problem.context_lens,
        problem.kv_of_q,
        problem.scale,
        out_TQH=out,
        **options,
    )


def _share_of_budget(problem: AttentionProblem, actual: torch.Tensor) -> float:
    exact, scale = exact_attention(problem)
    return over_budget(actual, exact, attention_budget(exact, scale, problem.q.dtype, rounded_weights=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("q_counts", "head_dim", "block_size"),
    [
        ((2,) * 8, 128, 256),
        ((4,) * 8, 128, 16),
        ((3, 2), 64, 256),
        ((1, 3, 3), 80, 48),
        ((5,), 40, 1),
        ((18,), 256, 64),
    ],
)
@pytest.mark.parametrize("pieces", [{}, {"num_programs": 1}, {"num_programs": 3}, {"num_programs": 31}])
def test_decode_stays_within_its_budget(
    dtype: torch.dtype, q_counts: tuple[int, ...], head_dim: int, block_size: int, pieces: dict[str, Any]
) -> None:
    problem = attention_problem(
        query_lens=[1] * 9,
        context_lens=[0, 1, 2, 63, 64, 255, 256, 257, 1500],
        q_counts=q_counts,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        device="cuda",
    )
    assert _share_of_budget(problem, _decode(problem, **pieces)) <= 1


def test_decode_gives_the_same_bits_whoever_finishes_last() -> None:
    generator = torch.Generator().manual_seed(0)
    problem = attention_problem(
        query_lens=[1] * 100,
        context_lens=torch.randint(0, 2000, (100,), generator=generator).tolist(),
        q_counts=(2,) * 8,
        head_dim=128,
        block_size=256,
        dtype=torch.bfloat16,
        device="cuda",
    )
    first = _decode(problem)
    assert _share_of_budget(problem, first) <= 1
    for _ in range(200):
        assert torch.equal(_decode(problem), first)
    assert not torch.equal(_decode(problem, num_programs=5), first), "must be able to fail"


def test_prefill_gives_the_same_bits_in_any_tile_of_queries_and_others_in_other_tiles_of_keys() -> None:
    problem = attention_problem(
        query_lens=[1, 63, 200, 300],
        context_lens=[5, 63, 1000, 300],
        q_counts=(2,) * 4,
        head_dim=128,
        block_size=256,
        dtype=torch.bfloat16,
        device="cuda",
    )
    by_default = _prefill(problem)
    assert torch.equal(_prefill(problem, tile_q=128, tile=64, num_warps=8), by_default)
    assert not torch.equal(_prefill(problem, tile_q=128, tile=128, num_warps=8, num_stages=2), by_default), "must be able to fail"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("q_counts", "head_dim", "block_size"),
    [((2, 2), 128, 256), ((4,), 128, 16), ((3, 2), 64, 256), ((1, 3), 80, 48), ((5,), 40, 1), ((2,), 256, 64)],
)
def test_prefill_stays_within_its_budget(dtype: torch.dtype, q_counts: tuple[int, ...], head_dim: int, block_size: int) -> None:
    problem = attention_problem(
        query_lens=[1, 300, 0, 128, 129, 1, 700],
        context_lens=[0, 300, 5, 1000, 130, 257, 701],
        q_counts=q_counts,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        device="cuda",
        padding_rows=150,
    )
    assert _share_of_budget(problem, _prefill(problem)) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_budgets_notice_a_missing_key_and_a_shifted_mask_at_real_shapes(dtype: torch.dtype) -> None:
    problem = attention_problem(query_lens=[64], context_lens=[64], q_counts=(2, 2), head_dim=128, dtype=dtype, device="cuda")
    exact, scale = exact_attention(problem, shift=-1)
    budget = attention_budget(exact, scale, dtype, rounded_weights=True)
    assert _share_of_budget(problem, _prefill(problem)) <= 1
    # The first row sees no key at all under this fault: NaN there, and a finite error from the second row on.
    assert over_budget(_prefill(problem)[1:], exact[1:], budget[1:]) > 2


@pytest.mark.parametrize("pieces", [{}, {"num_programs": 3}])
def test_a_captured_decode_follows_lengths_that_change_on_the_device(pieces: dict[str, Any]) -> None:
    problem = attention_problem(
        query_lens=[1] * 4,
        context_lens=[900, 300, 1024, 77],
        q_counts=(4, 4),
        head_dim=128,
        block_size=256,
        dtype=torch.bfloat16,
        device="cuda",
    )
    lengths = [problem.context_lens.clone(), torch.tensor([1, 300, 0, 65], dtype=torch.int32, device="cuda")]
    expected = []
    for length in lengths:
        problem.context_lens.copy_(length)
        expected.append(_decode(problem, **pieces))
    out = torch.empty_like(problem.q)
    inputs = (problem.q, problem.k_cache, problem.v_cache, problem.block_tables, problem.context_lens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_decode(*inputs, problem.q_start, problem.q_count, problem.scale, out_SQH=out, **pieces)
    for turn in range(6):
        problem.context_lens.copy_(lengths[turn % 2])
        graph.replay()
        assert torch.equal(out, expected[turn % 2])


def _matmul_share_of_budget(actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    exact = gemv_torch(x.double(), weight.double(), None if bias is None else bias.double())
    scale = gemv_torch(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    return over_budget(actual, exact, rounding_budget(exact, scale, x.dtype, steps=16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(960, 576), (6144, 1024), (1024, 3072), (4096, 12_288), (37, 1500)])
def test_products_of_one_row_stay_within_their_budget(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, weight = _normal(1, shape[1], dtype=dtype), _normal(*shape, dtype=dtype, seed=1)
    bias = 50 * _normal(shape[0], dtype=dtype, seed=2)
    torch.cuda.synchronize()  # the weight is settled
    for settled, b in ((True, None), (False, bias)):
        y = gemv(x, weight, b, settled=settled)
        assert _matmul_share_of_budget(y, x, weight, b) <= 1
        if dtype is torch.bfloat16:
            assert torch.equal(y, gemv(x, weight, b, overlap=False)), "the launch must not change a bit"
    assert _matmul_share_of_budget(gemv(x, weight), x, weight, bias) > 2, "a missing bias must be seen"


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.bfloat16, shape) for shape in ((2048, 1024), (1024, 1536), (6144, 1024), (70, 1000))] + [(torch.float16, (960, 576))],
)
def test_products_of_few_rows_stay_within_their_budget(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """With the tiles that are chosen, at their borders, or with some; the same bits however the kernel is launched."""
    weight, bias = _normal(*shape, dtype=dtype, seed=1), 50 * _normal(shape[0], dtype=dtype, seed=2)
    torch.cuda.synchronize()  # the weight is settled
    for num_rows in (2, 15, 16, 17, 32, 33, 48, 64, 65, 128, 129, 200, 256):
        x = _normal(num_rows, shape[1], dtype=dtype, seed=num_rows)
        tiles = tiles_for(num_rows, *shape) or Tiles(32, 64, 64)
        y = matmul_few_rows(x, weight, bias, tiles=tiles, settled=True)
        assert _matmul_share_of_budget(y, x, weight, bias) <= 1
        assert torch.equal(y, matmul_few_rows(x, weight, bias, tiles=tiles, overlap=False))
        assert _matmul_share_of_budget(y, x, weight, None) > 2, "a missing bias must be seen"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6144, 1024), (24_576, 4096), (1280, 640), (70, 1000)])
def test_a_gated_product_has_the_bits_of_silu_mul_on_the_product(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, bias = _normal(*shape, dtype=dtype, seed=1) / 16, _normal(shape[0], dtype=dtype, seed=2)
    torch.cuda.synchronize()  # the weight is settled
    for num_rows in (1, 2, 16, 17, 48, 64, 65, 128, 200, 256):
        x = _normal(num_rows, shape[1], dtype=dtype, seed=num_rows)
        tiles = tiles_for(num_rows, *shape, gated=True) or Tiles(32, 64, 64)
        product = partial(gemv, rows=2) if num_rows == 1 else partial(matmul_few_rows, tiles=tiles)
        for b in (None, bias):
            assert torch.equal(product(x, weight, b, gated=True, settled=True), silu_mul(product(x, weight, b)))


@pytest.mark.parametrize("hidden", [1024, 4096, 1000])
def test_a_norm_that_two_products_share_stays_within_its_budget(hidden: int) -> None:
    dtype = torch.bfloat16
    first, second = _normal(hidden, 2048, dtype=dtype, seed=1) / 64, _normal(2048, hidden, dtype=dtype, seed=2) / 32
    norm = _normal(hidden, dtype=dtype, seed=3)
    x, residual = _normal(1, 2048, dtype=dtype, seed=4), _normal(1, hidden, dtype=dtype, seed=5)
    torch.cuda.synchronize()  # weights are settled
    half, new_residual = gemv_add_norm(x, first, residual, norm, EPS, settled=True)
    assert torch.equal(new_residual, gemv(x, first) + residual)
    wide = HalfNormed(half.values_TI.double(), half.squares_TP.double(), EPS)
    exact = rms_norm_torch(new_residual.double(), norm.double(), EPS)
    divided = wide.values_TI * torch.rsqrt(wide.squares_TP.sum() / hidden + EPS)
    assert over_budget(divided, exact, rounding_budget(exact, exact, dtype)) <= 1
    y = gemv(half, second, settled=True)
    exact = gemv_torch(wide, second.double())
    budget = rounding_budget(exact, gemv_torch(wide._replace(values_TI=wide.values_TI.abs()), second.double().abs()), dtype,
                             steps=16)
    assert over_budget(y, exact, budget) <= 1
    assert over_budget(y * 1.02, exact, budget) > 1, "a wrong rms must be seen"
    again = gemv_add_norm(x, first, residual, norm, EPS, overlap=False)[0]
    assert all(torch.equal(one, other) for one, other in zip(half[:2], again[:2], strict=True))
    assert torch.equal(y, gemv(half, second, overlap=False))


def test_linear_takes_our_kernels_for_few_rows_and_torchs_for_what_they_do_not_serve() -> None:
    weight = torch.nn.Parameter(_normal(1024, 576, dtype=torch.bfloat16), requires_grad=False)
    x = _normal(300, 576, dtype=torch.bfloat16, seed=1)
    torch.cuda.synchronize()
    assert torch.equal(linear(x[:1], weight), gemv(x[:1], weight))
    tiles = tiles_for(2, *weight.shape)
    assert tiles is not None
    assert torch.equal(linear(x[:2], weight), matmul_few_rows(x[:2], weight, tiles=tiles))
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))
    assert is_ours(x[:1], weight)
    assert is_ours(x[:256], weight)
    refused = {
        "too many rows": (x[:257], weight),
        "no rows": (x[:0], weight),
        "unaligned columns": (x[:2, :570], weight[:, :570]),
        "unaligned start": (x[:2, 8:568][:, 4:532], weight[:, :528].contiguous()),
        "float32": (x[:2].float(), weight.float()),
        "float64": (x[:2].double(), weight.double()),
        "CPU": (x[:2].cpu(), weight.cpu()),
    }
    assert [name for name, operands in refused.items() if is_ours(*operands)] == []


@pytest.mark.parametrize(("num_seqs", "fused"), [(1, False), (1, True), (5, False), (5, True), (40, False)])
def test_a_captured_chain_of_early_launches_gives_the_bits_of_one_in_turn(num_seqs: int, fused: bool) -> None:
    """Sixteen small layers, each kernel of which reads what the one before wrote, and buffers that are used again."""
    dtype, hidden, heads = torch.bfloat16, 512, 8
    weights = [
        [_normal(out, width, dtype=dtype, seed=4 * i + j) / width**0.5
         for j, (out, width) in enumerate(((heads * 128, hidden), (hidden, 4 * 128), (2 * 768, hidden), (hidden, 768)))]
        for i in range(16)
    ]  # fmt: skip
    norm, head_norm = _normal(hidden, dtype=dtype, seed=99), _normal(128, dtype=dtype, seed=98)
    lengths = (torch.arange(num_seqs, device="cuda", dtype=torch.int32) * 61) % 700 + 1
    table = torch.arange(num_seqs * 3, device="cuda", dtype=torch.int32).view(num_seqs, 3)
    caches = _normal(2, num_seqs * 3, 2, 256, 128, dtype=dtype, seed=97)
    k_cache, v_cache = caches
    positions = lengths.long() - 1
    slots = table.gather(1, (positions // 256)[:, None])[:, 0] * 256 + positions % 256
    angles = torch.rand(700, 64, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    starts, counts = torch.tensor([[0, 2], [2, 2]], dtype=torch.int32, device="cuda")
    ids = torch.arange(num_seqs, device="cuda")
    heat = torch.full((num_seqs,), 0.7, device="cuda")
    x_in = _normal(num_seqs, hidden, dtype=dtype, seed=96)
    kept = caches.clone()

    def run(overlap: bool) -> tuple[torch.Tensor, torch.Tensor]:
        launch: dict[str, Any] = {"settled": True, "overlap": overlap}
        matmul = partial(matmul_few_rows, tiles=Tiles(16, 64, 64), **launch) if num_seqs > 1 else partial(gemv, **launch)

        def add_norm(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> tuple[Any, torch.Tensor]:
            if fused and num_seqs == 1:
                return gemv_add_norm(x, weight, residual, norm, EPS, **launch)
            return add_rms_norm(matmul(x, weight), residual, norm, EPS, **launch)

        x, residual = add_rms_norm(x_in, x_in, norm, EPS, **launch)
        for qkv_proj, o_proj, gate_up_proj, down_proj in weights:
            qkv = matmul(x, qkv_proj)
            q = rope_store_kv(qkv, positions, cos, sin, k_cache, v_cache, slots, head_norm, head_norm, EPS, settled=True,
                              overlap=overlap)  # fmt: skip
            x = paged_decode(q, k_cache, v_cache, table, lengths, starts, counts, 0.09, max_group=2, overlap=overlap)
            x, residual = add_norm(x.flatten(1), o_proj, residual)
            x = matmul(x, gate_up_proj, gated=True) if fused else silu_mul(matmul(x, gate_up_proj), overlap=overlap)
            x, residual = add_norm(x, down_proj, residual)
        x = residual
        return x, gumbel_argmax(x, heat, ids, ids, overlap=overlap)[1]

    expected = run(overlap=False)
    assert expected[0].isfinite().all()
    run(overlap=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(overlap=True)
    for _ in range(50):
        caches.copy_(kept)
        for part in captured:
            part.zero_()
        graph.replay()
        for part, wanted in zip(captured, expected, strict=True):
            assert torch.equal(part, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 576), (256, 1024), (300, 5120), (7, 100)])
def test_norms_stay_within_their_budget(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, residual = _normal(2, *shape, dtype=dtype)
    weight = _normal(shape[1], dtype=dtype, seed=1)
    exact = rms_norm_torch(x.double(), weight.double(), EPS)
    assert over_budget(rms_norm(x, weight, EPS), exact, rounding_budget(exact, exact, dtype)) <= 1
    normed, new_residual = add_rms_norm(x, residual, weight, EPS, settled=True)
    assert torch.equal(new_residual, add_rms_norm_torch(x, residual, weight, EPS)[1])
    assert torch.equal(normed, rms_norm(new_residual, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("intermediate", [35, 1536, 3072, 25600])
def test_gates_stay_within_their_budget(dtype: torch.dtype, intermediate: int) -> None:
    gate_up = 4 * _normal(64, 2 * intermediate, dtype=dtype)
    exact = silu_mul_torch(gate_up.double())
    assert over_budget(silu_mul(gate_up), exact, rounding_budget(exact, exact, dtype)) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_that_overflow_the_exponential_give_what_the_twin_gives(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([[inf, -inf, nan, 0.0, -0.0, 60_000.0, -60_000.0, -150.0, 150.0]], dtype=dtype, device="cuda")
    gate_up = torch.cat((gate, torch.ones_like(gate)), dim=1)
    torch.testing.assert_close(silu_mul(gate_up), silu_mul_torch(gate_up), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_q_heads", "num_kv_heads", "head_dim", "half"),
    [(16, 8, 128, 64), (5, 2, 64, 32), (9, 3, 64, 32), (7, 1, 80, 10), (32, 32, 40, 20)],
)
@pytest.mark.parametrize("norm", [False, True])
def test_rotation_and_cache_write_stay_within_their_budget(
    dtype: torch.dtype, num_q_heads: int, num_kv_heads: int, head_dim: int, half: int, norm: bool
) -> None:
    num_tokens, block_size, num_blocks = 500, 48, 20
    qkv = _normal(num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    q_weight, k_weight = _normal(2, head_dim, dtype=dtype, seed=1) if norm else (None, None)
    positions = torch.randint(0, 4096, (num_tokens,), device="cuda")
    angles = torch.arange(4096, device="cuda")[:, None] * 1e4 ** -(torch.arange(half, device="cuda") / half)
    cos, sin = angles.cos(), angles.sin()
    slots = torch.randperm(num_blocks * block_size, device="cuda")[:num_tokens].int()
    slots[::7] = -1
    caches = torch.full((2, num_blocks, num_kv_heads, block_size, head_dim), float("nan"), dtype=dtype).cuda()
    q_out = rope_store_kv(qkv, positions, cos, sin, caches[0], caches[1], slots, q_weight, k_weight, EPS)
    q, k, v = qkv.view(num_tokens, -1, head_dim).tensor_split([num_q_heads, num_q_heads + num_kv_heads], dim=1)
    wide = [None if w is None else w.double() for w in (q_weight, k_weight)]
    exact_q, exact_k = apply_rope_torch(
        q.double(), k.double(), positions, cos, sin, q_norm_weight_H=wide[0], k_norm_weight_H=wide[1], eps=EPS
    )

    def budget(exact: torch.Tensor) -> torch.Tensor:
        return rounding_budget(exact, exact.norm(dim=-1, keepdim=True).expand_as(exact), dtype)

    assert over_budget(q_out, exact_q, budget(exact_q)) <= 1
    kept = (slots >= 0).nonzero()[:, 0]
    stored = [c[slots[kept].long() // block_size, :, slots[kept].long() % block_size] for c in caches]
    assert over_budget(stored[0], exact_k[kept], budget(exact_k[kept])) <= 1
    assert torch.equal(stored[1], v[kept])
    assert (~caches.isnan()).any(dim=4).sum() == 2 * len(kept) * num_kv_heads

    early = torch.full_like(caches, float("nan"))  # the rest is settled: the budgets have waited for it
    for token in (1, 7):  # slot -1 is the second one's
        inputs = (qkv[token : token + 1], positions[token : token + 1], cos, sin, *early, slots[token : token + 1])
        q_early = rope_store_kv(*inputs, q_weight, k_weight, EPS, settled=True)
        assert over_budget(q_early, exact_q[token : token + 1], budget(exact_q[token : token + 1])) <= 1
    block, slot = divmod(int(slots[1]), block_size)
    assert over_budget(early[0, block, :, slot], exact_k[1], budget(exact_k[1])) <= 1
    assert torch.equal(early[1, block, :, slot], v[1])
    assert (~early.isnan()).any(dim=4).sum() == 2 * num_kv_heads

    ours, twins = torch.full_like(caches, float("nan")), torch.full_like(caches, float("nan"))
    store_kv(k, v, ours[0], ours[1], slots)
    store_kv_torch(k, v, twins[0], twins[1], slots)
    assert torch.equal(ours.nan_to_num(7.0), twins.nan_to_num(7.0))


@pytest.mark.parametrize("num_seqs", [1, 7, 128, 300])
def test_inputs_of_a_decode_step_are_the_twins(num_seqs: int) -> None:
    inputs = decode_inputs_problem(num_seqs=num_seqs, block_size=256, device="cuda")
    for ours, twins in zip(decode_inputs(*inputs), decode_inputs_torch(*inputs), strict=True):
        assert torch.equal(ours, twins)


def test_random_bits_are_the_twins() -> None:
    seed = torch.tensor([0, 1, -1, 2**62], device="cuda")
    position = torch.tensor([0, 2**40, -5, 77], device="cuda")
    ours = philox_uniform_triton(seed, position, 5003, start=3)
    assert torch.equal(ours, philox_uniform(seed, position, 5003, start=3))
    assert torch.equal(ours.cpu(), philox_uniform(seed.cpu(), position.cpu(), 5003, start=3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_are_the_twins_up_to_near_ties(dtype: torch.dtype) -> None:
    logits = 3 * _normal(64, 151_936, dtype=dtype)
    temperature = torch.linspace(0, 2, 64, device="cuda")
    seed, position = torch.arange(64, device="cuda") * 7 - 9, torch.arange(64, device="cuda")
    value, index = gumbel_argmax(logits, temperature, seed, position, 5)
    exact, exact_index = gumbel_argmax_torch(logits.double(), temperature, seed, position, 5)
    # float32 division, two logarithms (4 ulp each at most) and a sum, on values that this bounds.
    budget = 16 * 2.0**-24 * (logits.double().abs().amax(dim=1) / temperature.double().clamp_min(0.03) + 20)
    assert ((value.double() - exact).abs() <= budget).all()
    assert index[0] == exact_index[0] == logits[0].argmax() + 5
    assert (index != exact_index).sum() <= 1
