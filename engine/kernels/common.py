"""What all kernels share: Triton where it exists, a clear refusal where not, the twins' arithmetic."""

import functools
import os
import threading
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton as _triton
    import triton.language as tl

    HAVE_TRITON = True
    # The interpreter keeps which program runs, and what it puts in place of Triton's functions, for the whole process.
    _interpreting = threading.Lock() if os.environ.get("TRITON_INTERPRET") == "1" else None

    def _jit(fn: Any = None, **options: Any) -> Any:
        """``triton.jit``, but threads that come to a kernel together launch it one after the other.

        Ranks may be threads. Each would compile a new kernel for itself, and eight compilations take eight times as long as one.
        The interpreter runs one kernel at a time, whichever it is.
        """
        if fn is None:
            return functools.partial(_jit, **options)
        kernel = _triton.jit(fn, **options)
        launch, lock = kernel.run, _interpreting or threading.Lock()

        @functools.wraps(launch)
        def run(*args: Any, **arguments: Any) -> Any:
            with lock:
                return launch(*args, **arguments)

        kernel.run = run
        return kernel

except ImportError:  # macOS, or a CPU-only installation: the twins still work
    HAVE_TRITON = False

    class _KernelWithoutTriton:
        """Stands for a jitted kernel so that its module imports; launching it says what to do."""

        def __init__(self, fn: Any) -> None:
            self.name = fn.__name__

        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError(
                f"kernel={self.name} needs Triton, which cannot be imported here: install triton "
                f"(Linux only) or call the plain-torch twin, whose name ends in _torch"
            )

    def _jit(fn: Any = None, **options: Any) -> Any:
        return _KernelWithoutTriton if fn is None else _KernelWithoutTriton(fn)

    tl = SimpleNamespace(constexpr=Any)

triton = SimpleNamespace(jit=_jit)

__all__ = [
    "HAVE_TRITON",
    "cdiv",
    "check_kernel_inputs",
    "compute_dtype",
    "next_power_of_2",
    "rows_adjacent",
    "tl",
    "triton",
]

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def cdiv(numerator: int, denominator: int) -> int:
    """``numerator / denominator`` rounded up, for ``denominator >= 1``."""
    return -(-numerator // denominator)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n >= 1``: the sides that Triton's tiles may have."""
    return 1 << (n - 1).bit_length()


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The type a twin computes in: float32, or float64 where an input is float64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def check_kernel_inputs(**tensors: torch.Tensor) -> None:
    """Raise ``ValueError`` unless every tensor has a dtype and a layout that the Triton kernels read."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _KERNEL_DTYPES:
            raise ValueError(
                f"{name}.dtype={tensor.dtype}: Triton kernels take bfloat16, float16 and float32; "
                f"call the plain-torch twin (its name ends in _torch) for other types"
            )
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name}.stride()={tensor.stride()}: kernels read rows whose elements are adjacent; "
                f"pass a tensor whose last dimension is contiguous"
            )


def rows_adjacent(table: torch.Tensor) -> torch.Tensor:
    """``table`` itself, or a copy where the elements of a row are not adjacent in memory."""
    return table if table.stride(-1) == 1 or table.shape[-1] <= 1 else table.contiguous()
