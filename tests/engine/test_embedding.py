"""Embedding and LM head cut over vocabulary rows against the whole table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.checkpoint.weights import check_written
from engine.parallel.embedding import ParallelLMHead, VocabParallelEmbedding
from engine.parallel.group import TPGroup
from engine.parallel.parameter import CheckpointError
from harness.verification.budgets import same_bits
from tests.engine.support import (
    FEW,
    Integers,
    OnDisk,
    as_integers,
    as_tensor,
    draw_integers,
    lone_group,
    magnitudes,
    on_ranks,
    whole_linear,
)

DTYPES = st.sampled_from(["float32", "bfloat16"])


@st.composite
def vocabularies(draw: st.DrawFn) -> tuple[int, int]:
    """(vocab_size, tp_size), the last ranks of some holding padding only."""
    tp_size = draw(st.integers(1, 8))
    return draw(st.integers(tp_size, 40)), tp_size


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadProblem:
    """x [R, E], weight [V, E], bias [V] or None in int64."""

    tp_size: int
    dtype: str
    x: Integers
    weight: Integers
    bias: Integers | None

    @property
    def logits(self) -> Integers:
        return whole_linear(self.x, self.weight, self.bias, self.dtype)

    def run(self, kind: type[ParallelLMHead] = ParallelLMHead) -> list[Integers]:
        """Each rank's logits."""
        vocab_size, hidden_size = self.weight.shape

        @torch.inference_mode()
        def job(tp: TPGroup) -> Integers:
            dtype = getattr(torch, self.dtype)
            head = kind(vocab_size, hidden_size, bias=self.bias is not None, tp=tp, dtype=dtype)
            load(head, self.weight, self.bias, self.dtype)
            return as_integers(head(as_tensor(self.x, self.dtype)))

        return on_ranks(self.tp_size, job)


def load(layer: nn.Module, weight: Integers, bias: Integers | None, dtype: str) -> None:
    layer.weight.weight_loader(layer.weight, as_tensor(weight, dtype))
    if bias is not None:
        layer.bias.weight_loader(layer.bias, as_tensor(bias, dtype))
    check_written(dict(layer.named_parameters()))


@FEW
@given(vocabularies(), DTYPES, st.integers(0, 2**32), st.integers(0, 30))
@example((5, 4), "bfloat16", 1, 20)  # the last rank holds padding only
def test_a_lookup_gives_the_tables_bits_on_every_rank(
    vocabulary: tuple[int, int], dtype: str, seed: int, num_tokens: int
) -> None:
    vocab_size, tp_size = vocabulary
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(vocab_size, 3, generator=generator).to(getattr(torch, dtype))
    token_ids = torch.randint(vocab_size, (num_tokens,), generator=generator)

    @torch.inference_mode()
    def job(tp: TPGroup) -> Tensor:
        embedding = VocabParallelEmbedding(vocab_size, 3, tp=tp, dtype=table.dtype)
        embedding.weight.weight_loader(embedding.weight, table)
        check_written(dict(embedding.named_parameters()))
        return embedding(token_ids)

    for x in on_ranks(tp_size, job):
        assert same_bits(x, table[token_ids])


def test_the_first_and_last_row_of_every_shard_are_found() -> None:
    # 10 rows over 3 ranks: 0-3, 4-7, 8-9 and two rows of padding.
    table = torch.arange(1.0, 11.0)[:, None]

    def job(tp: TPGroup) -> list[float]:
        embedding = VocabParallelEmbedding(10, 1, tp=tp, dtype=torch.float32)
        embedding.weight.weight_loader(embedding.weight, table)
        return embedding(torch.tensor([0, 3, 4, 7, 8, 9])).flatten().tolist()

    assert on_ranks(3, job) == [[1, 4, 5, 8, 9, 10]] * 3


def test_a_negative_zero_keeps_its_sign() -> None:
    # -0.0 + 0.0 is 0.0: what the other ranks add to the sum must be -0.0.
    table = torch.tensor([[-0.0], [0.0], [-0.0], [1.0], [-0.0]])

    def job(tp: TPGroup) -> Tensor:
        embedding = VocabParallelEmbedding(5, 1, tp=tp, dtype=torch.float32)
        embedding.weight.weight_loader(embedding.weight, table)
        return embedding(torch.arange(5))

    for x in on_ranks(3, job):
        assert same_bits(x, table)


@st.composite
def head_problems(draw: st.DrawFn) -> HeadProblem:
    (vocab_size, tp_size), dtype, hidden_size = draw(vocabularies()), draw(DTYPES), draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    most_x, most_w, most_b = magnitudes(hidden_size, dtype)
    return HeadProblem(
        tp_size=tp_size,
        dtype=dtype,
        x=draw_integers(rng, (draw(st.integers(0, 3)), hidden_size), most_x),
        weight=draw_integers(rng, (vocab_size, hidden_size), most_w),
        bias=draw_integers(rng, (vocab_size,), most_b) if draw(st.booleans()) else None,
    )


