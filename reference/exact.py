"""Makes one float64 model compute in float64 throughout.

Hugging Face's RMSNorm converts to float32 whatever the model's dtype. Here each norm of one model gets a
forward of its own; classes and other models are left alone. Softmax is float64 as long as attention is
"sdpa"; "eager" converts to float32. What stays float32 is RoPE's cos and sin, which are part of the model's
definition.
"""

from types import MethodType
from typing import Any

import torch
from torch import nn


def _rms_norm_float64(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """[..., hidden] float64 in and out: ``weight * x / sqrt(mean(x^2) + eps)``."""
    variance = hidden_states.square().mean(-1, keepdim=True)
    normed: torch.Tensor = self.weight * (hidden_states / torch.sqrt(variance + self.variance_epsilon))
    return normed


def compute_in_float64(model: nn.Module) -> None:
    """Replace the forward of every RMSNorm in ``model``, a float64 model with sdpa attention.

    Raises
    ------
    NotImplementedError
        A norm computes something else than the formula above, as Gemma's does: its exact form would have to
        be added here first.
    """
    for name, module in model.named_modules():
        if not type(module).__name__.endswith("Norm"):
            continue
        weight = getattr(module, "weight", None)
        if not (isinstance(weight, nn.Parameter) and hasattr(module, "variance_epsilon")):
            raise NotImplementedError(f"{name} is a {type(module).__name__}, whose exact form is not known")
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(4, weight.shape[0], dtype=torch.float64, generator=generator)
        probe = probe.to(weight.device)
        original = module(probe)
        module.forward = MethodType(_rms_norm_float64, module)  # on this one module, not on its class
        # float32 inside the original: they agree to its rounding or compute different things.
        if not torch.allclose(module(probe), original, rtol=1e-5, atol=1e-5):
            raise NotImplementedError(f"{name}, a {type(module).__name__}, is no plain RMSNorm")
