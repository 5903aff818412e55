"""Launching a kernel before the one ahead of it is done: *programmatic dependent launch* of NVIDIA's Hopper and later.

A decode step is a chain of kernels of a few microseconds each, and about one of these is the launch itself. Launched early,
a kernel is ready on its multiprocessors when its inputs are (CUDA C++ Programming Guide, "Programmatic Dependent Launch and
Synchronization"); CUDA graphs record such launches as they are.

The rules, for a kernel that gets :func:`early_launch`:

* Every program calls :func:`wait_for_inputs`, whatever it does after. What waits for this kernel then also waits for those
  ahead of it, however long the chain is.
* Before that line it touches nothing that a kernel ahead may write: what it reads there must have been written before the
  launch ahead of it.
"""

from functools import cache
from typing import Any

import torch

from engine.kernels.common import tl, triton

LINE_BYTES = 128
"""What the L2 cache fetches at a time."""


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Let the next kernel be launched, then wait until all kernels ahead are done and what they wrote can be read."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def fetch_lines(rows_at, keep_rows, num_columns, LINES: tl.constexpr, LINE: tl.constexpr):
    """Ask for LINES lines of each row, ``rows_at`` ``[rows, 1]``, without waiting for them."""
    cols = (tl.arange(0, LINES) * LINE)[None, :]
    at = rows_at + cols
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred go;
            setp.ne.s32 go, $2, 0;
            @go prefetch.global.L2 [$1];
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r", [at, (keep_rows & (cols < num_columns)).to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def may_overlap(x: torch.Tensor, overlap: bool | None = None) -> bool:
    """``overlap`` itself, or where it is None whether kernels on ``x``'s device can be launched early."""
    return x.is_cuda and _device_can(x.device) if overlap is None else overlap


@cache
def _device_can(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


def early_launch(overlap: bool) -> dict[str, Any]:
    """Launch options of a kernel that keeps the rules above."""
    return {"launch_pdl": True} if overlap else {}
