"""Random numbers bit for bit, samples as their twin draws them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.philox import gumbel_argmax, gumbel_argmax_torch, philox_uniform, philox_uniform_triton

_INT64 = st.integers(-(2**63), 2**63 - 1)


@given(
    rows=st.lists(st.tuples(_INT64, _INT64), min_size=1, max_size=3),
    num=st.sampled_from([1, 4, 7, 2050]),
    start=st.sampled_from([0, 1, 2, 3, 4, 151_935]),
    stream=st.integers(0, 3),
)
def test_the_kernel_draws_the_same_bits(rows: list[tuple[int, int]], num: int, start: int, stream: int) -> None:
    seed, position = torch.tensor(rows).unbind(1)
    ours = philox_uniform_triton(seed, position, num, start, stream)
    assert torch.equal(ours, philox_uniform(seed, position, num, start, stream))


@given(
    num_columns=st.sampled_from([1, 5, 2048, 5000]),
    vocab_start=st.sampled_from([0, 3, 24_577]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_the_kernel_takes_the_same_samples(num_columns: int, vocab_start: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, num_columns + 1, generator=generator).to(dtype)[:, :num_columns]
    temperature = torch.tensor([0.0, 0.3, 1.0, 5.0])
    seeds, positions = torch.randint(0, 2**40, (2, 4), generator=generator)
    value, index = gumbel_argmax(logits, temperature, seeds, positions, vocab_start)
    exact, _ = gumbel_argmax_torch(logits.double(), temperature, seeds, positions, vocab_start)
    scores = logits.double() / temperature.double().clamp_min(1e-30)[:, None]
    noise = -(-philox_uniform(seeds, positions, num_columns, vocab_start).double().log()).log()
    scores = torch.where(temperature[:, None] > 0, scores + noise, logits.double())
    chosen = scores.gather(1, (index - vocab_start)[:, None])[:, 0]
    # float32 division, two logarithms and a sum: a near-tie may fall either way within eight roundings, no
    # other.
    budget = 8 * 2.0**-24 * (scores.abs().amax(dim=1) + 20)
    assert ((value - exact).abs() <= budget).all()
    assert ((exact - chosen).abs() <= budget).all()
    assert value[0] == logits[0].max()


def test_ties_nan_and_masked_columns_are_settled_as_in_the_twin() -> None:
    logits = torch.zeros(6, 5000)
    logits[0, [70, 4000]] = 3.0
    logits[1] = -math.inf
    logits[2, 4321] = math.nan
    logits[3, :2500] = -math.inf
    logits[4, 17] = math.inf
    logits[5] = math.nan
    zeros, ids = torch.zeros(6), torch.arange(6)
    for ours, twins in zip(
        gumbel_argmax(logits, zeros, ids, ids, 9),
        gumbel_argmax_torch(logits, zeros, ids, ids, 9),
        strict=True,
    ):
        assert torch.equal(ours, twins)
    _, index = gumbel_argmax(logits, zeros + 1.0, ids, ids, 9)
    assert (index < 0).tolist() == [False, True, True, False, True, True]


def test_a_shard_without_columns_is_refused() -> None:
    ids = torch.arange(2)
    with pytest.raises(ValueError, match="logits 2x0"):
        gumbel_argmax(torch.zeros(2, 0), torch.zeros(2), ids, ids)
