"""What machine, code and switches a run stands for: the head of every report."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from harness.shardproof import __version__
from reports.records import Gpu, Machine, RunInfo

PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "pandas", "hypothesis", "flash-attn", "flash-attn-4")
PEERS = {"vllm": "vllm", "nano-vllm": "nanovllm"}
"""Other engines that `bench` can measure beside our own: distribution -> module."""
SWITCH_PREFIXES = ("NCCL_", "CUBLAS_", "TORCH_", "TRITON_INTERPRET", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def run_info(command: str, *, started_at: datetime, seed: int | None, argv: list[str] | None = None) -> RunInfo:
    """The head of a report on a run that began at ``started_at`` (UTC) and ends now."""
    commit, dirty = _commit()
    return RunInfo(
        command=command, argv=argv if argv is not None else ["shardproof", *sys.argv[1:]], commit=commit, dirty=dirty, seed=seed,
        started_at=started_at.isoformat(timespec="seconds"), seconds=(datetime.now(UTC) - started_at).total_seconds(),
        machine=machine(), versions=_versions(), switches=_switches(),
        version=__version__,
    )


def machine() -> Machine:
    """This machine, as records tell of it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = []
    if torch.cuda.is_available():
        driver = _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or "unknown"
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            gpus.append(Gpu(name=properties.name, driver=driver, memory_gib=round(properties.total_memory / 2**30, 1)))
    kind = f"cpu-{cores}core"
    if gpus:
        kind = gpus[0].name.lower().replace(" ", "-") + (f"-x{len(gpus)}" if len(gpus) > 1 else "")
    return Machine(type=kind, cpu=_cpu(), cores=cores, memory_gib=round(psutil.virtual_memory().total / 2**30, 1), gpus=gpus,
                   instruction_set=torch.backends.cpu.get_cpu_capability())


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> tuple[str | None, bool]:
    """Commit, and whether files differ from it. ``SHARDPROOF_COMMIT`` names it where the code came without its history."""
    if named := os.environ.get("SHARDPROOF_COMMIT"):
        return named, False
    root = Path(__file__).parent
    commit = _first_line(["git", "-C", str(root), "rev-parse", "HEAD"])
    return commit, commit is not None and _first_line(["git", "-C", str(root), "status", "--porcelain"]) is not None


def _first_line(command: list[str]) -> str | None:
    """The first line that a command prints, or None if it fails or prints nothing."""
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return output.splitlines()[0].strip() if output.strip() else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *PEERS):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            if package in PEERS and find_spec(PEERS[package]) is not None:  # a checkout, which says no version
                found[package] = "unknown"
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda or "unknown"
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _switches() -> dict[str, Any]:
    matmul = torch.backends.cuda.matmul
    return {
        "allow_tf32": matmul.allow_tf32,
        "allow_bf16_reduced_precision_reduction": bool(matmul.allow_bf16_reduced_precision_reduction),
        "num_threads": torch.get_num_threads(),
        **{name: value for name, value in sorted(os.environ.items()) if name.startswith(SWITCH_PREFIXES)},
    }
