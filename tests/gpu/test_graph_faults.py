"""What only a captured graph can get wrong is planted on a GPU, and seen."""

from __future__ import annotations

import pytest
import torch

from harness.faults import FAULTS
from harness.faults.run import FaultPlan, run_faults

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.device == "cuda" and fault.tp_sizes == (1,)])
def test_a_fault_of_a_captured_graph_is_seen(name: str) -> None:
    (row,) = run_faults(FaultPlan(only=(name,), device="cuda")).checks
    assert row.verdict == "pass", row.message
    assert set(FAULTS[name].checks) <= set(row.extra["red"])
