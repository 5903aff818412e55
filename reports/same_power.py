"""Did a change of the code take power from the checks? What they saw before, held against what they see after."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reports.records import CheckRow, Report, read_report, whole_checks

RENAMED = Path(__file__).with_name("renamed.json")
"""``checks``, ``modules`` and ``tests`` that go by another name now, old -> new, or are gone, old -> ``gone: why``."""

Fault = tuple[str, int, int | None]
"""Name, tp_size and seed."""


def lost_power(before: Iterable[Report], after: Iterable[Report], names: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """What reports of ``shardproof faults`` show no more: a check that was red, a module that was named, a control left alone."""
    old, new = _faults(before), _faults(after)
    for key in sorted(old.keys() - new.keys(), key=str):
        yield f"{_named(key)}: not planted any more"
    for key in sorted(old.keys() & new.keys(), key=str):
        was, now = old[key], new[key]
        checks = {names.get("checks", {}).get(check, check) for check in was.extra["red"]}
        if was.extra["control"]:
            checks = set()
            if now.extra["red"] and not was.extra["red"]:
                yield f"{_named(key)}: a control that turns {', '.join(now.extra['red'])} red"
        if missed := checks - set(now.extra["red"]):
            yield f"{_named(key)}: {', '.join(sorted(missed))} no longer red"
        module = names.get("modules", {}).get(was.module or "", was.module)
        if was.module == was.extra["module_expected"] is not None and now.module != module:
            yield f"{_named(key)}: names {now.module}, it was {module}"


def fewer_judged(before: Report, after: Report, names: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Checks of ``shardproof verify`` that judge fewer cases or values than before."""
    renamed = names.get("checks", {})
    old, new = ({(renamed.get(row.check, row.check), row.tp_size): row for row in whole_checks(report.checks)}
                for report in (before, after))
    for (check, tp_size), was in old.items():
        now = new.get((check, tp_size))
        if now is None:
            yield f"{check} at tp_size={tp_size}: not run any more"
        elif now.cases < was.cases or now.compared < was.compared:
            yield (f"{check} at tp_size={tp_size}: cases={now.cases}, compared={now.compared}; it was cases={was.cases}, "
                   f"compared={was.compared}")


def lost_tests(before: Iterable[str], after: Iterable[str], names: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Tests, by file and function, that are gone without a successor or a reason."""
    old, new = ({line.strip().partition("[")[0] for line in lines} for lines in (before, after))
    renamed = names.get("tests", {})
    for test in sorted(old - new):
        successor = renamed.get(test) or _moved(test, renamed)
        if not successor.startswith("gone: ") and successor not in new:
            yield f"{test}: gone, and {f'its successor {successor} is not there' if successor else 'nothing says why'}"


def _moved(test: str, renamed: Mapping[str, str]) -> str:
    """The same test in the file that its own became."""
    file, _, name = test.partition("::")
    return f"{renamed[file]}::{name}" if file in renamed else ""


def _faults(reports: Iterable[Report]) -> dict[Fault, CheckRow]:
    """The planted ones; where two reports have one at the same seed, the later counts. Older records name it in ``model``."""
    return {(row.fault or row.model, row.tp_size, report.run.seed): row
            for report in reports for row in report.checks if "patched" in row.extra}


def _named(key: Fault) -> str:
    return f"{key[0]} at tp_size={key[1]}, seed={key[2]}"


def compare(before: Path, after: Path, names: Mapping[str, Any]) -> tuple[list[str], str]:
    """What was lost between two folders, and what was held against each other.

    Each folder holds reports of ``faults`` below ``faults/``, one of ``verify`` in ``v`` and pytest's list of tests in ``tests``;
    what is in neither is passed over.

    Raises:
        ValueError: if one folder lacks what the other has, or both have nothing.
    """
    lost: list[str] = []
    done: list[str] = []
    for what in ("faults", "v", "tests"):
        old, new = before / what, after / what
        if old.exists() != new.exists():
            raise ValueError(f"{what} is in one of before={before}, after={after} alone: run it on both")
        if not old.exists():
            continue
        done.append(what)
        if what == "faults":
            lost += lost_power(_reports(old), _reports(new), names)
        elif what == "v":
            lost += fewer_judged(read_report(old), read_report(new), names)
        else:
            lost += lost_tests(old.read_text().splitlines(), new.read_text().splitlines(), names)
    if not done:
        raise ValueError(f"before={before}, after={after}: neither has faults, v or tests")
    return lost, ", ".join(done)


def _reports(folder: Path) -> Sequence[Report]:
    # A second run into the same folder leaves the first one's as ``report.old.json``.
    return [read_report(file) for file in sorted(folder.rglob("*.json")) if not file.name.endswith(".old.json")]


def main() -> None:
    """Says what was lost; exits 1 if anything was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path, help="folder with faults/, v and tests of the code before")
    parser.add_argument("after", type=Path, help="the same of the code after")
    asked = parser.parse_args()
    try:
        lost, done = compare(asked.before, asked.after, json.loads(RENAMED.read_text()))
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write("".join(f"LOST {line}\n" for line in lost) + f"{len(lost)} lost, of {done}\n")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
