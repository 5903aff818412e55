"""An engine that is closed, whoever does it and whatever runs: one clear error for each call, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from engine import LLM, SamplingParams
from engine.ranks.ranks import RankContext, Ranks
from tests.engine.rank_jobs import ALL, ROOT, echo, nap
from tests.engine.served import PROMPTS, open_llm

pytestmark = pytest.mark.usefixtures("nothing_is_left_behind")

LONG = SamplingParams(seed=1, max_tokens=170, ignore_eos=True)
SHORT = replace(LONG, max_tokens=30)
WHILE = r"the engine was closed while it ran request_id=\d"
CLOSED = r"these ranks \(.*\) are closed"
AFTER = "this engine was closed: make a new one"


def errors_of(calls: list[Callable[[], object]], during: Callable[[], object]) -> list[str]:
    """What each call raises, repeated in a thread of its own until it does; ``during`` runs here once all are under way."""
    errors: list[str] = []
    started = threading.Barrier(len(calls) + 1)

    def repeat(call: Callable[[], object]) -> None:
        started.wait(20)
        try:
            while True:
                call()
        except BaseException as error:
            errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=repeat, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    started.wait(20)
    during()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "the call never ended"
    return errors


@pytest.mark.parametrize("kind", ALL)
def test_an_engine_is_closed_by_another_thread(talking: Path, kind: tuple[str, int]) -> None:
    llm = open_llm(talking, kind[1], fabric=kind[0])
    calls: list[Callable[[], object]] = [
        lambda: llm.generate(PROMPTS, LONG, use_tqdm=False),
        lambda: list(llm.stream(PROMPTS, LONG)),
        lambda: llm.generate(PROMPTS[0], LONG, use_tqdm=False),
    ]

    def close() -> None:
        time.sleep(0.3)
        llm.close()

    errors = errors_of(calls, close)
    assert len(errors) == 3
    assert all(error.startswith("RuntimeError: ") and "engine was closed" in error for error in errors), errors
    assert any("while it ran request_id=" in error for error in errors)


@pytest.mark.parametrize("kind", ALL)
def test_an_engine_may_be_closed_by_several_threads_at_once(talking: Path, kind: tuple[str, int]) -> None:
    llm = open_llm(talking, kind[1], fabric=kind[0])
    closers = [threading.Thread(target=llm.close) for _ in range(3)]

    def close() -> None:
        time.sleep(0.2)
        for closer in closers:
            closer.start()
        llm.close()
        assert not llm._ranks.healthy
        for closer in closers:
            closer.join(20)
        assert not any(closer.is_alive() for closer in closers)

    assert "engine was closed" in errors_of([lambda: llm.generate(PROMPTS, LONG, use_tqdm=False)], close)[0]
    llm.close()


@pytest.mark.parametrize("kind", ALL)
def test_a_stream_is_told_when_its_engine_is_closed(talking: Path, kind: tuple[str, int]) -> None:
    llm = open_llm(talking, kind[1], fabric=kind[0])
    stream, not_begun = llm.stream(PROMPTS, LONG), llm.stream(PROMPTS, LONG)
    next(stream)
    llm.close()
    for each in (stream, not_begun):
        with pytest.raises(RuntimeError, match=WHILE):
            list(each)
        each.close()
    later: list[Callable[[], Any]] = [lambda: llm.generate(PROMPTS), lambda: llm.stream([1]), lambda: llm.generate([]),
                                      lambda: llm.chat([{"role": "user", "content": "a"}])]
    for call in later:
        with pytest.raises(RuntimeError, match=AFTER):
            call()
    llm.abort(stream.request_ids[0])


def close_by_signal(llm: LLM) -> None:
    """Have a signal handler close the engine while this very thread drives its ranks."""

    def close(number: int, frame: FrameType | None) -> None:
        llm.close()

    before = signal.signal(signal.SIGUSR2, close)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR2))
    timer.start()
    try:
        with pytest.raises(RuntimeError, match="engine was closed"):
            list(iter(lambda: llm.generate(PROMPTS, LONG, use_tqdm=False), None))
    finally:
        timer.join()
        signal.signal(signal.SIGUSR2, before)
    llm.close()


@pytest.mark.parametrize("kind", ALL)
def test_a_signal_handler_may_close_the_engine(talking: Path, kind: tuple[str, int]) -> None:
    close_by_signal(open_llm(talking, kind[1], fabric=kind[0]))


@pytest.mark.parametrize("kind", ALL)
def test_a_signal_handler_may_close_an_engine_on_ranks_of_somebody_else(talking: Path, kind: tuple[str, int]) -> None:
    fabric, tp_size = kind
    with Ranks(tp_size, fabric=fabric) as ranks:
        for _ in range(2):
            close_by_signal(open_llm(talking, tp_size, ranks=ranks))
            assert ranks.healthy
            assert ranks.run(has_core) == [False] * tp_size


@pytest.mark.parametrize("kind", ALL)
def test_a_handler_that_closes_the_engine_as_a_thread_begins_to_drive_ends_its_call(
    talking: Path, monkeypatch: pytest.MonkeyPatch, kind: tuple[str, int]
) -> None:
    """A signal comes when it will: here between the look whether the engine is closed and the first message to the ranks."""
    fabric, tp_size = kind
    with Ranks(tp_size, fabric=fabric) as ranks:
        llm = open_llm(talking, tp_size, ranks=ranks)
        monkeypatch.setattr(llm._driver, "check_usable", llm.close)
        with pytest.raises(RuntimeError, match=WHILE):
            next(llm._driver.follow(llm._admission.admit(PROMPTS, LONG, streams=False)))
        assert ranks.run(has_core) == [False] * tp_size


@pytest.mark.parametrize("kind", ALL)
def test_ranks_are_closed_while_another_thread_waits_for_them(kind: tuple[str, int]) -> None:
    ranks = Ranks(kind[1], fabric=kind[0])
    seconds = 1.0 if kind[0] != "gloo" else 30.0  # only processes can be ended in mid-job

    def close() -> None:
        time.sleep(0.3)
        ranks.close()

    started = time.monotonic()
    (error,) = errors_of([lambda: ranks.run(nap, seconds)], close)
    assert error == f"RanksClosed: these ranks (tp_size={kind[1]}, fabric={kind[0]!r}) are closed"
    assert time.monotonic() - started < 6
    with pytest.raises(RuntimeError, match=CLOSED):
        ranks.run(nap, 0.0)
    with pytest.raises(RuntimeError, match=CLOSED):
        ranks.restart()


def tell(context: RankContext) -> str:
    context.emit("now")
    return "done"


@pytest.mark.parametrize("kind", ALL)
def test_what_hears_of_an_event_may_close_the_ranks(kind: tuple[str, int]) -> None:
    ranks = Ranks(kind[1], fabric=kind[0])
    with contextlib.suppress(RuntimeError):  # a solo rank was done
        ranks.run(tell, on_event=lambda rank, payload: ranks.close())
    with pytest.raises(RuntimeError, match=CLOSED):
        ranks.run(echo, 1)


OPEN_STREAM = """
import sys
from engine import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], tensor_parallel_size=int(sys.argv[3]), fabric=sys.argv[2], device="cpu", num_kv_blocks=64)
    stream = llm.stream([1, 2, 3], SamplingParams(max_tokens=100, ignore_eos=True))
    print(len(next(stream).prompt_token_ids))
