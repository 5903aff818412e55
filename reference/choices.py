"""What a model chooses (experts for tokens, keys to attend to), noted, and forced upon another run of it.

Three operators choose: top-k; a maximum, where the model uses its place and not its value alone; and, in a module that does one
of these, a comparison of numbers, such as of scores with a threshold. A choice goes by the name of the module that makes it and
its number there within one forward of the whole model, as ``model.layers.0.mlp.gate: top-k 1``.
Forced are the indices; the values that belong to them are those of the run itself, so that all that follows is what the model
makes of this choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from reference.modes import DispatchMode

Routes = Mapping[str, Tensor]
"""[T, ..., k] int64 each: the chosen indices by the choice's name."""

_LEFT_IS_LARGER = {torch.ops.aten.gt: True, torch.ops.aten.ge: True, torch.ops.aten.lt: False, torch.ops.aten.le: False}
"""What a comparison says of its two sides if it is true."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One call of an operator that chooses. A comparison chooses the larger of its two sides.

    Attributes:
        scores: What was chosen from, [..., n].
        indices: The k best, [..., k], whatever was forced.
    """

    name: str
    scores: Tensor
    indices: Tensor

    @property
    def module(self) -> str:
        """Which makes it."""
        return self.name.partition(":")[0]


@dataclass(frozen=True, slots=True)
class _Compared:
    """A comparison. What it chose from is put together only if it counts as a choice."""

    name: str
    module: str
    sides: tuple[Tensor, Any]
    indices: Tensor

    @property
    def choice(self) -> Choice:
        left, right = torch.broadcast_tensors(self.sides[0], torch.as_tensor(self.sides[1]).to(self.sides[0]))
        return Choice(self.name, torch.stack([left, right], -1), self.indices)


class Choosing(DispatchMode):
    """Within it, in this thread, every choice is noted, and those of ``routes`` are forced."""

    def __init__(self, routes: Routes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._routes = routes
        self._modules: list[str] = [""]
        self._calls: Counter[str] = Counter()
        self._chosen: list[Choice] = []
        # By the id of the tensor of places that the model got: held here, or another one could get that id.
        self._maxima: dict[int, tuple[Tensor, Choice]] = {}
        self._compared: list[_Compared] = []

    @property
    def made(self) -> list[Choice]:
        """What was chosen so far."""
        modules = {choice.module for choice in self._chosen}
        return [*self._chosen, *(compared.choice for compared in self._compared if compared.module in modules)]

    def enter(self, module: str) -> None:
        """A module's forward begins."""
        self._modules.append(module)

    def leave(self) -> None:
        """It ends: of the maxima that it took the places are not used."""
        left = self._modules.pop()
        self._maxima = {key: own for key, own in self._maxima.items() if own[1].module != left}

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        if self._maxima:
            used = (self._maxima.pop(id(value), None) for value in tree_leaves((args, kwargs)))
            self._chosen += [own[1] for own in used if own is not None]
        result = func(*args, **kwargs or {})
        if func is torch.ops.aten.topk.default:
            name = self._name("top-k")
            self._chosen.append(Choice(name, args[0], result[1]))
            forced = self._forced(name, result[1])
            return result if forced is None else (args[0].gather(args[2] if len(args) > 2 else -1, forced), forced)
        if func is torch.ops.aten.max.dim and args[1] in (-1, args[0].ndim - 1):
            name, is_kept = self._name("maximum"), result[1].ndim == args[0].ndim
            indices = result[1] if is_kept else result[1].unsqueeze(-1)
            forced = self._forced(name, indices)
            if forced is not None:
                result = args[0].gather(-1, forced), forced
                result = result if is_kept else (result[0].squeeze(-1), result[1].squeeze(-1))
            self._maxima[id(result[1])] = result[1], Choice(name, args[0], indices)
        elif func.overloadpacket in _LEFT_IS_LARGER and _is_plain_float(args[0]):
            name, is_left = self._name("threshold"), _LEFT_IS_LARGER[func.overloadpacket]
            indices = (result != is_left).long().unsqueeze(-1)
            self._compared.append(_Compared(name, self._modules[-1], (args[0], args[1]), indices))
            forced = self._forced(name, indices)
            return result if forced is None else (forced.squeeze(-1) == 0) == is_left
        return result

    def _name(self, what: str) -> str:
        kind = f"{self._modules[-1]}: {what}"
        self._calls[kind] += 1
        return f"{kind} {self._calls[kind] - 1}"

    def _forced(self, name: str, indices: Tensor) -> Tensor | None:
        if name not in self._routes:
            return None
        forced = self._routes[name].to(indices.device)
        # Several copies of a sequence in a batch take the same route.
        return forced.reshape(-1).repeat(indices.numel() // forced.numel()).view(indices.shape)


def _is_plain_float(value: Any) -> bool:
    """Whether it is a tensor of floats with dimensions, and no rank's part of one."""
    return type(value) is Tensor and value.is_floating_point() and value.ndim > 0


@contextmanager
def choosing(model: nn.Module, routes: Routes | None = None) -> Iterator[Choosing]:
    """Note what ``model`` chooses in its forwards as long as this lasts, and force ``routes`` upon it."""
    mode = Choosing(routes or {})
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(_enter(mode, name)).remove)
            hooks.callback(module.register_forward_hook(lambda *_: mode.leave(), always_call=True).remove)
        with mode:
            yield mode


def _enter(mode: Choosing, name: str) -> Callable[..., None]:
    return lambda *_: mode.enter(name)
