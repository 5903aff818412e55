"""RoPE's tables, as transformers computes them: they are part of a model's definition (design: the same on both sides)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def rope_frequencies(hf_config: Any, head_dim: int) -> tuple[Tensor, float]:
    """Angles of one position, ``[rotary_dim / 2]`` float32, and the attention scaling of yarn.

    ``rotary_dim`` is ``head_dim``, or the part of it that ``partial_rotary_factor`` says. Longrope's are those of sequences no
    longer than the length that it starts from.

    Methods: RoFormer (Su et al. 2021); linear scaling (Chen et al. 2023); yarn (Peng et al. 2023); longrope (Ding et al. 2024);
    llama3 (Llama 3.1 model card). All but the first are transformers' own functions.

    Args:
        hf_config: a transformers config, or what ranks have of it.
        head_dim: of the model.
    """
    if isinstance(hf_config, FrequenciesAlone):
        return hf_config.frequencies
    parameters = hf_config.rope_parameters
    if parameters.get("rope_type", "default") == "default":
        rotary_dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        exponents_D = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
        return 1.0 / (parameters["rope_theta"] ** exponents_D), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # seconds, for the models that need it

    inv_freq_D, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](hf_config, device=torch.device("cpu"))
    return inv_freq_D.float(), scaling


@dataclass(frozen=True, slots=True)
class FrequenciesAlone:
    """All that ranks need of a transformers config, whose module takes seconds to import."""

    frequencies: tuple[Tensor, float]


def rope_tables(hf_config: Any, head_dim: int, num_positions: int, *, device: torch.device | str = "cpu",
                by_position: bool = False) -> tuple[Tensor, Tensor]:
    """Cosines and sines, ``[num_positions, rotary_dim / 2]`` float32, times the scaling of :func:`rope_frequencies`.

    by_position   each row by itself: torch's functions may give other bits at the end of a table than in another, longer one
    """
    inv_freq_D, scaling = rope_frequencies(hf_config, head_dim)
    angles_PD = torch.arange(num_positions, dtype=torch.float32)[:, None] * inv_freq_D[None]
    parts = angles_PD.split(1) if by_position else (angles_PD,)
    cos_PD, sin_PD = (torch.cat([turn(part) for part in parts]) for turn in (torch.cos, torch.sin))
    return (cos_PD * scaling).to(device), (sin_PD * scaling).to(device)
