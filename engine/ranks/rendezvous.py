"""How rank processes find each other: a store that the driver or torchrun holds, and the group joined through it."""

from __future__ import annotations

import gc
import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # torch leaves them out of __all__

from engine.parallel.group import ProcessTPGroup
from engine.ranks.jobs import RankContext


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
    timeout = timedelta(seconds=start_timeout_s + 10)
    return TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)


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
        # torch waits four times this, a minute by default, before it ends a rank whose collective timed out: for a dump of its
        # own, where the driver tells more.
        os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "250")
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


def leave_group(box: list[RankContext]) -> None:
    """Called in each rank: the opposite of ``join_group``. ``box`` holds the rank's context, and nothing else does.

    A group that something still holds when the interpreter ends would abort it, and NCCL lets none go before the graphs that
    captured its collectives are gone.
    """
    box.clear()
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
