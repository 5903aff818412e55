"""One call as pytest-benchmark's clock may see it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def finished(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """``call``, which returns when the device is done: a GPU's launch returns long before.

    So a figure from a GPU has a launch and a wait in it, some ten microseconds; ``kernels_gpu.py`` times kernels without.
    """
    if device.type == "cpu":
        return call

    def run() -> Tensor:
        result = call()
        torch.cuda.synchronize(device)
        return result

    return run
