"""Ranks in another interpreter: called by name, answering in plain data, and told apart by how they fail."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]  # some machines have its stubs
import pytest
import torch

from engine.ranks.failures import RankFailure
from engine.ranks.foreign_program import MAGIC, GarbageError, Unpacker, pack
from engine.ranks.foreign_ranks import ForeignRanks, versions

PYTHON = Path(sys.executable)

SERVED = '''
import os, subprocess, sys, time

class Served:
    def __init__(self, tp_rank, tp_size, greeting="hello"):
        self.rank, self.size, self.greeting = tp_rank, tp_size, greeting

    def tell(self, what="", on=None):
        print("printed by", self.rank)
        return {"rank": self.rank, "size": self.size, "said": self.greeting + what, "variable": os.environ.get("SHARDPROOF_TEST")}

    def echo(self, value):
        return value

    def refuse(self, ranks):
        if self.rank in ranks:
            raise ValueError(f"no such model\\non rank {self.rank}")
        time.sleep(60)

    def leave(self, rank):
        if self.rank == rank:
            print("Killed by an assertion of its own")
            sys.stdout.flush()
            os._exit(7)
        time.sleep(60)

    def hang(self):
        time.sleep(60)

    def child(self):
        return [os.getpid(), subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True).pid]

    def scribble(self, fd_of_rank):
        if self.rank == 1:
            os.write(fd_of_rank, b"a progress bar")
        return None

    def close(self):
        pass
'''


@pytest.fixture
def served(tmp_path: Path) -> Path:
    path = tmp_path / "served.py"
    path.write_text(SERVED)
    return path


@pytest.fixture
def ranks(served: Path) -> Iterator[ForeignRanks]:
    with ForeignRanks(PYTHON, served, 2, environ={"SHARDPROOF_TEST": "set"}) as found:
        yield found


def pids(ranks: ForeignRanks) -> list[int]:
    return [rank.process.pid for rank in ranks._ranks]


def assert_gone(processes: list[int], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while left := [pid for pid in processes if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, f"pids={left} are still there"
        time.sleep(0.02)


def test_each_rank_is_called_with_its_own_and_answers(ranks: ForeignRanks) -> None:
    answers = ranks.call("tell", [{"what": " first"}, {"what": " second"}])
    assert [answer["said"] for answer in answers] == ["hello first", "hello second"]
    assert [(answer["rank"], answer["size"], answer["variable"]) for answer in answers] == [(0, 2, "set"), (1, 2, "set")]


def test_tensors_travel_to_the_bit(served: Path) -> None:
    sent: dict[str, Any] = {"value": {"of": [torch.tensor([1.5, float("nan")], dtype=torch.bfloat16), torch.arange(6).view(2, 3)],
                                      "none": torch.empty(0, 3), "one": torch.tensor(7), "text": "ä", "number": 1}}
    with ForeignRanks(PYTHON, served, 1) as ranks:  # each rank that gets a tensor imports torch
        answers = ranks.call("echo", sent)
    for answer in answers:
        assert answer["text"] == "ä"
        assert answer["number"] == 1
        for found, expected in zip([*answer["of"], answer["none"], answer["one"]],
                                   [*sent["value"]["of"], sent["value"]["none"], sent["value"]["one"]], strict=True):
            assert found.dtype == expected.dtype
            assert found.shape == expected.shape
            assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_what_is_no_plain_data_is_refused_on_both_sides(ranks: ForeignRanks) -> None:
    with pytest.raises(TypeError, match="type=PosixPath is no plain data"):
        ranks.call("echo", {"value": Path()})


def test_messages_come_whole_however_they_are_cut() -> None:
    data = pack({"a": torch.arange(3)}) + pack([1, "two"])
    unpacker = Unpacker()
    found = [message for at in range(0, len(data), 5) for message in unpacker.feed(data[at : at + 5])]
    assert found[0]["a"].tolist() == [0, 1, 2]
    assert found[1] == [1, "two"]


def test_a_message_that_was_taken_does_not_come_again() -> None:
    unpacker = Unpacker()
    assert next(unpacker.feed(pack({"number": 1}) + pack({"number": 2}))) == {"number": 1}
    assert list(unpacker.feed(b"")) == [{"number": 2}]


@pytest.mark.parametrize("garbage", [b"INFO 11-29", MAGIC[:2] + b"xy", b"\n"])
def test_garbage_is_no_message(garbage: bytes) -> None:
    with pytest.raises(GarbageError, match="no message"):
        list(Unpacker().feed(garbage))


def test_where_all_ranks_refuse_alike_they_go_on(ranks: ForeignRanks) -> None:
    with pytest.raises(RankFailure) as caught:
        ranks.call("refuse", {"ranks": [0, 1]})
    assert [error.summary for error in caught.value.failures.values()] == [
        f"ValueError: no such model on rank {rank}" for rank in range(2)]
    assert "in refuse" in caught.value.failures[1].traceback
    assert ranks.healthy
    assert len(ranks.call("tell")) == 2


def test_the_first_failure_ends_all_ranks(ranks: ForeignRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.ranks.foreign_ranks._GRACE_S", 0.2)
    processes = pids(ranks)
    with pytest.raises(RankFailure) as caught:
        ranks.call("refuse", {"ranks": [1]})
    assert [(error.rank, error.kind, error.consequence) for error in caught.value.failures.values()] == [
        (1, "raised", False), (0, "stuck", True)]
    assert not ranks.healthy
    assert_gone(processes)


def test_a_rank_that_dies_is_told_with_what_it_printed_last(ranks: ForeignRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.ranks.foreign_ranks._GRACE_S", 0.2)
    processes = pids(ranks)
    with pytest.raises(RankFailure) as caught:
        ranks.call("leave", {"rank": 1})
    first = next(iter(caught.value.failures.values()))
    assert (first.rank, first.kind) == (1, "died")
    assert first.summary == "exited with code 7; it printed last: Killed by an assertion of its own"
    assert_gone(processes)


def test_a_rank_that_hangs_is_told_with_its_stack(ranks: ForeignRanks) -> None:
    processes = pids(ranks)
    with pytest.raises(RankFailure, match=r"no answer within timeout_s=0\.3") as caught:
        ranks.call("hang", timeout_s=0.3)
    assert {error.kind for error in caught.value.failures.values()} == {"stuck"}
    assert "in hang" in caught.value.failures[0].stacks
    assert_gone(processes)


def test_what_somebody_prints_into_the_socket_is_told(ranks: ForeignRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.ranks.foreign_ranks._GRACE_S", 0.2)
    fds = [psutil.Process(pid).cmdline()[-2] for pid in pids(ranks)]
    with pytest.raises(RankFailure) as caught:
        ranks.call("scribble", [{"fd_of_rank": int(fd)} for fd in fds])
    assert "no message: b'a progress bar" in caught.value.failures[1].summary
    assert not ranks.healthy


def test_what_ranks_have_started_ends_with_them(served: Path) -> None:
    with ForeignRanks(PYTHON, served, 1) as ranks:
        ((rank, child),) = ranks.call("child")
        assert psutil.pid_exists(child)
        ranks.kill()
        assert_gone([rank, child])


def test_ranks_that_are_forgotten_or_whose_driver_is_killed_are_gone(served: Path) -> None:
    code = (f"import sys, time; sys.path.insert(0, {os.getcwd()!r})\n"
            "from pathlib import Path\nfrom engine.ranks.foreign_ranks import ForeignRanks\n"
            f"ranks = ForeignRanks(Path(sys.executable), Path({str(served)!r}), 1)\n"
            "print(ranks._ranks[0].process.pid, flush=True)\nranks.call('hang')")
    with psutil.Popen([sys.executable, "-c", code], stdout=-1) as driver:
        pid = int(driver.stdout.readline())
        assert psutil.pid_exists(pid)
        driver.send_signal(signal.SIGKILL)
        assert_gone([pid])
    gc.collect()


def test_what_can_not_start_says_why(tmp_path: Path, served: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module")
    with pytest.raises(RankFailure) as caught:
        ForeignRanks(PYTHON, broken, 2)
    assert caught.value.failures[0].summary == "ModuleNotFoundError: No module named 'no_such_module'"
    with pytest.raises(FileNotFoundError):
        ForeignRanks(tmp_path / "python", served, 1)


def test_versions_are_told_without_an_import(tmp_path: Path) -> None:
    found = versions(PYTHON, ["torch", "no-such-package"])
    assert found == {"python": sys.version.split()[0], "torch": torch.__version__, "no-such-package": None}
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho this is no python\n")
    other.chmod(0o755)
    with pytest.raises(ValueError, match=r"does not answer as a Python of 3\.10 or later does: this is no python"):
        versions(other, ["torch"])
