"""Write this step's keys and values into the paged cache."""

from __future__ import annotations

import torch

from engine.kernels.common import next_power_of_2, tl, triton

# Shape suffixes: T = tokens, N = KV heads on this rank, H = head dim, P = cache blocks, B = slots in a block


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
