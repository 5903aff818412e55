"""Memory that all ranks of one host can read and write: allocated on each GPU, and mapped into every rank's process.

Allocation and exchange are torch's symmetric memory; what is done with it is ours. NVLink multicast is not used.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from engine.kernels.common import HAVE_TRITON
from engine.kernels.peer_all_reduce import FLAG_BYTES, MAX_PROGRAMS, MAX_RANKS, PeerMemory

logger = logging.getLogger(__name__)

HALF_BYTES = 32 * 2**20
"""The largest message that is copied in one call."""
ROOM_BYTES = 128 * 2**20
"""The largest product that is written where the ranks read it: 16,384 rows of 4,096 features in 16 bits."""


def share_memory(process_group: dist.ProcessGroup, device: torch.device, *,
                 agree: Callable[[int], int]) -> PeerMemory | None:
    """Memory for the ranks of a group, or None on all of them where one can't reach the others'. Every rank must call it.

    Args:
        process_group: rank i of it has ``cuda:i``.
        device: this rank's.
        agree: gives the smallest of the ranks' numbers.
    """
    rank, size = process_group.rank(), process_group.size()
    host = _host_number()
    lowest, highest = agree(host), -agree(-host)
    if not agree(int(lowest == highest and _reaches_all(rank, size, device))):
        logger.info("rank %d: no peer-to-peer memory between %d GPUs, all-reduces are left to the library", rank, size)
        return None
    memory = None
    try:
        memory = _share(process_group, device)
    except RuntimeError as problem:  # of a driver, a container or a build of torch that can't
        logger.info("rank %d: GPUs can't share memory: %s", rank, problem)
    return memory if agree(int(memory is not None)) else None


def _share(process_group: dist.ProcessGroup, device: torch.device) -> PeerMemory:
    import torch.distributed._symmetric_memory as symmetric

    # Read when memory is shared. A program that uses multicast can put a machine's GPUs out of service where it does not work.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    num_bytes = FLAG_BYTES + 2 * HALF_BYTES + 2 * ROOM_BYTES
    own = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
    own.zero_()
    torch.cuda.synchronize(device)  # before a rank that is done here sets a flag
    shared = symmetric.rendezvous(own, process_group.group_name)
    parts = tuple(own if peer == process_group.rank() else shared.get_buffer(peer, (num_bytes,), torch.uint8)
                  for peer in range(process_group.size()))
    calls = torch.zeros(MAX_PROGRAMS, dtype=torch.int64, device=device)
    return PeerMemory(rank=process_group.rank(), size=process_group.size(), half_bytes=HALF_BYTES, parts=parts, calls=calls,
                      room_bytes=ROOM_BYTES)


def _reaches_all(rank: int, size: int, device: torch.device) -> bool:
    """Whether rank i has ``cuda:i``, and this GPU reaches all of them."""
    return (HAVE_TRITON and size <= MAX_RANKS and device.index == rank and torch.cuda.device_count() >= size
            and all(torch.cuda.can_device_access_peer(rank, peer) for peer in range(size) if peer != rank))


def _host_number() -> int:
    """One number a running system. Where none is to be had, of the process: no two are alike."""
    with suppress(OSError):
        return zlib.crc32(Path("/proc/sys/kernel/random/boot_id").read_bytes())
    return 2**32 + os.getpid()
