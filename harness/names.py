"""Names and folders that the command line knows before anything heavy is loaded."""

from __future__ import annotations

from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32", "float64")
FABRICS = ("auto", "gloo", "threads", "nccl")
BASELINES = Path("reports/baselines")
