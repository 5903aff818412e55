"""What a model family is made of, as data: each module of its checkpoints, how it is cut, and where the engine keeps it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

from torch import Tensor, nn

from engine.parallel.embedding import ParallelLMHead

Kind = Literal["column", "row", "vocabulary", "replicated"]
TOKEN_IDS, RESIDUAL, ATTENTION, ACTIVATION = "token ids", "residual", "attention", "activation"
"""What feeds a module where that is no module's output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A module under its name in the checkpoint, where it has a ``weight``, and a ``bias`` if the model's config says so.

    path         with ``*`` for the number of a layer
    kind         how it is cut: ``column``: by output features; ``row``: by input features, its bias whole; ``vocabulary``: by
                 rows, padded; ``replicated``: whole on every rank
    fed_by       the module whose output it takes, or one of ``TOKEN_IDS``, ``RESIDUAL``, ``ATTENTION``, ``ACTIVATION``
    fused        the engine's module that computes it together with others; None: it has one of its own, of the same path
    part         which part of the fused parameters it is: the ``shard_id`` of their loader
    has_output   False: a kernel computes it along with what follows, and its output is never seen
    """

    path: str
    kind: Kind
    fed_by: str
    fused: str | None = None
    part: str | int | None = None
    has_output: bool = True

    @property
    def held_in(self) -> str:
        """Path of the engine's module that holds its tensors."""
        return self.fused or self.path

    def of_layer(self, number: int) -> Module:
        """The same with a layer's number in all paths."""
        path, fed_by = (text.replace("*", str(number)) for text in (self.path, self.fed_by))
        return replace(self, path=path, fed_by=fed_by, fused=self.fused and self.fused.replace("*", str(number)))


class CausalLM(nn.Module):
    """What runs a model's steps asks of it. ``model(batch, caches)`` gives hidden states ``[T, hidden]`` of a step's tokens."""

    lm_head: ParallelLMHead
    """Logits of hidden states: this rank's, or whole."""

    @property
    def tied(self) -> dict[str, str]:
        """Checkpoint names that are copies of another one."""
        return {}

    def logits(self, hidden_RE: Tensor) -> Tensor:
        """``[R, hidden] -> [R, vocabulary]``, whole and unpadded on every rank."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """All that the engine knows of models of one ``model_type``.

    model            takes the arguments of :class:`engine.models.decoder.DecoderForCausalLM`
    fields           transformers' config -> the fields of ``ModelConfig`` that are not read alike in all families
    modules          its module table, in the order of computation
    rope_types       the kinds of RoPE that its models may ask for
    partial_rotary   whether they may rotate a part of each head alone (``partial_rotary_factor``)
    """

    model: Callable[..., CausalLM]
    fields: Callable[[Any], dict[str, Any]]
    modules: Sequence[Module]
    rope_types: Sequence[str] = ("default", "linear", "llama3", "yarn")
    partial_rotary: bool = False


def in_order(modules: Sequence[Module], num_layers: int) -> Iterator[Module]:
    """Every module of a model in the order of computation: what stands for a layer once for each."""
    for in_layers, group in groupby(modules, key=lambda module: "*" in module.path):
        rows = list(group)
        for number in range(num_layers if in_layers else 1):
            yield from (row.of_layer(number) for row in rows)


def held_in(modules: Sequence[Module], path: str) -> list[Module]:
    """What the engine's module at ``path`` holds, in the table's order; nothing if it is in no row."""
    number = re.search(r"(?<=\.)\d+(?=\.)", path)
    if number is None:
        return [module for module in modules if module.held_in == path]
    pattern = f"{path[: number.start()]}*{path[number.end() :]}"
    return [module.of_layer(int(number[0])) for module in modules if module.held_in == pattern]
