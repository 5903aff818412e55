"""What layers leave to those that follow them is what they would have computed; who looks by a hook sees whole tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.kernels.gemv import HalfNormed, gemv_add_norm_torch, gemv_torch
from engine.layers.matmul import Product
from engine.layers.norm import RMSNorm
from engine.models.parts import ORDINARY
from engine.parallel.group import SoloGroup
from engine.parallel.linear import MergedColumnParallelLinear, RowParallelLinear


class Chain(nn.Module):
    """From a row-parallel layer to the gated product behind its norm."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"tp": SoloGroup(), "dtype": torch.float32}
        self.row = RowParallelLinear(8, 16, norm_follows=True, **options)
        self.norm = RMSNorm(16, 1e-6, dtype=torch.float32)
        self.merged = MergedColumnParallelLinear(16, (12, 12), silu_mul_follows=True, **options)
        self.norm.followed_by = (self.merged,)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        normed, new_residual = self.norm(self.row(x), residual)
        return ORDINARY.silu_mul(self.merged(normed)), new_residual


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with the kernels' twins."""
    for module in ("engine.layers.norm", "engine.parallel.linear"):
        monkeypatch.setattr(f"{module}.fuses_norm", lambda x, weight: x.shape[0] == 1)
    monkeypatch.setattr("engine.parallel.linear.fuses_silu_mul", lambda x, weight: isinstance(x, HalfNormed) or x.shape[0] == 1)
    monkeypatch.setattr("engine.layers.matmul.gemv", lambda *operands, settled, gated=False: gemv_torch(*operands, gated=gated))
    monkeypatch.setattr("engine.layers.matmul.gemv_add_norm", lambda *operands, settled: gemv_add_norm_torch(*operands))


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("hooked", [(), ("row",), ("norm",), ("merged",), ("row", "norm", "merged")])
def test_a_chain_gives_what_its_layers_give_one_by_one(request: pytest.FixtureRequest, num_rows: int,
                                                       hooked: tuple[str, ...]) -> None:
    chain, generator = Chain(), torch.Generator().manual_seed(1)
    x, residual = torch.randn(num_rows, 8, generator=generator), torch.randn(num_rows, 16, generator=generator)
    with torch.inference_mode():
        expected = chain(x, residual)
        request.getfixturevalue("fused")
        seen: list[Any] = []
        for name in hooked:
            chain.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        torch.testing.assert_close(chain(x, residual), expected)
        assert len(seen) == len(hooked)
        for _, output in seen:
            assert isinstance(output[0] if isinstance(output, tuple) else output, Tensor)
        if "merged" in hooked:
            assert isinstance(seen[-1][0], Tensor), "an input that is hooked is whole too"
        if not hooked:
            left = chain.row(x)
            assert isinstance(left, Product) == (num_rows == 1)
            assert isinstance(chain.norm(left, residual)[0], HalfNormed) == (num_rows == 1)
