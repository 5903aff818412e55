"""How rank processes find each other: a store that the driver holds, and the group joined through it."""

from __future__ import annotations

import os
import socket
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch leaves it out of __all__

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


def join_group(
    *,
    rank: int,
    tp_size: int,
    backend: str,
    device: torch.device,
    store_port: int,
    start_timeout_s: float,
    collective_timeout_s: float,
) -> ProcessTPGroup:
    """Called in each rank. Returns when all ranks have joined."""
    # The driver holds the store, so it outlives every rank and goes with the driver.
    # Its deadline ends this wait, with a report on all ranks: a rank that gives up by itself would spoil that.
    patience = timedelta(seconds=start_timeout_s + 10)
    store = TCPStore("127.0.0.1", store_port, is_master=False, timeout=patience)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # gloo looks up the host's own name otherwise, which not every machine can resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
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
