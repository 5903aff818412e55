"""What a model chooses by top-k (experts for tokens, keys to attend to), noted, and forced upon another run of it.

A choice goes by the name of the module that makes it and its number there within one forward of the whole model, as
``model.layers.0.mlp.gate: top-k 1``.
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
from torch.utils._python_dispatch import TorchDispatchMode

Routes = Mapping[str, Tensor]
"""[T, ..., k] int64 each: the chosen indices by the choice's name."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One call of top-k.

    Attributes:
        scores: What was chosen from, [..., n].
        indices: The k best, [..., k], whatever was forced.
    """

    name: str
    scores: Tensor
    indices: Tensor


class Choosing(TorchDispatchMode):
    """Within it, in this thread, every top-k is noted in ``made``, and those of ``routes`` are forced."""

    def __init__(self, routes: Routes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[Choice] = []
        self._routes = routes
        self._modules: list[str] = [""]
        self._calls: Counter[str] = Counter()

    def enter(self, module: str) -> None:
        """A module's forward begins."""
        self._modules.append(module)

    def leave(self) -> None:
        """It ends."""
        self._modules.pop()

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **kwargs or {})
        if func is not torch.ops.aten.topk.default:
            return result
        indices, module = result[1], self._modules[-1]
        name = f"{module}: top-k {self._calls[module]}"
        self._calls[module] += 1
        self.made.append(Choice(name, args[0], indices))
        if name not in self._routes:
            return result
        dim = args[2] if len(args) > 2 else -1
        forced = self._routes[name].to(indices.device)
        # Several copies of a sequence in a batch take the same route.
        forced = forced.reshape(-1).repeat(indices.numel() // forced.numel()).view(indices.shape)
        return args[0].gather(dim, forced), forced


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
