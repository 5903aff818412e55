"""What a fault is, and how it gets into a rank and out again.

A fault is a bug that was found in public in some tensor-parallel engine, planted in this one while it runs: functions of
classes and modules are replaced inside the rank's process, before the subject is loaded, and put back afterwards. The engine
has no switch for any of it. What goes wrong in the driver, which takes requests, makes texts and watches the ranks, is planted
there, and what both read, in both.

Ranks must be processes of their own. Threads share their classes, so a patch of one rank would be a patch of all.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Literal, TypeVar

from engine.parallel.group import SoloGroup, TPGroup
from engine.ranks.ranks import RankContext
from harness.verification.classify import Kind

Make = Callable[[Any], Any]
Around = TypeVar("Around", bound=Callable[..., Any])
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

    def around(self, owner: Any, name: str) -> Callable[[Around], Around]:
        """Decorator: ``owner.name(...)`` becomes a call of the function below it, whose first argument is what it was."""

        def put(function: Around) -> Around:
            self.replace(owner, name, lambda original: lambda *args, **kwargs: function(original, *args, **kwargs))
            return function

        return put

    def on_close(self, clean_up: Callable[[], None]) -> None:
        """Call this when the fault is taken out, after what was replaced later has been put back."""
        self._undo.callback(clean_up)

    def close(self) -> None:
        """Put everything back, the latest first."""
        self._undo.close()


Plant = Callable[[Patches, TPGroup], object]
"""Patches one process. A rank gives its group; the driver, which has no place in it, one of its own."""
Where = Literal["ranks", "driver", "both"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A bug to plant; without ``checks`` a control: a change that is right, or mere rounding, and must stay green."""

    name: str
    what: str
    plant: Plant
    checks: tuple[str, ...]
    """Those that must see it, or ``LOAD`` where the model must not even load."""
    rows: tuple[int, ...] = ()
    """Rows of the catalogue of public bugs (``catalogue.BUGS``) that it recreates; none for bugs of our own making."""
    where: Where = "ranks"
    """Who plants: all ranks, each for itself, the driver while it runs the checks, or all of them."""
    layout: str = "llama"
    """The model of ``layouts.LAYOUTS`` on which it is visible."""
    tp_sizes: tuple[int, ...] = (2,)
    """Where it is visible."""
    module: str | None = None
    """The first module that goes wrong, where localisation must place it, if one does."""
    effect: Kind | None = None
    """What arithmetic tells of it, if it does."""
    device: str = "cpu"
    """``cuda`` for what only a captured graph can get wrong."""
    field: str = ""
    """What it gets wrong, where that is a field of one of the engine's dataclasses: ``SamplingParams.top_k``."""

    @property
    def is_control(self) -> bool:
        return not self.checks

    @property
    def layer(self) -> str:
        """The part of the engine that is patched: the name of the file that plants it."""
        return self.plant.__module__.rpartition(".")[2]


FAULTS: dict[str, Fault] = {}
"""By name, in the order in which they are defined."""


def fault(*, name: str | None = None, what: str | None = None, **fields: Any) -> Callable[[Plant], Plant]:
    """Register a function that plants a fault. Its name is the fault's, its docstring says what goes wrong.

    Args:
        name: instead of the function's, for a function that a table makes.
        what: instead of its docstring, likewise.
        **fields: the other fields of ``Fault``.
    """

    def register(plant: Plant) -> Plant:
        own_name, own_what = name or plant.__name__.replace("_", "-"), what or plant.__doc__
        assert own_what, f"fault {own_name} must say what it does"
        assert own_name not in FAULTS, f"there are two faults of the name {own_name}"
        FAULTS[own_name] = Fault(name=own_name, what=" ".join(own_what.split()), plant=plant, **fields)
        return plant

    return register


control = partial(fault, checks=())
"""Registers a change that no check may mind."""


def around(owner: Any, name: str) -> Callable[[Callable[..., Any]], Plant]:
    """Makes a plant of a function: ``owner.name(...)`` becomes a call of it, whose first argument is what it was."""
    return lambda function: wraps(function)(lambda patch, tp: patch.around(owner, name)(function))


def instead(owner: Any, name: str) -> Callable[[Callable[..., Any]], Plant]:
    """Makes a plant of a function, which stands in the place of ``owner.name``."""
    return lambda function: wraps(function)(lambda patch, tp: patch.replace(owner, name, lambda original: function))


def plant(rank: RankContext, name: str) -> None:
    """Job: plant a fault in this rank, until ``remove``."""
    if rank.tp.fabric == "threads":
        raise ValueError("fabric=threads: ranks that are threads share what a fault patches, take processes (gloo, nccl)")
    if FAULTS[name].where != "driver":
        rank.state["patches"] = planted(FAULTS[name], rank.tp)


def planted_in_driver(fault: Fault) -> Patches:
    """What of a fault is the driver's, planted in this process until it is closed."""
    return planted(fault, SoloGroup()) if fault.where != "ranks" else Patches()


def planted(fault: Fault, tp: TPGroup) -> Patches:
    """The fault, planted in this process until it is closed. One that fails half way is taken back."""
    patches = Patches()
    try:
        fault.plant(patches, tp)
    except BaseException:
        patches.close()
        raise
    return patches


def remove(rank: RankContext) -> None:
    """Job: take the fault out again, and with it the model that was built under it."""
    rank.state.pop("subject", None)
    patches: Patches | None = rank.state.pop("patches", None)
    if patches is not None:
        patches.close()
