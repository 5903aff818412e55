"""What a fault is, and how it gets into a rank and out again.

A fault is a bug that was found in public in some tensor-parallel engine, planted in this one while it runs: functions of
classes and modules are replaced inside the rank's process, before the subject is loaded, and put back afterwards. The engine
has no switch for any of it. What goes wrong in the driver, which starts and watches the ranks, is planted there.

Ranks must be processes of their own. Threads share their classes, so a patch of one rank would be a patch of all.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from engine.parallel.group import TPGroup
from engine.parallel.ranks import RankContext
from harness.classify import Kind

Make = Callable[[Any], Any]
LOAD = "load"
"""Stands among the checks for a subject that refuses to load."""


class Patches:
    """Replaces attributes of classes and modules until it is closed."""

    def __init__(self) -> None:
        self._undo = ExitStack()

    def replace(self, owner: Any, name: str, make: Make) -> None:
        """``owner.name`` becomes ``make(what it was)``. ``owner`` must define it itself, not inherit or re-export it."""
        before = vars(owner)[name]
        self._undo.callback(setattr, owner, name, before)
        setattr(owner, name, make(before))

    def on_close(self, clean_up: Callable[[], None]) -> None:
        """Call this when the fault is taken out, after what was replaced later has been put back."""
        self._undo.callback(clean_up)

    def close(self) -> None:
        """Put everything back, the latest first."""
        self._undo.close()


Plant = Callable[[Patches, TPGroup], None]
PlantInDriver = Callable[[Patches], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A bug to plant; without ``checks`` a control: a change that is right, or mere rounding, and must stay green."""

    name: str
    rows: tuple[int, ...]
    """Rows of the catalogue of public bugs that it recreates; none for bugs of our own making."""
    what: str
    plant: Plant | None
    """Patches one rank, whose group it is given. All ranks plant, each for itself."""
    plant_in_driver: PlantInDriver | None
    """Patches the driver, while it runs the checks."""
    layout: str
    """The model of ``layouts.LAYOUTS`` on which it is visible."""
    tp_sizes: tuple[int, ...]
    """Where it is visible."""
    checks: tuple[str, ...]
    """Those that must go red."""
    module: str | None = None
    """The first module that goes wrong, if one does."""
    effect: Kind | None = None
    """What arithmetic tells of it, if it does."""
    device: str = "cpu"
    """``cuda`` for what only a captured graph can get wrong."""

    @property
    def is_control(self) -> bool:
        return not self.checks

    @property
    def layer(self) -> str:
        """The part of the engine that is patched: the name of the file that plants it."""
        function = self.plant or self.plant_in_driver
        return function.__module__.rpartition(".")[2] if function else ""


FAULTS: dict[str, Fault] = {}
"""By name, in the order in which they are defined."""


def fault(*, rows: tuple[int, ...] = (), layout: str = "llama", tp_sizes: tuple[int, ...] = (2,), checks: tuple[str, ...],
          module: str | None = None, effect: Kind | None = None, device: str = "cpu") -> Callable[[Plant], Plant]:
    """Register a function that plants a fault in a rank. Its name is the fault's, its docstring says what goes wrong."""

    def register(plant: Plant) -> Plant:
        _register(plant.__name__, plant.__doc__, rows=rows, plant=plant, plant_in_driver=None, layout=layout, tp_sizes=tp_sizes,
                  checks=checks, module=module, effect=effect, device=device)
        return plant

    return register


def driver_fault(*, rows: tuple[int, ...] = (), checks: tuple[str, ...]) -> Callable[[PlantInDriver], PlantInDriver]:
    """Register a function that plants a fault in the driver."""

    def register(plant: PlantInDriver) -> PlantInDriver:
        _register(plant.__name__, plant.__doc__, rows=rows, plant=None, plant_in_driver=plant, layout="llama", tp_sizes=(2,),
                  checks=checks, module=None, effect=None)
        return plant

    return register


def _register(function_name: str, what: str | None, **fields: Any) -> None:
    name = function_name.replace("_", "-")
    assert what, f"fault {name} must say what it does"
    assert name not in FAULTS, f"there are two faults of the name {name}"
    FAULTS[name] = Fault(name=name, what=" ".join(what.split()), **fields)


def control(*, rows: tuple[int, ...] = (), layout: str = "llama", tp_sizes: tuple[int, ...] = (2,)) -> Callable[[Plant], Plant]:
    """Register a change that no check may mind."""
    return fault(rows=rows, layout=layout, tp_sizes=tp_sizes, checks=())


def plant(rank: RankContext, name: str) -> None:
    """Job: plant a fault in this rank, until ``uproot``. A patch that fails half way is taken back."""
    if rank.tp.fabric == "threads":
        raise ValueError("fabric=threads: ranks that are threads share what a fault patches, take processes (gloo, nccl)")
    planted = FAULTS[name].plant
    if planted is None:
        return
    patches = Patches()
    try:
        planted(patches, rank.tp)
    except BaseException:
        patches.close()
        raise
    rank.state["patches"] = patches


def uproot(rank: RankContext) -> None:
    """Job: take the fault out again, and with it the subject that was built under it."""
    rank.state.pop("subject", None)
    patches: Patches | None = rank.state.pop("patches", None)
    if patches is not None:
        patches.close()
