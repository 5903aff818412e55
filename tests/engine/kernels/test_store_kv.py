"""The plain-torch cache write: movement, hence bit-exact."""

import subprocess
import sys

import pytest
import torch

from engine.kernels.store_kv import check_caches, store_kv, store_kv_torch


@pytest.mark.parametrize("block_size", [1, 4, 48])
def test_each_token_lands_in_its_slot_and_nowhere_else(block_size: int) -> None:
    num_blocks, num_heads, head_dim = 96 // block_size, 3, 8
    slots = torch.tensor([5, -1, 0, 95, 47])
    k, v = torch.randn(2, 5, num_heads, head_dim, dtype=torch.float64)
    k_cache, v_cache = torch.zeros(2, num_blocks, num_heads, block_size, head_dim, dtype=torch.float64)
    store_kv_torch(k, v, k_cache, v_cache, slots)
    for given, cache in ((k, k_cache), (v, v_cache)):
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                assert torch.equal(cache[slot // block_size, :, slot % block_size], given[token])
        assert (cache != 0).any(dim=3).sum() == 4 * num_heads


def test_a_step_of_padding_alone_leaves_the_cache_alone() -> None:
    k_cache, v_cache = torch.zeros(2, 2, 1, 4, 8)
    store_kv_torch(torch.ones(2, 1, 8), torch.ones(2, 1, 8), k_cache, v_cache, torch.tensor([-1, -1]))
    assert not k_cache.any()
    assert not v_cache.any()


def test_float64_is_refused_by_the_kernel_with_the_twin_named() -> None:
    cache = torch.zeros(2, 1, 4, 8, dtype=torch.float64)
    kv = torch.ones(2, 1, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="_torch"):
        store_kv(kv, kv, cache, cache.clone(), torch.tensor([0, 1]))


def test_caches_laid_out_differently_are_refused() -> None:
    cache = torch.zeros(2, 2, 4, 8)
    with pytest.raises(ValueError, match="allocate both alike"):
        check_caches(cache, torch.zeros(2, 4, 2, 8).transpose(1, 2))


_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch
import engine.kernels.paged_decode, engine.kernels.paged_prefill, engine.kernels.philox, engine.kernels.rope
import engine.kernels.rms_norm, engine.kernels.silu_mul
from engine.kernels.store_kv import store_kv, store_kv_torch
kv, k_cache, v_cache = torch.ones(1, 1, 8), *torch.zeros(2, 2, 1, 4, 8)
store_kv_torch(kv, kv, k_cache, v_cache, torch.tensor([3]))
assert k_cache[0, 0, 3].all() and v_cache[0, 0, 3].all()
try:
    store_kv(kv, kv, k_cache, v_cache, torch.tensor([3]))
except RuntimeError as error:
    print(error)
"""


def test_without_triton_twins_work_and_a_launch_says_what_to_call() -> None:
    done = subprocess.run([sys.executable, "-c", _WITHOUT_TRITON], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "_store_kv_kernel needs Triton" in done.stdout
    assert "plain-torch twin" in done.stdout
