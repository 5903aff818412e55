"""Modes that see each of torch's operations, in any number of threads at once."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):
    """One whose ``__torch_dispatch__`` is called as it is.

    By default torch has Dynamo off around each call, which changes how the whole interpreter runs its frames: two threads that do
    so at the same time crash it now and then (a segmentation fault under torch 2.13), and every operation takes three times as
    long. Nothing is compiled within a mode of ours.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
