"""Attention by the flash-attn packages, where one is installed and serves the layout.

*flash-attn* (version 2, NVIDIA GPUs from Ampere on) and *flash-attn-4* (``flash_attn.cute``, Hopper and Blackwell): Dao,
FlashAttention-2, 2023, and its successors. Both take the cache as ``[blocks, slots, heads, head_dim]``, by its strides: ours,
transposed, needs no copy.

Shape suffixes: T = tokens, S = sequences, B = blocks of the longest sequence, P = cache blocks, C = slots of a block,
Q / N = local query / KV heads, H = head dim.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from engine.layers.attention_layout import AttentionLayout, LayerCache
from engine.scheduling.batch import StepBatch

Capability = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The step's decodes, or its prefill chunks."""

    q_TQH: Tensor
    k_PCNH: Tensor
    v_PCNH: Tensor
    block_tables_SB: Tensor
    cu_seqlens_S1: Tensor
    context_lens_S: Tensor
    max_query_len: int
    scale: float


class Package(Protocol):
    """One of the packages: an instance has its kernels at hand."""

    distribution: ClassVar[str]

    @staticmethod
    def refusal(layout: AttentionLayout, capability: Capability) -> str | None:
        """Why it can't serve this layout on a GPU of this compute capability; None if it can."""

    def attend(self, part: Part) -> Tensor:
        """``[T, Q, H]``: causal, the last query of each sequence sees all of its context."""


class FlashAttention2:
    """flash-attn 2: decodes split over the keys by ``flash_attn_with_kvcache``, chunks by ``flash_attn_varlen_func``."""

    distribution: ClassVar[str] = "flash-attn"

    def __init__(self) -> None:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

        self.varlen = flash_attn_varlen_func
        self.with_kvcache = flash_attn_with_kvcache

    @staticmethod
    def refusal(layout: AttentionLayout, capability: Capability) -> str | None:
        if capability < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
        if layout.block_size % 256:
            return f"block_size={layout.block_size} is not a multiple of 256"
        if layout.head_dim % 8 or layout.head_dim > 256:
            return f"head_dim={layout.head_dim} is not a multiple of 8 up to 256"
        return None

    def attend(self, part: Part) -> Tensor:
        if part.max_query_len == 1:
            out_S1QH: Tensor = self.with_kvcache(
                part.q_TQH[:, None], part.k_PCNH, part.v_PCNH, cache_seqlens=part.context_lens_S,
                block_table=part.block_tables_SB, softmax_scale=part.scale, causal=True,
            )
            return out_S1QH[:, 0]
        cu_seqlens_k = torch.nn.functional.pad(part.context_lens_S.cumsum(0, dtype=torch.int32), (1, 0))
        most_keys = part.block_tables_SB.shape[1] * part.k_PCNH.shape[1]
        out_TQH: Tensor = self.varlen(
            part.q_TQH, part.k_PCNH, part.v_PCNH, part.cu_seqlens_S1, cu_seqlens_k, part.max_query_len, most_keys,
            softmax_scale=part.scale, causal=True, block_table=part.block_tables_SB,
        )
        return out_TQH


# Its compiler, entered by a kernel's first call in a process, is not made for several threads at once; ranks may be threads.
_compiling = threading.Lock()


