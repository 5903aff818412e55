"""What a worker does for the workloads without an engine: layers, collectives, loading, hardware, on ranks that it starts."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from engine.ranks.ranks import Ranks
from harness.bench import ceilings, collectives, layers, loading
from harness.bench.collectives import Problems
from harness.bench.figures import Figures
from harness.bench.layers import LayerWork
from harness.bench.loading import Loaded
from harness.bench.workloads import CollectivesPart, LayersPart
from harness.machine import run_info
from reports.records import RunInfo

State = dict[str, Any]
Measured = dict[tuple[str, str], Figures]
"""(case, engine) -> figures"""
JOB_TIMEOUT_S = 300.0
_PRELOAD = (*(module.__name__ for module in (ceilings, collectives, layers, loading)),
            "transformers.models.llama.configuration_llama")
"""What ranks run, imported once for all that are forked from one server; and what opening a model's config imports."""


def describe(state: State, command: str, started_at: datetime, seed: int | None, argv: list[str]) -> RunInfo:
    """The head of the report, as this worker's checkout and interpreter see it."""
    return run_info(command, started_at=started_at, seed=seed, argv=argv)


def open_ranks(state: State, tp_size: int, fabric: str, device: str) -> str:
    """Start fresh ranks in place of those that there are; the fabric that joins them."""
    close_ranks(state)
    state["ranks"] = Ranks(tp_size, fabric=fabric, device=device, preload=_PRELOAD)
    return str(state["ranks"].fabric)


def close_ranks(state: State) -> None:
    """End the ranks, if there are any."""
    if (ranks := state.pop("ranks", None)) is not None:
        ranks.close()


def build_layers(state: State, folder: Path, dtype: str, part: LayersPart, slower: Mapping[str, float]) -> dict[str, LayerWork]:
    """Make the layers ready on every rank; the work of the rank that has most."""
    works = _run(state, layers.build, folder, dtype, part, dict(slower))
    return {case: max((work[case] for work in works), key=lambda work: work.num_bytes + work.flop) for case in works[0]}


def measure_layers(state: State, engine: str) -> Measured:
    """One round. The slowest rank's time: the others wait for it."""
    found = _run(state, layers.measure)
    return {(case, engine): {"call_us": 1e6 * max(times[case] for times in found)} for case in found[0]}


def build_collectives(state: State, dtype: str, part: CollectivesPart) -> Problems:
    """Make the collectives ready; ways that can't run here, and why."""
    problems: Problems = {}
    for answer in _run(state, collectives.build, dtype, part):
        problems |= answer
    return problems


def measure_collectives(state: State) -> Measured:
    """One round."""
    found = _run(state, collectives.measure)
    return {way: {"all_reduce_us": 1e6 * max(times[way] for times in found)} for way in found[0]}


def free_collectives(state: State) -> None:
    """Let go of graphs and buffers."""
    _run(state, collectives.free)


def measure_load(state: State, folder: Path, dtype: str, case: str, engine: str) -> Measured:
    """One round of one case: the slowest rank's seconds, what all read together, the bytes of the rank that has most."""
    ranks: list[Loaded] = _run(state, loading.load, folder, dtype, case)
    seconds = max(rank.seconds for rank in ranks)
    return {(case, engine): {
        "load_s": seconds,
        "read_gb_per_s": sum(rank.read_bytes for rank in ranks) / seconds / 1e9,
        "rank_read_gib": max(rank.read_bytes for rank in ranks) / 2**30,
        "rank_parameters_gib": max(rank.parameter_bytes for rank in ranks) / 2**30,
    }}


def measure_hardware(state: State, dtype: str, num_threads: int | None, case: str, engine: str) -> Measured:
    """One round, on one rank."""
    return {(case, engine): _run(state, ceilings.measure, dtype, num_threads)[0]}


def _run(state: State, job: Any, *args: Any) -> list[Any]:
    ranks: Ranks = state["ranks"]
    return ranks.run(job, *args, timeout_s=JOB_TIMEOUT_S)