@FEW
@given(head_problems())
def test_logits_are_whole_and_unpadded_on_every_rank(problem: HeadProblem) -> None:
    expected = problem.logits
    for logits in problem.run():
        assert logits.shape == expected.shape
        assert (logits == expected).all()


class PaddingKept(ParallelLMHead):
    """A fault: the gathered padding stays."""

    def forward(self, x_RE: Tensor) -> Tensor:
        self.vocab_size = self.shard.local_size * self.tp.size
        return super().forward(x_RE)


class InterleavedRanks(ParallelLMHead):
    """A fault: the ranks' columns are dealt out in turn, which one row of two ids does not show."""

    def forward(self, x_RE: Tensor) -> Tensor:
        logits_RV = super().forward(x_RE)
        return logits_RV.unflatten(1, (self.tp.size, -1)).transpose(1, 2).flatten(1)


def all_negative(vocab_size: int, tp_size: int) -> HeadProblem:
    rng = np.random.default_rng(3)
    weight = -1 - np.abs(draw_integers(rng, (vocab_size, 4), 5))
    return HeadProblem(tp_size=tp_size, dtype="float32", x=np.ones((2, 4), dtype=np.int64), weight=weight, bias=None)


@pytest.mark.parametrize(("vocab_size", "tp_size"), [(10, 3), (5, 4), (9, 8), (7, 2)])
def test_padding_never_wins_over_logits_that_are_all_negative(vocab_size: int, tp_size: int) -> None:
    problem = all_negative(vocab_size, tp_size)
    assert problem.logits.max() < 0
    for logits in problem.run():
        assert (logits.argmax(axis=1) == problem.logits.argmax(axis=1)).all()


def test_without_the_cut_padding_would_win() -> None:
    problem = all_negative(10, 3)
    for logits in problem.run(PaddingKept):
        assert (logits.argmax(axis=1) >= 10).all()


def test_the_logits_check_notices_ranks_in_the_wrong_order() -> None:
    problem = all_negative(8, 2)
    assert (problem.run()[0] == problem.logits).all()
    assert (problem.run(InterleavedRanks)[0] != problem.logits).any()


def test_a_tied_head_shares_the_embeddings_parameter_and_is_loaded_with_it() -> None:
    class Tied(nn.Module):
        def __init__(self, tp: TPGroup) -> None:
            super().__init__()
            self.embed = VocabParallelEmbedding(10, 4, tp=tp, dtype=torch.float32)
            self.head = ParallelLMHead(10, 4, tp=tp, dtype=torch.float32)
            self.head.tie(self.embed)

    problem = all_negative(10, 3)

    def job(tp: TPGroup) -> Integers:
        model = Tied(tp)
        assert [name for name, _ in model.named_parameters()] == ["embed.weight"]
        load(model.embed, problem.weight, None, "float32")
        return as_integers(model.head(as_tensor(problem.x, "float32")))

    for logits in on_ranks(3, job):
        assert (logits == problem.logits).all()


def test_a_rank_reads_its_own_rows_and_one_with_padding_only_reads_none() -> None:
    read = []
    for rank in range(4):
        stored, layer = (
            OnDisk(torch.ones(5, 3)),
            VocabParallelEmbedding(5, 3, tp=lone_group(rank, 4), dtype=torch.float32),
        )
        layer.weight.weight_loader(layer.weight, stored)
        read.append(stored.elements_read)
        assert layer.weight.sum() == stored.elements_read, "padding must be zero"
        assert layer.weight.num_unwritten == 0
    assert read == [6, 6, 3, 0]


def test_an_embedding_has_one_all_reduce_and_a_head_one_all_gather() -> None:
    def job(tp: TPGroup) -> list[str]:
        embedding = VocabParallelEmbedding(10, 4, tp=tp, dtype=torch.float32)
        head = ParallelLMHead(10, 4, tp=tp, dtype=torch.float32)
        head(embedding(torch.tensor([1, 2])))
        return [record.op for record in tp.log.snapshot().records]

    assert on_ranks(3, job) == [["all_reduce", "all_gather(dim=1)"]] * 3


@pytest.mark.parametrize("kind", [VocabParallelEmbedding, ParallelLMHead])
def test_a_padded_tensor_in_the_checkpoint_is_refused_with_both_shapes(
    kind: Callable[..., nn.Module],
) -> None:
    layer = kind(10, 4, tp=lone_group(0, 3), dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"\(12, 4\) .*\(10, 4\)"):
        layer.weight.weight_loader(layer.weight, torch.zeros(12, 4))


def test_a_vocabulary_smaller_than_the_group_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"vocab_size=3 .*tp_size=4\b"):
        VocabParallelEmbedding(3, 4, tp=lone_group(0, 4), dtype=torch.float32)