"""


@pytest.mark.parametrize("kind", [
    *(pytest.param(*kind.values, id=kind.id, marks=pytest.mark.endurance) for kind in ALL[:-1]), ALL[-1]])
def test_an_interpreter_ends_in_silence_around_an_open_stream(talking: Path, tmp_path: Path, kind: tuple[str, int]) -> None:
    script = tmp_path / "script.py"
    script.write_text(OPEN_STREAM)
    done = subprocess.run([sys.executable, str(script), str(talking), kind[0], str(kind[1])], cwd=ROOT, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


@pytest.mark.parametrize("kind", ALL)
def test_ranks_of_somebody_else_live_on(talking: Path, kind: tuple[str, int]) -> None:
    """Closed in good order, closed over an open stream, broken by ranks that disagree: the next engine starts on them."""
    fabric, tp_size = kind
    expected = None
    with Ranks(tp_size, fabric=fabric) as ranks:
        for _ in range(2):
            with open_llm(talking, tp_size, ranks=ranks) as llm:
                ids = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, SHORT, use_tqdm=False)]
                assert ids == (expected or ids)
                expected = ids
                stream = llm.stream(PROMPTS, SHORT)
                next(stream)
            with pytest.raises(RuntimeError, match=AFTER):
                llm.generate(PROMPTS, SHORT, use_tqdm=False)
            assert ranks.run(has_core) == [False] * tp_size
        if tp_size > 1:
            llm = open_llm(talking, tp_size, ranks=ranks)
            ranks.run(draw_something_else, tp_size - 1)
            with pytest.raises(RuntimeError, match="drew other token ids than rank 0"):
                llm.generate(PROMPTS, LONG, use_tqdm=False)
            assert ranks.healthy
            assert ranks.run(has_core) == [False] * tp_size


def test_ranks_that_do_not_fit_are_refused_and_live_on(talking: Path) -> None:
    with Ranks(2, fabric="threads") as ranks:
        with pytest.raises(ValueError, match="do not fit tensor_parallel_size=3"):
            open_llm(talking, 3, ranks=ranks)
        assert ranks.healthy


def has_core(rank: RankContext) -> bool:
    return "core" in rank.state


def draw_something_else(rank: RankContext, wrong: int) -> None:
    """Job: from now on this rank's tokens are others."""
    if rank.tp.rank == wrong:
        runner = rank.state["core"].runner
        collect = runner.collect
        runner.collect = lambda drawn: [token_id ^ 1 for token_id in collect(drawn)]
