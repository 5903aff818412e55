"""What runs inside the ranks for a check: importable functions with plain arguments.

Whole results come from rank 0 alone; every rank sends a digest, and ranks that disagree are a finding.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.ranks.ranks import RankContext
from harness.subjects import SUBJECTS, Script, Subject, Taps
from harness.verification.budgets import bits
from reference.checkpoints import CheckpointError


def load(rank: RankContext, subject: str, folder: Path, dtype: str, options: Mapping[str, Any]) -> None:
    """Put a subject with its checkpoint into the rank's state."""
    rank.phase = "load"
    rank.state.pop("subject", None)  # before the next one is loaded, or both would be in memory
    candidate = SUBJECTS[subject]()
    candidate.load(rank, folder, dtype=dtype, options=options)
    rank.state["subject"] = candidate


def load_beside(rank: RankContext, subject: str, folder: Path, dtype: str, options: Mapping[str, Any]) -> None:
    """Let another checkpoint take the place of the one that the rank holds, until ``put_back``."""
    rank.state["before"] = rank.state.pop("subject")
    load(rank, subject, folder, dtype, options)


def put_back(rank: RankContext) -> None:
    """End what ``load_beside`` began, whether or not it came to its end."""
    if "before" in rank.state:
        rank.state["subject"] = rank.state.pop("before")


def unload(rank: RankContext) -> None:
    """Let go of the subject."""
    rank.state.pop("subject", None)


def is_loaded(rank: RankContext) -> bool:
    """Whether there is a subject."""
    return rank.state.get("subject") is not None


def find_checkpoint(rank: RankContext, folder: Path) -> None:
    """Raise CheckpointError where the folder is not: ranks may be on hosts of their own."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"rank {rank.tp.rank} on host {socket.gethostname()} finds no checkpoint at {folder}: it must be "
                              "readable at the same path on every host")


def logits(rank: RankContext, script: Script) -> tuple[bytes, list[Tensor]]:
    """Digest of all logits, and on rank 0 the logits themselves."""
    found = _subject(rank).logits(script)
    return digest(found), found if rank.tp.rank == 0 else []


def taps(rank: RankContext, script: Script, sequence: int) -> Taps:
    """This rank's activations of one sequence."""
    return _subject(rank).taps(script, sequence)


def generate(rank: RankContext, prompts: Sequence[Sequence[int]], params: Mapping[str, Any]) -> list[list[int]]:
    """Token ids after each prompt, from every rank."""
    rank.phase = "generate"
    return _subject(rank).generate(prompts, params)


def digest(tensors: Sequence[Tensor]) -> bytes:
    """Hash of shapes and bits."""
    total = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        total.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        total.update(bits(tensor.cpu()).numpy().tobytes())
    return total.digest()


def _subject(rank: RankContext) -> Subject:
    subject: Subject = rank.state["subject"]
    return subject
