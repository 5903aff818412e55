"""The pytest plugin: live ranks for tests, markers, and a run that compared nothing does not pass.

In this project it is loaded by ``conftest.py``; in others, installed, by its entry point of the same name.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
import torch

from harness.live_ranks import RankPools

_ran = pytest.StashKey[int]()
_skipped = pytest.StashKey[int]()
_tp_sizes = pytest.StashKey[list[int]]()
_pools = pytest.StashKey[RankPools]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("shardproof", "tensor-parallel tests")
    group.addoption("--tp-fabric", choices=("threads", "gloo", "nccl"), default=None,
                    help="what joins the ranks of the `ranks` fixture (default: gloo on a CPU, nccl with GPUs enough)")
    group.addoption("--tp-sizes", default="2", help="numbers of ranks for tests that take `tp_size`, as 2,3")
    group.addoption("--tp-allow-skip", action="store_true",
                    help="do not fail a run of multigpu tests that were all skipped")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "multirank: starts several ranks as processes on the CPU (gloo)")
    config.addinivalue_line("markers", "multigpu: needs two GPUs or more (NCCL)")
    config.stash[_tp_sizes] = tp_sizes(config.getoption("--tp-sizes"))  # here: a wrong one ends the run before it starts
    config.stash[_ran] = config.stash[_skipped] = 0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tp_size" in metafunc.fixturenames and not any("tp_size" in str(mark.args[:1])
                                                      for mark in metafunc.definition.iter_markers("parametrize")):
        sizes: list[int] = metafunc.config.stash[_tp_sizes]
        metafunc.parametrize("tp_size", sizes, scope="session")


def tp_sizes(text: str) -> list[int]:
    """``"2,3"`` -> ``[2, 3]``."""
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise pytest.UsageError(f"--tp-sizes={text!r} must be numbers of at least 1 with commas between them, as 2,3")
    return sizes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    num_gpus = torch.cuda.device_count()
    if num_gpus >= 2:
        return
    for item in items:
        if item.get_closest_marker("multigpu"):
            item.add_marker(pytest.mark.skip(reason=f"multigpu needs two GPUs or more, torch sees {num_gpus}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.get_closest_marker("multigpu"):
        item.config.stash[_ran] += report.when == "call"
        item.config.stash[_skipped] += report.skipped
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    if exitstatus == 0 and config.stash[_skipped] and not config.stash[_ran] and not config.getoption("--tp-allow-skip") \
            and "multigpu" in (config.option.markexpr or "").replace("not multigpu", ""):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(f"FAILED: all {config.stash[_skipped]} multigpu tests were skipped, so nothing was compared; "
                                "--tp-allow-skip lets that pass", red=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if (pools := item.config.stash.get(_pools, None)) is not None:
        pools.begin_test()


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest) -> Iterator[RankPools]:
    """Live ranks: ``ranks(tp_size).run(job, *arguments)``; the job is an importable function, its first argument the rank."""
    pools = request.config.stash[_pools] = RankPools(request.config.getoption("--tp-fabric"))
    try:
        yield pools
    finally:
        pools.close()
