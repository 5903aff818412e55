"""What a record says about the machine that it was made on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from harness.machine import machine
from reports.records import Machine, write_report
from tests.reports.builders import CPU, a_check, a_report


def test_a_record_says_which_instructions_torch_computed_with(tmp_path: Path) -> None:
    path = write_report(tmp_path, a_report(a_check(), machine=machine()))
    found = json.loads(path.read_text())["run"]["machine"]
    assert found.get("instruction_set") == torch.backends.cpu.get_cpu_capability()


@pytest.mark.parametrize(("instruction_set", "folder"), [
    ("AVX512", "cpu-2core-intel-xeon-avx512"), ("AVX2", "cpu-2core-intel-xeon-avx2"), (None, "cpu-2core-intel-xeon"),
])
def test_cpus_of_one_name_lie_apart_by_their_instructions(instruction_set: str | None, folder: str) -> None:
    found = Machine(**CPU | {"cpu": "Intel(R) Xeon(R) Processor"}, instruction_set=instruction_set).folder
    assert found == folder
