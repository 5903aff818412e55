"""Bit-equality sees what several ranks get wrong and one does not, and nothing of what all get wrong alike."""

from __future__ import annotations

import pytest

from harness.faults import FAULTS
from harness.faults.models import FaultModels
from harness.studies.oracle import asked_of, examine


@pytest.mark.multirank
def test_a_lost_sum_is_seen_and_an_eps_that_all_ranks_have_is_not() -> None:
    with FaultModels() as models:
        assert examine(models, FAULTS["never-reduced"]) == "seen: model.layers.0.self_attn.o_proj"
        assert examine(models, FAULTS["eps-by-default"]) == "not seen: one rank does the same"
        assert examine(models, FAULTS["fused-qkv-cut-naively"]) == "not seen: it changes nothing in this mode"


def test_what_is_no_matter_of_ranks_logits_is_not_asked() -> None:
    asked = [fault.name for fault in FAULTS.values() if asked_of(fault)]
    assert "never-reduced" in asked
    assert not {"killed-rank-not-seen", "stop-reason-missing", "flags-not-waited-for"} & set(asked)
