"""Times every kernel on one GPU: ``python -m tests.benchmarks.kernels_gpu --out FILE.json [--sweep]``.

Each figure is from replays of one CUDA graph that holds several calls, on buffers that rotate through more memory
than the L2 cache holds. A few minutes at most; with ``--sweep`` also over tiles, warps, stages and splits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.kernels.gemv import gemv
from engine.kernels.paged_decode import paged_decode
from engine.kernels.paged_prefill import paged_prefill
from engine.kernels.philox import gumbel_argmax
from engine.kernels.rms_norm import add_rms_norm, rms_norm
from engine.kernels.rope import rope_store_kv
from engine.kernels.silu_mul import silu_mul
from tests.benchmarks.graph_timing import (
    BLOCK_SIZE,
    DECODE_MAX_CONTEXT,
    HEAD_DIM,
    Row,
    describe,
    normal,
    num_copies,
    paged,
    time_us,
)
from tests.benchmarks.kernel_chains import layer_rows

_MATMUL_CASES = [
    # name, output features, input features
    ("0.6B qkv", 4096, 1024),
    ("0.6B o", 1024, 2048),
    ("0.6B gate_up", 6144, 1024),
    ("0.6B down", 1024, 3072),
    ("0.6B lm_head", 151_936, 1024),
    ("8B qkv", 6144, 4096),
    ("8B o", 4096, 4096),
    ("8B gate_up", 24_576, 4096),
    ("8B down", 4096, 12_288),
]
_GEMV_CONFIGS = [
    # rows, parts, num_warps
    (2, 4, 4),
    (4, 1, 4),
    (4, 2, 4),
    (4, 4, 4),
    (8, 1, 4),
    (8, 2, 4),
    (8, 4, 1),
    (4, 4, 2),
    (4, 2, 8),
]
_DECODE_CASES = [
    # name, sequences, shortest and longest context (uniform between), query heads, KV heads
    ("1x1k-16/8", 1, 1024, 1024, 16, 8),
    ("8x1k-16/8", 8, 100, 2000, 16, 8),
    ("32xW1-16/8", 32, 100, 2000, 16, 8),
    ("64xW1-16/8", 64, 100, 2000, 16, 8),
    ("128xW1-16/8", 128, 100, 2000, 16, 8),
    ("192xW1-16/8", 192, 100, 2000, 16, 8),
    ("256xW1-16/8", 256, 100, 2000, 16, 8),
    ("128xW1-32/8", 128, 100, 2000, 32, 8),
    ("128xW1-8/4", 128, 100, 2000, 8, 4),
    ("8x8k-16/8", 8, 1600, 14_800, 16, 8),
    ("1x32k-16/8", 1, 32_768, 32_768, 16, 8),
]
_PREFILL_CASES = [
    # name, queries of each sequence, keys of each sequence
    ("1x256", [256], [256]),
    ("1x1024", [1024], [1024]),
    ("1x4096", [4096], [4096]),
    ("1x16384", [16384], [16384]),
    ("64x256", [256] * 64, [256] * 64),
    ("16x1024", [1024] * 16, [1024] * 16),
    ("4x4096", [4096] * 4, [4096] * 4),
    ("4x2048-after-6144", [2048] * 4, [8192] * 4),
    ("64-ragged", [100 + 29 * i for i in range(16)], [100 + 29 * i for i in range(16)]),
]
_PREFILL_HEADS = [(8, 4), (16, 8), (32, 8)]  # query heads, KV heads: 0.6B on two GPUs and one, 8B
_DECODE_CONFIGS = [
    # tile, num_warps, num_stages, programs_per_sm
    (64, 4, 2, 4),
    (64, 4, 2, 5),
    (64, 4, 3, 4),
    (128, 4, 2, 2),
    (128, 4, 2, 3),
]
# The block lookup and the keys behind it share Triton's stages: 3 and 4 give the same code, 5 looks further ahead.
_GUMBEL_CONFIGS = [
    # counters (a quarter of a program's columns), num_warps
    (256, 2),
    (512, 2),
    (1024, 4),
    (1024, 8),
    (2048, 8),
]
_PREFILL_CONFIGS = [
    # tile_q, tile, num_warps, num_stages
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 64, 8, 5),
    (128, 128, 8, 2),
    (128, 128, 8, 3),
    (128, 64, 4, 2),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 64, 4, 5),
    (64, 128, 4, 2),
]


def matmul_rows(*, sweep: bool) -> Iterator[Row]:
    for name, num_outputs, num_inputs in _MATMUL_CASES:
        moved = 2.0 * num_outputs * num_inputs
        weights = [normal(num_outputs, num_inputs) for _ in range(num_copies(moved))]
        for num_rows in (1, 8, 64, 256):
            x = normal(num_rows, num_inputs)
            row = partial(Row, case=f"{num_rows} x {name}", bytes_moved=moved, flop=moved * num_rows)
            us = time_us([partial(F.linear, x, weight) for weight in weights])
            yield row(kernel="torch linear", config="default", us=us)
            if num_rows > 1:
                continue
            ours = [partial(gemv, x, weight, settled=True) for weight in weights]
            yield row(kernel="gemv", config="default", us=time_us(ours))
            alone = [partial(call, overlap=False) for call in ours]
            yield row(kernel="gemv", config="default, not launched early", us=time_us(alone))
            if sweep:
                for rows, parts, warps in _GEMV_CONFIGS:
                    options = {"rows": rows, "parts": parts, "num_warps": warps}
                    us = time_us([partial(call, **options) for call in ours], rounds=3)
                    yield row(kernel="gemv", config=describe(options), us=us)


def decode_rows(*, sweep: bool) -> Iterator[Row]:
    for case, num_seqs, shortest, longest, num_q_heads, num_kv_heads in _DECODE_CASES:
        generator = torch.Generator().manual_seed(0)
        contexts = torch.randint(shortest, longest + 1, (num_seqs,), generator=generator).tolist()
        bytes_moved = sum(contexts) * num_kv_heads * HEAD_DIM * 2 * 2 + num_seqs * num_q_heads * HEAD_DIM * 4
        group = num_q_heads // num_kv_heads
        starts = torch.arange(0, num_q_heads, group, dtype=torch.int32, device="cuda")
        counts = torch.full_like(starts, group)
        lengths = torch.tensor(contexts, dtype=torch.int32, device="cuda")
        flop = 4.0 * sum(contexts) * num_q_heads * HEAD_DIM
        row_of = partial(Row, kernel="paged_decode", case=case, bytes_moved=bytes_moved, flop=flop)
        max_context = max(DECODE_MAX_CONTEXT, -(-max(contexts) // BLOCK_SIZE) * BLOCK_SIZE)
        bounds = {"max_group": group, "max_context": max_context}
        calls = []
        for _ in range(num_copies(bytes_moved)):
            inputs = (normal(num_seqs, num_q_heads, HEAD_DIM), *paged(contexts, num_kv_heads), lengths, starts, counts)
            calls.append(partial(paged_decode, *inputs, HEAD_DIM**-0.5, **bounds))
        yield row_of(config="default", us=time_us(calls))
        alone = [partial(call, overlap=False) for call in calls]
        yield row_of(config="default, not launched early", us=time_us(alone))
        if sweep:
            for tile, warps, stages, per_sm in _DECODE_CONFIGS:
                options = {"tile": tile, "num_warps": warps, "num_stages": stages, "programs_per_sm": per_sm}
                us = time_us([partial(call, **options) for call in alone], rounds=3)
                yield row_of(config=describe(options), us=us)



def prefill_rows(*, sweep: bool) -> Iterator[Row]:
    for (num_q_heads, num_kv_heads), (name, queries, contexts) in itertools.product(_PREFILL_HEADS, _PREFILL_CASES):
        case = f"{name}-{num_q_heads}/{num_kv_heads}"
        kv_of_q = torch.arange(num_q_heads, dtype=torch.int32, device="cuda") // (num_q_heads // num_kv_heads)
        starts = torch.tensor([0, *queries]).cumsum(0).int().cuda()
        lengths = torch.tensor(contexts, dtype=torch.int32, device="cuda")
        # A view into rows of queries, keys and values, as in the engine.
        q = normal(sum(queries), num_q_heads + 2 * num_kv_heads, HEAD_DIM)[:, :num_q_heads]
        caches = paged(contexts, num_kv_heads)
        pairs = sum(n * (length - n) + n * (n + 1) / 2 for n, length in zip(queries, contexts, strict=True))
        flop = 4.0 * pairs * num_q_heads * HEAD_DIM
        bytes_moved = (2 * q.numel() + 2 * sum(contexts) * num_kv_heads * HEAD_DIM) * 2.0
        call = partial(paged_prefill, q, *caches, starts, lengths, kv_of_q, HEAD_DIM**-0.5)
        row = partial(Row, kernel="paged_prefill", case=case, bytes_moved=bytes_moved, flop=flop)
        yield row(config="default", us=time_us([call], min_calls=4))
        if len(set(queries)) == 1 and queries == contexts:
            # The flash kernel that ships with torch, on the same problem without paging.
            shape = (len(queries), num_q_heads, queries[0], HEAD_DIM)
            q, k, v = normal(*shape), normal(*shape), normal(*shape)
            flash = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                us = time_us([flash], min_calls=4)
            yield row(config="torch flash, not paged", us=us)
        if sweep:
            for tile_q, tile, warps, stages in _PREFILL_CONFIGS:
                options = {"tile_q": tile_q, "tile": tile, "num_warps": warps, "num_stages": stages}
                us = time_us([partial(call, **options)], min_calls=4, rounds=3)
                yield row(config=describe(options), us=us)


def elementwise_rows(*, sweep: bool) -> Iterator[Row]:
    size = 2
    for tokens, dim in ((1, 1024), (256, 1024), (256, 4096), (16384, 4096)):
        weight = normal(dim)
        moved = 2.0 * tokens * dim * size
        xs = [normal(2, tokens, dim) for _ in range(num_copies(2 * moved))]
        us = time_us([partial(rms_norm, x[0], weight, 1e-6) for x in xs])
        yield Row(kernel="rms_norm", case=f"{tokens}x{dim}", config="default", us=us, bytes_moved=moved)
        us = time_us([partial(add_rms_norm, x[0], x[1], weight, 1e-6) for x in xs])
        yield Row(kernel="add_rms_norm", case=f"{tokens}x{dim}", config="default", us=us, bytes_moved=2 * moved)
    for tokens, intermediate in ((1, 3072), (256, 3072), (256, 12288), (16384, 12288)):
        moved = 3.0 * tokens * intermediate * size
        xs = [normal(tokens, 2 * intermediate) for _ in range(num_copies(moved))]
        us = time_us([partial(silu_mul, x) for x in xs])
        yield Row(kernel="silu_mul", case=f"{tokens}x{intermediate}", config="default", us=us, bytes_moved=moved)
    angles = torch.rand(4096, HEAD_DIM // 2, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    for tokens, num_q, num_kv in ((1, 16, 8), (256, 16, 8), (256, 32, 8), (16384, 16, 8)):
        moved = 2.0 * tokens * (num_q + 2 * num_kv) * HEAD_DIM * size
        num_blocks = -(-tokens // BLOCK_SIZE) + 1
        positions = torch.randint(0, 4096, (tokens,), device="cuda")
        slots = torch.randperm(num_blocks * BLOCK_SIZE, device="cuda")[:tokens]
        weight = normal(HEAD_DIM)
        cache_shape = (num_blocks, num_kv, BLOCK_SIZE, HEAD_DIM)
        buffers = [
            (normal(tokens, (num_q + 2 * num_kv) * HEAD_DIM), normal(*cache_shape), normal(*cache_shape))
            for _ in range(num_copies(moved))
        ]
        calls = [
            partial(rope_store_kv, qkv, positions, cos, sin, k_cache, v_cache, slots, weight, weight)
            for qkv, k_cache, v_cache in buffers
        ]
        case = f"{tokens} tokens {num_q}/{num_kv}"
        yield Row(kernel="rope_store_kv", case=case, config="default", us=time_us(calls), bytes_moved=moved)
    for rows, vocab in ((1, 151_936), (256, 151_936), (256, 75_968)):
        moved = float(rows * vocab * size)
        logits = [normal(rows, vocab) for _ in range(num_copies(moved))]
        ids = torch.arange(rows, device="cuda")
        for temperature in (0.0, 0.6):
            heat = torch.full((rows,), temperature, device="cuda")
            us = time_us([partial(gumbel_argmax, each, heat, ids, ids) for each in logits])
            row = partial(Row, kernel="gumbel_argmax", case=f"{rows}x{vocab} T={temperature}", bytes_moved=moved)
            yield row(config="default", us=us)
            for counters, warps in _GUMBEL_CONFIGS if sweep else ():
                options: dict[str, Any] = {"counters": counters, "num_warps": warps}
                us = time_us([partial(gumbel_argmax, each, heat, ids, ids, **options) for each in logits], rounds=3)
                yield row(config=describe(options), us=us)


def copy_rows() -> Iterator[Row]:
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    us = time_us([partial(target.copy_, source)], min_calls=4)
    yield Row(kernel="device copy", case="1 GiB", config="read + write", us=us, bytes_moved=2.0 * 2**30)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where to write the rows, as JSON")
    parser.add_argument("--sweep", action="store_true", help="also time many launch configurations")
    parser.add_argument("--only", default="", help="comma-separated: copy,layer,matmul,decode,prefill,elementwise")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("no CUDA device: kernels cannot be timed here\n")
        return 3
    parts: dict[str, Callable[[], Iterable[Row]]] = {
        "copy": copy_rows,
        "layer": layer_rows,
        "matmul": partial(matmul_rows, sweep=options.sweep),
        "decode": partial(decode_rows, sweep=options.sweep),
        "prefill": partial(prefill_rows, sweep=options.sweep),
        "elementwise": partial(elementwise_rows, sweep=options.sweep),
    }
    wanted = options.only.split(",") if options.only else list(parts)
    if unknown := set(wanted) - set(parts):
        parser.error(f"--only={options.only}: {sorted(unknown)} are not among {sorted(parts)}")
    torch.manual_seed(0)
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        for row in parts[name]():
            figures = row.as_dict()
            rows.append(figures)
            sys.stdout.write(
                f"{figures['kernel']:14} {figures['case']:20} {figures['config']:60} {figures['us']:10.2f} us "
                f"{figures['tb_per_s']:7.3f} TB/s {figures['percent_of_copy']:6.1f} % "
                f"{figures['tflop_per_s']:7.1f} TFLOP/s\n"
            )
            sys.stdout.flush()
        # After each part, so that a run cut short still leaves what it measured.
        record = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "seconds": round(time.perf_counter() - began, 1),
            "rows": rows,
        }
        options.out.write_text(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
