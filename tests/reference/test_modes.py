"""Modes that see each operation run in several threads: none may change what all threads of the interpreter share."""

from __future__ import annotations

import threading

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.studies.calibrate import orders
from harness.verification.simulated import SimulatedRounding
from reference import choices, exact


def subclasses(kind: type) -> list[type]:
    return [each for own in kind.__subclasses__() for each in (own, *subclasses(own))]


def test_no_mode_has_dynamo_switched_around_each_operation() -> None:
    modes = subclasses(TorchDispatchMode)
    ours = [mode for mode in modes if mode.__module__.partition(".")[0] in ("engine", "harness", "reference")]
    assert {module.__name__ for module in (choices, exact, orders)} <= {mode.__module__ for mode in ours}
    assert [mode for mode in ours if hasattr(vars(mode).get("__torch_dispatch__"), "__wrapped__")] == []


def test_modes_of_several_threads_leave_each_other_alone() -> None:
    a, b = torch.ones(3, 4, 5, dtype=torch.float64), torch.ones(3, 5, 6, dtype=torch.float64)
    found: dict[int, list[torch.Tensor]] = {}

    def work(seed: int) -> None:
        with torch.inference_mode(), SimulatedRounding("bfloat16", seed):
            found[seed] = [torch.matmul(a, b) for _ in range(50)]

    for seed in range(4):
        work(seed)
    alone, found = found, {}
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(torch.stack(found[seed]), torch.stack(alone[seed])) for seed in range(4))
    assert not torch.equal(torch.stack(alone[0]), torch.stack(alone[1]))
