"""What tox installs is pinned, within the ranges of pyproject.toml, whose lower bounds are what `oldest` installs."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMED = [Requirement(line) for line in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"])]
CONSTRAINTS = ("requirements/constraints.txt", "requirements/constraints-oldest.txt")
PYTHONS = ("3.11", "3.12")
DEPENDENCIES = {"newest": ["-c requirements/torch.txt", "-e .[dev]"], "pins": ["uv==0.13.9"],
                "oldest": ["-c requirements/constraints-oldest.txt", "-e .[dev]"],
                "lint": ["-c requirements/constraints.txt", "ruff"], "vllm": ["-r requirements/vllm.txt"]}
"""Of the tox environments that do not just take all that is pinned."""


def tox() -> dict[str, dict[str, str]]:
    """Each environment's settings, without those of its base where it has its own."""
    ini = ConfigParser(interpolation=None)
    ini.read(ROOT / "tox.ini")
    return {name.removeprefix("testenv:"): dict(ini["testenv"]) | dict(ini[name]) for name in ini.sections() if ":" in name}


def text_of(name: str) -> str:
    """Nothing where there is no such file."""
    return "".join(path.read_text() for path in ROOT.glob(name))


def pins(text: str, python: str) -> dict[str, Requirement]:
    """Package -> its line, of those that count on Linux under ``python``."""
    lines = [Requirement(line) for line in text.splitlines() if line.strip() and not line.strip().startswith(("#", "-"))]
    where = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux",
             "platform_system": "Linux", "platform_machine": "x86_64"}
    return {canonicalize_name(line.name): line for line in lines if line.marker is None or line.marker.evaluate(where)}


def versions(requirement: Requirement) -> list[Version]:
    return [Version(specifier.version) for specifier in requirement.specifier]


def wrong_with(text: str, python: str) -> Iterator[str]:
    found = pins(text, python)
    for name, pin in found.items():
        if [specifier.operator for specifier in pin.specifier] != ["=="]:
            yield f"{name} is not pinned"
        elif any(version.local for version in versions(pin)):
            yield f"{name} bears a local label"
    for wanted in NAMED:
        pin = found.get(canonicalize_name(wanted.name))
        if pin is None:
            yield f"{wanted.name} is missing"
        elif any(version not in wanted.specifier for version in versions(pin)):
            yield f"{wanted.name} is out of range"
    if "://" in text or any(line.startswith("-") for line in text.splitlines()):
        yield "names a place to install from"


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_every_package_that_the_project_names_is_pinned_within_its_range(name: str, python: str) -> None:
    assert list(wrong_with(text_of(name), python)) == []


@pytest.mark.parametrize(("right", "wrong", "found"), [
    ("\nnumpy==", "\nnumpy>=", "numpy is not pinned"),
    ("\ntorch==2.13.0", "\ntorch==2.13.0+cpu", "torch bears a local label"),
    ("\ntorch==2.13.0", "\ntorch==2.9.0", "torch is out of range"),
    ("\npytest==", "\npytest-of-others==", "pytest is missing"),
    ("\npytest==", "\n--index-url https://example.org\npytest==", "names a place to install from"),
])
def test_a_wrong_pin_would_be_noticed(right: str, wrong: str, found: str) -> None:
    text = text_of("requirements/constraints.txt")
    assert right in text
    assert found in list(wrong_with(text.replace(right, wrong), "3.11"))


def test_what_the_oldest_environment_installs_are_the_lower_bounds() -> None:
    found = pins(text_of("requirements/constraints-oldest.txt"), "3.11")
    bounds = {canonicalize_name(wanted.name): versions(wanted) for wanted in NAMED if wanted.name not in ("torch", "triton")}
    assert {name: versions(found[name]) for name in bounds if name in found} == bounds


def test_the_head_of_each_file_of_constraints_is_the_command_that_made_it() -> None:
    commands = [line.replace(" --upgrade", "") for line in tox().get("pins", {}).get("commands", "").splitlines() if line]
    heads = [text_of(name).splitlines()[1].removeprefix("#").strip() for name in CONSTRAINTS if text_of(name)]
    assert heads
    assert heads == commands


def test_every_tox_environment_is_constrained() -> None:
    usual = ["-c requirements/constraints.txt", "-e .[dev]"]
    found = {name: settings["deps"].strip().splitlines() for name, settings in tox().items()}
    assert found == dict.fromkeys(found, usual) | DEPENDENCIES
