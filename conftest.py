"""Makes the harness's pytest plugin known when the tests run from a checkout."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Generator, Iterator

import pytest

pytest_plugins = ["harness.plugin", "pytester"]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Thousands of tests and what they import are no garbage: to look through them takes half a second each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def interpreters_of_tests_are_no_workers() -> None:
    """A pytest that a test starts is not one of the workers that share this run, though it inherits their environment."""
    os.environ.pop("PYTEST_XDIST_WORKER", None)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell that starts a process in the background has it ignore Ctrl-C, and what that starts too: here it must not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
