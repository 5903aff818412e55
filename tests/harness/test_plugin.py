"""The pytest plugin, run as its users run it: pytest inside pytest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.installed import PLUGIN, ROOT, environment, install, pytest_command


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest("")
    return pytester


def run(project: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return project.runpytest_inprocess("-p", "harness.plugin", "-p", "no:cacheprovider", *arguments)


def test_a_multigpu_run_that_was_skipped_whole_fails(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    project.makepyfile("import pytest\n@pytest.mark.multigpu\ndef test_a(): pass\n")
    result = run(project, "-m", "multigpu", "-rs")
    result.assert_outcomes(skipped=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines_random(["*multigpu needs two GPUs or more, torch sees 1*", "*nothing was compared*"])


def test_a_skipped_multigpu_run_passes_where_that_is_allowed(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    project.makepyfile("import pytest\n@pytest.mark.multigpu\ndef test_a(): pass\n")
    assert run(project, "-m", "multigpu", "--tp-allow-skip").ret == pytest.ExitCode.OK


def test_multigpu_tests_run_where_the_gpus_are(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    project.makepyfile("import pytest\n@pytest.mark.multigpu\ndef test_a(): pass\n")
    run(project, "-m", "multigpu").assert_outcomes(passed=1)


def test_tests_without_gpus_pass_beside_skipped_ones(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    project.makepyfile("import pytest\n@pytest.mark.multigpu\ndef test_a(): pass\ndef test_b(): pass\n")
    result = run(project)
    result.assert_outcomes(passed=1, skipped=1)
    assert result.ret == pytest.ExitCode.OK


def test_tp_sizes_parametrise_a_test_that_takes_tp_size(project: pytest.Pytester) -> None:
    project.makepyfile("""
        def size_of(rank):
            return rank.tp.size
        def test_all_ranks_answer(ranks, tp_size):
            assert ranks(tp_size, fabric="threads").run(size_of) == [tp_size] * tp_size
    """)
    run(project, "--tp-sizes", "2,3").assert_outcomes(passed=2)


@pytest.mark.parametrize("sizes", ["0", "two", "2,", ""])
def test_tp_sizes_that_are_no_sizes_are_refused(project: pytest.Pytester, sizes: str) -> None:
    project.makepyfile("def test_a(tp_size): pass\n")
    result = run(project, f"--tp-sizes={sizes}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--tp-sizes='{sizes}' must be numbers*"])

# --- installed: projects that asked for nothing, and what asks ---


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("installed") / "site")


@pytest.fixture
def installed(pytester: pytest.Pytester, site: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pytest.RunResult]:
    """Runs pytest with these arguments as in an environment that has the project."""
    for name, value in environment(site).items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str) -> pytest.RunResult:
        return pytester.run(*pytest_command(*arguments))

    return run


Installed = Callable[..., pytest.RunResult]
OWN_SIZES = {
    "a fixture of the conftest": (
        "import pytest\n@pytest.fixture(params=[5, 7])\ndef tp_size(request): return request.param\n",
        "def test_a(tp_size): assert tp_size in (5, 7)\n"),
    "a fixture of the module": (
        "", "import pytest\n@pytest.fixture(params=[5, 7])\ndef tp_size(request): return request.param\n"
            "def test_a(tp_size): assert tp_size in (5, 7)\n"),
    "a fixture of the class": (
        "", "import pytest\nclass TestA:\n"
            "    @pytest.fixture(params=[5, 7])\n    def tp_size(self, request): return request.param\n"
            "    def test_a(self, tp_size): assert tp_size in (5, 7)\n"),
    "a fixture of fixtures": (
        "import pytest\n@pytest.fixture\ndef tp_size(num_ranks): return num_ranks\n"
        "@pytest.fixture(params=[5, 7])\ndef num_ranks(request): return request.param\n",
        "import pytest\n@pytest.fixture\ndef layer(tp_size): return tp_size\n"
        "def test_a(layer): assert layer in (5, 7)\n"),
    "a mark with a tuple of names": (
        "", "import pytest\n@pytest.mark.parametrize(('tp_size', 'x'), [(5, 0), (7, 0)])\n"
            "def test_a(tp_size, x): assert tp_size in (5, 7)\n"),
    "a mark with names in one string": (
        "", "import pytest\n@pytest.mark.parametrize('x, tp_size', [(0, 5), (0, 7)])\n"
            "def test_a(tp_size, x): assert tp_size in (5, 7)\n"),
    "a mark with its names by keyword": (
        "", "import pytest\n@pytest.mark.parametrize(argnames='tp_size', argvalues=[5, 7])\n"
            "def test_a(tp_size): assert tp_size in (5, 7)\n"),
    "a mark of the class": (
        "", "import pytest\n@pytest.mark.parametrize('tp_size', [5, 7])\nclass TestA:\n"
            "    def test_a(self, tp_size): assert tp_size in (5, 7)\n"),
    "a mark, indirectly": (
        "", "import pytest\n@pytest.fixture\ndef tp_size(request): return request.param + 1\n"
            "@pytest.mark.parametrize('tp_size', [4, 6], indirect=True)\ndef test_a(tp_size): assert tp_size in (5, 7)\n"),
    "a hook of the conftest": (
        "def pytest_generate_tests(metafunc):\n    if 'tp_size' in metafunc.fixturenames:\n"
        "        metafunc.parametrize('tp_size', [5, 7])\n",
        "def test_a(tp_size): assert tp_size in (5, 7)\n"),
}
"""(conftest.py, test module) of projects that bring their own ``tp_size``, which is 5 and 7."""


@pytest.mark.parametrize("own", OWN_SIZES)
def test_a_tp_size_of_the_projects_own_stays(own: str, pytester: pytest.Pytester, installed: Installed) -> None:
    conftest, module = OWN_SIZES[own]
    pytester.makeconftest(conftest)
    pytester.makepyfile(module)
    installed().assert_outcomes(passed=2)


def test_ranks_of_the_projects_own_stay(pytester: pytest.Pytester, installed: Installed) -> None:
    pytester.makeconftest("import pytest\n@pytest.fixture\ndef ranks(): return 'own'\n")
    pytester.makepyfile("def test_a(ranks): assert ranks == 'own'\n")
    installed().assert_outcomes(passed=1)


def test_multigpu_marks_and_options_of_the_projects_own_stay(pytester: pytest.Pytester, installed: Installed) -> None:
    pytester.makeini("[pytest]\nmarkers = multigpu: means something else here\naddopts = --strict-markers\n")
    pytester.makeconftest("""
        def pytest_addoption(parser):
            parser.addoption("--tp-sizes", default="many", type=str.upper)
            parser.addoption("--tp-fabric", action="store_true")
    """)
    pytester.makepyfile("""
        import pytest
        @pytest.mark.multigpu
        def test_a(pytestconfig):
            assert pytestconfig.getoption("--tp-sizes") == "A FEW"
            assert pytestconfig.getoption("--tp-fabric") is True
    """)
    result = installed("-m", "multigpu", "--tp-fabric", "--tp-sizes", "a few")
    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.OK


def test_a_project_that_asks_for_nothing_pays_nothing(pytester: pytest.Pytester, installed: Installed) -> None:
    pytester.makepyfile(f"""
        import sys
        import pytest
        @pytest.mark.multigpu
        def test_a(tmp_path, pytestconfig):
            assert pytestconfig.pluginmanager.hasplugin({PLUGIN!r})
            assert sys.modules.keys() & {{"torch", "numpy", "hypothesis", "engine", "harness", "reference", "reports"}} == set()
    """)
    installed().assert_outcomes(passed=1)


def test_a_project_that_asks_for_nothing_has_packages_of_these_names(pytester: pytest.Pytester, installed: Installed) -> None:
    for name in ("engine", "harness", "reference", "reports"):
        pytester.makepyfile(**{f"{name}/__init__": "mine = True"})
    pytester.makepyfile("import engine, harness, reference, reports\n"
                        "def test_a(): assert engine.mine and harness.mine and reference.mine and reports.mine\n")
    installed().assert_outcomes(passed=1)


TAKES_RANKS = """
    def size_of(rank):
        return rank.tp.size
    def test_all_ranks_answer(ranks, tp_size):
        assert ranks(tp_size, fabric="threads").run(size_of) == [tp_size] * tp_size
