"""Which fabric joins the ranks: what a rank is, and what carries its collectives."""

from __future__ import annotations

from typing import Literal, get_args

import torch

Fabric = Literal["auto", "solo", "threads", "gloo", "nccl"]


def choose_fabric(tp_size: int, fabric: str, device: torch.device) -> tuple[str, torch.device]:
    """The fabric that ``auto`` stands for, and the device with its index where all ranks share one.

    Raises ValueError for combinations that can't work.
    """
    if tp_size < 1:
        raise ValueError(f"tp_size={tp_size} must be at least 1")
    if fabric not in get_args(Fabric):
        raise ValueError(f"fabric={fabric!r} is not one of {', '.join(get_args(Fabric))}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={str(device)!r} is not supported: ranks run on cpu or cuda")
    index: int | None = device.index
    num_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and num_gpus == 0:
        raise ValueError(f"device={str(device)!r}, but torch sees no GPU")
    chosen = fabric
    if fabric == "auto":
        if tp_size == 1:
            chosen = "solo"
        elif device.type == "cpu":
            chosen = "gloo"
        else:
            chosen = "nccl" if num_gpus >= tp_size and index is None else "threads"
    if chosen == "solo" and tp_size != 1:
        raise ValueError(f"fabric='solo' is one rank, got tp_size={tp_size}")
    if chosen == "gloo" and device.type != "cpu":
        raise ValueError(f"fabric='gloo' needs device='cpu', got device={str(device)!r}")
    if chosen == "nccl":
        if device.type != "cuda" or index is not None:
            raise ValueError(f"fabric='nccl' needs device='cuda' without an index, got device={str(device)!r}")
        if num_gpus < tp_size:
            raise ValueError(f"fabric='nccl' needs a GPU for each of tp_size={tp_size} ranks, torch sees {num_gpus}")
        return chosen, device
    if device.type == "cuda" and index is None:
        device = torch.device("cuda", 0)
    return chosen, device
