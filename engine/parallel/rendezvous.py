"""How rank processes find each other: a store that the driver or torchrun holds, and the group joined through it."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # torch leaves them out of __all__

from engine.parallel.group import ProcessTPGroup


def make_store() -> TCPStore:
    """A store for the rendezvous, on a port of the system's choice that only this machine can reach."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    port = listener.getsockname()[1]
    return TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def connect_store(port: int, start_timeout_s: float) -> TCPStore:
    """A rank's end of the driver's store. The driver holds it, so it outlives every rank and goes with the driver."""
    # The driver's deadline ends this wait, with a report on all ranks: a rank that gives up by itself would spoil that.
    patience = timedelta(seconds=start_timeout_s + 10)
    return TCPStore("127.0.0.1", port, is_master=False, timeout=patience)


def join_group(
    *,
    rank: int,
    tp_size: int,
    backend: str,
    device: torch.device,
    store: Store,
    collective_timeout_s: float,
) -> ProcessTPGroup:
    """Called in each rank. Returns when all ranks have joined."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # A rank whose collective timed out would live on for a minute to write torch's own dump. Ours is told by the driver.
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=tp_size,
        timeout=timedelta(seconds=collective_timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
    group = dist.group.WORLD
    assert group is not None, "the group exists after init_process_group"
    return ProcessTPGroup(group, device)
