"""Holds what transformers loaded against the files: the reference is under test too.

Loading renames tensors, merges and splits them. Here the loaded model is written back by transformers' own way, to the names on
disk, and compared with the files bit for bit. By the same way made-up checkpoints come into the format of the hub's files.
"""

import re
from collections.abc import Collection, Iterator, Set
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.checkpoint_files import open_file, read_headers, weight_files
from reference.building import building, read_config
from reference.writing import as_config, edited, without_weights

# Derived values that old files have, and that models make by themselves today.
_DERIVED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


def differences(model: Any, folder: str | Path) -> Iterator[str]:
    """What a loaded model holds otherwise than the files of its folder, a line each.

    Args:
        model: A model of transformers that ``from_pretrained`` returned, in any dtype.
        folder: The Hugging Face folder it was loaded from.

    Raises:
        CheckpointError: If the files can't be read, or transformers knows no way back from what it loaded to the names on disk.
    """
    folder = Path(folder)
    in_files = read_headers(folder).keys()
    with building(f"transformers can't write what it loaded from folder={folder} under the names on disk"):
        written = as_in_files(model, model.state_dict(), in_files)
    held = {_in_files(name, in_files, f"{model.base_model_prefix}."): tensor for name, tensor in written.items()}
    ignored = re.compile("|".join((*_DERIVED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()))))
    for name in sorted(in_files - held.keys()):
        if not ignored.search(name):
            yield f"{name} is in the files, and went to no parameter"
    filled = {held[name].data_ptr() for name in in_files & held.keys()}
    for name in sorted(held.keys() - in_files):
        if held[name].data_ptr() not in filled:  # of tied ones, files have one
            yield f"{name} is not in the files: it was made up"
    for path in weight_files(folder):
        with open_file(path) as file:
            for name in sorted(in_files & held.keys() & set(file.keys())):
                if (why := _difference(held[name], file.get_tensor(name))) is not None:
                    yield f"{name} differs from the file: {why}"


def as_in_files(model: Any, tensors: dict[str, torch.Tensor], in_files: Set[str]) -> dict[str, torch.Tensor]:
    """What is held under a loaded model's own names, by the names of the files that it was loaded from.

    Files are in the format of the hub, which is converted while it is loaded, or in the model's own, as
    ``save_pretrained(save_original_format=False)`` writes it: there the way back leads to names that they don't have.
    """
    from transformers.core_model_loading import revert_weight_conversion  # only here: most processes load no model

    converted: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    return max(converted, tensors, key=lambda named: len(in_files & named.keys()))


def hub_names(config: Any) -> dict[str, str]:
    """By each name that the hub's files of such a model have, the name of the tensor that the model makes of it.

    Raises:
        CheckpointError: If transformers can't build such a model, or knows no way back to the files' names.
    """
    model = without_weights(as_config(config))
    tensors = model.state_dict()
    if _written(model, tensors).keys() == tensors.keys():
        return {name: name for name in tensors}
    return {in_files: name for name, tensor in tensors.items() for in_files in _written(model, {name: tensor})}


def to_hub_format(folder: Path) -> None:
    """Have a checkpoint of one file, with the model's own names in it, as the hub's files of such a model are.

    Raises:
        CheckpointError: As of ``hub_names``.
    """
    with edited(folder) as tensors:
        written = _written(without_weights(read_config(folder)), tensors)
        if written.keys() != tensors.keys():
            tensors.clear()
            tensors.update((name, tensor.contiguous()) for name, tensor in written.items())


def _written(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    with building(f"transformers can't write a {model.config.model_type} under the names of the hub's files"):
        written: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    return written


def _in_files(name: str, in_files: Collection[str], prefix: str) -> str:
    """The name under which files have a tensor: those of the model without its head leave out the prefix, others may have it."""
    return next((own for own in (name, name.removeprefix(prefix), prefix + name) if own in in_files), name)


def _difference(held: torch.Tensor, stored: torch.Tensor) -> str | None:
    if held.shape != stored.shape:
        return f"it is {tuple(held.shape)} and not {tuple(stored.shape)}"
    held, stored = held.detach().cpu().reshape(-1), stored.to(held.dtype).reshape(-1)
    wrong = (_bytes(held) != _bytes(stored)).any(1)
    if not wrong.any():
        return None
    first = int(wrong.nonzero()[0])
    return f"{int(wrong.sum())} of {len(wrong)} values, element {first} is {held[first].item()} and not {stored[first].item()}"


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8).view(len(x), x.element_size())
