"""Runs checks on clean code, on several machines' arithmetic, and counts false alarms.

A run is what ``verify`` does: the check on one model and one tp_size, with all the cases that it draws by itself. Other seeds and
models than those that constants were fitted on; every setting sees models of its own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from engine.ranks.ranks import Ranks
from harness.checks import all_checks
from harness.checks.base import CheckContext, together
from harness.studies.calibrate.draws import OPTIONS, Pools, drawn_models, orders_of
from harness.studies.calibrate.jobs import load_model
from harness.studies.calibrate.orders import InDrawnOrders
from harness.subjects.base import Loaded, Placement
from harness.subjects.engine import EngineSubject
from harness.verification.reference_results import ReferenceResults

TP_SIZES = (1, 2, 3, 4, 5, 8)
"""One of them is none that the constants were fitted on."""
JUDGED = ("collectives", "weights", "layers", "attention", "logits")
LAYERS_RUNS = 5
"""Of ``layers`` on one float32 model and tp_size, each with a seed of its own: it needs no model, and is quick."""
AS_IT_IS, DRAWN = "as it is", "drawn orders"


def _isa(aten: str, onednn: str, mkl: str) -> dict[str, str]:
    return {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}


SETTINGS: Mapping[str, Mapping[str, str]] = {
    AS_IT_IS: {},
    "AVX-512": _isa("avx512", "AVX512_CORE", "AVX512"),
    "AVX2": _isa("avx2", "AVX2", "AVX2"),
    "AVX": _isa("default", "AVX", "AVX"),
    "SSE4": _isa("default", "SSE41", "SSE4_2"),
    "mixed": _isa("avx2", "AVX512_CORE_BF16", "SSE4_2"),
    DRAWN: {},
}
"""Instruction sets that torch, oneDNN and MKL are held to, by environment: several machines in one. In the last one each product
of ranks is summed in an order of its own."""
_ATEN = ("default", "avx2", "avx512")
"""What torch may be held to, the least first."""


def runs_here(environ: Mapping[str, str]) -> bool:
    """Whether this CPU has the instructions. oneDNN and MKL use no others; torch uses what it is told, and dies of SIGILL."""
    asked, found = environ.get("ATEN_CPU_CAPABILITY", _ATEN[0]), torch.backends.cpu.get_cpu_capability().lower()
    return _ATEN.index(asked) <= (_ATEN.index(found) if found in _ATEN else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one run of a check said of clean code."""

    check: str
    setting: str
    dtype: str
    tp_size: int
    fabric: str
    cases: int
    compared: int
    error_over_budget: float | None
    seconds: float
    alarm: str | None
    """What it found, where there is nothing to be found."""


def judge_models(pools: Pools, draw: random.Random, setting: str, dtype: str, num_models: int) -> Iterator[Verdict]:
    """Every check on drawn models, on each of ``TP_SIZES``, in an interpreter that has the setting's environment."""
    for results in drawn_models(draw, "judge", num_models, (dtype,), pools.device):
        for tp_size in pools.sizes(TP_SIZES):
            ranks = loaded(pools, draw, results, tp_size)
            for check in JUDGED:
                for _ in range(LAYERS_RUNS if (check, dtype) == ("layers", "float32") else 1):
                    yield judged(check, context_of(ranks, results, draw.randrange(2**31)), setting)


def loaded(pools: Pools, draw: random.Random, results: ReferenceResults, tp_size: int) -> Ranks:
    """Ranks with the model on them."""
    ranks = pools(tp_size, draw.choice(orders_of(tp_size)))
    ranks.run(load_model, results.folder, results.dtype, OPTIONS)
    return ranks


def context_of(ranks: Ranks, results: ReferenceResults, seed: int, case: dict[str, Any] | None = None) -> CheckContext:
    """For a whole run, or for one case alone, on ranks that hold the model."""
    subject = EngineSubject(Placement(tp_size=ranks.tp_size, device=str(ranks.device), ranks=ranks))
    subject.loaded = Loaded(folder=results.folder, dtype=results.dtype, options=OPTIONS)
    return CheckContext(results=results, subject=subject, options=OPTIONS, seed=seed, case=case)


def judged(check: str, context: CheckContext, setting: str = "") -> Verdict:
    """The check's own verdict; ranks that fail are a finding, as in ``verify``."""
    subject, started = context.subject, time.perf_counter()
    if setting == DRAWN:
        ranks = cast(Ranks, InDrawnOrders(cast(EngineSubject, subject).ranks, context.seed))
        context = context_of(ranks, context.results, context.seed)
    outcome = together(list(all_checks()[check].run(context)))
    return Verdict(check=check, setting=setting, dtype=context.dtype, tp_size=subject.tp_size, fabric=subject.fabric,
                   cases=outcome.cases, compared=outcome.compared, error_over_budget=outcome.error_over_budget,
                   seconds=time.perf_counter() - started, alarm=outcome.finding or outcome.error)
