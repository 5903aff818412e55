"""How often each rule was right on pairs of streams, counted: one row a rule, dtype and fault."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from harness.studies.score.pairs import FITTED_SEED, Pair
from harness.studies.score.rules import PEOPLES, VALUES, VERDICTS, called, values_of
from harness.verdict.rates import ON_FITTED
from reports.records import ScoreRow
from reports.verdict_rows import ALL_FAULTS

Line = dict[str, Any]
"""``pair``: its model's name, a dash, and which of the model's pairs; ``planted``, ``dtype``, ``model``, ``tokens``;
``said``: rule -> [[tokens, answer], …]; ``values``: what people look at. The last two are empty for a fault that changes
nothing."""
SAME_ALARMS = "with no false alarm here"


def line_of(pair: Pair, model: int | None = None, *, whole: bool = False) -> Line:
    """What the rules say of a pair; ``whole`` as in ``rules.called``."""
    return {"pair": pair.name, "planted": pair.planted, "dtype": pair.dtype, "model": model, "tokens": pair.a.num_tokens,
            "said": called(pair, whole=whole), "values": values_of(pair)}


def scores(lines: Sequence[Mapping[str, Any]], by_fault: Collection[str] = VERDICTS) -> list[ScoreRow]:
    """One row a rule and dtype, of the rules in ``by_fault`` one a fault too.

    Beside each rule as people use it stands the value that it looks at, with the bound that calls no clean pair of that dtype a
    bug: the best that anybody could do with it who knew these pairs.
    """
    worst: dict[tuple[str, str], float] = defaultdict(float)
    for line in lines:
        if not line["planted"]:
            for name, value in line["values"].items():
                worst[name, line["dtype"]] = max(worst[name, line["dtype"]], value)
    groups: dict[tuple[str, str, str], list[tuple[int, str]]] = defaultdict(list)
    models: dict[tuple[str, str], set[str]] = defaultdict(set)
    for line in lines:
        models[line["planted"], line["dtype"]] |= set() if line["planted"] else {line["pair"].rpartition("-")[0]}
        fitted = f" {ON_FITTED}" if line["pair"].startswith(f"clean-{FITTED_SEED}-") else ""
        said = {f"{rule}{fitted}": [(tokens, answer) for tokens, answer in answers] for rule, answers in line["said"].items()}
        bounds = {rule: (name, bound) for rule, (name, bound) in PEOPLES.items()} | {
            f"{name} {SAME_ALARMS}": (name, worst[name, line["dtype"]]) for name in VALUES}
        if line["values"]:
            said |= {rule: [(line["tokens"], "rounding" if line["values"][name] <= bound else "bug")]
                     for rule, (name, bound) in bounds.items()}
        for rule, answers in said.items():
            planted = line["planted"] if rule in by_fault else line["planted"] and ALL_FAULTS
            groups[rule, planted, line["dtype"]] += answers
    return [ScoreRow(rule=rule, planted=planted, dtype=dtype, runs=len(said), models=len(models[planted, dtype]),
                     tokens=[min(count for count, _ in said), max(count for count, _ in said)],
                     bug=sum(answer == "bug" for _, answer in said), cant_tell=sum(answer == "can't tell" for _, answer in said))
            for (rule, planted, dtype), said in groups.items()]
