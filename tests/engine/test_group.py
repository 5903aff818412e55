"""Collectives: the same values on every fabric, and told apart when ranks disagree."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from engine.parallel.collective_log import RING_SIZE, CollectiveLog, LogSnapshot, compare_logs
from engine.parallel.group import CollectiveAborted, CollectiveMismatch, SoloGroup, ThreadGroup, TPGroup
from engine.ranks.ranks import RankContext, Ranks

NUM_GPUS = torch.cuda.device_count()
FABRICS = [
    pytest.param(("solo", 1, "cpu"), id="solo-1"),
    pytest.param(("threads", 2, "cpu"), id="threads-2"),
    pytest.param(("threads", 3, "cpu"), id="threads-3"),
    pytest.param(("gloo", 2, "cpu"), id="gloo-2", marks=pytest.mark.multirank),
    pytest.param(("gloo", 3, "cpu"), id="gloo-3", marks=pytest.mark.multirank),
    pytest.param(
        ("threads", 3, "cuda"),
        id="threads-3-cuda",
        marks=pytest.mark.skipif(NUM_GPUS < 1, reason="needs a GPU"),
    ),
    pytest.param(
        ("nccl", 2, "cuda"),
        id="nccl-2",
        marks=[pytest.mark.multigpu, pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")],
    ),
]
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
INTS = [torch.int64, torch.int32, torch.int8, torch.uint8]


@pytest.fixture(scope="module", params=FABRICS)
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    fabric, tp_size, device = request.param
    with Ranks(tp_size, fabric=fabric, device=device, auto_restart=True) as live:
        yield live


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """One rank's integers: small enough to be summed exactly in every dtype."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 7 + 3 * rank) % 11 + rank).to(dtype).view(shape)


