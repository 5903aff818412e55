"""Is every element of the checkpoint where it belongs, bit for bit, and nothing else anywhere?

Twice: the model's own checkpoint, as it was loaded for the other checks; and a small one of the same layout whose every
value is the number of its element, so that a wrong element names itself. Where embeddings are tied, a third time, with a
checkpoint that holds an LM head all the same.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint.checkpoint_files import by_model_name, open_file, read_headers
from engine.config import TIED
from engine.ranks.ranks import RankContext
from harness.checks.base import CheckContext, Outcome
from harness.subjects import SUBJECTS
from harness.verification.budgets import bits
from reference.checkpoints import as_config, index_checkpoint
from reference.elements import ElementIndex
from reference.hf import DTYPES
from reference.shards import owners
from reference.writing import edited

LONG_VOCABULARY = 1009


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrong:
    """A shard that is not what it should be."""

    name: str
    what: str
    element: str = ""
    """``[row, column]``, where it is the file's own element that is wrong."""

    def __str__(self) -> str:
        return f"{self.name}{self.element} {self.what}" if self.element else f"{self.name}: {self.what}"


def check_weights(context: CheckContext) -> Outcome:
    compared = 0
    parts = {"the model's checkpoint": _own_checkpoint, "an index-valued checkpoint": _indexed}
    if context.truth.config.get("tie_word_embeddings"):
        parts["a checkpoint with an LM head beside the embedding that it is tied to"] = _with_a_head_of_its_own
    for what, compare in parts.items():
        for rank, (num_elements, wrong) in enumerate(compare(context)):
            compared += num_elements
            if wrong:
                first = wrong[0]
                return Outcome(cases=len(parts), compared=compared, rank=rank, module=first.name.rpartition(".")[0],
                               finding=f"{what}: {len(wrong)} wrong shards on rank {rank}, first {first}")
    return Outcome(cases=len(parts), compared=compared)


def _own_checkpoint(context: CheckContext) -> list[tuple[int, list[Wrong]]]:
    truth = context.truth
    return context.ranks.run(compare_shards, truth.folder, truth.config, truth.dtype)


def _indexed(context: CheckContext) -> list[tuple[int, list[Wrong]]]:
    with tempfile.TemporaryDirectory(prefix="shardproof-") as scratch:
        config = small_twin(context.truth.config, context.ranks.tp_size)
        folder = index_checkpoint(Path(scratch) / "indexed", config)
        return context.ranks.run(load_and_compare, context.subject, folder, config)


def _with_a_head_of_its_own(context: CheckContext) -> list[tuple[int, list[Wrong]]]:
    """Where an LM head is stored that differs from the embedding, if only in its last row, transformers does not tie them."""
    with tempfile.TemporaryDirectory(prefix="shardproof-") as scratch:
        config = {**small_twin(context.truth.config, context.ranks.tp_size), "vocab_size": LONG_VOCABULARY}
        folder = index_checkpoint(Path(scratch) / "headed", {**config, "tie_word_embeddings": False})
        as_config(config).save_pretrained(folder)
        with edited(folder) as tensors:
            head = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            head[-1] = 0
        return context.ranks.run(load_and_compare, context.subject, folder, config)


def small_twin(config: dict[str, Any], tp_size: int) -> dict[str, Any]:
    """The config with the same heads, biases and ties, two narrow layers, and sizes that do not split evenly."""
    rope = dict(config.get("rope_parameters") or {})
    head_dim = 4 if rope.get("partial_rotary_factor", 1.0) == 1.0 else 8
    intermediate_size = 5 * tp_size + (1 if tp_size > 1 else 0)
    twin = {**config, "hidden_size": head_dim * config["num_attention_heads"], "intermediate_size": intermediate_size,
            "num_hidden_layers": 2, "vocab_size": 7 * tp_size + (1 if tp_size > 1 else 0), "max_position_embeddings": 64}
    if "head_dim" in config:
        twin["head_dim"] = head_dim
    if config.get("sliding_window"):
        twin["sliding_window"] = max(64, config["sliding_window"])
    if rope.get("rope_type") == "longrope":
        num_pairs = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
        rope |= {name: rope[name][:num_pairs] for name in ("short_factor", "long_factor")}
        twin |= {"rope_parameters": rope | {"factor": 2.0}, "original_max_position_embeddings": 64}
    for derived in ("layer_types", "torch_dtype", "dtype"):
        twin.pop(derived, None)
    return twin | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


