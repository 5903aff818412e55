"""RMSNorm (Zhang and Sennrich, 2019), alone and fused with the residual addition before it.

Both compute ``x / rms(x) * weight`` in float32 and round once, at the end. The fused form normalises the
*rounded* new residual, so that it gives the same bits as an addition followed by :func:`rms_norm`.
"""

import torch

from engine.kernels.common import check_kernel_inputs, compute_dtype, next_power_of_2, tl, triton
from engine.kernels.overlap import early_launch, may_overlap, wait_for_inputs
from engine.kernels.quanta import quanta_exponents, quanta_value


@triton.jit
def _rms_norm_kernel(
    x, residual, weight, out, new_residual, peaks, units, x_stride, residual_stride, eps,
    D: tl.constexpr, D_PAD: tl.constexpr, ADD: tl.constexpr, QUANTA: tl.constexpr, SETTLED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per row. Outputs are contiguous; the residuals are read only if ADD, peaks and units if QUANTA."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, D_PAD)
    keep = dims < D
    # A settled weight comes in while the kernels ahead still work on x.
    if not SETTLED:
        wait_for_inputs(OVERLAP)
    weights = tl.load(weight + dims, mask=keep, other=0.0)
    if SETTLED:
        wait_for_inputs(OVERLAP)
    values = tl.load(x + row * x_stride + dims, mask=keep, other=0)
    if QUANTA:
        exponents, unit = quanta_exponents(tl.load(peaks + row)), tl.load(units + dims, mask=keep, other=0)
        values = quanta_value(values, exponents, unit, 0.0).to(out.dtype.element_ty)
    values = values.to(tl.float32)
    if ADD:
        values += tl.load(residual + row * residual_stride + dims, mask=keep, other=0.0).to(tl.float32)
        rounded = values.to(new_residual.dtype.element_ty)
        tl.store(new_residual + row * D + dims, rounded, mask=keep)
        values = rounded.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(values * values, axis=0) / D + eps)
    scaled = values * inverse_rms * weights.to(tl.float32)
    tl.store(out + row * D + dims, scaled.to(out.dtype.element_ty), mask=keep)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    settled: bool,
    overlap: bool | None,
    quanta: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(x.shape, dtype=x.dtype if residual is None else residual.dtype, device=x.device)
    new_residual = out if residual is None else torch.empty_like(out)
    if x.numel() == 0:
        return out, new_residual
    dim = x.shape[-1]
    x_rows = x.reshape(-1, dim)
    residual_rows = x_rows if residual is None else residual.reshape(-1, dim)
    check_kernel_inputs(residual=residual_rows, weight=weight, **({} if quanta else {"x": x_rows}))
    peaks, units = quanta or (weight, weight)  # arguments that a variant never reads still need a tensor in their place
    dim_padded = next_power_of_2(dim)
    overlap = may_overlap(x, overlap)
    _rms_norm_kernel[(x_rows.shape[0],)](
        x_rows, residual_rows, weight, out, new_residual, peaks, units, x_rows.stride(0), residual_rows.stride(0), eps,
        dim, dim_padded, residual is not None, quanta is not None, settled, overlap,
        num_warps=min(16, max(1, dim_padded // 512)), **early_launch(overlap),
    )  # fmt: skip
    return out, new_residual


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, settled: bool = False, overlap: bool | None = None
) -> torch.Tensor:
    """``x / sqrt(mean(x², last dim) + eps) * weight`` in float32, rounded once to ``x``'s dtype.

    x         ``[..., D]``, rows may be strided
    weight    ``[D]``, any of the kernels' dtypes
    settled   the kernel launched just before this one does not write the weight, so it may be read early
    overlap   whether to launch as :mod:`engine.kernels.overlap` describes; by default, where the device can

    Every row is computed alike, whatever the others: the result is batch-invariant.
    Raises ``ValueError`` for dtypes other than bfloat16, float16, float32.
    """
    return _launch(x, None, weight, eps, settled, overlap)[0]


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    settled: bool = False,
    overlap: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rms_norm(s), s)`` for the new residual ``s = x + residual``: a float32 sum rounded to the dtype.

    Shapes as in :func:`rms_norm`; neither input is changed.
    """
    return _launch(x, residual, weight, eps, settled, overlap)


def add_rms_norm_of_quanta(
    sums: torch.Tensor, peaks: torch.Tensor, units: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`add_rms_norm` of what int32 sums stand for: the new residual to the bit, the norm up to its order of sums."""
    return _launch(sums, residual, weight, eps, True, None, (peaks, units))


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float, *, settled: bool = False) -> torch.Tensor:
    """Plain-torch twin of :func:`rms_norm`; float64 input is computed in float64 throughout."""
    del settled
    x_wide = x.to(compute_dtype(x))
    inverse_rms = torch.rsqrt(x_wide.square().mean(dim=-1, keepdim=True) + eps)
    return (x_wide * inverse_rms * weight.to(x_wide.dtype)).to(x.dtype)


def add_rms_norm_torch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, settled: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain-torch twin of :func:`add_rms_norm`; float64 input is computed in float64 throughout."""
    del settled
    # torch adds two tensors of a 16-bit type in float32 and rounds once: what the kernel does.
    new_residual = x + residual
    return rms_norm_torch(new_residual, weight, eps), new_residual
