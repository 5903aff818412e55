"""The flash-attn backend: what it hands to the packages (stand-ins that compute), what it refuses, and real kernels on a GPU."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from engine.kernels.attention_torch import paged_attention_torch
from engine.layers import flash_attention
from engine.layers.attention_backends import TorchBackend, select_backend
from engine.layers.attention_layout import AttentionLayout, LayerCache
from engine.layers.flash_attention import FlashAttention4, FlashAttnBackend, installed_version
from engine.parallel.sharding import HeadShard
from engine.scheduling.batch import StepBatch, profiling_batch
from tests.engine.kernels.problems import AttentionProblem, attention_budget, attention_problem, exact_attention, over_budget

HOPPER, AMPERE, TURING, BLACKWELL = (9, 0), (8, 6), (7, 5), (10, 0)
FA2, FA4 = "flash-attn", "flash-attn-4"
needs_fa4 = pytest.mark.skipif(installed_version(FA4) is None, reason="flash-attn-4 is not installed")
# As a string it is looked at when a test is to run: collecting tests leaves the GPUs alone.
needs_hopper = pytest.mark.skipif("not torch.cuda.is_available() or torch.cuda.get_device_capability() != HOPPER",
                                  reason="no Hopper GPU: flash-attn-4 cannot run")
# Not ours: flash-attn-4 uses names that its compiler deprecates, and its compiler warns about flash-attn-4's arguments.
theirs = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


def layout_of(q_counts: tuple[int, ...] = (2, 2), **changes: Any) -> AttentionLayout:
    kv_of_q = tuple(kv_head for kv_head, count in enumerate(q_counts) for _ in range(count))
    heads = HeadShard(q_heads=range(len(kv_of_q)), kv_heads=range(len(q_counts)), kv_of_q=kv_of_q)
    values: dict[str, Any] = {"head_dim": 16, "block_size": 256, "dtype": torch.bfloat16, "device": torch.device("cuda", 0)}
    return AttentionLayout(heads=heads, **(values | changes))


def batch_of(problem: AttentionProblem, num_decodes: int) -> StepBatch:
    """The problem as a step whose first ``num_decodes`` sequences are decodes."""
    lengths = problem.cu_seqlens_q.diff().tolist()
    assert lengths[:num_decodes] == [1] * num_decodes
    return replace(
        profiling_batch(1, 1), cu_seqlens_S1=problem.cu_seqlens_q, context_lens_S=problem.context_lens,
        block_tables_SB=problem.block_tables, num_decodes=num_decodes,
        prefill_cu_seqlens_S1=problem.cu_seqlens_q[num_decodes:] - num_decodes,
        max_decode_context_len=max(problem.context_lens[:num_decodes].tolist(), default=0),
        max_prefill_len=max(lengths[num_decodes:], default=0),
    )


# --- stand-ins with the packages' signatures (flash-attn 2.8, flash-attn-4 4.0), on the CPU ---


def standin_2_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
                     max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
                     window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
                     deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None) -> Tensor:
    assert cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_k[0] == 0
    context_lens = cu_seqlens_k.diff()
    assert max_seqlen_k >= context_lens.max()
    return compute(q, k, v, cu_seqlens_q, context_lens, block_table, softmax_scale, causal, max_seqlen_q)


def standin_2_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Any = None, v: Any = None, rotary_cos: Any = None,
                           rotary_sin: Any = None, cache_seqlens: Tensor | None = None, cache_batch_idx: Any = None,
                           cache_leftpad: Any = None, block_table: Tensor | None = None, softmax_scale: float | None = None,
                           causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
                           rotary_interleaved: bool = True, alibi_slopes: Any = None, num_splits: int = 0,
                           return_softmax_lse: bool = False) -> Tensor:
    assert q.shape[1] == 1
    assert cache_seqlens is not None
    starts = torch.arange(len(q) + 1, dtype=torch.int32)
    return compute(q[:, 0], k_cache, v_cache, starts, cache_seqlens, block_table, softmax_scale, causal, 1)[:, None]


def standin_4_varlen(q: Tensor, k: Tensor, v: Tensor, qv: Any = None, cu_seqlens_q: Tensor | None = None,
                     cu_seqlens_k: Any = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
                     min_seqlen_k: int | None = None, seqused_q: Any = None, seqused_k: Tensor | None = None,
                     gather_kv_indices: Any = None, page_table: Tensor | None = None, softmax_scale: float | None = None,
                     causal: bool = False, window_size: Any = (None, None), learnable_sink: Any = None, softcap: float = 0.0,
                     num_splits: int = 1, pack_gqa: bool | None = None) -> tuple[Tensor, None]:
    assert cu_seqlens_q is not None
    assert seqused_k is not None
    assert num_splits == 1
    assert cu_seqlens_k is None
    return compute(q, k, v, cu_seqlens_q, seqused_k, page_table, softmax_scale, causal, max_seqlen_q), None


def compute(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, context_lens: Tensor, block_table: Tensor | None,
            softmax_scale: float | None, causal: bool, max_seqlen_q: int | None) -> Tensor:
    """What both packages promise, with the twin's arithmetic; and what they check before it."""
    assert causal
    assert softmax_scale is not None
    assert block_table is not None
    assert max_seqlen_q == cu_seqlens_q.diff().max()
    for integers in (cu_seqlens_q, context_lens, block_table):
        assert integers.dtype == torch.int32
        assert integers.stride(-1) == 1
    assert k.shape == v.shape
    assert k.stride(-1) == 1
    assert block_table.shape[0] == context_lens.shape[0] == cu_seqlens_q.shape[0] - 1
    assert q.shape[0] == cu_seqlens_q[-1]
    num_kv_heads = k.shape[2]
    assert q.shape[1] % num_kv_heads == 0
    kv_of_q = [head // (q.shape[1] // num_kv_heads) for head in range(q.shape[1])]
    return paged_attention_torch(q, k.transpose(1, 2), v.transpose(1, 2), block_table, cu_seqlens_q, context_lens, kv_of_q,
                                 softmax_scale)


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """``install(FA2, FA4, capability=HOPPER)``: these packages, and a GPU of that compute capability, as far as anyone asks."""

    def pretend(*distributions: str, capability: tuple[int, int] = HOPPER) -> None:
        monkeypatch.setattr(flash_attention, "installed_version", lambda name: "1" if name in distributions else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        outer, cute = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
        if FA2 in distributions:
            outer.__dict__.update(flash_attn_varlen_func=standin_2_varlen, flash_attn_with_kvcache=standin_2_with_kvcache)
        if FA4 in distributions:
            cute.__dict__.update(flash_attn_varlen_func=standin_4_varlen)
        monkeypatch.setitem(sys.modules, "flash_attn", outer)
        monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)

    return pretend


@pytest.mark.parametrize("distribution", [FA2, FA4])
@pytest.mark.parametrize(("query_lens", "context_lens", "num_decodes"), [
    ([1, 1, 1], [3, 300, 256], 3),
    ([5, 30], [5, 290], 0),
    ([1, 1, 7, 2], [600, 1, 7, 300], 2),
])
@pytest.mark.parametrize("q_counts", [(2, 2), (3,), (1, 1, 1)])
def test_what_is_handed_over_gives_what_the_torch_backend_gives(
    install: Install, distribution: str, query_lens: list[int], context_lens: list[int], num_decodes: int,
    q_counts: tuple[int, ...],
) -> None:
    install(distribution)
    problem = attention_problem(query_lens=query_lens, context_lens=context_lens, q_counts=q_counts, block_size=256,
                                dtype=torch.bfloat16)
    layout = layout_of(q_counts)
    backend = select_backend("flash_attn", layout)
    assert isinstance(backend, FlashAttnBackend)
    assert backend.package.distribution == distribution
    cache, batch = LayerCache(problem.k_cache, problem.v_cache), batch_of(problem, num_decodes)
    assert torch.equal(backend(problem.q, cache, batch), TorchBackend(layout)(problem.q, cache, batch))


@pytest.mark.parametrize("distribution", [FA2, FA4])
def test_the_comparison_notices_keys_and_values_exchanged(install: Install, distribution: str) -> None:
    install(distribution)
    problem = attention_problem(query_lens=[1, 4], context_lens=[30, 4], q_counts=(2, 2), block_size=256, dtype=torch.bfloat16)
    backend, batch = FlashAttnBackend(layout_of()), batch_of(problem, 1)
    exchanged = backend(problem.q, LayerCache(problem.v_cache, problem.k_cache), batch)
    right = TorchBackend(layout_of())(problem.q, LayerCache(problem.k_cache, problem.v_cache), batch)
    assert not torch.equal(exchanged[:1], right[:1])
    assert not torch.equal(exchanged[1:], right[1:])


@pytest.mark.parametrize(("capability", "distribution"), [(HOPPER, FA4), (BLACKWELL, FA4), (AMPERE, FA2)])
def test_of_two_installed_packages_the_newest_that_serves_the_gpu_is_taken(
    install: Install, capability: tuple[int, int], distribution: str
) -> None:
    install(FA2, FA4, capability=capability)
    assert FlashAttnBackend(layout_of()).package.distribution == distribution


@pytest.mark.parametrize(("changes", "distributions", "capability", "reason"), [
    ({}, (), HOPPER, "no flash-attn package is installed"),
    ({"device": torch.device("cpu")}, (FA2, FA4), HOPPER, "device=cpu is no GPU"),
    ({"dtype": torch.float32}, (FA2, FA4), HOPPER, "dtype=float32 is not one of bfloat16, float16"),
    ({"dtype": torch.float64}, (FA2, FA4), HOPPER, "dtype=float64 is not one of bfloat16, float16"),
    ({"q_counts": (3, 2)}, (FA2, FA4), HOPPER, "query heads per KV head on this rank are (3, 2): they must be equally many"),
    ({"block_size": 128}, (FA2,), HOPPER, "flash-attn: block_size=128 is not a multiple of 256"),
    ({"head_dim": 260}, (FA2,), HOPPER, "flash-attn: head_dim=260 is not a multiple of 8 up to 256"),
    ({}, (FA2,), TURING, "flash-attn: compute capability 7.5 is below 8.0"),
    ({}, (FA4,), AMPERE, "flash-attn-4: compute capability 8.6 has no paged kernel: it takes 9.x (Hopper) to 11.x (Blackwell)"),
    ({"head_dim": 40}, (FA4,), HOPPER, "flash-attn-4: head_dim=40 is not a multiple of 16 up to 256"),
    ({"head_dim": 192}, (FA4,), BLACKWELL, "flash-attn-4: head_dim=192 is not a multiple of 16 up to 128, nor 256"),
    ({"head_dim": 40, "block_size": 16}, (FA2, FA4), HOPPER, "flash-attn-4: head_dim=40 is not a multiple of 16 up to 256; "
                                                             "flash-attn: block_size=16 is not a multiple of 256"),
])
def test_what_cannot_be_served_is_refused_with_the_reason(
    install: Install, changes: dict[str, Any], distributions: tuple[str, ...], capability: tuple[int, int], reason: str
) -> None:
    install(*distributions, capability=capability)
    assert FlashAttnBackend.refusal(layout_of(**changes)) == reason


@pytest.mark.parametrize(("changes", "distributions", "capability"), [
    ({}, (FA4,), HOPPER),
    ({"block_size": 16, "head_dim": 256, "dtype": torch.float16}, (FA4,), HOPPER),
    ({"head_dim": 256}, (FA4,), BLACKWELL),
    ({"head_dim": 40}, (FA2,), AMPERE),
    ({"head_dim": 40}, (FA2, FA4), HOPPER),  # one of them is enough
])
def test_what_can_be_served_is_not_refused(
    install: Install, changes: dict[str, Any], distributions: tuple[str, ...], capability: tuple[int, int]
) -> None:
    install(*distributions, capability=capability)
    assert FlashAttnBackend.refusal(layout_of(**changes)) is None


def test_a_layout_that_is_refused_is_served_by_another_backend_and_the_log_says_why(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install(FA4)
    with caplog.at_level(logging.WARNING, logger="engine"):
        backend = select_backend("flash_attn", layout_of(dtype=torch.float64))
    assert backend.name == "torch"
    assert "attention_backend=flash_attn gives way to torch: flash_attn: dtype=float64 is not one of" in caplog.text


def test_asking_for_it_where_it_is_not_installed_is_an_error(install: Install) -> None:
    install()
    with pytest.raises(ValueError, match=r"attention_backend='flash_attn' is not installed: it needs flash-attn-4 .*installed: "):
        select_backend("flash_attn", layout_of())


def test_it_is_never_picked_without_being_asked_for(install: Install) -> None:
    install(FA2, FA4)
    assert select_backend("auto", layout_of(dtype=torch.float64)).name == "torch"


@needs_fa4
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_stand_in_takes_no_argument_that_the_package_does_not_take() -> None:
    real = inspect.signature(FlashAttention4().varlen).parameters
    standin = inspect.signature(standin_4_varlen).parameters
    assert {name: parameter.default for name, parameter in standin.items()}.items() <= {
        name: parameter.default for name, parameter in real.items()}.items()


# --- the real thing ---


def gpu_problem(query_lens: list[int], context_lens: list[int], q_counts: tuple[int, ...], head_dim: int, block_size: int,
                dtype: torch.dtype) -> AttentionProblem:
    problem = attention_problem(query_lens=query_lens, context_lens=context_lens, q_counts=q_counts, head_dim=head_dim,
                                block_size=block_size, dtype=dtype, device="cuda")
    if block_size == 128:  # by TMA: free slots must be finite, any finite value does
        problem.k_cache.nan_to_num_(3.0)
        problem.v_cache.nan_to_num_(3.0)
    return problem


class TestOnHopper:
    """Bodies that run where flash-attn-4 does."""

    pytestmark: ClassVar = [needs_fa4, needs_hopper, *theirs]

    @pytest.mark.parametrize(("q_counts", "head_dim", "block_size", "dtype"), [
        ((2,) * 8, 128, 256, torch.bfloat16),
        ((2,) * 8, 128, 128, torch.bfloat16),
        ((3, 3), 64, 16, torch.bfloat16),
        ((3, 3), 64, 128, torch.float16),
        ((5,), 80, 256, torch.bfloat16),
        ((1, 1), 256, 48, torch.float16),
    ])
    def test_decodes_chunks_and_both_mixed_stay_within_their_budget(
        self, q_counts: tuple[int, ...], head_dim: int, block_size: int, dtype: torch.dtype
    ) -> None:
        device = torch.device("cuda", 0)
        backend = FlashAttnBackend(layout_of(q_counts, head_dim=head_dim, block_size=block_size, dtype=dtype, device=device))
        for query_lens, context_lens, num_decodes in (
            ([1] * 8, [1, 2, 63, 64, 255, 256, 257, 1500], 8),
            ([300, 128, 129, 2, 700], [300, 1000, 130, 257, 701], 0),
            ([1, 1, 130, 5], [1, 900, 130, 260], 2),
        ):
            problem = gpu_problem(query_lens, context_lens, q_counts, head_dim, block_size, dtype)
            out = backend(problem.q, LayerCache(problem.k_cache, problem.v_cache), batch_of(problem, num_decodes))
            exact, scale = exact_attention(problem)
            share = over_budget(out, exact, attention_budget(exact, scale, dtype, rounded_weights=True))
            assert share <= 1, f"{share:.3g} of the budget for query_lens={query_lens}"

    def test_the_budget_notices_a_shifted_mask(self) -> None:
        problem = gpu_problem([64], [64], (2, 2), 128, 256, torch.bfloat16)
        backend = FlashAttnBackend(layout_of(head_dim=128, device=torch.device("cuda", 0)))
        out = backend(problem.q, LayerCache(problem.k_cache, problem.v_cache), batch_of(problem, 0))
        exact, scale = exact_attention(problem, shift=-1)
        budget = attention_budget(exact, scale, torch.bfloat16, rounded_weights=True)
        assert over_budget(out[1:], exact[1:], budget[1:]) > 2

    @pytest.mark.parametrize("block_size", [128, 256])
    def test_a_captured_decode_follows_lengths_that_change_and_leaves_padding_finite(self, block_size: int) -> None:
        problem = gpu_problem([1] * 4, [900, 300, 1024, 77], (2, 2), 128, block_size, torch.bfloat16)
        backend = FlashAttnBackend(layout_of(head_dim=128, block_size=block_size, device=torch.device("cuda", 0)))
        cache, batch = LayerCache(problem.k_cache, problem.v_cache), batch_of(problem, 4)
        expected = backend(problem.q, cache, batch)
        full = problem.context_lens.clone()
        problem.context_lens.fill_(1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = backend(problem.q, cache, batch)
        problem.context_lens.copy_(full)
        graph.replay()
        assert torch.equal(out, expected)
        problem.context_lens[1:3] = 0  # padding of a decode graph
        graph.replay()
        assert torch.equal(out[[0, 3]], expected[[0, 3]])
        assert out.isfinite().all()