def compare_shards(rank: RankContext, folder: Path, config: dict[str, Any], dtype: str,
                   index: ElementIndex | None = None) -> tuple[int, list[Wrong]]:
    """Job: hold every shard of the loaded subject against the checkpoint. Returns elements compared, and what is wrong."""
    shards: dict[str, Tensor] = rank.state["subject"].shards()
    wrong: list[Wrong] = []
    compared = 0
    tied = TIED if config.get("tie_word_embeddings") else {}
    stored = by_model_name(read_headers(folder), shards.keys() - tied.keys(), tied)
    stored |= {copy: stored[original] for copy, original in tied.items() if copy not in stored and original in stored}
    wrong += [Wrong(name=name, what="the subject holds no shard of it") for name in sorted(stored.keys() - shards.keys())]
    wrong += [Wrong(name=name, what="not in the checkpoint") for name in sorted(shards.keys() - stored.keys())]
    with ExitStack() as stack:
        files = {file: stack.enter_context(open_file(file)) for file in sorted({tensor.file for tensor in stored.values()})}
        for name in sorted(stored.keys() & shards.keys()):
            as_stored = files[stored[name].file].get_tensor(stored[name].name)
            whole = as_stored.to(DTYPES[dtype])
            if len(not_finite := (~whole.isfinite()).nonzero()):
                place = tuple(not_finite[0].tolist())
                what = f"is {as_stored[place].item()} in {stored[name].file.name}"
                if as_stored[place].isfinite():
                    what += f", which {dtype} can't hold"
                wrong.append(Wrong(name=stored[name].name, element=str(list(place)), what=what))
            owned = owners(config, name, tuple(whole.shape), rank.tp.size)
            expected = torch.from_numpy(owned.take(bits(whole).numpy(), rank.tp.rank))
            shard = shards[name].cpu()
            if shard.dtype != DTYPES[dtype] or shard.shape != expected.shape:
                wrong.append(Wrong(name=name, what=f"the shard is {tuple(shard.shape)} {shard.dtype}, "
                                                   f"it should be {tuple(expected.shape)} {DTYPES[dtype]}"))
                continue
            compared += shard.numel()
            differs = (bits(shard) != expected).nonzero()
            if len(differs):
                place = tuple(differs[0].tolist())
                wrong.append(Wrong(name=name, what=f"{len(differs)} of {shard.numel()} elements differ, the first at local "
                                                   f"index {place}: {_explain(shard, expected.view(shard.dtype), place, index)}"))
    return compared, wrong


def load_and_compare(rank: RankContext, subject: str, folder: Path, config: dict[str, Any]) -> tuple[int, list[Wrong]]:
    """Job: load another checkpoint beside the one that the rank holds, compare, and put the first one back."""
    index = ElementIndex.of_checkpoint(folder)
    before = rank.state.get("subject")
    try:
        candidate = SUBJECTS[subject]()
        candidate.load(rank, folder, dtype=index.dtype, options={"num_kv_blocks": 4, "block_size": 16})
        rank.state["subject"] = candidate
        return compare_shards(rank, folder, config, index.dtype, index)
    finally:
        rank.state["subject"] = before


def _explain(shard: Tensor, expected: Tensor, place: tuple[int, ...], index: ElementIndex | None) -> str:
    values = [tensor[place].item() for tensor in (shard, expected)]
    return f"it holds {_name(values[0], index)} where {_name(values[1], index)} belongs"


def _name(value: float, index: ElementIndex | None) -> str:
    if index is None:
        return repr(value)
    if np.isnan(value):
        return "NaN, never written,"
    if value == 0:
        return "zero padding"
    try:
        return str(index.decode(value))
    except ValueError:
        return repr(value)
