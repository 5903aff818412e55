import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from reference.checkpoints import weight_shapes
from reference.shards import owners
from tests.reference.tiny import FAMILIES, tiny_config

ATTENTION = "model.layers.0.self_attn."
MLP = "model.layers.0.mlp."
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}


def heads_of(ownership, head_dim):
    """Heads by rank; fails on a head that is owned in part."""
    by_rank = []
    for indices in ownership.indices:
        assert len(indices) % head_dim == 0
        heads = indices.reshape(-1, head_dim)
        assert (heads % head_dim == np.arange(head_dim)).all()
        by_rank.append((heads[:, 0] // head_dim).tolist())
    return by_rank


@pytest.mark.parametrize(
    ("tp_size", "query_heads", "kv_heads"),
    [
        (1, [[0, 1, 2, 3, 4, 5, 6, 7, 8]], [[0, 1, 2]]),
        (2, [[0, 1, 2, 3, 4], [5, 6, 7, 8]], [[0, 1], [1, 2]]),
        (4, [[0, 1, 2], [3, 4], [5, 6], [7, 8]], [[0], [1], [1, 2], [2]]),
        (9, [[h] for h in range(9)], [[h // 3] for h in range(9)]),
    ],
)
def test_nine_query_heads_are_dealt_evenly_and_take_their_kv_heads_along(tp_size, query_heads, kv_heads):
    def of(name, shape):
        return owners(SMOLLM2, ATTENTION + name, shape, tp_size)

    assert heads_of(of("q_proj.weight", (576, 576)), 64) == query_heads
    assert heads_of(of("o_proj.weight", (576, 576)), 64) == query_heads
    assert heads_of(of("k_proj.weight", (192, 576)), 64) == kv_heads
    assert heads_of(of("v_proj.weight", (192, 576)), 64) == kv_heads
    assert of("q_proj.weight", (576, 576)).dim == 0
    assert of("o_proj.weight", (576, 576)).dim == 1


def test_biases_follow_rows_and_those_of_row_parallel_layers_are_whole_everywhere():
    config = tiny_config()
    assert [len(i) for i in owners(config, ATTENTION + "q_proj.bias", (60,), 4).indices] == [20, 20, 10, 10]
    assert [len(i) for i in owners(config, MLP + "gate_proj.bias", (70,), 4).indices] == [18, 18, 17, 17]
    for name in (ATTENTION + "o_proj.bias", MLP + "down_proj.bias"):
        bias = owners(config, name, (48,), 4)
        assert bias.dim is None
        assert bias.shard_shape(3) == (48,)


@pytest.mark.parametrize(
    "name", ["model.norm", "model.layers.0.input_layernorm", ATTENTION + "q_norm", ATTENTION + "k_norm"]
)
def test_norms_are_whole_on_every_rank(name):
    norm = owners(tiny_config("qwen3"), f"{name}.weight", (10,), 3)
    assert norm.dim is None
    whole = np.arange(10)
    assert all(np.array_equal(norm.take(whole, rank), whole) for rank in range(3))


def test_vocabulary_shards_are_equal_and_the_last_are_padded():
    embedding = owners(SMOLLM2, "model.embed_tokens.weight", (49152, 576), 5)
    assert [len(rows) for rows in embedding.indices] == [9831, 9831, 9831, 9831, 9828]
    assert {embedding.shard_shape(rank) for rank in range(5)} == {(9831, 576)}
    assert embedding.indices[1][0] == 9831


def test_the_last_ranks_may_own_no_row_of_a_small_vocabulary():
    config = tiny_config(vocab_size=9, num_attention_heads=8, num_key_value_heads=8)
    head = owners(config, "lm_head.weight", (9, 2), 8)
    assert [rows.tolist() for rows in head.indices] == [[0, 1], [2, 3], [4, 5], [6, 7], [8], [], [], []]
    whole = np.arange(1, 19).reshape(9, 2)
    assert head.take(whole, 4).tolist() == [[17, 18], [0, 0]]
    assert head.take(whole, 7).tolist() == [[0, 0], [0, 0]]


@settings(deadline=None)  # a busy machine must not decide
@given(
    num_kv_heads=st.integers(1, 5),
    group=st.integers(1, 5),
    head_dim=st.integers(1, 3),
    intermediate_size=st.integers(1, 40),
    vocab_size=st.integers(1, 40),
    data=st.data(),
)
def test_each_rank_owns_what_the_rule_says_element_by_element(
    num_kv_heads, group, head_dim, intermediate_size, vocab_size, data
):
    num_q_heads = num_kv_heads * group
    tp_size = data.draw(st.integers(1, num_q_heads))
    config = {
        "hidden_size": 1,
        "head_dim": head_dim,
        "num_attention_heads": num_q_heads,
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": intermediate_size,
        "vocab_size": vocab_size,
    }

    def ranks(name, shape, index):
        ownership = owners(config, name, shape, tp_size)
        return ranks_of(ownership, index[ownership.dim])

    def ranks_of(ownership, place):
        return [rank for rank, owned in enumerate(ownership.indices) if place in owned]

    def even(place, total):
        """The rank whose run of places holds ``place``, found by walking along the runs."""
        rank = 0
        while place >= (run := total // tp_size + (rank < total % tp_size)):
            place -= run
            rank += 1
        return rank

    for row in range(num_q_heads * head_dim):
        owner = [even(row // head_dim, num_q_heads)]
        assert ranks(ATTENTION + "q_proj.weight", (num_q_heads * head_dim, 1), (row, 0)) == owner
        assert ranks(ATTENTION + "o_proj.weight", (1, num_q_heads * head_dim), (0, row)) == owner
    for row in range(num_kv_heads * head_dim):
        readers = range(row // head_dim * group, (row // head_dim + 1) * group)
        assert ranks(ATTENTION + "k_proj.weight", (num_kv_heads * head_dim, 1), (row, 0)) == sorted(
            {even(head, num_q_heads) for head in readers}
        )
    for row in range(intermediate_size):
        owner = [even(row, intermediate_size)]
        assert ranks(MLP + "up_proj.weight", (intermediate_size, 1), (row, 0)) == owner
        assert ranks(MLP + "down_proj.weight", (1, intermediate_size), (0, row)) == owner
    # Fused on disk: queries, keys, values one after the other, as gate and up are; each is cut by itself.
    def by_row(name, num_rows):
        ownership = owners(config, name, (num_rows, 1), tp_size)
        return [ranks_of(ownership, row) for row in range(num_rows)]

    queries = by_row(ATTENTION + "q_proj.weight", num_q_heads * head_dim)
    keys = by_row(ATTENTION + "k_proj.weight", num_kv_heads * head_dim)
    assert by_row(ATTENTION + "qkv_proj.weight", len(queries) + 2 * len(keys)) == [*queries, *keys, *keys]
    up = by_row(MLP + "up_proj.weight", intermediate_size)
    assert by_row(MLP + "gate_up_proj.weight", 2 * intermediate_size) == [*up, *up]
    shard_rows = (vocab_size + tp_size - 1) // tp_size
    for row in range(vocab_size):
        assert ranks("lm_head.weight", (vocab_size, 1), (row, 0)) == [row // shard_rows]


def test_a_rank_has_a_part_of_each_of_the_tensors_that_are_fused_on_disk():
    qkv = owners(SMOLLM2, ATTENTION + "qkv_proj.weight", (960, 576), 4)
    assert qkv.indices[1].tolist() == [*range(192, 320), *range(576 + 64, 576 + 128), *range(768 + 64, 768 + 128)]
    gate_up = owners(SMOLLM2, MLP + "gate_up_proj.weight", (3072, 576), 2)
    assert gate_up.indices[0].tolist() == [*range(768), *range(1536, 2304)]
    whole = np.arange(3072 * 576).reshape(3072, 576)
    assert np.array_equal(gate_up.take(whole, 1), np.concatenate((whole[768:1536], whole[2304:])))


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("tp_size", [1, 2, 4, 5])
def test_every_tensor_of_every_family_has_owners_and_their_shards_make_it_up_again(model_type, tp_size):
    config = tiny_config(model_type)
    for name, shape in weight_shapes(config).items():
        whole = np.arange(1, np.prod(shape) + 1).reshape(shape)
        ownership = owners(config, name, shape, tp_size)
        shards = [ownership.take(whole, rank) for rank in range(tp_size)]
        assert set(np.concatenate([shard.ravel() for shard in shards])) - {0} == set(whole.ravel()), name
        for rank, shard in enumerate(shards):
            assert shard.shape == ownership.shard_shape(rank)


def test_a_config_object_says_the_same_as_its_dict():
    as_object = LlamaConfig(**SMOLLM2)
    of_object, of_dict = (
        owners(config, MLP + "up_proj.weight", (1536, 576), 7) for config in (as_object, SMOLLM2)
    )
    assert [i.tolist() for i in of_object.indices] == [i.tolist() for i in of_dict.indices]


@pytest.mark.parametrize(
    ("name", "shape", "tp_size", "message"),
    [
        (ATTENTION + "q_proj.weight", (576, 576), 10, "tp_size=10 with num_attention_heads=9"),
        (ATTENTION + "q_proj.weight", (576, 576), 0, "tp_size=0 with"),
        (ATTENTION + "q_proj.weight", (192, 576), 2, "the config says 576 along dim=0"),
        (ATTENTION + "rotary_emb.inv_freq", (32,), 2, "not a tensor whose owners are known"),
        ("model.layers.0.mlp.experts.weight", (32,), 2, "not a tensor whose owners are known"),
    ],
)
def test_what_has_no_owners_is_refused_with_the_numbers(name, shape, tp_size, message):
    with pytest.raises(ValueError, match=message):
        owners(SMOLLM2, name, shape, tp_size)


def test_a_tensor_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"whole\.shape=\(4, 3\)"):
        owners(SMOLLM2, MLP + "up_proj.weight", (1536, 576), 2).take(np.zeros((4, 3)), 0)
    with pytest.raises(ValueError, match="num_attention_heads=9 is no multiple of num_key_value_heads=2"):
        owners(SMOLLM2 | {"num_key_value_heads": 2}, MLP + "up_proj.weight", (1536, 576), 2)
