"""The project as an installation has it, without one: its packages and entry points in a folder, to be put on the path."""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
((PLUGIN, PLUGIN_MODULE),) = PROJECT["entry-points"]["pytest11"].items()
"""The name of the plugin's entry point, and the module behind it."""


def install(site: Path) -> Path:
    """Fill the folder ``site``; its ``bin/shardproof`` is the console script."""
    site.mkdir()
    for name in ("engine", "harness", "reference", "reports"):
        (site / name).symlink_to(ROOT / name)
    (site / "shardproof").symlink_to(ROOT / "harness" / "shardproof")
    info = site / "shardproof-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shardproof\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[pytest11]\n{PLUGIN} = {PLUGIN_MODULE}\n")
    # An editable installation of this project, where there is one, would lend its modules to a foreign package.
    (site / "sitecustomize.py").write_text("import sys\nsys.meta_path[:] = [finder for finder in sys.meta_path\n"
                                           "                    if not finder.__module__.startswith('__editable__')]\n")
    module, _, function = PROJECT["scripts"]["shardproof"].partition(":")
    (site / "bin").mkdir()
    (site / "bin" / "shardproof").write_text(f"import sys\nfrom {module} import {function}\n"
                                              f"if __name__ == '__main__':\n    sys.exit({function}())\n")
    return site


def environment(*path: Path) -> dict[str, str]:
    """With these folders on the path, and of pytest's plugins only those that the command line names."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def pytest_command(*arguments: str) -> list[str]:
    """``python -m pytest`` with the plugin as its entry point brings it."""
    return [sys.executable, "-m", "pytest", "-p", PLUGIN, "-p", "no:cacheprovider", *arguments]
