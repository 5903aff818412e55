"""Starts the interpreted tests, which need ``TRITON_INTERPRET=1`` before anything imports a kernel."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.kernels.common import HAVE_TRITON

_ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.skipif(not HAVE_TRITON, reason="Triton cannot be imported here, hence not interpreted either")
@pytest.mark.parametrize("examples", ["few", pytest.param("many", marks=pytest.mark.endurance)])
def test_kernels_agree_with_their_twins_under_the_interpreter(examples: str) -> None:
    # Options meant for this process would select or deselect tests in that one.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    tests = "tests/engine/kernels/interpreted"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--hypothesis-profile={examples}", tests]
    done = subprocess.run(command, cwd=_ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    counts = re.search(r"(\d+) passed in ", done.stdout)
    assert counts is not None, f"not every test passed: {done.stdout[-2000:]}"
    assert int(counts[1]) >= 20, f"only {counts[1]} tests ran"
