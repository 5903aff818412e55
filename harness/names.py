"""Names and folders that the command line knows before anything heavy is loaded. Tests hold the names equal to what they name."""

from __future__ import annotations

from pathlib import Path

CHECK_NAMES = ("collectives", "weights", "layers", "attention", "kv", "logits", "generation", "lifecycle")
DTYPES = ("bfloat16", "float16", "float32", "float64")
FABRICS = ("auto", "gloo", "threads", "nccl")
BASELINES = Path("reports/baselines")