"""


@pytest.mark.parametrize("conftest", ["", pytest.param('pytest_plugins = ["harness.plugin"]\n', marks=pytest.mark.endurance)])
def test_a_plain_project_takes_ranks_of_its_sizes(conftest: str, pytester: pytest.Pytester, installed: Installed) -> None:
    pytester.makeconftest(conftest)
    pytester.makepyfile(**{"reports/__init__": "mine = True"}, test_ranks=TAKES_RANKS)  # reports has no part in this
    installed("--tp-sizes", "2,3").assert_outcomes(passed=2)


@pytest.mark.parametrize("name", ["engine", "harness"])
def test_ranks_that_would_run_someone_elses_package_are_refused_in_a_line(name: str, pytester: pytest.Pytester,
                                                                          installed: Installed) -> None:
    found = pytester.makepyfile(**{f"{name}/__init__": "mine = True"}).parent
    pytester.makepyfile(test_ranks=TAKES_RANKS)
    result = installed()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = filter(None, result.errlines)
    assert line.startswith(f"ERROR: package={name} is found at {found}, but Shardproof's own is {ROOT / name}: rename")


def test_ranks_taken_in_the_middle_of_a_test_are_refused_likewise(pytester: pytest.Pytester, installed: Installed) -> None:
    pytester.makepyfile(**{"engine/__init__": "mine = True"},
                        test_ranks="def test_a(request): request.getfixturevalue('ranks')\ndef test_b(): pass\n")
    result = installed()
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["*UsageError: package=engine is found at *"])


@pytest.mark.parametrize(("conftest", "arguments", "workers"), [
    ("", "ranks", ()), ('pytest_plugins = ["harness.plugin"]\n', "", ("-p", "xdist", "-n", "2")),
    pytest.param("", "ranks", ("-p", "xdist", "-n", "2"), marks=pytest.mark.endurance),
    pytest.param('pytest_plugins = ["harness.plugin"]\n', "", (), marks=pytest.mark.endurance),
], ids=["by a test that takes ranks", "by loading harness.plugin, two workers", "by a test that takes ranks, two workers",
        "by loading harness.plugin"])
def test_who_asks_has_multigpu_tests_skipped_below_two_gpus(conftest: str, arguments: str, workers: tuple[str, ...],
                                                            pytester: pytest.Pytester, installed: Installed,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    pytester.makeconftest(conftest)
    pytester.makepyfile(f"import pytest\n@pytest.mark.multigpu\ndef test_a({arguments}): pass\n")
    result = installed("-m", "multigpu", "-rs", *workers)
    result.assert_outcomes(skipped=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines_random(["*multigpu needs two GPUs or more, torch sees 0*", "*nothing was compared*"])
