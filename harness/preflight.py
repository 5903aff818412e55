"""Is the checkpoint itself whole? Asked before any rank starts, so that a damaged file is not taken for a finding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from reference.checkpoints import CheckpointError, weight_shapes


def check_checkpoint(folder: Path) -> None:
    """Look at every file's header, at no tensor.

    Raises:
        CheckpointError: naming file and tensor, if a file is damaged or cut short, or if a tensor that the config asks for is
            missing or has another shape.
    """
    found = {name: (file, shape) for file, name, shape in _tensors(folder)}
    for name, shape in weight_shapes(AutoConfig.from_pretrained(folder)).items():
        if name not in found:
            files = sorted({file.name for file, _ in found.values()})
            raise CheckpointError(f"folder={folder}: tensor={name} is missing, no file holds it ({', '.join(files)})")
        file, own = found[name]
        if own != shape:
            raise CheckpointError(f"file={file}: tensor={name} has shape={own}, the config asks for {shape}")


def _tensors(folder: Path) -> Iterator[tuple[Path, str, tuple[int, ...]]]:
    """(file, tensor, its shape) for all that the folder's files hold."""
    with ExitStack() as stack:
        for file in sorted(folder.glob("*.safetensors")):
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                raise CheckpointError(f"file={file} is damaged or cut short: {error}") from error
            for name in opened.keys():  # noqa: SIM118 - not iterable
                yield file, name, tuple(opened.get_slice(name).get_shape())
