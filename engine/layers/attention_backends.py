"""Attention over the paged cache, by backends with one interface: plain torch, Triton, flash-attn.

Shape suffixes: T = tokens, D = decode rows (the first of T), Q / N = local query / KV heads, H = head dim.
"""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec

import torch
from torch import Tensor

from engine.kernels.attention_torch import paged_attention_torch
from engine.kernels.common import HAVE_TRITON
from engine.kernels.paged_decode import paged_decode
from engine.kernels.paged_prefill import paged_prefill
from engine.layers.attention_layout import AttentionBackend, AttentionLayout, LayerCache
from engine.layers.flash_attention import FlashAttnBackend
from engine.scheduling.batch import StepBatch

logger = logging.getLogger(__name__)


class TorchBackend:
    """Runs anywhere, any GQA map, any block size, float64 too: the truth that the kernels are held against."""

    name = "torch"
    capturable = False
    requires = "torch"

    def __init__(self, layout: AttentionLayout) -> None:
        self.scale = layout.head_dim**-0.5
        self.kv_of_q = list(layout.heads.kv_of_q)

    @staticmethod
    def is_installed() -> bool:
        return True

    @staticmethod
    def refusal(layout: AttentionLayout) -> str | None:
        """Why this layout can't be served; None if it can."""
        return None

    def __call__(self, q_TQH: Tensor, cache: LayerCache, batch: StepBatch) -> Tensor:
        return paged_attention_torch(q_TQH, cache.k_PNBH, cache.v_PNBH, batch.block_tables_SB, batch.cu_seqlens_S1,
                                     batch.context_lens_S, self.kv_of_q, self.scale)


class TritonBackend:
    """Own kernels, any GQA map: split-KV decode for the rows of one token, tiled prefill for the others."""

    name = "triton"
    capturable = True
    requires = "triton"

    def __init__(self, layout: AttentionLayout) -> None:
        heads, device = layout.heads, layout.device
        self.scale = layout.head_dim**-0.5
        self.q_start_N = torch.tensor(heads.q_starts, dtype=torch.int32, device=device)
        self.q_count_N = torch.tensor(heads.q_counts, dtype=torch.int32, device=device)
        self.kv_of_q_Q = torch.tensor(heads.kv_of_q, dtype=torch.int32, device=device)
        self.max_group = max(heads.q_counts)

    @staticmethod
    def is_installed() -> bool:
        return find_spec("triton") is not None

    @staticmethod
    def refusal(layout: AttentionLayout) -> str | None:
        if not HAVE_TRITON:
            return "triton can't be imported"
        if layout.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"device={layout.device} has no Triton (set TRITON_INTERPRET=1 to interpret it on a CPU)"
        if layout.dtype is torch.float64:
            return "dtype=float64 is served by the torch backend only"
        if layout.head_dim % 8 or layout.head_dim > 256:
            return f"head_dim={layout.head_dim} is not a multiple of 8 up to 256"
        return None

    def __call__(self, q_TQH: Tensor, cache: LayerCache, batch: StepBatch) -> Tensor:
        num_decodes = batch.num_decodes
        out_TQH = torch.empty(q_TQH.shape, dtype=q_TQH.dtype, device=q_TQH.device)
        if num_decodes:
            decodes = (q_TQH[:num_decodes], cache.k_PNBH, cache.v_PNBH, batch.block_tables_SB[:num_decodes],
                       batch.context_lens_S[:num_decodes], self.q_start_N, self.q_count_N, self.scale)
            paged_decode(*decodes, out_SQH=out_TQH[:num_decodes], max_context=batch.max_decode_context_len,
                         max_group=self.max_group)
        if num_decodes < batch.num_seqs:
            paged_prefill(q_TQH[num_decodes:], cache.k_PNBH, cache.v_PNBH, batch.block_tables_SB[num_decodes:],
                          batch.prefill_cu_seqlens_S1, batch.context_lens_S[num_decodes:], self.kv_of_q_Q, self.scale,
                          out_TQH=out_TQH[num_decodes:])
        return out_TQH


BACKENDS: dict[str, type[TorchBackend] | type[TritonBackend] | type[FlashAttnBackend]] = {
    backend.name: backend for backend in (TritonBackend, TorchBackend, FlashAttnBackend)
}
AUTO = ("triton", "torch")
"""What ``auto`` tries, in this order, and what a backend that was asked for by name gives way to."""


def check_name(name: str) -> None:
    """Raise ValueError if there is no such backend, installed or not."""
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"attention_backend={name!r} is unknown; supported: auto, {', '.join(BACKENDS)}")


def select_backend(name: str, layout: AttentionLayout) -> AttentionBackend:
    """The backend of that name, or for ``auto`` the first that serves this layout.

    A backend asked for by name that can't serve the layout (a GQA group cut in two, say) gives way to one that can, with a
    warning; a backend that is not installed is an error.

    Raises:
        ValueError: if the name is unknown, or the backend's package is not installed.
    """
    check_name(name)
    if name != "auto" and not BACKENDS[name].is_installed():
        installed = ", ".join(other for other, backend in BACKENDS.items() if backend.is_installed())
        raise ValueError(f"attention_backend={name!r} is not installed: it needs {BACKENDS[name].requires}; "
                         f"installed: {installed}")
    refused: list[str] = []
    for candidate in AUTO if name == "auto" else dict.fromkeys((name, *AUTO)):
        refusal = BACKENDS[candidate].refusal(layout)
        if refusal is None:
            if refused and name != "auto":
                logger.warning("attention_backend=%s gives way to %s: %s", name, candidate, "; ".join(refused))
            return BACKENDS[candidate](layout)
        refused.append(f"{candidate}: {refusal}")
    raise AssertionError(f"the torch backend serves every layout, but: {refused}")
