"""What a record says about the machine that it was made on."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from harness.machine import machine, run_info
from harness.shardproof import __version__
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


def test_a_record_names_the_version_of_every_peer_that_could_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, installed in (("vllm", "0.26.1"), ("flash_attn_4", "4.0.0b5"), ("nano_vllm", None)):
        (tmp_path / package.replace("nano_", "nano")).mkdir()
        (tmp_path / package.replace("nano_", "nano") / "__init__.py").touch()
        if installed is not None:
            (tmp_path / f"{package}-{installed}.dist-info").mkdir()
            (tmp_path / f"{package}-{installed}.dist-info" / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {package}\nVersion: {installed}\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = run_info("bench", started_at=datetime.now(UTC), seed=0).versions
    assert {name: found.get(name) for name in ("vllm", "nano-vllm", "flash-attn-4", "torch")} == {
        "vllm": "0.26.1", "nano-vllm": "unknown", "flash-attn-4": "4.0.0b5", "torch": torch.__version__}


def test_a_record_names_the_version_of_this_project() -> None:
    assert run_info("verify", started_at=datetime.now(UTC), seed=0).version == __version__
