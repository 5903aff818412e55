"""Cache write, norms, rotation and gate against their twins.

bfloat16 is left to the GPU: the interpreter truncates where hardware rounds.
"""

import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.decode_inputs import decode_inputs, decode_inputs_torch
from engine.kernels.rms_norm import add_rms_norm, add_rms_norm_torch, rms_norm, rms_norm_torch
from engine.kernels.rope import apply_rope, apply_rope_torch, rope_store_kv, rope_store_kv_torch
from engine.kernels.silu_mul import silu_mul, silu_mul_torch
from engine.kernels.store_kv import store_kv, store_kv_torch
from tests.engine.kernels.problems import decode_inputs_problem, over_budget, rounding_budget

DTYPES = st.sampled_from([torch.float32, torch.float16])
SEEDS = st.integers(0, 2**16)
EPS = 1e-6


def _normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _slots(seed: int, num_tokens: int, num_slots: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(num_slots, generator=generator)[:num_tokens].int()
    slots[torch.rand(num_tokens, generator=generator) < 0.3] = -1
    return slots


@given(
    block_size=st.sampled_from([1, 3, 16]),
    num_heads=st.integers(1, 5),
    head_dim=st.sampled_from([8, 40, 64]),
    num_tokens=st.integers(0, 5),
    seed=SEEDS,
)
def test_store_kv_moves_the_same_bits(block_size: int, num_heads: int, head_dim: int, num_tokens: int, seed: int) -> None:
    fused = _normal(seed, num_tokens, 2 * num_heads + 1, head_dim, dtype=torch.bfloat16)
    k, v = fused[:, 1 : 1 + num_heads], fused[:, 1 + num_heads :]
    slots = _slots(seed, num_tokens, 6 * block_size)
    ours = torch.full((2, 6, num_heads, block_size, head_dim), float("nan"), dtype=torch.bfloat16)
    twins = ours.clone()
    store_kv(k, v, ours[0], ours[1], slots)
    store_kv_torch(k, v, twins[0], twins[1], slots)
    assert torch.equal(ours.view(torch.int16), twins.view(torch.int16))


@given(num_rows=st.integers(0, 4), dim=st.sampled_from([1, 40, 64, 576]), dtype=DTYPES, settled=st.booleans(), seed=SEEDS)
def test_norms_agree(num_rows: int, dim: int, dtype: torch.dtype, settled: bool, seed: int) -> None:
    x, residual = _normal(seed, 2, num_rows, dim + 3, dtype=dtype)[..., :dim]
    weight = _normal(seed + 1, dim, dtype=dtype)
    exact = rms_norm_torch(x.double(), weight.double(), EPS)
    assert over_budget(rms_norm(x, weight, EPS, settled=settled), exact, rounding_budget(exact, exact, dtype)) <= 1
    normed, new_residual = add_rms_norm(x, residual, weight, EPS, settled=settled)
    assert torch.equal(new_residual, add_rms_norm_torch(x, residual, weight, EPS)[1])
    assert torch.equal(normed, rms_norm(new_residual, weight, EPS))


@given(num_rows=st.integers(0, 3), intermediate=st.sampled_from([1, 35, 1024, 1100]), dtype=DTYPES, seed=SEEDS)
def test_gates_agree(num_rows: int, intermediate: int, dtype: torch.dtype, seed: int) -> None:
    gate_up = 4 * _normal(seed, num_rows, 2 * intermediate, dtype=dtype)
    exact = silu_mul_torch(gate_up.double())
    assert over_budget(silu_mul(gate_up), exact, rounding_budget(exact, exact, dtype)) <= 1


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # numpy, which interprets
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gates_that_overflow_the_exponential_give_what_the_twin_gives(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([[inf, -inf, nan, 0.0, -0.0, 60_000.0, -60_000.0, -150.0, 150.0]], dtype=dtype)
    gate_up = torch.cat((gate, torch.ones_like(gate)), dim=1)
    torch.testing.assert_close(silu_mul(gate_up), silu_mul_torch(gate_up), rtol=0, atol=0, equal_nan=True)


@given(
    num_tokens=st.sampled_from([1, 3]),
    num_q_heads=st.sampled_from([1, 5, 9, 17]),
    num_kv_heads=st.sampled_from([1, 3, 9]),
    dims=st.sampled_from([(16, 8), (40, 20), (80, 10), (128, 64), (24, 3), (128, 48)]),
    block_size=st.sampled_from([1, 4, 48]),
    dtype=DTYPES,
    normed=st.sampled_from(["", "q", "qk"]),
    settled=st.booleans(),
    seed=SEEDS,
)
def test_rotations_and_the_fused_cache_write_agree(
    num_tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    dims: tuple[int, int],
    block_size: int,
    dtype: torch.dtype,
    normed: str,
    settled: bool,
    seed: int,
) -> None:
    head_dim, half = dims
    columns = (num_q_heads + 2 * num_kv_heads) * head_dim
    qkv = _normal(seed, num_tokens, columns + 8, dtype=dtype)[:, :columns]
    positions = torch.randint(0, 50, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    angles = torch.arange(50)[:, None] * 100.0 ** -(torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()
    q_weight, k_weight = (_normal(seed + i, head_dim, dtype=dtype) if heads in normed else None for i, heads in enumerate("qk"))
    slots = _slots(seed, num_tokens, 4 * block_size)

    q, k, v = qkv.view(num_tokens, -1, head_dim).tensor_split([num_q_heads, num_q_heads + num_kv_heads], dim=1)
    weights = [None if w is None else w.double() for w in (q_weight, k_weight)]
    exact = apply_rope_torch(q.double(), k.double(), positions, cos, sin, weights[0], weights[1], EPS)
    rotated = apply_rope(q, k, positions, cos, sin, q_weight, k_weight, EPS, settled=settled)
    for part, exact_part in zip(rotated, exact, strict=True):
        # Rotation sums two terms, each at most the length of the whole head.
        scale = exact_part.norm(dim=-1, keepdim=True).expand_as(exact_part)
        assert over_budget(part, exact_part, rounding_budget(exact_part, scale, dtype)) <= 1

    caches = torch.full((2, 4, num_kv_heads, block_size, head_dim), float("nan"), dtype=dtype)
    stored = rope_store_kv(qkv, positions, cos, sin, caches[0], caches[1], slots, q_weight, k_weight, EPS, settled=settled)
    assert torch.equal(stored, rotated[0])
    expected = torch.full_like(caches, float("nan"))
    store_kv_torch(rotated[1], v, expected[0], expected[1], slots)
    assert torch.equal(caches.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_the_twin_of_the_fused_write_fills_the_same_slots() -> None:
    head_dim, slots = 16, torch.tensor([3, -1, 6])
    qkv = _normal(0, 3, (5 + 4) * head_dim)
    angles = torch.rand(10, 8)
    ours = torch.full((2, 2, 2, 4, head_dim), float("nan"))
    twins = ours.clone()
    positions = torch.tensor([1, 2, 9])
    rope_store_kv(qkv, positions, angles.cos(), angles.sin(), ours[0], ours[1], slots)
    rope_store_kv_torch(qkv, positions, angles.cos(), angles.sin(), twins[0], twins[1], slots)
    assert torch.equal(ours.isnan(), twins.isnan())
    torch.testing.assert_close(ours, twins, rtol=8 * 2.0**-24, atol=8 * 2.0**-24, equal_nan=True)


def test_tables_wider_than_half_a_head_are_refused() -> None:
    q = torch.zeros(1, 1, 16)
    with pytest.raises(ValueError, match="head_dim=16"):
        apply_rope(q, q, torch.zeros(1).long(), torch.zeros(4, 9), torch.zeros(4, 9))


@given(num_seqs=st.sampled_from([0, 1, 5, 130]), block_size=st.sampled_from([1, 16, 48]), seed=SEEDS)
def test_inputs_of_a_decode_step_are_the_twins(num_seqs: int, block_size: int, seed: int) -> None:
    inputs = decode_inputs_problem(num_seqs=num_seqs, block_size=block_size, seed=seed)
    for ours, twins in zip(decode_inputs(*inputs), decode_inputs_torch(*inputs), strict=True):
        assert ours.dtype == twins.dtype == torch.int64
        assert torch.equal(ours, twins)


def test_kernels_of_several_threads_are_right() -> None:
    """Ranks may be threads: kernels of different grids, started together, time after time."""
    x, weight = _normal(0, 5, 64), _normal(1, 64)
    wrong: list[str] = []

    def run(kernel: Callable[[torch.Tensor], torch.Tensor], twin: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for num_rows in (1, 5, 2, 4, 3) * 3:
            try:
                if not torch.allclose(kernel(x[:num_rows]), twin(x[:num_rows]), rtol=1e-5, atol=1e-5):
                    wrong.append(f"{num_rows} rows: other values")
            except Exception as problem:
                wrong.append(repr(problem))

    norm, norm_twin = partial(rms_norm, weight=weight, eps=EPS), partial(rms_norm_torch, weight=weight, eps=EPS)
    pairs = [(silu_mul, silu_mul_torch), (norm, norm_twin)]
    threads = [threading.Thread(target=run, args=pair) for pair in pairs * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
