"""Keeps the garbage collector out of large imports."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """Automatic garbage collection is off inside, and on again afterwards if it was before.

    Importing torch and transformers makes hundreds of thousands of objects, nearly all of which stay. Collections on the way,
    which scan them again and again, are a tenth of the whole start.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if not gc.get_freeze_count():  # unfreeze() would take back what others froze
                gc.freeze()
                gc.unfreeze()  # puts all objects into the oldest generation, as collections would have
            gc.enable()