def reduce_and_gather(context: RankContext, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    x = part(context.tp.rank, shape, dtype).to(context.device)
    gathered = [context.tp.all_gather(x, dim) for dim in range(-len(shape), len(shape))]
    return [context.tp.all_reduce(x), *gathered]


@pytest.mark.parametrize("dtype", FLOATS + INTS, ids=str)
@pytest.mark.parametrize("shape", [(4, 6), (3,), (1, 1, 7), (2, 3, 5), (0, 4), (3, 0), ()], ids=str)
def test_sums_and_gathers_are_exact_on_integers(ranks: Ranks, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parts = [part(rank, shape, dtype) for rank in range(ranks.tp_size)]
    total = torch.stack(parts).to(torch.float64).sum(0).to(dtype)
    joined = [torch.cat(parts, dim) for dim in range(-len(shape), len(shape))]
    for results in ranks.run(reduce_and_gather, shape, dtype, timeout_s=30):
        assert len(results) == 1 + len(joined)
        for result, expected in zip(results, [total, *joined], strict=True):
            assert result.dtype == dtype
            assert result.shape == expected.shape
            assert torch.equal(result.cpu(), expected)


def reduce_views(context: RankContext) -> list[torch.Tensor]:
    x = part(context.tp.rank, (4, 6), torch.float32).to(context.device)
    views = [x.t(), x[:, ::2], x[1:3, 2:5], x[0].expand(3, 6)]
    reduced = [context.tp.all_reduce(view) for view in views]
    gathered = [context.tp.all_gather(view, 0) for view in views]
    return [*reduced, *gathered, x]


def test_inputs_need_not_be_contiguous_and_their_base_is_left_alone(ranks: Ranks) -> None:
    parts = [part(rank, (4, 6), torch.float32) for rank in range(ranks.tp_size)]
    viewed = [[x.t(), x[:, ::2], x[1:3, 2:5], x[0].expand(3, 6)] for x in parts]
    expected = [torch.stack(views).sum(0) for views in zip(*viewed, strict=True)]
    expected += [torch.cat(views, 0) for views in zip(*viewed, strict=True)]
    for rank, results in enumerate(ranks.run(reduce_views, timeout_s=30)):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(results, [*expected, parts[rank]], strict=True))


def reduce_random(context: RankContext, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(context.tp.rank)
    return context.tp.all_reduce(torch.randn(1031, generator=generator).to(context.device, dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_rank_gets_the_same_bits_of_a_rounded_sum(ranks: Ranks, dtype: torch.dtype) -> None:
    first, *others = [result.cpu() for result in ranks.run(reduce_random, dtype, timeout_s=30)]
    assert all(torch.equal(first, other) for other in others)
    parts = [torch.randn(1031, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(ranks.tp_size)]
    exact = torch.stack(parts).double().sum(0)
    scale = torch.stack(parts).double().abs().sum(0)
    unit = torch.finfo(dtype).eps / 2
    steps = ranks.tp_size - 1  # one rounding to dtype for each addition at most
    assert ((first.double() - exact).abs() <= steps * unit * scale * (1 + unit)).all()
    if ranks.fabric == "threads" and dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(first, torch.stack(parts).float().sum(0).to(dtype)), "rounded once, from float32"


def write_after_collectives(context: RankContext) -> tuple[list[float], float]:
    """Write into every result at once: the other ranks' results must not change."""
    tp = context.tp
    seen = []
    for step in range(20):
        reduced = tp.all_reduce(torch.full((5,), float(tp.rank + step), device=context.device))
        seen.append(reduced.sum().item())
        reduced.fill_(-1.0)
        gathered = tp.all_gather(torch.full((5,), float(tp.rank + step), device=context.device), 0)
        seen.append(gathered.sum().item())
        gathered.fill_(-1.0)
    own = torch.ones(3, device=context.device)
    tp.all_gather(own, 0).fill_(9.0)
    return seen, own.sum().item()


def test_a_rank_may_write_into_what_it_got(ranks: Ranks) -> None:
    base, size = sum(range(ranks.tp_size)), ranks.tp_size
    expected = [5.0 * (base + size * step) for step in range(20) for _ in range(2)]
    assert ranks.run(write_after_collectives, timeout_s=30) == [(expected, 3.0)] * size


def in_inference_mode(context: RankContext, ranks_in_it: list[int]) -> bool:
    with torch.inference_mode(context.tp.rank in ranks_in_it):
        x = context.tp.all_gather(context.tp.all_reduce(torch.ones(2, device=context.device)), 0)
        x += 1  # a normal tensor outside of inference mode stays one
        return bool((x == context.tp.size + 1).all()) and x.is_inference() == (context.tp.rank in ranks_in_it)


@pytest.mark.parametrize("ranks_in_it", [[], [0], [0, 1, 2], [1, 2]], ids=str)
def test_ranks_may_be_in_inference_mode_or_not(ranks: Ranks, ranks_in_it: list[int]) -> None:
    assert all(ranks.run(in_inference_mode, ranks_in_it, timeout_s=30))


def smallest(context: RankContext) -> list[int]:
    context.tp.barrier()
    rank = context.tp.rank
    return [context.tp.all_reduce_min(value) for value in (10 + rank, 10 - rank, 2**62 + rank, -rank)]


def test_all_reduce_min_is_the_smallest_of_all(ranks: Ranks) -> None:
    last = ranks.tp_size - 1
    assert ranks.run(smallest, timeout_s=30) == [[10, 10 - last, 2**62, -last]] * ranks.tp_size


def largest(context: RankContext) -> list[int]:
    x = torch.tensor([context.tp.rank, -context.tp.rank, 2**31 - 1 - context.tp.rank], dtype=torch.int32, device=context.device)
    found: list[int] = context.tp.all_reduce_max(x).tolist()
    return found


def test_all_reduce_max_is_the_largest_of_all_element_by_element(ranks: Ranks) -> None:
    assert ranks.run(largest, timeout_s=30) == [[ranks.tp_size - 1, 0, 2**31 - 1]] * ranks.tp_size


def meet_in_order(context: RankContext) -> list[float]:
    """Nobody passes a barrier before all have reached it. The clock is the same for all ranks."""
    times = []
    for turn in range(context.tp.size):
        if turn == context.tp.rank:
            time.sleep(0.05)
        times.append(time.monotonic())
        context.tp.barrier()
        times.append(time.monotonic())
    return times


def test_a_barrier_holds_until_the_last_rank(ranks: Ranks) -> None:
    by_rank = ranks.run(meet_in_order, timeout_s=30)
    for turn in range(ranks.tp_size):
        assert min(times[2 * turn + 1] for times in by_rank) >= max(times[2 * turn] for times in by_rank)


def wrong_inputs(context: RankContext) -> list[str]:
    messages = []
    calls: list[Callable[[TPGroup], Any]] = [
        lambda tp: tp.all_reduce(torch.tensor([True])),
        lambda tp: tp.all_gather(torch.ones(2, 3), 2),
        lambda tp: tp.all_gather(torch.ones(()), 0),
    ]
    for call in calls:
        try:
            call(context.tp)
        except ValueError as error:
            messages.append(str(error))
    assert not context.tp.log.snapshot().inside
    return messages


def test_wrong_inputs_are_refused_before_anyone_waits(ranks: Ranks) -> None:
    for messages in ranks.run(wrong_inputs, timeout_s=30):
        assert ["dtype=torch.bool" in messages[0], "dim=2" in messages[1], "dim=0" in messages[2]] == [True] * 3


def logged(context: RankContext) -> LogSnapshot:
    before = context.tp.log.entered
    context.tp.all_reduce(torch.ones(4, 178, dtype=torch.bfloat16, device=context.device))
    context.tp.all_gather(torch.ones(2, 3, device=context.device), -1)
    context.tp.all_reduce_min(3)
    context.tp.barrier()
    assert context.tp.log.entered == before + 4
    return context.tp.log.snapshot(4)


def test_collectives_are_numbered_and_know_their_call_site(ranks: Ranks) -> None:
    snapshots = ranks.run(logged, timeout_s=30)
    for log in snapshots:
        assert not log.inside
        first = log.records[0].number
        assert [record.number for record in log.records] == list(range(first, first + 4))
        lines = [logged.__code__.co_firstlineno + offset for offset in (2, 3, 4, 5)]
        assert [record.site for record in log.records] == [f"test_group.py:{line}" for line in lines]
        assert str(log.records[0]) == (f"all_reduce #{first} (4×178 bfloat16) called at test_group.py:{lines[0]}")
        assert [record.op for record in log.records[1:]] == ["all_gather(dim=1)", "all_reduce_min", "barrier"]
    assert compare_logs(dict(enumerate(snapshots))) == []


def test_a_log_keeps_the_latest_and_counts_all() -> None:
    log = CollectiveLog()
    assert log.last is None
    for size in range(RING_SIZE + 50):
        log.enter("all_reduce", (size,), torch.float32)
        log.finish()
    assert (log.entered, log.finished) == (RING_SIZE + 50, RING_SIZE + 50)
    tail = log.tail()
    assert [record.number for record in tail] == list(range(51, RING_SIZE + 51))
    assert [record.shape for record in log.tail(2)] == [(RING_SIZE + 48,), (RING_SIZE + 49,)]
    assert log.snapshot().numbered(51) == tail[0]
    assert log.snapshot().numbered(50) is None


def test_a_log_can_be_read_while_it_is_written() -> None:
    log, stop = CollectiveLog(), threading.Event()

    def write() -> None:
        while not stop.is_set():
            log.enter("all_reduce", (1,), torch.float32)
            log.finish()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            numbers = [record.number for record in log.tail()]
            assert numbers == sorted(set(numbers))
    finally:
        stop.set()
        writer.join()


def test_a_digest_tells_logs_apart_by_op_shape_dtype_and_order() -> None:
    a, b = ("all_reduce", (2, 3)), ("all_reduce", (3, 2))
    assert log_of(a, b).digest == log_of(a, b).digest != 0
    digests = {log_of(a, b).digest, log_of(b, a).digest, log_of(a).digest, log_of(("barrier", (2, 3)), b).digest}
    assert len(digests) == 4
    log = CollectiveLog()
    log.enter("all_reduce", (2, 3), torch.float32)
    assert log.digest != log_of(a).digest, "another dtype"


def log_of(*calls: tuple[str, tuple[int, ...]], finished: bool = True) -> LogSnapshot:
    log = CollectiveLog()
    for op, shape in calls:
        log.enter(op, shape, torch.bfloat16)
        log.finish()
    if not finished:
        log.finished -= 1
    return log.snapshot()


def test_comparing_logs_names_the_rank_that_never_came() -> None:
    common = [("all_reduce", (4, 178))] * 6
    ahead = log_of(*common, ("all_reduce", (4, 178)), finished=False)
    behind = log_of(*common)
    [sentence] = compare_logs({0: ahead, 1: behind, 2: ahead})
    assert sentence.startswith("rank 1 never entered all_reduce #7 (4×178 bfloat16) called at test_group.py:")
    [sentence] = compare_logs({0: ahead, 1: behind, 2: behind})
    assert sentence.startswith("ranks 1, 2 never entered all_reduce #7")


def test_comparing_logs_names_the_first_collective_that_differs() -> None:
    start = [("all_reduce", (4, 8))] * 3
    one = log_of(*start, ("all_reduce", (4, 8)), ("barrier", ()))
    other = log_of(*start, ("all_gather(dim=1)", (4, 8)))
    [sentence] = compare_logs({0: one, 1: other})
    assert "part at #4" in sentence
    assert "rank 0 entered all_reduce #4" in sentence
    assert "rank 1 entered all_gather(dim=1) #4" in sentence


def test_comparing_equal_logs_finds_nothing() -> None:
    log = log_of(*[("all_reduce", (4, 8))] * (RING_SIZE + 9))
    assert compare_logs({0: log, 1: log, 2: log}) == []
    assert compare_logs({0: log}) == []


def on_threads(groups: list[ThreadGroup], body: Callable[[ThreadGroup], Any]) -> list[Any]:
    """What ``body`` returned or raised on each rank."""
    outcomes: list[Any] = [None] * len(groups)

    def live(group: ThreadGroup) -> None:
        try:
            outcomes[group.rank] = body(group)
        except Exception as failure:
            outcomes[group.rank] = failure

    threads = [threading.Thread(target=live, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    return outcomes


@pytest.mark.parametrize(
    ("odd_one", "named"),
    [
        (lambda tp: tp.all_reduce(torch.ones(3)), "rank 2 in all_reduce #2 (3 float32)"),
        (lambda tp: tp.all_reduce(torch.ones(2).half()), "rank 2 in all_reduce #2 (2 float16)"),
        (lambda tp: tp.barrier(), "rank 2 in barrier #2"),
        (lambda tp: tp.all_gather(torch.ones(2)), "rank 2 in all_gather(dim=0) #2 (2 float32)"),
    ],
)
def test_threads_that_meet_in_different_collectives_are_told_so(odd_one: Callable[[TPGroup], Any], named: str) -> None:
    def body(tp: ThreadGroup) -> None:
        tp.barrier()
        if tp.rank == 2:
            odd_one(tp)
        else:
            tp.all_reduce(torch.ones(2))

    for outcome in on_threads(ThreadGroup.create(3), body):
        assert isinstance(outcome, CollectiveMismatch)
        assert "rank 0 in all_reduce #2 (2 float32) called at test_group.py:" in str(outcome)
        assert named in str(outcome)


def test_a_thread_that_never_comes_is_named_after_the_deadline() -> None:
    def body(tp: ThreadGroup) -> None:
        tp.barrier()
        if tp.rank != 1:
            tp.all_reduce(torch.ones(4, 178, dtype=torch.bfloat16))

    first, absent, last = on_threads(ThreadGroup.create(3, timeout_s=0.2), body)
    assert absent is None
    for outcome in (first, last):
        assert isinstance(outcome, CollectiveAborted)
        assert "all_reduce #2 (4×178 bfloat16)" in str(outcome)
        assert "rank 1 never arrived within timeout_s=0.2" in str(outcome)


def test_an_aborted_group_lets_nobody_wait() -> None:
    groups = ThreadGroup.create(3)

    def body(tp: ThreadGroup) -> None:
        if tp.rank == 1:
            time.sleep(0.05)
            tp.abort("enough")
        tp.barrier()

    started = time.monotonic()
    for outcome in on_threads(groups, body):
        assert isinstance(outcome, CollectiveAborted)
        assert "enough" in str(outcome)
    assert time.monotonic() - started < 5


def test_a_thread_that_leaves_spoils_only_collectives_that_it_did_not_enter() -> None:
    groups = ThreadGroup.create(2)

    def body(tp: ThreadGroup) -> float:
        total = tp.all_reduce(torch.ones(1)).item()
        if tp.rank == 1:
            tp.leave("ValueError: bad weight")
            return total
        time.sleep(0.05)
        tp.barrier()
        return total

    waiting, left = on_threads(groups, body)
    assert left == 2.0
    assert isinstance(waiting, CollectiveAborted)
    assert "rank 1 left: ValueError: bad weight" in str(waiting)


def test_a_rank_outside_its_group_is_refused() -> None:
    with pytest.raises(ValueError, match="rank=2 must be in 0 to size-1 \\(size=2\\)"):
        TPGroup(2, 2, "solo")
    with pytest.raises(ValueError, match="size=0"):
        ThreadGroup.create(0)


def test_a_solo_group_changes_nothing_and_still_counts() -> None:
    tp = SoloGroup()
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(tp.all_reduce(x), x)
    gathered = tp.all_gather(x)
    assert torch.equal(gathered, x)
    assert gathered.data_ptr() != x.data_ptr()
    assert tp.all_reduce_min(4) == 4
    tp.barrier()
    assert tp.log.entered == tp.log.finished == 4
