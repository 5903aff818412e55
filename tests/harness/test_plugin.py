"""The pytest plugin, run as its users run it: pytest inside pytest."""

from __future__ import annotations

import pytest


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
