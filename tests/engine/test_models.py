"""Whole models in float64 against the exact reference: what is left are roundings, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.config import ModelConfig
from engine.execution.runner import Runner
from engine.models.registry import FAMILIES as REGISTERED
from engine.models.registry import family_of
from engine.models.table import ACTIVATION, ATTENTION, RESIDUAL, TOKEN_IDS, held_in, in_order
from engine.parallel.group import SoloGroup, TPGroup
from engine.parallel.linear import QKVParallelLinear
from engine.parallel.sharding import HeadShard
from tests.engine.conftest import MakeCheckpoint, MakeReference
from tests.engine.support import FEW, Schedule, logits_of, lone_group, make_model, make_runner, on_ranks, roundoffs

# Correct code stays below 60; the mildest fault below, one computation in float32, is beyond a million.
MOST_ROUNDOFFS = 1000.0

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 48}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 2.5, 4.0],
}
# Its head_dim follows from the hidden size: 48 / 6.
PHI3_SIZES = {"hidden_size": 48, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama with all biases": {},
    "llama without biases, tied": {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True},
    "llama, rope llama3": {"rope_parameters": LLAMA3},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, tied, rope yarn": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_parameters": YARN},
    "qwen3": {"model_type": "qwen3"},
    "qwen3 with biases, tied": {"model_type": "qwen3", "attention_bias": True, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 192},
    "phi3": {"model_type": "phi3", **PHI3_SIZES},
    "phi3, tied, rope longrope on a part of each head": {
        "model_type": "phi3",
        **PHI3_SIZES,
        "tie_word_embeddings": True,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 96,
        "rope_parameters": LONGROPE,
    },
    "one KV head": {"num_key_value_heads": 1},
    "as many KV heads as query heads": {"model_type": "qwen3", "num_key_value_heads": 6},
}
SEQUENCES = [
    [(7 * position + 3) % 131 for position in range(45)],
    [(11 * position * position + 130) % 131 for position in range(18)],
    [130],
]
MIXED: Schedule = [[(0, 7), (1, 1), (2, 1)], [(0, 1), (1, 16)], [(0, 36)], [(0, 1), (1, 1)]]


def worst(candidates: list[Tensor], exact: list[Tensor]) -> float:
    return max(roundoffs(ours, theirs) for ours, theirs in zip(candidates, exact, strict=True))


def run(checkpoint: MakeCheckpoint, family: dict[str, Any], tp: TPGroup, schedule: Schedule = MIXED) -> list[Tensor]:
    runner = make_runner(checkpoint(**family), tp, dtype="float64", block_size=4)
    return logits_of(runner, SEQUENCES, schedule)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_float64_logits_are_the_exact_references_but_for_rounding(
    checkpoint: MakeCheckpoint, reference: MakeReference, family: dict[str, Any]
) -> None:
    exact = reference(checkpoint(**family), "exact").logits(SEQUENCES)
    assert worst(run(checkpoint, family, SoloGroup()), exact) < MOST_ROUNDOFFS


@pytest.fixture(scope="module")
def solo_logits(checkpoint: MakeCheckpoint) -> Callable[[str], list[Tensor]]:
    """The solo rank's logits of a family by its name, computed once."""
    return cache(lambda name: run(checkpoint, FAMILIES[name], SoloGroup()))


