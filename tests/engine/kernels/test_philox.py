"""Counter-based random numbers and Gumbel-max sampling, in plain torch."""

import math
from itertools import pairwise

import pytest
import torch

from engine.kernels.philox import gumbel_argmax_torch, philox_4x32, philox_uniform


def _words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


# The known answers that the authors distribute with their implementation (Random123, kat_vectors).
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_published_vectors_come_out(counter: str, key: str, answer: str) -> None:
    c0, c1, c2, c3 = _words(counter)
    k0, k1 = _words(key)
    assert philox_4x32((c0, c1, c2, c3), (k0, k1)) == _words(answer)


def test_a_column_is_the_word_that_the_docstring_names() -> None:
    seed, position, stream = -(2**40) + 12345, 2**33 + 7, 3
    uniform = philox_uniform(torch.tensor([seed]), torch.tensor([position]), 9, start=2, stream=stream)
    for j in range(9):
        counter = _words(f"{(j + 2) // 4:x} {position & 0xFFFFFFFF:x} {position >> 32:x} {stream:x}")
        key = _words(f"{seed & 0xFFFFFFFF:x} {(seed >> 32) & 0xFFFFFFFF:x}")
        word = int(philox_4x32(counter, key)[(j + 2) % 4])  # type: ignore[arg-type]
        assert uniform[0, j].item() == (2 * (word >> 9) + 1) / 2**24


@pytest.mark.parametrize("start", [0, 1, 3, 4, 1001])
def test_a_part_of_the_columns_is_a_part_of_the_whole(start: int) -> None:
    seed, position = torch.tensor([0, 5, -1]), torch.tensor([0, 2**40, 9])
    whole = philox_uniform(seed, position, 1100)
    assert torch.equal(philox_uniform(seed, position, 70, start=start), whole[:, start : start + 70])


def test_rows_depend_on_their_seed_and_position_alone() -> None:
    seed, position = torch.tensor([3, 4, 3, 3]), torch.tensor([8, 8, 9, 8])
    uniform = philox_uniform(seed, position, 64)
    assert torch.equal(uniform[0], uniform[3])
    assert not torch.equal(uniform[0], uniform[1])
    assert not torch.equal(uniform[0], uniform[2])
    assert not torch.equal(uniform[:1], philox_uniform(seed[:1], position[:1], 64, stream=1))


def test_numbers_are_uniform_and_never_zero_or_one() -> None:
    uniform = philox_uniform(torch.arange(64), torch.arange(64), 4096).double()
    count = uniform.numel()
    assert 0 < uniform.min() < 1e-4
    assert 1 - 1e-4 < uniform.max() < 1
    # Five standard deviations of the mean, and of each of 64 bins.
    assert abs(uniform.mean() - 0.5) < 5 * (1 / 12 / count) ** 0.5
    bins = torch.histc(uniform.float(), 64, 0, 1)
    assert ((bins - count / 64).abs() < 5 * (count / 64) ** 0.5).all()


def test_greedy_rows_take_the_lowest_of_equal_maxima() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -math.inf], [-math.inf, -5.0, -5.0, -7.0]], dtype=torch.bfloat16)
    zeros = torch.zeros(2)
    value, index = gumbel_argmax_torch(logits, zeros, zeros.long(), zeros.long(), vocab_start=100)
    assert value.tolist() == [3.0, -5.0]
    assert index.tolist() == [101, 101]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_from_logits_that_are_not_finite_nothing_is_drawn(temperature: float) -> None:
    rows = [[1.0, math.nan, 9.0], [1.0, math.inf, 9.0], [-math.inf] * 3, [math.nan] * 3, [-math.inf, 2.0, -math.inf]]
    ids = torch.arange(5)
    value, index = gumbel_argmax_torch(torch.tensor(rows), torch.full((5,), temperature), ids, ids, vocab_start=7)
    assert value[:4].tolist() == [math.inf, math.inf, -math.inf, math.inf]
    assert index.tolist() == [-1, -1, -1, -1, 8]


def test_samples_follow_the_softmax_at_their_temperature() -> None:
    logits, temperature, draws = torch.tensor([2.0, 1.0, 0.0, -1.0, -math.inf]), 0.7, 20000
    rows = torch.arange(draws)
    _, index = gumbel_argmax_torch(logits.expand(draws, -1), torch.full((draws,), temperature), torch.full_like(rows, 11), rows)
    expected = (logits / temperature).softmax(0) * draws
    observed = torch.bincount(index, minlength=5)
    # Five standard deviations of each count.
    assert ((observed - expected).abs() <= 5 * expected.sqrt()).all()
    cold = (logits / 0.5).softmax(0) * draws
    assert ((observed - cold).abs() > 5 * cold.sqrt()).any(), "another temperature must show"


@pytest.mark.parametrize("bounds", [(0, 500, 1000), (0, 1, 250, 999, 1000)])
def test_the_best_of_all_shards_is_what_one_rank_finds(bounds: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 1000, generator=generator)
    temperature = torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0, 0.1])
    seed, position = torch.arange(6) - 3, torch.arange(6) * 7
    value, index = gumbel_argmax_torch(logits, temperature, seed, position)
    shards = [gumbel_argmax_torch(logits[:, a:b], temperature, seed, position, vocab_start=a) for a, b in pairwise(bounds)]
    values, indices = (torch.stack(part) for part in zip(*shards, strict=True))
    best = values.argmax(0)
    assert torch.equal(values.amax(0), value)
    assert torch.equal(indices.gather(0, best[None])[0], index)
