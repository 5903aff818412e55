"""pytest-benchmark's timings of kernels and layers: there when they are asked for, and only then."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def pytest_in_a_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    # Old libraries warn of each other, which this process may be told to bear, and that one is not.
    command = [sys.executable, "-m", "pytest", "-W", "default", "-p", "no:cacheprovider", "-q", "tests/benchmarks",
               *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_kernels_and_layers_are_timed_when_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "timings.json"
    done = pytest_in_a_process("--benchmark-only", "--benchmark-max-time=0.01", "--benchmark-min-rounds=2", "-k",
                               "silu_mul or o_proj", f"--benchmark-json={file}")
    assert done.returncode == 0, done.stdout + done.stderr
    timings = {timing["name"]: timing["stats"]["median"] for timing in json.loads(file.read_text())["benchmarks"]}
    assert set(timings) == {"test_kernel_silu_mul[1]", "test_kernel_silu_mul[64]", "test_layer[o_proj-1]",
                            "test_layer[o_proj-16]"}
    assert all(0 < seconds < 1 for seconds in timings.values())


def test_nothing_is_timed_unasked() -> None:
    done = pytest_in_a_process()
    assert done.returncode == 5, done.stdout  # no tests collected
    assert "no tests ran" in done.stdout
