"""A slow-down on purpose, to see whether a comparison finds it: more of the same work, never a pause."""

from __future__ import annotations

from typing import Any

import torch


def slow_down(layer: Any, share: float) -> None:
    """Let a linear layer compute ``share`` more output features than it has. Nothing drops them: that would cost time too.

    Raises:
        ValueError: for shares out of (0, 1], and for layers whose weight is no matrix of output features.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must lie in (0, 1]: the part of the work that is done on top")
    if not hasattr(layer, "weight") or layer.weight.ndim != 2:
        raise ValueError(f"layer={type(layer).__name__} has no matrix of output features to make longer")
    extra = max(1, round(share * layer.weight.shape[0]))
    layer.weight.data = torch.cat((layer.weight.data, layer.weight.data[:extra]))
