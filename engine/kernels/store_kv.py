"""Write this step's keys and values into the paged cache."""

import torch

from engine.kernels.common import check_kernel_inputs, next_power_of_2, tl, triton

# Shape suffixes: T = tokens, N = KV heads on this rank, H = head dim, P = cache blocks, B = slots in a block


@triton.jit
def _store_kv_kernel(
    k, v, k_cache, v_cache, slot_mapping,
    k_stride_t, k_stride_n, v_stride_t, v_stride_n,
    STRIDE_P: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_B: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, N: tl.constexpr, H: tl.constexpr, N_PAD: tl.constexpr, H_PAD: tl.constexpr,
):  # fmt: skip
    """One program per token: all its KV heads, keys and values."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot >= 0:
        heads = tl.arange(0, N_PAD)[:, None]
        dims = tl.arange(0, H_PAD)[None, :]
        keep = (heads < N) & (dims < H)
        k_rows = tl.load(k + token * k_stride_t + heads * k_stride_n + dims, mask=keep)
        v_rows = tl.load(v + token * v_stride_t + heads * v_stride_n + dims, mask=keep)
        base = (slot // BLOCK_SIZE) * STRIDE_P + (slot % BLOCK_SIZE) * STRIDE_B
        at = base + heads * STRIDE_N + dims
        tl.store(k_cache + at, k_rows, mask=keep)
        tl.store(v_cache + at, v_rows, mask=keep)


def store_kv(
    k_TNH: torch.Tensor,
    v_TNH: torch.Tensor,
    k_cache_PNBH: torch.Tensor,
    v_cache_PNBH: torch.Tensor,
    slot_mapping_T: torch.Tensor,
) -> None:
    """Copy each token's keys and values to its slot, bit for bit; slot -1 marks padding and writes nothing.

    k_TNH, v_TNH     ``[T, N, H]``, strided views allowed (a part of the fused projection's output)
    caches           ``[P, N, B, H]``, both laid out alike; slot ``i`` is row ``i % B`` of block ``i // B``
    slot_mapping_T   ``[T]`` int32 or int64; two tokens of one step must not share a slot

    Raises ``ValueError`` for dtypes other than bfloat16, float16, float32 and for unequal cache layouts.
    """
    check_kernel_inputs(k=k_TNH, v=v_TNH)
    check_caches(k_cache_PNBH, v_cache_PNBH)
    num_tokens, num_heads, head_dim = k_TNH.shape
    if num_tokens == 0:
        return
    stride_p, stride_n, stride_b, _ = k_cache_PNBH.stride()
    _store_kv_kernel[(num_tokens,)](
        k_TNH, v_TNH, k_cache_PNBH, v_cache_PNBH, slot_mapping_T.contiguous(),
        k_TNH.stride(0), k_TNH.stride(1), v_TNH.stride(0), v_TNH.stride(1),
        stride_p, stride_n, stride_b, k_cache_PNBH.shape[2],
        num_heads, head_dim, next_power_of_2(num_heads), next_power_of_2(head_dim),
    )  # fmt: skip


def store_kv_torch(
    k_TNH: torch.Tensor,
    v_TNH: torch.Tensor,
    k_cache_PNBH: torch.Tensor,
    v_cache_PNBH: torch.Tensor,
    slot_mapping_T: torch.Tensor,
) -> None:
    """Plain-torch twin of :func:`store_kv`: same arguments, same bits in the cache."""
    block_size = k_cache_PNBH.shape[2]
    kept = (slot_mapping_T >= 0).nonzero().squeeze(1)
    slots = slot_mapping_T[kept].long()
    blocks, offsets = slots // block_size, slots % block_size
    k_cache_PNBH[blocks, :, offsets] = k_TNH[kept]
    v_cache_PNBH[blocks, :, offsets] = v_TNH[kept]


def check_caches(k_cache_PNBH: torch.Tensor, v_cache_PNBH: torch.Tensor) -> None:
    """Raise ``ValueError`` unless both caches have one shape and layout: the kernels address them alike."""
    check_kernel_inputs(k_cache=k_cache_PNBH, v_cache=v_cache_PNBH)
    if k_cache_PNBH.shape != v_cache_PNBH.shape or k_cache_PNBH.stride() != v_cache_PNBH.stride():
        raise ValueError(
            f"k_cache {tuple(k_cache_PNBH.shape)} strides {k_cache_PNBH.stride()} and v_cache "
            f"{tuple(v_cache_PNBH.shape)} strides {v_cache_PNBH.stride()} must agree: allocate both alike"
        )
