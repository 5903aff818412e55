"""Is every way in which a rank can fail reported for what it is, with nothing left behind and a next job that works?

A rank raises, leaves, is killed or hangs, while it loads, in prefill or in decode. Each time the report must name the rank,
the phase and what happened, a hang also the collective that the others wait in; processes, listening ports and shared memory
must be gone; and restarted ranks must generate what ranks did before. On a tiny model of its own, two ranks, processes for all
of it and threads for what threads can do: raise.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import psutil

from harness.checks.base import Check, CheckContext, Outcome, Whole
from harness.subjects.base import Placement, Subject, SubjectFailure
from harness.subjects.rank import Rank
from reference.checkpoints import random_checkpoint

TP_SIZE = 2
VICTIM = 1
HANG_S = 2.0
"""Deadline of a job in which a rank hangs."""
SLACK_S = 15.0
"""How much later than it could a report may come, on a machine that does other things too."""
GONE_S = 5.0
"""How long what is left of a rank may take to go away."""
_LISTEN = "0A"  # a state of TCP, as the kernel's tables have it

How = Literal["raise", "exit", "kill", "hang"]
Phase = Literal["load", "prefill", "decode"]
REPORTED: dict[How, tuple[str, str]] = {
    "raise": ("raised", "RuntimeError: planted"), "exit": ("died", "exited with code 7"),
    "kill": ("died", "killed by SIGKILL"), "hang": ("stuck", "stuck outside any collective"),
}
"""What the report must call it, and say."""

OPTIONS = {"block_size": 4, "num_kv_blocks": 16, "max_num_batched_tokens": 16, "max_num_seqs": 4}
CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LifecycleCase:
    """How a rank fails, where, and among which ranks."""

    fabric: str
    how: How
    phase: Phase

    def __str__(self) -> str:
        return f"rank {VICTIM} of {TP_SIZE} ({self.fabric}) {self.how}s in {self.phase}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traces:
    """What a live rank has of the machine."""

    pid: int
    started: float
    sockets: tuple[tuple[int, int], ...]
    """(inode, port) of those that listen. Another program may listen at the same port, of another address, or later."""
    shared_memory: tuple[str, ...]


def all_cases(fabric: str) -> list[LifecycleCase]:
    """Every failure in every phase on processes; on threads an exception."""
    hows: tuple[How, ...] = ("raise", "exit", "kill", "hang") if fabric != "threads" else ("raise",)
    phases: tuple[Phase, ...] = ("load", "prefill", "decode")
    return [LifecycleCase(fabric=fabric, how=how, phase=phase) for phase in phases for how in hows]


def check_lifecycle(context: CheckContext) -> Outcome:
    """Every case on ranks of its own."""
    if context.tp_size != TP_SIZE:
        return Outcome(cases=0, compared=0, skipped=f"it is for tp_size={TP_SIZE} alone (--tp {TP_SIZE}): how a rank fails does "
                                                    "not depend on how many there are")
    processes = "nccl" if context.subject.fabric == "nccl" else "gloo"
    cases = [*all_cases("threads"), *all_cases(processes)] if context.case is None else [LifecycleCase(**context.case)]
    device = "cuda" if processes == "nccl" else "cpu"
    with tempfile.TemporaryDirectory(prefix="shardproof-") as scratch:
        folder = random_checkpoint(Path(scratch) / "model", CONFIG, seed=context.seed)
        for fabric in dict.fromkeys(case.fabric for case in cases):
            problem = run_cases(type(context.subject), [case for case in cases if case.fabric == fabric], folder, device=device)
            if problem is not None:
                case, what = problem
                return Outcome(cases=len(cases), compared=0, rank=VICTIM, module=f"ranks ({case.fabric})", case=asdict(case),
                               finding=f"{case}: {what}")
    return Outcome(cases=len(cases), compared=len(cases))


def run_cases(make: type[Subject], cases: Sequence[LifecycleCase], folder: Path, *,
              device: str = "cpu") -> tuple[LifecycleCase, str] | None:
    """The first case that goes wrong, and how. All of one fabric."""
    before = _listening(os.getpid())
    with make(Placement(tp_size=TP_SIZE, fabric=cases[0].fabric, device=device, auto_restart=False)) as subject:
        expected = subject.run(load_and_generate, folder)
        for case in cases:
            traces = subject.run(traces_of)
            started = time.monotonic()
            try:
                subject.run(load_and_generate, folder, case, timeout_s=HANG_S if case.how == "hang" else None)
            except SubjectFailure as failure:
                problem = wrong_with(failure, case, time.monotonic() - started)
            else:
                problem = "the job succeeded, and nobody noticed"
            if not subject.is_healthy:
                # Threads are this process: they leave what it has.
                problem = problem or (left_behind(traces) if case.fabric != "threads" else None)
                subject.restart()
            if problem is None and subject.run(load_and_generate, folder) != expected:
                problem = "the next job gave other token ids than the one before"
            if problem is not None:
                return case, problem
        traces = subject.run(traces_of)
    problem = left_behind(traces) if cases[-1].fabric != "threads" else None
    if problem is None and (sockets := _listening(os.getpid()) - before):
        problem = f"this process still listens on ports {sorted(port for _, port in sockets)}"
    return None if problem is None else (cases[-1], f"after the ranks were closed, {problem}")


def wrong_with(failure: SubjectFailure, case: LifecycleCase, seconds: float) -> str | None:
    """What the report leaves out or gets wrong."""
    kind, summary = REPORTED[case.how]
    late = SLACK_S + (HANG_S if case.how == "hang" else 0)
    error = failure.failures.get(VICTIM)
    if error is None:
        return f"the report does not name rank {VICTIM}: {_first_line(failure)}"
    if error.consequence:
        return f"the report takes rank {VICTIM} for a consequence of another: {_first_line(failure)}"
    if (blamed := [rank for rank, other in failure.failures.items() if rank != VICTIM and not other.consequence]):
        return f"the report blames ranks {blamed} too: {_first_line(failure)}"
    if error.kind != kind or summary not in error.summary:
        return f"reported as {error.kind}, {error.summary!r}; it is {kind}, {summary!r}"
    if error.phase != case.phase:
        return f"reported in phase {error.phase!r}, it was in {case.phase!r}"
    if seconds > late:
        return f"reported after {seconds:.1f} s, later than {late:g} s"
    if case.how == "hang":
        named = " ".join(failure.divergence)
        if f"rank {VICTIM} never entered" not in named:
            return f"the report does not say which collective rank {VICTIM} never entered: {named or 'nothing'}"
    return None


def _first_line(failure: SubjectFailure) -> str:
    return str(failure).split("\n\n", 1)[0]


def load_and_generate(rank: Rank, folder: Path, case: LifecycleCase | None = None) -> list[list[int]]:
    """Job: load the model and generate; the victim fails on the way if there is a case."""

    def enter(phase: str) -> None:
        rank.phase = phase
        if case is not None and rank.tp_rank == VICTIM and case.phase == phase:
            fail(case.how)

    enter("load")
    rank.load(folder, dtype="float32", options=OPTIONS)
    return rank.generate(((1, 2, 3, 4, 5), (7, 8, 9)), [{"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}] * 2, enter)


def fail(how: How) -> NoReturn:
    """Fail in that way."""
    if how == "exit":
        os._exit(7)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(3600)
    raise RuntimeError(f"planted: rank {VICTIM} was told to {how}")


def traces_of(rank: Rank) -> Traces:
    """Job: what this rank has of the machine. Of a thread: of its process."""
    process = psutil.Process()
    maps = {mapped.path.removesuffix(" (deleted)") for mapped in process.memory_maps()}
    return Traces(pid=process.pid, started=process.create_time(), sockets=tuple(sorted(_listening(process.pid))),
                  shared_memory=tuple(sorted(path for path in maps if path.startswith("/dev/shm/"))))


def left_behind(traces: Sequence[Traces]) -> str | None:
    """What is still there of ranks that are gone, after a moment."""
    deadline = time.monotonic() + GONE_S
    while True:
        left = [f"process {trace.pid}" for trace in traces if _is_alive(trace)]
        left += [f"shared memory {path}" for trace in traces for path in trace.shared_memory if os.path.exists(path)]
        open_now = _listening_sockets()
        left += [f"port {port}" for trace in traces for inode, port in trace.sockets if inode in open_now]
        if not left:
            return None
        if time.monotonic() > deadline:
            return f"left behind: {', '.join(left)}"
        time.sleep(0.02)


def _is_alive(trace: Traces) -> bool:
    try:
        return psutil.Process(trace.pid).create_time() == trace.started  # a number may have been given to another process
    except psutil.NoSuchProcess:
        return False


def _listening(pid: int) -> set[tuple[int, int]]:
    """(inode, port) of the process's sockets that listen."""
    links = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed by now
            links.add(os.readlink(entry))
    return {(inode, port) for inode, port in _listening_sockets().items() if f"socket:[{inode}]" in links}


def _listening_sockets() -> dict[int, int]:
    """Of this machine: the port of each inode. See proc(5) and ``Documentation/networking/proc_net_tcp.rst``."""
    rows = [line.split() for table in ("tcp", "tcp6") if (path := Path(f"/proc/net/{table}")).exists()
            for line in path.read_text(encoding="ascii").splitlines()[1:]]
    return {int(row[9]): int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == _LISTEN}


CHECK = Check(
    name="lifecycle", question="Is every failure of a rank reported for what it is, with nothing left behind?",
    parts=(Whole(judge=check_lifecycle, needs="processes"),), needs_model=False, owns_ranks=True)
