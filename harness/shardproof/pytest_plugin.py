"""The pytest plugin: live ranks for tests, markers, and a run of multigpu tests that compared nothing does not pass.

pytest loads it at every start in every environment that has it, so it imports nothing of ours, and no torch, before it is
asked for, and leaves alone what other projects call by the same names:

* A test asks by taking ``ranks`` or ``tp_size`` where neither its project nor a mark provides them.
* A ``multigpu`` mark is ours where the test takes ``ranks``, or everywhere if the project loads ``harness.plugin``.
* An option that someone else has already stays theirs.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from .packages import foreign

if TYPE_CHECKING:
    from harness.live_ranks import RankPools

_count = pytest.StashKey["Count"]()
_tp_sizes = pytest.StashKey[list[int]]()
_pools = pytest.StashKey["RankPools"]()


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """At once where the project loads ``harness.plugin``: perhaps from a conftest file, too late for the hook below."""
    if pluginmanager.has_plugin("harness.plugin"):
        _add_options(parser)


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(parser: pytest.Parser) -> Generator[None, None, None]:
    """After plugins and conftest files that ask for nothing, which add their options first."""
    yield
    _add_options(parser)


def _add_options(parser: pytest.Parser) -> None:
    """Add those of our options whose names are free."""
    options: dict[str, dict[str, Any]] = {
        "--tp-fabric": {"choices": ("threads", "gloo", "nccl"),
                        "help": "what joins the ranks of the `ranks` fixture (default: gloo on a CPU, nccl with GPUs enough)"},
        "--tp-sizes": {"default": "2", "metavar": "SIZES", "help": "numbers of ranks for tests that take `tp_size`, as 2,3"},
        "--tp-allow-skip": {"action": "store_true", "help": "do not fail a run of multigpu tests that were all skipped"},
    }
    group = parser.getgroup("shardproof", "tensor-parallel tests")
    for name, attributes in options.items():
        if _is_free(parser, name):
            group.addoption(name, dest=_dest(name), **attributes)


def _is_free(parser: pytest.Parser, name: str) -> bool:
    try:
        return name in parser.parse_known_and_unknown_args([name])[1]
    except pytest.UsageError:  # someone's option, which wants a value
        return False


def _dest(name: str) -> str:
    return f"shardproof_{name.lstrip('-')}"


def pytest_configure(config: pytest.Config) -> None:
    """Markers, and sizes that make no sense refused before the run starts."""
    config.addinivalue_line("markers", "multirank: starts several ranks as processes on the CPU (gloo)")
    config.addinivalue_line("markers", "multigpu: needs two GPUs or more (NCCL)")
    config.stash[_tp_sizes] = tp_sizes(config.getoption(_dest("--tp-sizes"), "2"))
    config.stash[_count] = Count()
    config.pluginmanager.register(config.stash[_count])


def tp_sizes(text: str) -> list[int]:
    """``"2,3"`` -> ``[2, 3]``."""
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise pytest.UsageError(f"--tp-sizes={text!r} must be numbers of at least 1 with commas between them, as 2,3")
    return sizes


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give ``tp_size`` its values where neither a fixture nor a mark does."""
    # After all others. pytest has no public way to ask whether a fixture, a mark or another hook provides a name.
    if "tp_size" in metafunc.fixturenames and "tp_size" not in metafunc._arg2fixturedefs:
        sizes: list[int] = metafunc.config.stash[_tp_sizes]
        metafunc.parametrize("tp_size", sizes, scope="session")


@pytest.hookimpl(trylast=True)  # of those that are left when others have deselected theirs
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs more GPUs than there are."""
    if any(_takes_ranks(item) for item in items):
        _check_packages()
    if not (needy := [item for item in items if _needs_gpus(item)]):
        return
    import torch

    if (num_gpus := torch.cuda.device_count()) < 2:
        for item in needy:
            item.add_marker(pytest.mark.skip(reason=f"multigpu needs two GPUs or more, torch sees {num_gpus}"))


def _takes_ranks(item: pytest.Item) -> bool:
    """Whether the item's ``ranks`` is ours, which alone takes ``shardproof_ranks``."""
    return "shardproof_ranks" in getattr(item, "fixturenames", ())


def _needs_gpus(item: pytest.Item) -> bool:
    asked = _takes_ranks(item) or item.config.pluginmanager.has_plugin("harness.plugin")
    return asked and item.get_closest_marker("multigpu") is not None


def _check_packages() -> None:
    if (message := foreign("engine")) is not None:
        raise pytest.UsageError(message)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Say in the report whether the test needed GPUs."""
    report = yield
    report.needs_gpus = _needs_gpus(item)  # type: ignore[attr-defined]  # an attribute of ours, which travels along
    return report


class Count:
    """How many multigpu tests ran and were skipped. By their reports, which xdist's workers send to the process that decides."""

    ran = 0
    skipped = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if getattr(report, "needs_gpus", False):
            self.ran += report.when == "call"
            self.skipped += report.skipped


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run of multigpu tests that were all skipped."""
    config = session.config
    count = config.stash[_count]
    if exitstatus == 0 and count.skipped and not count.ran \
            and not config.getoption(_dest("--tp-allow-skip"), False) \
            and "multigpu" in (config.option.markexpr or "").replace("not multigpu", ""):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(f"FAILED: all {count.skipped} multigpu tests were skipped, so nothing was compared; "
                                "--tp-allow-skip lets that pass", red=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Bound how long this test's ranks may hang."""
    if (pools := item.config.stash.get(_pools, None)) is not None:
        pools.begin_test()


@pytest.fixture(scope="session")
def shardproof_ranks(request: pytest.FixtureRequest) -> Iterator[RankPools]:
    """What ``ranks`` gives, under a name that no project has."""
    _check_packages()
    from harness.live_ranks import RankPools

    pools = request.config.stash[_pools] = RankPools(request.config.getoption(_dest("--tp-fabric"), None))
    try:
        yield pools
    finally:
        pools.close()


@pytest.fixture(scope="session")
def ranks(shardproof_ranks: RankPools) -> RankPools:
    """Live ranks: ``ranks(tp_size).run(job, *arguments)``; the job is an importable function, its first argument the rank."""
    return shardproof_ranks
