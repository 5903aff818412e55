"""Makes one float64 model compute in float64 throughout.

A float64 model of transformers still computes parts in float32: norms, softmax, routers, the application of RoPE and states
of linear attention convert to it explicitly, whatever the model's dtype. Within the forward of a model that
``compute_in_float64`` was given, every such conversion, and every tensor made anew, is float64 instead. No architecture is
known by name: what is replaced are dtypes in calls of torch's operators, below all modules and functions.

RoPE's cos and sin as transformers computes them, in float32, are part of a model's definition: the modules that make them
compute as they always do, and their results are carried as float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from reference.modes import DispatchMode

WIDER = {
    torch.bfloat16: torch.float64,
    torch.float16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
"""What stands in the place of each narrower dtype."""
_NARROW = frozenset(WIDER)


def compute_in_float64(model: nn.Module) -> None:
    """Make every forward of ``model`` compute in float64; other models and threads are left alone.

    Args:
        model: a model with float64 weights. It is changed in place: the few weights and buffers that are narrower, such as
            tables made by the model itself, become float64 with the values that they have.
    """
    inside = _Float64()
    tables = [module for module in model.modules() if makes_position_tables(module)]
    for module in model.modules():
        if module not in tables:
            _widen(module)
    for module in tables:
        module.forward = _outside(module.forward, inside)
    model.forward = _within(model.forward, inside)


def makes_position_tables(module: nn.Module) -> bool:
    """Whether a module makes RoPE's tables: its only tensors are buffers, some of them inverse frequencies."""
    buffers = [name for name, _ in module.named_buffers()]
    return any(name.endswith("inv_freq") for name in buffers) and not any(True for _ in module.parameters())


class _Float64(DispatchMode):
    """Within it, in this thread, nothing narrower than float64 is made, but for what is computed while it is ``paused``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pauses = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Everything computes as it would without this mode."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self._pauses:
            return func(*args, **kwargs)
        if _NARROW.intersection(value for value in args if type(value) is torch.dtype):
            args = [_wider(value) if type(value) is torch.dtype else value for value in args]
        if "dtype" in kwargs:
            kwargs["dtype"] = _wider(kwargs["dtype"])
        if kwargs.get("dtype") is None and _makes_values(func) and _is_float(func, args):
            kwargs["dtype"] = torch.float64
        result = func(*args, **kwargs)
        if not _is_narrow(result):
            return result
        # Of integers, such as their quotient: it is made again.
        return _as_wide(func(*tree_map_only(Tensor, _without_integers, args), **kwargs))


_DTYPE_OF_VALUES = (torch.ops.aten.arange, torch.ops.aten.full, torch.ops.aten.scalar_tensor)
"""Their result is of integers if what they are given is."""


@functools.cache
def _makes_values(func: Any) -> bool:
    """Whether an operator makes a tensor of a dtype from no other tensor."""
    arguments = func._schema.arguments
    return (any(argument.name == "dtype" for argument in arguments)
            and not any("Tensor" in str(argument.type) for argument in arguments))


def _is_float(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operator that is not told a dtype takes torch's default one, which is a float's."""
    return func.overloadpacket not in _DTYPE_OF_VALUES or any(isinstance(value, float) for value in args)


def _wider(dtype: torch.dtype) -> torch.dtype:
    return WIDER.get(dtype, dtype)


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in WIDER


def _as_wide(value: Any) -> Any:
    return value.to(WIDER[value.dtype]) if _is_narrow(value) else value


def _without_integers(x: Tensor) -> Tensor:
    is_integer = not (x.is_floating_point() or x.is_complex() or x.dtype is torch.bool)
    return x.double() if is_integer else x


def _widen(module: nn.Module) -> None:
    """Convert the module's own parameters and buffers, and tensors that are mere attributes."""
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data = _as_wide(tensor.data)
    for name, value in vars(module).items():
        if _is_narrow(value):
            setattr(module, name, _as_wide(value))


def _within(forward: Callable[..., Any], mode: _Float64) -> Callable[..., Any]:
    @functools.wraps(forward)  # whoever looks at the signature of a model's forward sees its own
    def in_float64(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    return in_float64


def _outside(forward: Callable[..., Any], mode: _Float64) -> Callable[..., Any]:
    @functools.wraps(forward)
    def as_transformers_computes(*args: Any, **kwargs: Any) -> Any:
        with mode.paused():
            tables = forward(*args, **kwargs)
        return tree_map(_as_wide, tables)

    return as_transformers_computes
