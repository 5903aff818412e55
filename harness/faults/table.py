"""The report of `faults` as tables for a terminal, from its records alone."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from reports.records import CheckRow


def faults_table(rows: Sequence[CheckRow]) -> pd.DataFrame:
    """One line a planted fault: who saw it, and where it was said to be."""
    return pd.DataFrame([
        {"fault": row.fault, "tp": row.tp_size, "layout": row.model, "verdict": row.verdict, "s": row.seconds,
         "red": " ".join(row.extra["red"]) or None, "missed": " ".join(row.extra["missed"]) or None, "module": _module(row),
         "effect": _effect(row), "smallest": row.extra["smallest"] or None}
        for row in rows if "patched" in row.extra
    ], dtype=object)


def faults_summary(rows: Sequence[CheckRow]) -> str:
    """``48 of 48 faults seen, 11 of 11 controls left alone``."""
    planted = [row for row in rows if "control" in row.extra]
    counts = []
    for is_control, what in ((False, "faults seen"), (True, "controls left alone")):
        verdicts = [row.verdict for row in planted if row.extra["control"] is is_control]
        if verdicts:
            counts.append(f"{verdicts.count('pass')} of {len(verdicts)} {what}")
    return ", ".join(counts)


def _module(row: CheckRow) -> str | None:
    expected = row.extra["module_expected"]
    if expected is None:
        return None
    return f"right: {_short(expected)}" if row.module == expected else f"WRONG: {_short(row.module)}, it is {_short(expected)}"


def _effect(row: CheckRow) -> str | None:
    expected, effect = row.extra["effect_expected"], row.extra["effect"]
    assert effect is None or isinstance(effect, str), f"effect={effect!r} must be a name"
    if expected is None:
        return effect
    return f"right: {expected}" if effect == expected else f"WRONG: {effect}, it is {expected}"


def _short(module: str | None) -> str:
    return "none" if module is None else module.removeprefix("model.").replace("layers.", "")
