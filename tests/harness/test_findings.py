"""What docs/findings.md says that a command shows, it shows."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from harness.subjects.transformers import OLDEST
from tests.harness.installed import ROOT, environment

pytest.importorskip("accelerate", reason="accelerate is not installed here, and transformers shards no model without it")
pytest.importorskip("transformers", minversion=OLDEST, reason=f"before {OLDEST} transformers gives ranks no uneven parts")

COMMANDS = re.findall(r"^\$ shardproof (.+)$", (ROOT / "docs" / "findings.md").read_text(), re.MULTILINE)


@pytest.mark.endurance
@pytest.mark.multirank
@pytest.mark.parametrize("command", COMMANDS)
def test_each_finding_is_shown_by_its_command(tmp_path: Path, command: str) -> None:
    words = [sys.executable, "-m", "harness", *shlex.split(command), "--out", str(tmp_path)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment(ROOT), timeout=600)
    assert result.returncode == 1, result.stdout + result.stderr
    assert re.search("^(FINDING|WRONG) ", result.stdout, re.MULTILINE), result.stdout


def test_there_are_findings() -> None:
    assert len(COMMANDS) >= 4