class FlashAttention4:
    """flash-attn-4: one kernel for decodes and chunks, whole sequences (on Hopper it can't split the keys).

    Blocks as long as its tile of keys (128 slots, for most head_dims) are loaded by TMA, others row by row with cp.async. TMA
    brings the free slots of a sequence's last block too, and a probability of zero does not hide a NaN in them: the cache must
    start as zeros.
    """

    distribution: ClassVar[str] = "flash-attn-4"

    def __init__(self) -> None:
        from flash_attn.cute import flash_attn_varlen_func

        self.varlen = flash_attn_varlen_func

    @staticmethod
    def refusal(layout: AttentionLayout, capability: Capability) -> str | None:
        major, minor = capability
        if major not in (9, 10, 11):
            return f"compute capability {major}.{minor} has no paged kernel: it takes 9.x (Hopper) to 11.x (Blackwell)"
        most = 256 if major == 9 else 128
        if layout.head_dim % 16 or (layout.head_dim > most and layout.head_dim != 256):
            return f"head_dim={layout.head_dim} is not a multiple of 16 up to {most}" + (", nor 256" if most < 256 else "")
        return None

    def attend(self, part: Part) -> Tensor:
        with _compiling:
            out = self.varlen(
                part.q_TQH, part.k_PCNH, part.v_PCNH, cu_seqlens_q=part.cu_seqlens_S1, seqused_k=part.context_lens_S,
                max_seqlen_q=part.max_query_len, page_table=part.block_tables_SB, softmax_scale=part.scale, causal=True,
                num_splits=1,
            )
        # The result, and from some versions on the logarithms of the sums behind it.
        out_TQH: Tensor = out[0] if isinstance(out, tuple) else out
        return out_TQH


PACKAGES: tuple[type[FlashAttention2] | type[FlashAttention4], ...] = (FlashAttention4, FlashAttention2)
"""The newer first."""


class FlashAttnBackend:
    """The first installed flash-attn package that serves the layout: 16-bit types, even GQA groups, CUDA."""

    name = "flash_attn"
    capturable = True
    requires = "flash-attn-4 (Hopper, Blackwell) or flash-attn (Ampere and later)"

    def __init__(self, layout: AttentionLayout) -> None:
        self.scale = layout.head_dim**-0.5
        capability = torch.cuda.get_device_capability(layout.device)
        self.package: Package = next(package() for package in _installed() if package.refusal(layout, capability) is None)

    @staticmethod
    def is_installed() -> bool:
        return bool(_installed())

    @staticmethod
    def refusal(layout: AttentionLayout) -> str | None:
        if not _installed():
            return "no flash-attn package is installed"
        if layout.device.type != "cuda":
            return f"device={layout.device} is no GPU"
        if layout.dtype not in (torch.bfloat16, torch.float16):
            return f"dtype={str(layout.dtype).removeprefix('torch.')} is not one of bfloat16, float16"
        if not layout.heads.is_even:
            return f"query heads per KV head on this rank are {layout.heads.q_counts}: they must be equally many"
        capability = torch.cuda.get_device_capability(layout.device)
        refusals = [f"{package.distribution}: {why}" for package in _installed()
                    if (why := package.refusal(layout, capability)) is not None]
        return "; ".join(refusals) if len(refusals) == len(_installed()) else None

    def __call__(self, q_TQH: Tensor, cache: LayerCache, batch: StepBatch) -> Tensor:
        num_decodes = batch.num_decodes
        parts = []
        if num_decodes:
            parts.append(self._attend(q_TQH[:num_decodes], cache, batch, slice(None, num_decodes),
                                      batch.cu_seqlens_S1[: num_decodes + 1], 1))
        if num_decodes < batch.num_seqs:
            parts.append(self._attend(q_TQH[num_decodes:], cache, batch, slice(num_decodes, None),
                                      batch.prefill_cu_seqlens_S1, batch.max_prefill_len))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend(self, q_TQH: Tensor, cache: LayerCache, batch: StepBatch, sequences: slice, cu_seqlens_S1: Tensor,
                max_query_len: int) -> Tensor:
        return self.package.attend(Part(
            q_TQH=q_TQH, k_PCNH=cache.k_PNBH.transpose(1, 2), v_PCNH=cache.v_PNBH.transpose(1, 2),
            block_tables_SB=batch.block_tables_SB[sequences], cu_seqlens_S1=cu_seqlens_S1,
            context_lens_S=batch.context_lens_S[sequences], max_query_len=max_query_len, scale=self.scale,
        ))


def _installed() -> list[type[FlashAttention2] | type[FlashAttention4]]:
    """By their metadata: importing them would load CUDA libraries in every process that only asks."""
    return [package for package in PACKAGES if installed_version(package.distribution) is not None]


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
