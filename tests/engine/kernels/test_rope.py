"""The plain-torch rotation against complex multiplication in float64."""

import pytest
import torch

from engine.kernels.rope import apply_rope_torch, rope_store_kv, rope_store_kv_torch
from tests.engine.kernels.problems import over_budget, rounding_budget

EPS = 1e-6


def _tables(half: int, *, max_positions: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(max_positions)[:, None] * 100.0 ** -(torch.arange(half) / half)
    return angles.cos(), angles.sin()


def _exact(
    x_TNH: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs ``(i, i + half)`` as complex numbers times ``cos + i sin``; and the magnitude summed."""
    x, half = x_TNH.double(), cos.shape[1]
    if weight is not None:
        x = x * (x.square().mean(dim=-1, keepdim=True) + EPS).rsqrt() * weight.double()
    pairs = torch.complex(x[..., :half], x[..., half : 2 * half])
    turned = pairs * torch.complex(cos.double(), sin.double())[positions][:, None]
    magnitude = pairs.abs()
    rest = x[..., 2 * half :]
    return torch.cat([turned.real, turned.imag, rest], -1), torch.cat([magnitude, magnitude, rest.abs()], -1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("half", [8, 3, 1])
@pytest.mark.parametrize("norm", [False, True])
def test_rotation_is_complex_multiplication(dtype: torch.dtype, half: int, norm: bool) -> None:
    generator = torch.Generator().manual_seed(half)
    q, k = torch.randn(2, 6, 3, 16, generator=generator).to(dtype)
    weights = torch.randn(2, 16, generator=generator).to(dtype) if norm else (None, None)
    positions = torch.tensor([0, 1, 39, 7, 7, 20])
    cos, sin = _tables(half)
    rotated = apply_rope_torch(q, k, positions, cos, sin, weights[0], weights[1], EPS)
    for x, weight, actual in zip((q, k), weights, rotated, strict=True):
        exact, scale = _exact(x, positions, cos, sin, weight)
        budget = rounding_budget(exact, scale, dtype)
        assert over_budget(actual, exact, budget) <= 1
        late, _ = _exact(x, (positions + 1) % 40, cos, sin, weight)
        assert over_budget(actual, late, budget) > 10, "a position that is off by one must show"


def test_the_fused_form_rotates_and_stores_what_the_separate_steps_do() -> None:
    generator = torch.Generator().manual_seed(0)
    num_q, num_kv, head_dim, block_size = 5, 2, 16, 4
    qkv = torch.randn(3, (num_q + 2 * num_kv) * head_dim, generator=generator)
    heads = qkv.view(3, -1, head_dim)
    k_cache, v_cache = torch.zeros(2, 4, num_kv, block_size, head_dim)
    positions, slots = torch.tensor([3, 9, 0]), torch.tensor([6, 15, -1])
    cos, sin = _tables(8)
    q_weight, k_weight = torch.randn(2, head_dim, generator=generator)
    q = rope_store_kv_torch(qkv, positions, cos, sin, k_cache, v_cache, slots, q_weight, k_weight, EPS)
    want_q, want_k = apply_rope_torch(
        heads[:, :num_q], heads[:, num_q : num_q + num_kv], positions, cos, sin, q_weight, k_weight, EPS
    )
    assert torch.equal(q, want_q)
    assert torch.equal(k_cache[1, :, 2], want_k[0])
    assert torch.equal(k_cache[3, :, 3], want_k[1])
    assert torch.equal(v_cache[1, :, 2], heads[0, num_q + num_kv :])
    assert (k_cache != 0).any(dim=3).sum() == (v_cache != 0).any(dim=3).sum() == 2 * num_kv


@pytest.mark.parametrize("fused", [rope_store_kv, rope_store_kv_torch])
def test_columns_that_fit_no_number_of_heads_are_refused(fused) -> None:  # type: ignore[no-untyped-def]
    k_cache, v_cache = torch.zeros(2, 4, 2, 4, 16)
    cos, sin = _tables(8)
    for columns in (4 * 16, 5 * 16 + 1):
        with pytest.raises(ValueError, match=f"qkv columns={columns}"):
            fused(torch.zeros(1, columns), torch.zeros(1).long(), cos, sin, k_cache, v_cache, torch.tensor([0]))
