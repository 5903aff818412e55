"""Modes that see each of torch's operations, in any number of threads at once."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):
    """One whose ``__torch_dispatch__`` is called as it is.

    By default torch disables Dynamo around each call, and that changes how the whole interpreter evaluates its frames: two
    threads that do so at once crash it now and then (a segmentation fault, seen with torch 2.13), and a small operation takes
    about three times as long. Nothing is compiled within a mode of ours.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
