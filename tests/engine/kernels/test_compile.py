"""Every kernel compiles for Hopper, without a GPU: the interpreter runs what a compiler refuses.

Triton ships the assembler too, so a kernel that asks for more registers or shared memory than exist shows here.
"""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from engine.kernels import (
    decode_inputs,
    gemv,
    invariant_attention_gpu,
    invariant_matmul_gpu,
    invariant_row_gpu,
    log_softmax,
    matmul_few_rows,
    paged_decode,
    paged_prefill,
    peer_all_reduce,
    philox,
    quanta,
    rms_norm,
    rope,
    silu_mul,
    store_kv,
)
from engine.kernels.common import HAVE_TRITON, tl, triton
from engine.kernels.overlap import early_launch, wait_for_inputs
from tests.engine.kernels.peers import shared_memory

if not HAVE_TRITON:
    pytest.skip("Triton cannot be imported here, hence nothing compiled", allow_module_level=True)

_MODULES = (
    decode_inputs, gemv, invariant_attention_gpu, invariant_matmul_gpu, invariant_row_gpu, log_softmax, matmul_few_rows,
    paged_decode, paged_prefill, peer_all_reduce, philox, quanta, rms_norm, rope, silu_mul, store_kv,
)  # fmt: skip
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
    for module in _MODULES:
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
    [(torch.bfloat16, 128, 256), pytest.param(torch.float16, 40, 48, marks=pytest.mark.endurance),
     pytest.param(torch.bfloat16, 256, 16, marks=pytest.mark.endurance),
     pytest.param(torch.float32, 64, 16, marks=pytest.mark.endurance)],
)
def test_attention_compiles(compiled: list[Any], dtype: torch.dtype, head_dim: int, block_size: int) -> None:
    q = torch.zeros(4, 6, head_dim, dtype=dtype)
    k_cache, v_cache = torch.zeros(2, 3, 2, block_size, head_dim, dtype=dtype)
    table, ints = torch.zeros(4, 8, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    paged_decode.paged_decode(q, k_cache, v_cache, table, ints[:4], ints[:2], ints[:2], 0.1)
    paged_prefill.paged_prefill(q, k_cache, v_cache, table, ints[:5], ints[:4], ints, 0.1)
    _check(compiled, 3)
    decode, _, prefill = compiled
    if head_dim == 128:
        assert "mma.sync" in decode.asm["ptx"], "decode should use the tensor cores"
        assert "wgmma" in prefill.asm["ptx"], "prefill should use Hopper's tensor core instructions"
        for kernel in (decode, prefill):
            assert "cp.async" in kernel.asm["ptx"], "keys should be copied ahead of their use"


def _launch_invariant(num_rows: int) -> int:
    """The products of TP invariance. Returns how many kernels there are."""
    weight, bias = torch.nn.Parameter(torch.zeros(96, 256, dtype=torch.bfloat16)), torch.zeros(96, dtype=torch.bfloat16)
    x, units = torch.zeros(num_rows, 256, dtype=torch.bfloat16), torch.zeros(96, dtype=torch.int32)
    invariant_matmul_gpu.linear_in_order(x, weight)
    peaks, sums = quanta.row_peaks(x), torch.zeros(num_rows, 96, dtype=torch.int32)
    invariant_matmul_gpu.linear_in_leaves(x, weight, peaks, units, None, leaf=128)
    invariant_matmul_gpu.add_leaves(x, weight, peaks, units, sums, leaf=128, shares=2)
    quanta.value_of_sums(sums, peaks, units, bias, x.dtype)
    cut = invariant_row_gpu.leaves_cut_of(num_rows, 96, 256, 128)
    if cut is not None:
        for given in (None, peaks):
            invariant_row_gpu.sums_of_row(x, weight, units, cut, leaf=128, peak_T=given)
    return 5 if cut is None else 7


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [1, pytest.param(1024, marks=pytest.mark.endurance)])
def test_invariant_products_compile_and_wait_for_their_inputs(compiled: list[Any], monkeypatch: pytest.MonkeyPatch,
                                                              num_rows: int) -> None:
    for module in (invariant_matmul_gpu, invariant_row_gpu, quanta):
        monkeypatch.setattr(module, "may_overlap", lambda x: True)
    _check(compiled, _launch_invariant(num_rows))
    for kernel in compiled:
        assert kernel.metadata.launch_pdl, f"{kernel.name} is launched in turn"
        _assert_waits_first(kernel.name, kernel.asm["ptx"])


