"""Inputs of a decode step, against the sentence that says what they are."""

from __future__ import annotations

import torch

from engine.kernels.decode_inputs import decode_inputs_torch
from tests.engine.kernels.problems import decode_inputs_problem


def test_inputs_are_what_the_lengths_and_tables_say() -> None:
    tables = torch.tensor([[7, 2, 99], [5, 99, 99], [99, 99, 99], [3, 1, 4], [6, 6, 6]], dtype=torch.int32)
    token, position, slot, length = decode_inputs_torch(
        torch.tensor([-1, 50, -1, 60, -1]),
        torch.tensor([2, 0, 1, 2, 3]),
        torch.tensor([5, 4, 0, 12, 1], dtype=torch.int32),
        tables,
        torch.tensor([10, 11, 12, -1]),
        4,
    )
    assert token.tolist() == [12, 50, 11, 60, 0]
    assert position.tolist() == [4, 3, 0, 11, 0]
    assert slot.tolist() == [2 * 4 + 0, 5 * 4 + 3, -1, 4 * 4 + 3, 6 * 4]
    assert length.tolist() == [5, 4, 0, 12, 1]


def test_slots_of_a_drawn_problem_are_those_of_each_sequence_alone() -> None:
    inputs = decode_inputs_problem(num_seqs=40, block_size=16)
    together = decode_inputs_torch(*inputs)
    token_S, row_S, context_S, tables_SB, last_token_M, block_size = inputs
    for s in range(40):
        alone = decode_inputs_torch(token_S[s : s + 1], row_S[s : s + 1], context_S[s : s + 1], tables_SB[s : s + 1],
                                    last_token_M, block_size)  # fmt: skip
        assert [part[s].item() for part in together] == [part.item() for part in alone]
