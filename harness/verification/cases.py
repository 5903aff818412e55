"""Case files: a finding with all that it takes to run it again.

One safetensors file each: the failing tensors, and in its header what was drawn and on which layout. Opening one runs no code.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from harness.verification.budgets import same_bits

HEADER = "shardproof_case"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedCase:
    """One finding.

    model     what ``verify`` was given: a name, or a folder's whole path
    kind      of a check that has kinds of cases; files from before it was noted have none
    case      what the check drew; empty for checks that draw from the seed alone
    finding   what was wrong
    tensors   what was given, found and expected
    """

    check: str
    model: str
    tp_size: int
    fabric: str
    device: str
    dtype: str
    subject: str
    seed: int
    case: dict[str, Any]
    finding: str
    kind: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        name = "-".join([self.check, *self.kind.split()])
        return f"{name}-tp{self.tp_size}-{self.fabric}.safetensors"


def save_case(folder: Path, saved: SavedCase) -> Path:
    """Write a case file into ``folder`` and return its path. An older one of the same check, kind and layout is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / saved.file_name
    header = {name: value for name, value in asdict(saved).items() if name != "tensors"}
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in saved.tensors.items()}
    save_file(tensors, path, metadata={HEADER: json.dumps(header)})
    return path


def load_case(path: Path) -> SavedCase:
    """Read a case file.

    Raises:
        OSError: if it can't be read.
        ValueError: if it is no case file of ours.
    """
    if not path.is_file():
        raise FileNotFoundError(f"case={path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as opened:
            header = json.loads((opened.metadata() or {})[HEADER])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not iterable
        if {"kind"} | set(header) != {item.name for item in fields(SavedCase)} - {"tensors"}:
            raise ValueError(f"it holds {sorted(header)}")
        return SavedCase(**header, tensors=tensors)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"case={path} is not a case file that `shardproof verify` wrote: {error}") from error


def compare_replay(saved: SavedCase, finding: str | None, tensors: dict[str, Tensor]) -> str:
    """How a case that ran again compares with what was saved."""
    if finding is None:
        return "it passes now"
    if not saved.tensors or not tensors:
        return "it fails again"
    same = saved.tensors.keys() == tensors.keys() and all(same_bits(saved.tensors[name], tensors[name]) for name in tensors)
    return "it fails again, to the bit" if same else "it fails again, with other values"
