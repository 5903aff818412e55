"""Live ranks: jobs run on every rank, arguments and results travel by value."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from engine.ranks.ranks import RankContext, Ranks
from tests.engine.rank_jobs import (
    ALL,
    ROOT,
    SHARED,
    change_argument,
    echo,
    environment,
    failing_within,
    kill_self,
    last_row,
    multirank,
    pid,
    remember,
    report_progress,
    total,
    wait_for_godot,
    who,
)

pytestmark = pytest.mark.usefixtures("nothing_is_left_behind")


@pytest.mark.parametrize("kind", ALL)
def test_a_job_runs_on_every_rank_and_keeps_state(kind: tuple[str, int]) -> None:
    fabric, size = kind
    with Ranks(size, fabric=fabric) as ranks:
        assert ranks.run(who) == [(rank, size, fabric) for rank in range(size)]
        results = ranks.run(total, torch.ones(2, 3), timeout_s=20)
        assert all(torch.equal(result, torch.full((2, 3), sum(range(size + 1)))) for result in results)
        ranks.run(remember, 1)
        assert ranks.run(remember, 2) == [[1, 2]] * size
        ranks.restart()
        assert ranks.run(remember, 3) == [[3]] * size
    with pytest.raises(RuntimeError, match="closed"):
        ranks.run(who)
    ranks.close()


@pytest.mark.parametrize("kind", ALL)
def test_events_arrive_in_order_while_the_job_runs(kind: tuple[str, int]) -> None:
    fabric, size = kind
    events: list[tuple[int, Any]] = []
    with Ranks(size, fabric=fabric) as ranks:
        ranks.run(report_progress, 50, on_event=lambda rank, payload: events.append((rank, payload)))
        assert ranks.run(report_progress, 2) == ["done"] * size, "events that nobody wants are dropped"
    for rank in range(size):
        assert [payload["step"] for source, payload in events if source == rank] == list(range(50))
    assert len(events) == 50 * size


@pytest.mark.parametrize("kind", SHARED)
def test_arguments_travel_by_value(kind: tuple[str, int]) -> None:
    x = torch.zeros(3)
    with Ranks(kind[1], fabric=kind[0]) as ranks:
        assert ranks.run(change_argument, x) == [3.0, 6.0]
    assert x.sum() == 0


@multirank
def test_a_view_travels_as_its_own_elements() -> None:
    with Ranks(2, fabric="gloo") as ranks:
        for row in ranks.run(last_row, 200):
            assert torch.equal(row, torch.arange(199_000, 200_000))
            assert row.untyped_storage().nbytes() == 8000


@multirank
def test_tensors_of_every_kind_come_back_as_they_were() -> None:
    values = [
        torch.arange(6).view(2, 3).t(),
        torch.ones((), dtype=torch.bfloat16),
        torch.empty(0, 4),
        torch.randn(5, requires_grad=True),
        torch.nn.Parameter(torch.randn(4, 4)[1:3]),
        torch.ones(3).expand(2, 3),
        torch.tensor([1 + 2j]),
    ]
    with Ranks(2, fabric="gloo") as ranks:
        for returned in ranks.run(echo, values):
            for before, after in zip(values, returned, strict=True):
                assert type(before) is type(after)
                assert (before.dtype, before.shape) == (after.dtype, after.shape)
                assert before.requires_grad == after.requires_grad
                assert torch.equal(before, after)


@multirank
def test_big_payloads_pass_both_ways_with_jobs_in_flight() -> None:
    big = torch.arange(5_000_000, dtype=torch.float32)  # 20 MB
    with Ranks(2, fabric="gloo") as ranks:
        handles = [ranks.submit(echo, big + n) for n in range(2)]
        for n, handle in enumerate(handles):
            for result in ranks.collect(handle, timeout_s=30):
                assert torch.equal(result, big + n)


@pytest.mark.parametrize("kind", ALL)
def test_jobs_in_flight_run_in_order_and_can_be_collected_in_any(kind: tuple[str, int]) -> None:
    with Ranks(kind[1], fabric=kind[0]) as ranks:
        handles = [ranks.submit(remember, n) for n in range(4)]
        assert [ranks.collect(handles[n])[0][n] for n in (0, 2, 1, 3)] == [0, 2, 1, 3]
        with pytest.raises(RuntimeError, match="collected before"):
            ranks.collect(handles[0])


@multirank
def test_ranks_see_the_environment_as_it_is_when_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDPROOF_TEST_ONLY", "seen")
    with Ranks(2, fabric="gloo") as ranks:
        assert ranks.run(environment, "SHARDPROOF_TEST_ONLY") == ["seen", "seen"]


@multirank
def test_ranks_live_side_by_side() -> None:
    with (
        Ranks(2, fabric="gloo") as one,
        Ranks(2, fabric="gloo") as other,
        Ranks(2, fabric="threads") as third,
    ):
        pids = [*one.run(pid), *other.run(pid)]
        assert len(set(pids)) == 4
        handles = [(ranks, ranks.submit(total, torch.ones(2))) for ranks in (one, other, third)]
        for ranks, handle in handles:
            assert ranks.collect(handle, timeout_s=20)[0].tolist() == [3.0, 3.0]
        assert set(third.run(pid)) == {os.getpid()}


def test_a_partial_is_a_job_and_a_local_function_is_one_without_processes() -> None:
    with Ranks(2, fabric="threads") as ranks:
        assert ranks.run(functools.partial(echo, value=3)) == [3, 3]
        assert ranks.run(lambda context: context.tp.rank) == [0, 1]


# --- GPUs ---

multigpu = [pytest.mark.multigpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


def sum_on_gpu(context: RankContext) -> tuple[str, torch.Tensor]:
    context.tp.barrier()
    return str(context.device), context.tp.all_reduce(torch.ones(3, device=context.device))


def fail_on_gpu(context: RankContext, how: str) -> None:
    context.tp.all_reduce(torch.ones(4, 178, device=context.device)).sum().item()
    if context.tp.rank == 1:
        context.phase = "prefill"
        if how == "raises":
            raise ValueError("bad weight")
        if how == "is killed":
            kill_self()
        wait_for_godot(60)
    context.tp.all_reduce(torch.ones(4, 178, device=context.device)).sum().item()


class TestOnGPUs:
    pytestmark = multigpu

    def test_each_rank_has_its_gpu_and_results_arrive_on_the_cpu(self) -> None:
        with Ranks(2, device="cuda") as ranks:
            assert ranks.fabric == "nccl"
            results = ranks.run(sum_on_gpu, timeout_s=60)
            assert [device for device, _ in results] == ["cuda:0", "cuda:1"]
            assert all(x.device.type == "cpu" and x.tolist() == [2.0] * 3 for _, x in results)

    def test_the_driver_keeps_off_the_gpus(self) -> None:
        driver = (
            "import torch\n"
            "from engine.ranks.ranks import Ranks\n"
            "from tests.engine.test_ranks import sum_on_gpu\n"
            "with Ranks(2, device='cuda') as ranks:\n"
            "    ranks.run(sum_on_gpu, timeout_s=60)\n"
            "print(torch.cuda.is_initialized())\n"
        )
        # By itself: other tests of this process may have been on a GPU.
        done = subprocess.run([sys.executable, "-c", driver], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.stdout.split() == ["False"], done.stderr

    @pytest.mark.parametrize(
        ("how", "summary"),
        [
            ("raises", "ValueError: bad weight"),
            ("is killed", "killed by SIGKILL"),
            ("hangs", "stuck outside any collective; the last it finished was all_reduce #1"),
        ],
    )
    def test_a_rank_that_fails_is_the_cause_and_can_be_replaced(self, how: str, summary: str) -> None:
        with Ranks(2, fabric="nccl", device="cuda", auto_restart=True) as ranks:
            ranks.run(sum_on_gpu, timeout_s=60)
            ranks.restart()
            with failing_within(20) as caught:
                ranks.run(fail_on_gpu, how, timeout_s=10)
            error = next(iter(caught.value.failures.values()))
            assert (error.rank, error.phase, error.consequence) == (1, "prefill", False)
            assert error.summary.startswith(summary)
            if how != "is killed":
                assert "rank 1 never entered all_reduce #2 (4×178 float32)" in str(caught.value)
            assert ranks.run(sum_on_gpu, timeout_s=60)[1][1].tolist() == [2.0] * 3
