"""Real tensor-parallel bugs as runtime patches, each with the checks that must see it; and controls that none may mind."""

from __future__ import annotations

from harness.faults import (
    blind,
    cache,
    collectives,
    controls,
    graphs,
    layers,
    lifecycle,
    loading,
    model_fields,
    norms,
    outputs,
    own,
    parameters,
    rows,
    sampling,
    vocabulary,
)
from harness.faults.base import FAULTS, Fault

__all__ = ["FAULTS", "Fault", "blind", "cache", "collectives", "controls", "graphs", "layers", "lifecycle", "loading",
           "model_fields", "norms", "outputs", "own", "parameters", "rows", "sampling", "vocabulary"]
