"""Is every element of the checkpoint where it belongs, bit for bit, and nothing else anywhere?

First, whether the subject's own layout leaves nothing out: the one rule that every TP obeys. Then contents, held against the
files where that layout has them: of the model's own checkpoint, as it was loaded for the other checks; of a small one of the
same layout whose every value is the number of its element, so that a wrong element names itself; and where embeddings are tied,
of a checkpoint that holds an LM head all the same.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint.checkpoint_files import DERIVED, CheckpointError, StoredTensor, by_model_name, open_file, read_headers
from harness.checks.base import Check, CheckContext, NotApplicableError, Outcome, Whole
from harness.verification.budgets import bits
from reference.checkpoints import as_config, index_checkpoint, shapes_and_ties, weight_shapes
from reference.elements import ElementIndex
from reference.hf import DTYPES
from reference.loaded import to_hub_format
from reference.shards import Ownership
from reference.writing import edited

SHARDED = "sharded_parameters"
"""In a row's ``extra``: the share of the parameters that no rank holds whole."""
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
LONG_VOCABULARY = 1009
_EXPERTS_WIDTH = re.compile(r"(moe_|expert_|shared_experts?_|moe_shared_expert_|shared_)(intermediate|ffn_hidden)_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrong:
    """A shard that is not what it should be."""

    name: str
    what: str
    element: str = ""
    """``[row, column]``, where it is the file's own element that is wrong."""

    def __str__(self) -> str:
        return f"{self.name}{self.element} {self.what}" if self.element else f"{self.name}: {self.what}"


def check_own(context: CheckContext) -> Outcome:
    """The model's own checkpoint, as it is loaded for the other checks."""
    return compare_shards(context, "the model's checkpoint", context.results.folder, context.results.config, context.dtype)


def _uncovered(owned: Ownership, shape: tuple[int, ...], tp_size: int) -> str | None:
    """What the layout of a tensor leaves out, or gives twice to one rank; None if nothing."""
    if owned.shape != shape:
        return f"the layout is of shape {list(owned.shape)}"
    if owned.dim is None:
        return None
    if len(owned.indices) != tp_size:
        return f"the layout is of {len(owned.indices)} ranks, there are {tp_size}"
    length = owned.shape[owned.dim]
    for rank, indices in enumerate(owned.indices):
        if len(indices) and not 0 <= indices.min() <= indices.max() < length:
            return f"rank {rank} is to hold indices {indices.min()} to {indices.max()} of {length} along dim={owned.dim}"
        if len(np.unique(indices)) < len(indices):
            return f"rank {rank} is to hold an index along dim={owned.dim} twice"
    missing = np.setdiff1d(np.arange(length), np.concatenate(owned.indices))
    if not len(missing):
        return None
    return f"no rank is to hold {len(missing)} of {length} indices along dim={owned.dim}, first {missing[0]}"


def check_indexed(context: CheckContext) -> Outcome:
    """A small one of the same layout whose every value is the number of its element."""
    with tempfile.TemporaryDirectory(prefix="shardproof-") as scratch:
        config = _narrow(context)
        return _loaded_beside(context, "an index-valued checkpoint", index_checkpoint(Path(scratch) / "indexed", config), config)


def check_own_head(context: CheckContext) -> Outcome | None:
    """Where an LM head is stored that differs from the embedding, if only in its last row, transformers does not tie them."""
    if not context.results.config.get("tie_word_embeddings"):
        return None
    with tempfile.TemporaryDirectory(prefix="shardproof-") as scratch:
        config = {**_narrow(context), "vocab_size": LONG_VOCABULARY}
        folder = index_checkpoint(Path(scratch) / "headed", {**config, "tie_word_embeddings": False})
        as_config(config).save_pretrained(folder)
        with edited(folder) as tensors:
            head = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            head[-1] = 0
        return _loaded_beside(context, "a checkpoint with an LM head beside the embedding that it is tied to", folder, config)


def _loaded_beside(context: CheckContext, what: str, folder: Path, config: dict[str, Any]) -> Outcome:
    index = ElementIndex.of_checkpoint(folder)
    if index.dtype not in context.subject.dtypes:
        raise NotApplicableError(f"subject={context.subject.name!r} takes no {index.dtype}, and {what} has more elements than "
                                 "float32 has numbers")
    to_hub_format(folder)  # not everybody knows the names that a model has once it is loaded
    with context.subject.beside(folder, dtype=index.dtype, options={"num_kv_blocks": 4, "block_size": 16}):
        return compare_shards(context, what, folder, config, index.dtype, index)


def _narrow(context: CheckContext) -> dict[str, Any]:
    subject = context.subject
    return narrow_config(context.results.config, context.tp_size, uneven=subject.loads_uneven, head_dim=subject.head_dim)


def narrow_config(config: dict[str, Any], tp_size: int, *, uneven: bool = True, head_dim: int = 4) -> dict[str, Any]:
    """The config with the same heads, biases and ties, two narrow layers, and sizes that do not split evenly, if ``uneven``.

    Raises:
        NotApplicableError: if the config has no fields of these names, or transformers refuses it with other values in them.
    """
    if missing := {"hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"} - config.keys():
        raise NotApplicableError(f"model_type={config['model_type']!r} has no {', '.join(sorted(missing))} to make a "
                                 "small model of the same layout by")
    rest = 1 if uneven and tp_size > 1 else 0
    rope = dict(config.get("rope_parameters") or {})
    head_dim = head_dim if rope.get("partial_rotary_factor", 1.0) == 1.0 else max(8, head_dim)
    intermediate_size = 5 * tp_size + rest
    narrow = {**config, "hidden_size": head_dim * config["num_attention_heads"], "intermediate_size": intermediate_size,
            "num_hidden_layers": 2, "vocab_size": 7 * tp_size + rest, "max_position_embeddings": 64}
    if "head_dim" in config:
        narrow["head_dim"] = head_dim
    # Experts' grouped products want rows of multiples of 16 bytes.
    narrow |= {name: 8 * tp_size for name, value in config.items() if value and _EXPERTS_WIDTH.fullmatch(name)}
    if config.get("sliding_window"):
        narrow["sliding_window"] = max(64, config["sliding_window"])
    if rope.get("rope_type") == "longrope":
        num_pairs = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
        rope |= {name: rope[name][:num_pairs] for name in ("short_factor", "long_factor")}
        narrow |= {"rope_parameters": rope | {"factor": 2.0}, "original_max_position_embeddings": 64}
    for derived in ("layer_types", "torch_dtype", "dtype"):
        narrow.pop(derived, None)
    narrow |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    try:
        weight_shapes(narrow)
    except CheckpointError as error:
        raise NotApplicableError(f"a small model of the same layout can't be made: {error}") from error
    return narrow


def compare_shards(context: CheckContext, what: str, folder: Path, config: dict[str, Any], dtype: str,
                   index: ElementIndex | None = None) -> Outcome:
    """Hold every shard of what is loaded against the file, at the places where the subject's own layout has it: all of them."""
    stored, seen, compared = stored_tensors(folder, config), set(), 0
    layouts = {name: context.subject.layout(config, name, tensor.shape) for name, tensor in stored.items()}
    for name, tensor in stored.items():
        if (problem := _uncovered(layouts[name], tensor.shape, context.tp_size)) is not None:
            return Outcome(cases=len(stored), compared=0, module=name.rpartition(".")[0],
                           finding=f"{what}: {name} of shape {list(tensor.shape)}: {problem}")
    share = _sharded_share(layouts.values())
    if context.tp_size > 1 and not share:
        return Outcome(cases=len(stored), compared=0, finding=f"{what}: no rank lacks anything of it: nothing is sharded, and a "
                                                              "model that is whole on every rank proves nothing")
    wrong: dict[int, list[Wrong]] = {rank: [] for rank in range(context.tp_size)}
    with ExitStack() as stack:
        files = {file: stack.enter_context(open_file(file)) for file in sorted({tensor.file for tensor in stored.values()})}
        for name, shards in context.subject.shards():
            seen.add(name)
            if name not in stored:
                wrong[0].append(Wrong(name=name, what="not in the checkpoint"))
                continue
            as_stored = files[stored[name].file].get_tensor(stored[name].name)
            held_as = DTYPES[dtype]  # what is kept wider is asked for only where a shard differs: that takes the whole model
            if dtype == context.dtype and any(shard is not None and shard.dtype != held_as for shard in shards):
                held_as = context.results.kept_wider.get(name, held_as)
            whole = as_stored.to(held_as) if as_stored.is_floating_point() else as_stored
            if len(not_finite := (~whole.isfinite()).nonzero()):
                place = tuple(not_finite[0].tolist())
                says = f"is {as_stored[place].item()} in {stored[name].file.name}"
                if as_stored[place].isfinite():
                    says += f", which {dtype} can't hold"
                wrong[0].append(Wrong(name=stored[name].name, element=str(list(place)), what=says))
            for rank, shard in enumerate(shards):
                expected = torch.from_numpy(layouts[name].take(bits(whole).numpy(), rank)).view(whole.dtype)
                problem = _difference(shard, expected, index)
                if problem is None:
                    compared += expected.numel()
                else:
                    wrong[rank].append(Wrong(name=name, what=problem))
    wrong[0] += [Wrong(name=name, what="the subject holds no shard of it") for name in sorted(stored.keys() - seen)]
    for rank, found in wrong.items():
        if found:
            return Outcome(cases=len(stored), compared=compared, rank=rank, module=found[0].name.rpartition(".")[0],
                           finding=f"{what}: {len(found)} wrong shards on rank {rank}, first {found[0]}")
    return Outcome(cases=len(stored), compared=compared, extra={SHARDED: round(share, 4)})


def _sharded_share(layouts: Iterable[Ownership]) -> float:
    """Share of the parameters that no rank holds whole."""
    sizes = [(math.prod(owned.shape), owned.dim is not None and max(map(len, owned.indices)) < owned.shape[owned.dim])
             for owned in layouts]
    return sum(size for size, is_sharded in sizes if is_sharded) / max(1, sum(size for size, _ in sizes))


def stored_tensors(folder: Path, config: dict[str, Any]) -> dict[str, StoredTensor]:
    """What the files hold, by the names of the model's tensors, tied ones under both of theirs.

    Files in the hub's format have other names than the model, which transformers converts: by those then.
    """
    shapes, tied = shapes_and_ties(config)
    headers = read_headers(folder)
    stored = by_model_name(headers, shapes, tied)
    if not shapes.keys() <= stored.keys():
        stored = {name: tensor for name, tensor in headers.items() if not DERIVED.search(name)}
    for copy, original in tied.items():
        ends = "." + ".".join(original.split(".")[-2:])
        originals = [name for name in stored if f".{name}".endswith(ends)]
        if copy not in stored and len(originals) == 1:
            stored[copy] = stored[originals[0]]
    return stored


def _difference(shard: Tensor | None, expected: Tensor, index: ElementIndex | None) -> str | None:
    if shard is None:
        return "this rank holds no shard of it" if expected.numel() else None
    if shard.dtype != expected.dtype or shard.shape != expected.shape:
        return f"the shard is {tuple(shard.shape)} {shard.dtype}, it should be {tuple(expected.shape)} {expected.dtype}"
    differs = (bits(shard) != bits(expected)).nonzero()
    if not len(differs):
        return None
    place = tuple(differs[0].tolist())
    return (f"{len(differs)} of {shard.numel()} elements differ, the first at local index {place}: "
            f"{_explain(shard, expected, place, index)}")


def _explain(shard: Tensor, expected: Tensor, place: tuple[int, ...], index: ElementIndex | None) -> str:
    values = [tensor[place].item() for tensor in (shard, expected)]
    return f"it holds {_name(values[0], index)} where {_name(values[1], index)} belongs"


def _name(value: float, index: ElementIndex | None) -> str:
    if index is None:
        return repr(value)
    if np.isnan(value):
        return "NaN, never written,"
    if value == 0:
        return "a zero"
    try:
        return str(index.decode(value))
    except ValueError:
        return repr(value)


CHECK = Check(
    name="weights", question="Is every element of the checkpoint where it belongs, bit for bit, and nothing else anywhere?",
    parts=(Whole(judge=check_own, kind="model"), Whole(judge=check_indexed, kind="indexed"),
           Whole(judge=check_own_head, kind="own head")))