@pytest.mark.slow
def test_invariant_attention_has_no_fused_sums_and_products_and_waits(compiled: list[Any],
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and decode steps must round alike."""
    monkeypatch.setattr(invariant_attention_gpu, "may_overlap", lambda x: True)
    q = torch.zeros(4, 6, 128, dtype=torch.bfloat16)
    caches, table = torch.zeros(2, 3, 2, 256, 128, dtype=torch.bfloat16), torch.zeros(4, 8, dtype=torch.int32)
    ints = torch.zeros(6, dtype=torch.int32)
    invariant_attention_gpu.prefill_in_order(q, *caches, table, ints[:5], ints[:4], ints, 0.1, out_TQH=q)
    for programs in (1, 2):
        invariant_attention_gpu.decode_in_order(q, *caches, table, ints[:4], ints[:2], ints[:2], 0.1, out_SQH=q,
                                                max_context=512, max_group=3, programs=programs)
    log_softmax.log_softmax(torch.zeros(2, 5000))
    _check(compiled, 5)
    for kernel in compiled[:4]:
        assert not re.search(r"\bfma\.rn", kernel.asm["ptx"]), f"{kernel.name} has fused sums and products"
    for kernel in compiled[1:4]:
        _assert_waits_first(kernel.name, kernel.asm["ptx"])
    assert "wgmma" in compiled[0].asm["ptx"], "prompts should use Hopper's instruction"


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.endurance)])
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gemv_compiles(compiled: list[Any], dtype: torch.dtype) -> None:
    weight = torch.zeros(4096, 4096, dtype=dtype)
    for num_inputs in (1024, 4096):
        gemv.gemv(weight[:1, :num_inputs], weight[:, :num_inputs].contiguous(), weight[0])
    _check(compiled, 2)
    assert all("ld.global.v4" in kernel.asm["ptx"] for kernel in compiled), "weights should be read in the widest loads"


@pytest.mark.parametrize(("num_rows", "num_outputs"), [(16, 2048), (60, 1024)])
def test_matmul_of_few_rows_compiles(compiled: list[Any], num_rows: int, num_outputs: int) -> None:
    weight = torch.zeros(num_outputs, 1024, dtype=torch.bfloat16)
    tiles = matmul_few_rows.tiles_for(num_rows, *weight.shape)
    assert tiles is not None
    matmul_few_rows.matmul_few_rows(weight[:num_rows], weight, tiles=tiles, settled=True, overlap=True)
    _check(compiled, 1)
    ptx = compiled[0].asm["ptx"]
    assert "mma" in ptx, "it should use the tensor cores"
    assert "cp.async" in ptx, "weights should be copied ahead of their use"
    before, _ = ptx.split("griddepcontrol.wait")
    assert "prefetch.global.L2" in before, "settled weights should be asked for before the inputs are there"


def _launch_all(overlap: bool) -> int:
    """Launch every kernel of a decode step. Returns how many there are."""
    x, ids = torch.zeros(4, 1024, dtype=torch.bfloat16), torch.zeros(4).long()
    k_cache, v_cache = torch.zeros(2, 3, 2, 16, 128, dtype=torch.bfloat16)
    angles, ints = torch.zeros(9, 64), torch.zeros(4, dtype=torch.int32)
    for settled in (False, True):
        rms_norm.rms_norm(x, x[0], 1e-6, settled=settled, overlap=overlap)
        rms_norm.add_rms_norm(x, x, x[0], 1e-6, settled=settled, overlap=overlap)
        rope.rope_store_kv(x, ids, angles, angles, k_cache, v_cache, ids, angles[0], settled=settled, overlap=overlap)
        gemv.gemv(x[:1], x, settled=settled, overlap=overlap)
        matmul_few_rows.matmul_few_rows(x, x, tiles=matmul_few_rows.Tiles(16, 16, 64), settled=settled, overlap=overlap)
    half = gemv.gemv_add_norm(x[:1], x, x[:1, :4], x[0, :4], 1e-6, settled=True, overlap=overlap)[0]
    gemv.gemv(half, x[:, :4], gated=True, settled=True, overlap=overlap)
    matmul_few_rows.matmul_few_rows(x, x, tiles=matmul_few_rows.Tiles(16, 16, 64), gated=True, settled=True, overlap=overlap)
    silu_mul.silu_mul(x, overlap=overlap)
    q, table = x.view(4, 8, 128)[:, :4], torch.zeros(4, 8, dtype=torch.int32)
    for num_programs in (None, 2):  # more than there are sequences, and fewer: they are combined by another rule
        paged_decode.paged_decode(q, k_cache, v_cache, table, ints, ints[:2], ints[:2], 0.1, num_programs=num_programs,
                                  overlap=overlap)  # fmt: skip
    philox.gumbel_argmax(x, torch.ones(4), ids, ids, overlap=overlap)
    decode_inputs.decode_inputs(ids, ids, ints, table, ids, 16, overlap=overlap)
    return 21 + _launch_peers(x, overlap)


def _launch_few(overlap: bool) -> int:
    """One kernel of each way to be launched: by rows, by tiles of a product, on memory that ranks share."""
    x = torch.zeros(4, 1024, dtype=torch.bfloat16)
    memory = shared_memory(2, half_bytes=8 * x.numel() * x.element_size())[1]
    rms_norm.add_rms_norm(x, x, x[0], 1e-6, settled=True, overlap=overlap)
    matmul_few_rows.matmul_few_rows(x, x, tiles=matmul_few_rows.Tiles(16, 16, 64), settled=True, overlap=overlap)
    peer_all_reduce.peer_add_rms_norm(x, x, x[0], 1e-6, memory, settled=True, overlap=overlap)
    return 3


def _launch_peers(x: torch.Tensor, overlap: bool) -> int:
    """The kernels on memory that ranks share, as one of two. Returns how many there are."""
    rows, ids = x.repeat(8, 1), torch.zeros(4).long()
    memory = shared_memory(2, half_bytes=rows.numel() * rows.element_size())[1]
    for two_shot in (False, True):
        peer_all_reduce.peer_all_reduce(x, memory, peer_all_reduce.Way(two_shot=two_shot), overlap=overlap)
    for settled in (False, True):
        peer_all_reduce.peer_add_rms_norm(x, x, x[0], 1e-6, memory, settled=settled, overlap=overlap)
    # One program for all of it takes tile after tile.
    peer_all_reduce.peer_add_rms_norm(rows, rows, x[0], 1e-6, memory, num_programs=1, settled=True, overlap=overlap)
    # What is where the others read it already is not copied.
    peer_all_reduce.peer_add_rms_norm_into(x, x, x, x, x[0], 1e-6, memory, settled=True, overlap=overlap, parts=(x, x))
    peer_all_reduce.peer_argmax(ids.float(), ids, memory, overlap=overlap)
    for largest in (False, True):
        peer_all_reduce.peer_all_reduce(x.int(), memory, peer_all_reduce.Way(two_shot=False), largest=largest, overlap=overlap)
    return 9


@pytest.mark.parametrize("dtype", [
    torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.endurance) for dtype in (torch.float16, torch.float32))])
def test_kernels_on_shared_memory_release_what_they_wrote_and_acquire_what_they_read(compiled: list[Any],
                                                                                     dtype: torch.dtype) -> None:
    """Each flag by one release and one acquire at system scope; behind and ahead of a barrier of the whole program."""
    _check(compiled, _launch_peers(torch.zeros(4, 1024, dtype=dtype), overlap=True))
    for kernel in compiled:
        order = re.findall(r"bar\.sync|st\.release\.sys\.global|ld\.acquire\.sys\.global", kernel.asm["ptx"])
        meeting = ["bar.sync", "st.release.sys.global", "ld.acquire.sys.global", "bar.sync"]
        num_meetings = 2 if "two_shot" in kernel.name else 1
        assert [word for word in order if word != "bar.sync"] == meeting[1:3] * num_meetings
        for number, word in enumerate(order):
            if word == "st.release.sys.global":
                assert order[number - 1 : number + 3] == meeting, kernel.name
        if "argmax" not in kernel.name:
            assert "ld.global.v4" in kernel.asm["ptx"], f"{kernel.name} should read 16 bytes at a time"


def test_no_number_of_rows_compiles_kernels_on_shared_memory_anew(compiled: list[Any]) -> None:
    x, ids = torch.zeros(48, 64, dtype=torch.bfloat16), torch.zeros(48).long()
    memory = shared_memory(2, half_bytes=x.numel() * x.element_size())[1]
    for num_rows in (48, 47, 1):
        peer_all_reduce.peer_add_rms_norm(x[:num_rows], x[:num_rows], x[0], 1e-6, memory, overlap=True)
        peer_all_reduce.peer_argmax(ids[:num_rows].float(), ids[:num_rows], memory, overlap=True)
    _check(compiled, 6)
    assert len({kernel.hash for kernel in compiled}) == 2


def _assert_waits_first(name: str, ptx: str) -> None:
    lines = ptx.splitlines()
    waits = [number for number, line in enumerate(lines) if "griddepcontrol.wait" in line]
    writes = [number for number, line in enumerate(lines) if re.search(r"\b(st|atom|red)\.global", line)]
    assert len(waits) == 1, f"{name} waits {len(waits)} times"
    assert waits[0] < min(writes), f"{name} writes before it waits"
    # A branch around the wait would let a program end, and what comes next begin, before its turn.
    assert not any(re.search(r"\b(bra|ret)\b", line) for line in lines[: waits[0]]), f"{name} may miss its wait"


def test_kernels_that_are_launched_early_wait_for_their_inputs(compiled: list[Any]) -> None:
    _check(compiled, _launch_all(overlap=True))
    for kernel in compiled:
        assert kernel.metadata.launch_pdl, f"{kernel.name} is launched in turn"
        _assert_waits_first(kernel.name, kernel.asm["ptx"])


@triton.jit  # type: ignore[untyped-decorator]
def _hasty(out, FAULT: tl.constexpr):  # type: ignore[no-untyped-def]
    if FAULT == "writes":
        tl.store(out, 1)
    if FAULT == "leaves" and tl.program_id(0) > 3:
        return
    if FAULT != "forgets":
        wait_for_inputs(True)
    tl.store(out + 1, 1)


@pytest.mark.parametrize(
    ("fault", "message"), [("writes", "writes before it waits"), ("leaves", "may miss its wait"), ("forgets", "waits 0 times")]
)
def test_a_kernel_that_does_not_wait_is_seen(compiled: list[Any], fault: str, message: str) -> None:
    _CompileOnly(_hasty, compiled)[(8,)](torch.zeros(2, dtype=torch.int32), fault, **early_launch(True))
    with pytest.raises(AssertionError, match=message):
        _assert_waits_first("_hasty", compiled[0].asm["ptx"])


@pytest.mark.parametrize("launch", [_launch_few, pytest.param(_launch_all, marks=pytest.mark.endurance)])
def test_kernels_that_are_launched_in_turn_do_not_wait(compiled: list[Any], launch: Callable[[bool], int]) -> None:
    _check(compiled, launch(False))
    for kernel in compiled:
        assert not kernel.metadata.launch_pdl
        assert "griddepcontrol" not in kernel.asm["ptx"]


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
