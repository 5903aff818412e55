"""``engine``, ``harness``, ``reference`` and ``reports`` are names that a user's own modules may have: whose does Python find?"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def foreign(*names: str) -> str | None:
    """One line about the first package, ``harness`` or one of ``names``, that is somebody else's; None if all are ours.

    Ours are ``harness`` with this package in it, and what lies beside it: another checkout, found first, is whole.
    """
    harness = _found("harness")
    if harness is not None and (harness / "shardproof" / Path(__file__).name).is_file():
        root = harness.parent
    else:
        root = next(folder for folder in Path(__file__).resolve().parents if (folder / "harness" / "shardproof").is_dir())
    for name in ("harness", *names):
        if (found := _found(name)) != root / name:
            return (f"package={name} is found at {found or 'no place'}, but Shardproof's own is {root / name}: rename the other "
                    "one, or run from another folder, or with `python -P` (PYTHONSAFEPATH=1), which leaves the current one out")
    return None


def _found(name: str) -> Path | None:
    """The folder of a package, or the file of a module, that ``import name`` gives."""
    spec = find_spec(name)
    if spec is None:
        return None
    place = next(iter(spec.submodule_search_locations or ()), spec.origin)
    return None if place is None else Path(place).resolve()
