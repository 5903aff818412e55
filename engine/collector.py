"""Keeps the garbage collector out of large imports."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """Import in here what is large. Afterwards garbage is collected again, if it was before.

    To import torch and transformers makes hundreds of thousands of objects, and nearly all of them stay: to look through them
    again and again on the way is a tenth of the whole start.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if not gc.get_freeze_count():  # nothing is frozen that would thaw
                gc.freeze()
                gc.unfreeze()  # all is among the oldest objects now, as if it had been looked through
            gc.enable()
