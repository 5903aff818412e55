"""Every kernel compiles for Hopper, without a GPU: the interpreter runs what a compiler refuses.

Triton ships the assembler too, so a kernel that asks for more registers or shared memory than exist shows here.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from engine.kernels import paged_decode, paged_prefill, philox, rms_norm, rope, silu_mul, store_kv
from engine.kernels.common import HAVE_TRITON

if not HAVE_TRITON:
    pytest.skip("Triton cannot be imported here, hence nothing compiled", allow_module_level=True)

_SHARED_MEMORY_BYTES = 227 * 1024  # of one block on compute capability 9.0


class _HopperWithoutGPU:
    """What Triton asks its driver on the way to a compiled kernel."""

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class _CompileOnly:
    """Stands for a kernel: a launch compiles it for its arguments and keeps the result."""

    def __init__(self, kernel: Any, compiled: list[Any]) -> None:
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.compiled.append(self.kernel.warmup(*args, grid=grid, **options))

        return launch


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[list[Any]]:
    """The kernels that a test compiled; none of them runs."""
    results: list[Any] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # silences triton 3.9's note that a default will change
    for module in (paged_decode, paged_prefill, philox, rms_norm, rope, silu_mul, store_kv):
        for name, kernel in vars(module).copy().items():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, _CompileOnly(kernel, results))
    driver = importlib.import_module("triton.runtime").driver
    before = driver._active
    driver.set_active(_HopperWithoutGPU())
    try:
        yield results
    finally:
        driver._active = before


def _check(compiled: list[Any], count: int) -> None:
    assert len(compiled) == count
    for kernel in compiled:
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= _SHARED_MEMORY_BYTES, f"{kernel.name} does not fit a multiprocessor"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_size"),
    [(torch.bfloat16, 128, 256), (torch.float16, 40, 48), (torch.bfloat16, 256, 16), (torch.float32, 64, 16)],
)
def test_attention_compiles(compiled: list[Any], dtype: torch.dtype, head_dim: int, block_size: int) -> None:
    q = torch.zeros(4, 6, head_dim, dtype=dtype)
    k_cache, v_cache = torch.zeros(2, 3, 2, block_size, head_dim, dtype=dtype)
    table, ints = torch.zeros(4, 8, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    for num_splits in (1, 8):
        paged_decode.paged_decode(q, k_cache, v_cache, table, ints[:4], ints[:2], ints[:2], 0.1, num_splits=num_splits)
    paged_prefill.paged_prefill(q, k_cache, v_cache, table, ints[:5], ints[:4], ints, 0.1)
    _check(compiled, 4)
    if head_dim == 128:
        assert "mma.sync" in compiled[0].asm["ptx"], "decode should use the tensor cores"
        assert "wgmma" in compiled[3].asm["ptx"], "prefill should use Hopper's tensor core instructions"
        for kernel in (compiled[0], compiled[3]):
            assert "cp.async" in kernel.asm["ptx"], "keys should be copied ahead of their use"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_elementwise_kernels_compile(compiled: list[Any], dtype: torch.dtype) -> None:
    x, weight, ids = torch.zeros(4, 1024, dtype=dtype), torch.zeros(1024, dtype=dtype), torch.zeros(4).long()
    rms_norm.rms_norm(x, weight, 1e-6)
    rms_norm.add_rms_norm(x, x, weight, 1e-6)
    silu_mul.silu_mul(x)
    k_cache, v_cache = torch.zeros(2, 3, 2, 16, 128, dtype=dtype)
    store_kv.store_kv(x.view(4, 8, 128)[:, 2:4], x.view(4, 8, 128)[:, 4:6], k_cache, v_cache, ids)
    for half, norm in ((64, weight[:128]), (10, None)):
        table = torch.zeros(9, half)
        rope.rope_store_kv(x, ids, table, table, k_cache, v_cache, ids, norm, norm)
        rope.apply_rope(x.view(4, 8, 128), x.view(4, 8, 128), ids, table, table, norm, norm)
    philox.gumbel_argmax(x, torch.ones(4), ids, ids)
    philox.philox_uniform_triton(ids, ids, 100)
    _check(compiled, 11)


def test_a_kernel_that_asks_for_too_much_shared_memory_is_seen(compiled: list[Any]) -> None:
    q = torch.zeros(4, 2, 256, dtype=torch.bfloat16)
    k_cache, v_cache = torch.zeros(2, 3, 2, 256, 256, dtype=torch.bfloat16)
    table, ints = torch.zeros(4, 8, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    paged_prefill.paged_prefill(q, k_cache, v_cache, table, ints, ints[:4], ints[:2], 0.1, tile_q=128, tile=128, num_warps=8)
    with pytest.raises(AssertionError, match="does not fit"):
        _check(compiled, 1)


def test_threads_that_come_to_a_new_kernel_together_compile_it_once(compiled: list[Any]) -> None:
    """What is compiled anew is another object."""
    together = threading.Barrier(4)

    def launch() -> None:
        together.wait(30)
        silu_mul.silu_mul(torch.zeros(4, 106))

    threads = [threading.Thread(target=launch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 4
    assert len({id(kernel) for kernel in compiled}) == 1
