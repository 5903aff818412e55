"""Whatever kernel is chosen, a product is that of the whole numbers in float64."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.matmul_few_rows import MAX_ROWS, tiles_for
from engine.layers.matmul import linear


@pytest.mark.parametrize("weight_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 8, 9, 20])
def test_any_number_of_rows(monkeypatch: pytest.MonkeyPatch, num_rows: int, dtype: torch.dtype, strided: bool, bias: bool,
                            weight_first: bool) -> None:
    monkeypatch.setattr("engine.layers.matmul.prefers_weight_first", lambda: weight_first)
    generator = torch.Generator().manual_seed(num_rows)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)

    x, weight, shift = integers(num_rows, 24 if strided else 12)[:, ::2 if strided else 1], integers(7, 12), integers(7)
    y = linear(x, weight, shift if bias else None)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert y.double().equal(x.double() @ weight.double().T + (shift.double() if bias else 0))
    if not bias:
        into = torch.full_like(y, -77)
        assert linear(x, weight, out_TO=into) is into
        assert into.equal(y)


@pytest.mark.parametrize(("num_rows", "num_outputs", "num_inputs", "is_ours"), [
    (1, 2048, 1024, True), (MAX_ROWS, 2048, 1024, True), (MAX_ROWS + 1, 2048, 1024, False),
    (64, 6144, 1024, True), (64, 6145, 1024, False), (65, 6144, 1024, False), (64, 1024, 3072, True), (64, 1024, 3073, False),
    (64, 4096, 2048, False),
])
def test_few_rows_have_tiles_of_at_least_their_number_up_to_64_where_ours_is_faster(num_rows: int, num_outputs: int,
                                                                                     num_inputs: int, is_ours: bool) -> None:
    tiles = tiles_for(num_rows, num_outputs, num_inputs)
    assert (tiles is not None) == is_ours
    # No tile is twice as high as the rows that there are.
    assert tiles is None or tiles.rows <= max(16, 2 * num_rows - 1)


@pytest.mark.parametrize(("num_rows", "num_outputs", "num_inputs", "is_gated"), [
    (2, 6144, 1024, True), (MAX_ROWS, 6144, 1024, True), (MAX_ROWS + 1, 6144, 1024, False), (64, 6145, 1024, False),
    (64, 3072, 1024, False),
])
def test_gated_products_have_tiles_where_they_were_measured(num_rows: int, num_outputs: int, num_inputs: int,
                                                            is_gated: bool) -> None:
    assert (tiles_for(num_rows, num_outputs, num_inputs, gated=True) is not None) == is_gated
