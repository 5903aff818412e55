"""Which error gets which exit code, the names that the command line knows, and the time that a run has left."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engine.config
import harness.verification.verify
from engine.parallel.parameter import CheckpointError as EnginesCheckpointError
from engine.ranks.failures import RankError, RankFailure
from engine.ranks.ranks import Fabric
from harness import names
from harness.commands.progress import RowsShown, about
from harness.errors import CouldNotRunError, UsageError, told, usage
from harness.studies.calibrate import run as calibrate_run
from reference.checkpoints import CheckpointError
from tests.harness.test_exit_codes import MISTAKES, run
from tests.reports.builders import a_check


def failure_of(summary: str, *, kind: Any = "raised", phase: str = "generate", job: str = "advance") -> RankFailure:
    return RankFailure(job, {1: RankError(rank=1, kind=kind, phase=phase, summary=summary)}, tp_size=2, fabric="gloo")


CODES: list[tuple[BaseException, int | None]] = [
    (UsageError("x"), 2), (CouldNotRunError("x"), 3), (CheckpointError("x"), 3), (EnginesCheckpointError("x"), 3),
    (FileNotFoundError("x"), 3), (PermissionError("x"), 3), (MemoryError(), 3), (KeyboardInterrupt(), 3),
    (ValueError("x"), None), (RuntimeError("x"), None), (KeyError("x"), None), (AssertionError("x"), None),
    (failure_of("killed by SIGKILL", kind="died"), 3), (failure_of("stuck in all_reduce", kind="stuck"), 3),
    (failure_of("CheckpointError: tensor=x", phase="load"), 3), (failure_of("ValueError: no memory is left", phase="load"), 3),
    (failure_of("OutOfMemoryError: x"), 3), (failure_of("OSError: x"), 3), (failure_of("DistStoreError: x", job="start"), 3),
    (failure_of("ValueError: deep inside"), None), (failure_of("IndexError: x"), None),
]


@pytest.mark.parametrize(("error", "code"), CODES, ids=lambda value: repr(value)[:50])
def test_an_error_is_the_inputs_the_machines_or_ours(error: BaseException, code: int | None) -> None:
    found = told(error)
    assert (found and found[1]) == code


def test_planning_alone_makes_a_value_error_wrong_usage() -> None:
    with pytest.raises(UsageError, match="planned"), usage():
        raise ValueError("planned")
    with pytest.raises(CheckpointError) as kept, usage():
        raise CheckpointError("the model's")
    assert not isinstance(kept.value, UsageError)
    with pytest.raises(KeyError), usage():
        raise KeyError("ours")


# Whatever people type

ODD = st.one_of(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8),
                st.sampled_from(["1,2", "-1", "0", "9" * 20, "1e9", "nan", "inf", "٣", "2 ", "2;3", "None", "[]", "/", "."]))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(sorted({option for _, option, *_ in MISTAKES if option.startswith("--")} | {"--seed"})), value=ODD,
       command=st.sampled_from(["verify", "faults", "generate", "bench", "calibrate"]))
def test_no_value_of_an_option_crashes_or_passes_for_a_finding(name: str, value: str, command: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        def stop(*args: object, **kwargs: object) -> None:
            raise CouldNotRunError("enough")

        for target in ("harness.commands.verify.model_folder", "harness.commands.generate.model_folder",
                       "harness.bench.cli.model_folder", "harness.faults.run.run_faults",
                       "harness.studies.calibrate.run.calibrate"):
            patch.setattr(target, stop)
        for module in ("verify", "faults", "calibrate"):
            patch.setattr(f"harness.commands.{module}.prepare_out", lambda out: None)
        patch.setattr("harness.bench.cli.prepare_out", lambda out: None)
        words = ["generate", "model", "text"] if command == "generate" else [command]
        result = run(*words, name, value)
    assert result.exit_code in (2, 3), result.output
    assert "Traceback" not in result.stderr


def test_the_one_place_stands_for_all_commands() -> None:
    """No command ends the process by itself but with the exit code of its work."""
    sources = Path(harness.verification.verify.__file__).parent.glob("commands/*.py")
    for source in sources:
        assert not re.search(r"sys\.exit|SystemExit|typer\.Exit\((USAGE|2|1)\)", source.read_text()), source




def test_light_names_are_those_of_what_they_name() -> None:
    assert tuple(engine.config.DTYPES) == names.DTYPES
    assert set(names.FABRICS) | {"solo"} == set(get_args(Fabric))
    assert calibrate_run.CalibratePlan().models == calibrate_run.DEFAULT_MODELS


def test_the_time_left_is_what_the_same_took_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = RowsShown(("a", "b") * 3, quiet=True)
    for name, seconds in (("a", 10.0), ("b", 100.0), ("a", 20.0)):
        shown.on_start(name, 1)
        now[0] += seconds
        shown.on_row(a_check(name), name)
    assert shown.seconds_left == 100 + 20 + 100
    assert (about(0), about(3.2), about(95), about(4000)) == ("", "about 4 s", "about 2 min", "about 67 min")