@pytest.mark.parametrize("tp_size", [2, pytest.param(3, marks=pytest.mark.endurance), 4, 5,
                                     pytest.param(6, marks=pytest.mark.endurance)])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_rank_has_the_solo_ranks_logits_but_for_rounding(
    checkpoint: MakeCheckpoint, solo_logits: Callable[[str], list[Tensor]], name: str, tp_size: int
) -> None:
    family, solo = FAMILIES[name], solo_logits(name)
    ranks = on_ranks(tp_size, lambda tp: run(checkpoint, family, tp))
    for logits in ranks:
        assert worst(logits, solo) < MOST_ROUNDOFFS
        assert all(torch.equal(a, b) for a, b in zip(logits, ranks[0], strict=True)), "ranks of one run are bit-equal"


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Any way of running the sequences in chunks, side by side or one after the other."""
    left = [len(sequence) for sequence in SEQUENCES]
    steps = []
    while any(left):
        step = []
        for number in draw(st.permutations(range(len(left)))):
            if left[number] and (draw(st.booleans()) or not step):
                count = draw(st.integers(1, left[number]))
                left[number] -= count
                step.append((number, count))
        steps.append(step)
    return steps


@pytest.fixture(scope="module")
def prepared(checkpoint: MakeCheckpoint, reference: MakeReference) -> tuple[dict[int, Runner], list[Tensor]]:
    """A model in float64 by block size, and the exact logits of the sequences."""
    folder = checkpoint(model_type="qwen3")
    runners = {
        block_size: make_runner(folder, SoloGroup(), dtype="float64", block_size=block_size, num_kv_blocks=80)
        for block_size in (1, 3, 16, 64)
    }
    return runners, reference(folder, "exact").logits(SEQUENCES)


@FEW
@given(schedule=schedules(), block_size=st.sampled_from([1, 3, 16, 64]))
def test_chunks_and_block_sizes_make_no_difference_but_rounding(
    prepared: tuple[dict[int, Runner], list[Tensor]], schedule: Schedule, block_size: int
) -> None:
    runners, exact = prepared
    assert worst(logits_of(runners[block_size], SEQUENCES, schedule), exact) < MOST_ROUNDOFFS


def test_ranks_whose_vocabulary_shard_is_padding_only_agree_too(checkpoint: MakeCheckpoint, reference: MakeReference) -> None:
    # Five ids over four ranks are 2, 2, 1 and 0.
    folder = checkpoint(vocab_size=5)
    sequences = [[0, 1, 2, 3, 4, 4, 0], [4]]
    exact = reference(folder, "exact").logits(sequences)

    def job(tp: TPGroup) -> list[Tensor]:
        return logits_of(make_runner(folder, tp, dtype="float64"), sequences, [[(0, 3), (1, 1)], [(0, 4)]])

    for logits in on_ranks(4, job):
        assert [tuple(part.shape) for part in logits] == [(7, 5), (1, 5)]
        assert worst(logits, exact) < MOST_ROUNDOFFS


def test_positions_up_to_the_models_limit_can_run(checkpoint: MakeCheckpoint, reference: MakeReference) -> None:
    folder = checkpoint()
    longest = [position % 131 for position in range(192)]
    runner = make_runner(folder, SoloGroup(), dtype="float64")
    (logits,) = logits_of(runner, [longest], [[(0, 192)]])
    assert roundoffs(logits, reference(folder, "exact").logits([longest])[0]) < MOST_ROUNDOFFS


def swap_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = QKVParallelLinear.weight_loader

    def swapped(layer: Any, param: Any, loaded: Any, shard_id: Any = None) -> None:
        loader(layer, param, loaded, {"k": "v", "v": "k"}.get(shard_id, shard_id))

    monkeypatch.setattr(QKVParallelLinear, "weight_loader", swapped)


def divide_query_heads_by_a_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    def ratio(shard: HeadShard) -> tuple[int, ...]:
        group = -(-shard.local_num_q_heads // shard.local_num_kv_heads)
        return tuple(head // group for head in range(shard.local_num_q_heads))

    original = Runner._heads.fget  # type: ignore[attr-defined]

    def heads(runner: Runner) -> HeadShard:
        shard = original(runner)
        return HeadShard(q_heads=shard.q_heads, kv_heads=shard.kv_heads, kv_of_q=ratio(shard))

    monkeypatch.setattr(Runner, "_heads", property(heads))


def compute_logits_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.parallel import embedding

    def single(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return (x.float() @ weight.float().T).double()

    monkeypatch.setattr(embedding, "linear", single)


@pytest.mark.parametrize("fault", [swap_keys_and_values, divide_query_heads_by_a_ratio, compute_logits_in_float32])
def test_the_comparison_notices(checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    # Nine query heads, three KV heads, four ranks: rank 1 has heads 3 and 4, rank 2 heads 5 and 6 of two KV heads.
    family = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 45}
    solo = run(checkpoint, family, SoloGroup())
    assert worst(on_ranks(2, lambda tp: run(checkpoint, family, tp))[1], solo) < MOST_ROUNDOFFS
    fault(monkeypatch)
    assert worst(on_ranks(2, lambda tp: run(checkpoint, family, tp))[1], solo) > 1000 * MOST_ROUNDOFFS


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 96, "sliding_window": 2047}, 2047),
        (
            {
                "num_attention_heads": 24,
                "num_key_value_heads": 8,
                "hidden_size": 3072,
                "tie_word_embeddings": True,
                "partial_rotary_factor": 0.75,
                "max_position_embeddings": 131_072,
                "original_max_position_embeddings": 4096,
                "sliding_window": 262_144,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0 + pair / 100 for pair in range(48)],
                    "long_factor": [1.0 + pair for pair in range(48)],
                },
            },
            4096,
        ),
    ],
    ids=["Phi-3-mini-4k", "Phi-4-mini"],
)
def test_the_heads_and_positions_of_the_phis_run(
    checkpoint: MakeCheckpoint, reference: MakeReference, changes: dict[str, Any], longest: int
) -> None:
    shape = {"model_type": "phi3", "num_hidden_layers": 1, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    if "hidden_size" in changes:  # its heads are the hidden size's share, as the lists of longrope ask for
        shape["head_dim"] = changes["hidden_size"] // changes["num_attention_heads"]
    folder = checkpoint(**(shape | changes))
    assert ModelConfig.from_folder(folder).max_position_embeddings == longest
    exact = reference(folder, "exact").logits(SEQUENCES)

    def job(tp: TPGroup) -> list[Tensor]:
        return logits_of(make_runner(folder, tp, dtype="float64"), SEQUENCES, MIXED)

    for logits in on_ranks(5, job):
        assert worst(logits, exact) < MOST_ROUNDOFFS


def test_every_registered_family_is_run_here() -> None:
    assert {changes.get("model_type", "llama") for changes in FAMILIES.values()} == set(REGISTERED)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_module_table_is_what_the_checkpoint_holds_and_what_the_reference_computes(
    checkpoint: MakeCheckpoint, reference: MakeReference, family: dict[str, Any]
) -> None:
    exact = reference(checkpoint(**family), "exact")
    modules = family_of(family.get("model_type", "llama")).modules
    rows = {row.path: row for row in in_order(modules, exact.config.num_hidden_layers)}
    stored = {name.rpartition(".")[0] for name, _ in exact.model.named_parameters()} | {"lm_head"}
    assert rows.keys() == stored
    seen = exact.activations(SEQUENCES[1])
    shown = [path for path, row in rows.items() if row.has_output]
    assert [path for path in seen.outputs if path in shown] == shown, "in the order of computation"
    for path, row in rows.items():
        if row.fed_by in rows and row.has_output:
            assert torch.equal(seen.inputs[path], seen.outputs[row.fed_by])
        assert row.fed_by in {*rows, TOKEN_IDS, RESIDUAL, ATTENTION, ACTIVATION}
        assert row in held_in(modules, row.held_in)


def test_a_tied_model_names_its_embedding_once(checkpoint: MakeCheckpoint) -> None:
    tied = make_model(ModelConfig.from_folder(checkpoint(tie_word_embeddings=True)), lone_group(0, 2))
    untied = make_model(ModelConfig.from_folder(checkpoint()), lone_group(0, 2))
    assert "lm_head.weight" not in dict(tied.named_parameters())
    assert "lm_head.weight" in dict(untied.named_parameters())
    assert tied.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert untied.tied == {}


def test_a_step_has_two_all_reduces_a_layer_one_for_the_embedding_and_one_gather(checkpoint: MakeCheckpoint) -> None:
    def job(tp: TPGroup) -> list[str]:
        runner = make_runner(checkpoint(), tp)
        before = tp.log.snapshot().entered
        logits_of(runner, [[1, 2, 3]], [[(0, 3)]])
        return [record.op for record in tp.log.snapshot().records][before:]

    for ops in on_ranks(2, job):
        assert ops == ["all_reduce"] * 5 + ["all_gather(dim=1)"]
