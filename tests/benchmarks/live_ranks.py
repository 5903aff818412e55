"""Times one example on live ranks, beside ranks started for it: ``python -m tests.benchmarks.live_ranks [--out FILE]``.

Two gloo ranks on this machine, all ways in turns within one run, so that chance in the machine's speed hits each alike:

* a trivial job: nothing but there and back
* a row-parallel layer: weights and input sent by value, the layer built and run, the results sent back
* ``Ranks`` started for the example, and ended after it
* ranks spawned for the example as test suites do: ``torch.multiprocessing.spawn``, one all-reduce
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from engine.parallel.linear import RowParallelLinear
from engine.ranks.ranks import RankContext, Ranks

TP_SIZE = 2
ROWS, IN, OUT = 8, 64, 32
GOALS_MS = {"trivial job": 5.0, "row-parallel layer": 10.0}


def trivial(rank: RankContext) -> int:
    return rank.tp.rank


def row_parallel(rank: RankContext, x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor) -> torch.Tensor:
    layer = RowParallelLinear(x_TI.shape[1], weight_OI.shape[0], bias=True, tp=rank.tp, dtype=x_TI.dtype)
    for param, whole in ((layer.weight, weight_OI), (layer.bias, bias_O)):
        assert param is not None, "the layer was made with a bias"
        param.weight_loader(param, whole)
    with torch.inference_mode():
        y_TO: torch.Tensor = layer(x_TI[:, layer.input_range.start : layer.input_range.stop])
    return y_TO


def layer_example(ranks: Ranks) -> None:
    x_TI, weight_OI, bias_O = (torch.randint(-8, 9, shape).float() for shape in ((ROWS, IN), (OUT, IN), (OUT,)))
    for y_TO in ranks.run(row_parallel, x_TI, weight_OI, bias_O, timeout_s=5):
        assert torch.equal(y_TO, x_TI @ weight_OI.T + bias_O), "the layer gave a wrong value"


def started_example() -> None:
    with Ranks(TP_SIZE, fabric="gloo") as ranks:
        ranks.run(trivial)


def spawned_rank(rank: int, port: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=TP_SIZE)
    dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()


def spawned_example() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    start_processes(spawned_rank, args=(port,), nprocs=TP_SIZE, start_method="spawn")


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="how often ranks are started and spawned")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    times: dict[str, list[float]] = {}
    with Ranks(TP_SIZE, fabric="gloo") as ranks:
        ways: dict[str, tuple[int, Callable[[], object]]] = {  # how often in a turn, and what
            "trivial job": (100, lambda: ranks.run(trivial)),
            "row-parallel layer": (100, lambda: layer_example(ranks)),
            "Ranks started for each": (1, started_example),
            "ranks spawned for each": (1, spawned_example),
        }
        for _, call in list(ways.values())[:3]:
            call()  # imports, and the fork server
        for _ in range(options.turns):
            for name, (count, call) in ways.items():
                times.setdefault(name, []).extend(seconds(call) for _ in range(count))
    figures = {name: {"median_ms": round(1e3 * statistics.median(values), 2),
                      "p90_ms": round(1e3 * statistics.quantiles(values, n=10)[-1], 2),
                      "examples": len(values)} for name, values in times.items()}
    print(f"{'one example on ' + str(TP_SIZE) + ' gloo ranks':<30}{'median ms':>12}{'p90 ms':>12}{'examples':>10}{'goal ms':>10}")  # noqa: T201
    for name, figure in figures.items():
        goal = GOALS_MS.get(name)
        print(f"{name:<30}{figure['median_ms']:>12}{figure['p90_ms']:>12}{figure['examples']:>10}{goal or '':>10}")  # noqa: T201
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=2) + "\n")
    return int(any(figures[name]["median_ms"] > goal for name, goal in GOALS_MS.items()))


if __name__ == "__main__":
    sys.exit(main())
