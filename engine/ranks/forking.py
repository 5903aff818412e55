"""Starts the server that ranks are forked from. Imports no torch: a program may do so before all else, beside its own imports."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence

from engine.ranks import fork_server

RANK_LOOP = "engine.ranks.rank_loop"
"""The module that ranks run."""
_MAX_SOCKET_PATH = 107 if sys.platform == "linux" else 103  # bytes; what is longer, bind() refuses
_SHORT_FOLDERS = ("/tmp", "/var/tmp")


@contextlib.contextmanager
def importable_main() -> Iterator[None]:
    """Ranks import the main module anew, unless it has no file. The name of what is no file, such as <stdin>, is hidden here."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if file is None or main.__spec__ is not None or os.path.isfile(file):
        yield
        return
    main.__file__ = None
    try:
        yield
    finally:
        main.__file__ = file


def socket_folder() -> str:
    """Where multiprocessing's fork server of this process listens. A socket's path may not be long.

    Raises:
        RuntimeError: if it is too long, and can't be helped.
    """
    before = tempfile.gettempdir()
    usable = (folder for folder in (before, *_SHORT_FOLDERS) if _fits(f"{folder}/pymp-12345678") and _may_write(folder))
    tempfile.tempdir = next(usable, before)
    try:
        folder = multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = before
    if not _fits(folder):
        raise RuntimeError(f"the fork server of the ranks would listen in folder={folder!r}, whose name is too long for a socket "
                           f"of at most {_MAX_SOCKET_PATH} bytes: set TMPDIR to a shorter folder, such as /tmp")
    return folder


def _fits(folder: str) -> bool:
    return len(os.fsencode(f"{folder}/listener-12345678")) <= _MAX_SOCKET_PATH


def _may_write(folder: str) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def start_fork_server(tp_size: int, preload: Sequence[str] = ()) -> None:
    """Start it, if it does not run, with the folder that it is to remove in its environment, and the driver's path.

    Returns at once: it loads what ranks need, and ``preload``, in a process of its own. Left to itself, Python 3.11 has it look
    in the current folder first, where ``engine`` may be someone else's.

    Raises:
        RuntimeError: if this process can't have processes of its own.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "this script starts ranks while it is imported by a rank that it started: "
            'put what it runs under `if __name__ == "__main__":`'
        )
    if multiprocessing.current_process().daemon:
        raise RuntimeError(
            f"{tp_size} ranks are processes, and a daemonic process such as a worker of multiprocessing.Pool may not "
            "start any: start this one with daemon=False (those of concurrent.futures.ProcessPoolExecutor are), or take "
            "fabric='threads'"
        )
    multiprocessing.get_context("forkserver").set_forkserver_preload([fork_server.__name__, *_preload(), *preload])
    told = {fork_server.FOLDER: socket_folder(), "PYTHONSAFEPATH": "1",
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        with importable_main():
            multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _preload() -> list[str]:
    """What the fork server loads once for all ranks, unless someone started it before.

    None of it may touch a GPU: CUDA does not survive a fork.
    """
    names = ["torch", "torch.distributed", RANK_LOOP]
    # Seconds of import for each rank that will run the engine, and no use to ranks that will not.
    names += [name for name in ("engine.execution.core",) if name in sys.modules]
    # Jobs may be given a config that is an object of transformers, whose module brings hundreds along.
    names += [name for name in sys.modules if name.startswith("transformers.models.") and ".configuration_" in name]
    main_spec = getattr(sys.modules["__main__"], "__spec__", None)
    if main_spec is not None and main_spec.parent:
        names.append(main_spec.parent)  # each rank imports the main module anew: have its package ready
    return names
