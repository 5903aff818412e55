"""Loading: the right elements on the right rank, nothing read in vain, everything accounted for."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.checkpoint.checkpoint_files import INDEX_FILE, SINGLE_FILE, CheckpointError
from engine.checkpoint.preflight import check_checkpoint
from engine.checkpoint.weights import Checkpoint, CheckpointTensor, LoadReport, load_weights
from engine.config import ModelConfig
from engine.models.decoder import MODULES, DecoderForCausalLM
from engine.models.registry import family_of
from engine.parallel.linear import MergedColumnParallelLinear, QKVParallelLinear
from harness.verification.budgets import same_bits
from reference.shards import owners
from tests.engine.conftest import MakeCheckpoint
from tests.engine.support import FEW, lone_group, make_model

FAMILIES: list[dict[str, Any]] = [
    {},
    {"model_type": "qwen2", "tie_word_embeddings": True},
    {"model_type": "qwen3", "num_attention_heads": 7, "num_key_value_heads": 1},
    {"model_type": "mistral"},
    {"model_type": "phi3", "hidden_size": 48, "tie_word_embeddings": True},
    {"num_attention_heads": 6, "num_key_value_heads": 6, "tie_word_embeddings": True},
    # Five ids over four ranks: the last rank holds padding only.
    {"num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 5},
]
Tensors = dict[str, Tensor]


def load(
    folder: Path, tp_rank: int = 0, tp_size: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[DecoderForCausalLM, LoadReport]:
    model = make_model(ModelConfig.from_folder(folder), lone_group(tp_rank, tp_size), dtype=dtype)
    return model, load_weights(model, folder, modules=family_of(model.config.model_type).modules, tied=model.tied)


def shards(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's shards under their checkpoint names: fused ones taken apart, unless they are fused there too."""
    fused_names = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for path, module in model.named_modules():
        for kind, param in module.named_parameters(recurse=False):
            if isinstance(module, MergedColumnParallelLinear) and model.config.model_type != "phi3":
                parent, _, fused = path.rpartition(".")
                for name, part in zip(fused_names[fused], param.split(module.local_sizes), strict=True):
                    yield f"{parent}.{name}.{kind}", part
            else:
                yield f"{path}.{kind}", param.data


@pytest.fixture
def edited(checkpoint: MakeCheckpoint, tmp_path: Path) -> Callable[..., Path]:
    """``edited(change, **config)``: a checkpoint's copy whose tensors went through ``change``."""

    def make(change: Callable[[Tensors], None], **config: Any) -> Path:
        tensors = load_file(checkpoint(**config) / SINGLE_FILE)
        change(tensors)
        folder = tmp_path / "edited"
        shutil.copytree(checkpoint(**config), folder)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / SINGLE_FILE)
        return folder

    return make


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("shard_bytes", [None, 20_000])
def test_every_rank_holds_and_reads_exactly_what_it_owns(
    checkpoint: MakeCheckpoint, family: dict[str, Any], shard_bytes: int | None
) -> None:
    folder = checkpoint(shard_bytes=shard_bytes, **family)
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_bytes is not None)
    config = json.loads((folder / "config.json").read_text())
    for tp_size in (1, 2, 3, 4, 5, 6):
        if tp_size > config["vocab_size"]:
            continue
        for tp_rank in range(tp_size):
            model, report = load(folder, tp_rank, tp_size)
            held = dict(shards(model))
            assert held.keys() - {"lm_head.weight"} == stored.keys() - {"lm_head.weight"}
            assert report.bytes_read.keys() == stored.keys()
            for name, whole in stored.items():
                owned = owners(config, name, tuple(whole.shape), tp_size)
                expected = torch.from_numpy(owned.take(whole.numpy(), tp_rank))
                where = f"{name} on rank {tp_rank} of {tp_size}"
                assert same_bits(held[name], expected), where
                num_rows = whole.shape[0] if owned.dim is None else len(owned.indices[tp_rank])
                per_row = whole.numel() // whole.shape[owned.dim or 0]
                assert report.bytes_read[name] == num_rows * per_row * whole.element_size(), where
            assert report.parameter_bytes == sum(tensor.nbytes for tensor in set(model.parameters()))


def test_no_read_of_a_sharded_tensor_takes_more_than_a_part(checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: dict[str, list[int]] = {}
    read = CheckpointTensor.__getitem__

    def counting(tensor: CheckpointTensor, index: Any) -> Tensor:
        value = read(tensor, index)
        reads.setdefault(tensor.name, []).append(value.numel())
        return value

    monkeypatch.setattr(CheckpointTensor, "__getitem__", counting)
    folder = checkpoint()
    load(folder, 1, 3)
    sizes = {name: math.prod(tensor.shape) for name, tensor in load_file(folder / SINGLE_FILE).items()}
    for name, parts in reads.items():
        sharded = "norm" not in name and not name.endswith(("o_proj.bias", "down_proj.bias"))
        # 131 rows over 3 ranks are 44 a shard; everything else here is a third, give or take one.
        assert max(parts) <= (0.36 if sharded else 1.0) * sizes[name], name
        assert len(parts) == 1, f"{name} was read in {len(parts)} parts"


@FEW
@given(dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float64]), tp_rank=st.integers(0, 1))
def test_weights_are_cast_to_the_models_dtype_element_by_element(
    checkpoint: MakeCheckpoint, dtype: torch.dtype, tp_rank: int
) -> None:
    folder = checkpoint()
    cast, _ = load(folder, tp_rank, 2, dtype)
    stored, _ = load(folder, tp_rank, 2)
    for param, original in zip(cast.parameters(), stored.parameters(), strict=True):
        assert same_bits(param.data, original.data.to(dtype))


def test_missing_and_extra_tensors_are_all_named(edited: Callable[..., Path]) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.sinks"] = tensors.pop("model.layers.1.mlp.up_proj.bias")
        del tensors["model.norm.weight"]

    with pytest.raises(CheckpointError) as refusal:
        load(edited(change))
    missing, extra = str(refusal.value).split("not in the model:")
    assert "model.layers.1.mlp.up_proj.bias" in missing
    assert "model.norm.weight" in missing
    assert "model.layers.0.self_attn.sinks" in extra


def test_a_bias_that_the_config_does_not_ask_for_is_not_left_out_unseen(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint(), tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    with pytest.raises(CheckpointError, match=r"not in the model: .*k_proj\.bias"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.o_proj.bias",
        "model.layers.0.mlp.down_proj.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ],
)
def test_a_misshapen_tensor_names_itself_its_file_and_both_shapes(edited: Callable[..., Path], name: str) -> None:
    shape: list[tuple[int, ...]] = []

    def change(tensors: Tensors) -> None:
        shape.append(tuple(tensors[name].shape))
        tensors[name] = tensors[name].repeat_interleave(2, dim=0)

    folder = edited(change)
    with pytest.raises(CheckpointError) as refusal:
        load(folder, 0, 2)
    message = str(refusal.value)
    assert name in message
    assert str(folder / SINGLE_FILE) in message
    assert str(shape[0]) in message
    assert str((2 * shape[0][0], *shape[0][1:])) in message


def test_a_transposed_tensor_is_refused(edited: Callable[..., Path]) -> None:
    def change(tensors: Tensors) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].T.contiguous()

    with pytest.raises(CheckpointError, match=r"\(42, 50\) in the checkpoint.* \(50, 42\)"):
        load(edited(change))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_a_foreign_dtype_is_refused_by_name(edited: Callable[..., Path], dtype: torch.dtype) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)

    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .*dtype=\w+ is not supported; supported: F64"):
        load(edited(change))


@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.5, 0.999999])
def test_a_truncated_file_is_named(checkpoint: MakeCheckpoint, tmp_path: Path, kept: float) -> None:
    folder = Path(shutil.copytree(checkpoint(), tmp_path / "copy"))
    file = folder / SINGLE_FILE
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(CheckpointError, match=f"file={file} is damaged or cut short"):
        load(folder)


def test_a_file_of_other_bytes_is_named(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint(), tmp_path / "copy"))
    (folder / SINGLE_FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 20)
    with pytest.raises(CheckpointError, match="damaged"):
        load(folder)


@pytest.fixture
def sharded(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A copy of a checkpoint in several files."""
    return Path(shutil.copytree(checkpoint(shard_bytes=20_000), tmp_path / "sharded"))


def rewrite_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = folder / INDEX_FILE
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_missing_shard_file_is_named(sharded: Path) -> None:
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(CheckpointError, match=f"file={file} is missing"):
        load(sharded)


def test_what_the_index_says_of_tensors_does_not_matter_only_the_files_it_names_do(sharded: Path) -> None:
    """As in transformers, which reads all that the named files hold."""

    def change(weight_map: dict[str, str]) -> None:
        weight_map.update({"model.ghost": next(iter(weight_map.values()))})
        del weight_map["model.norm.weight"]

    before, _ = load(sharded)
    rewrite_index(sharded, change)
    after, _ = load(sharded)
    assert all(same_bits(*pair) for pair in zip(before.parameters(), after.parameters(), strict=True))


def test_a_tensor_in_two_files_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = load_file(first)
    name = next(iter(load_file(second)))
    save_file(tensors | {name: torch.zeros(2)}, first)
    with pytest.raises(CheckpointError, match=f"tensor={name} is in file=.* and again in file="):
        load(sharded)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"weight_map": null}',
        b'{"weight_map": {}, "metadata": {}}',
        b'{"weight_map": {"a": "b.safetensors"}}',
        b'{"weight_map": {"a": "../b.safetensors"}, "metadata": {}}',
        b'{"weight_map": {"a": "/b.safetensors"}, "metadata": {}}',
        b'{"weight_map": {"a": "b.bin"}, "metadata": {}}',
        b'{"weight_map": ["a"]}',
        b'{"weight_map": {"a": 3}}',
        b"\xff\xfe\x00",
    ],
)
def test_a_broken_index_is_named(sharded: Path, content: bytes) -> None:
    (sharded / INDEX_FILE).write_bytes(content)
    said = f"file={sharded / INDEX_FILE} (is not (a safetensors index|valid JSON)|holds a list)"
    with pytest.raises(CheckpointError, match=said):
        load(sharded)


def test_pickled_weights_are_refused_and_said_to_be_there(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    shutil.copy(checkpoint() / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(CheckpointError, match=r"found pytorch_model\.bin: .*can run code.*convert"):
        load(tmp_path)


def test_a_folder_without_weights_says_what_it_looked_for(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    shutil.copy(checkpoint() / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=rf"no {SINGLE_FILE} and no {INDEX_FILE} in folder={tmp_path}: give"):
        load(tmp_path)


def add_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]


@pytest.mark.parametrize(("tp_rank", "tp_size"), [(0, 1), (0, 3), (2, 3)])
def test_an_equal_copy_of_a_tied_tensor_is_accepted_and_not_read_again(
    edited: Callable[..., Path], tp_rank: int, tp_size: int
) -> None:
    folder = edited(add_head, tie_word_embeddings=True)
    model, report = load(folder, tp_rank, tp_size)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert report.bytes_read["lm_head.weight"] == 0
    assert report.bytes_read["model.embed_tokens.weight"] <= 4 * 42 * -(-131 // tp_size)


@pytest.mark.parametrize("row", [0, 60, 130])
def test_a_head_that_differs_from_the_embedding_it_is_tied_to_stays_its_own_and_is_told_of(
    edited: Callable[..., Path], row: int, caplog: pytest.LogCaptureFixture
) -> None:
    def change(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][row, -1] += 1

    folder = edited(change, tie_word_embeddings=True)
    model, _ = load(folder)
    check_checkpoint(folder, model.config)
    differs = (model.lm_head.weight != model.model.embed_tokens.weight).nonzero().tolist()
    assert differs == [[row, 41]]
    assert "tie_word_embeddings=true" in caplog.text
    assert "are not tied" in caplog.text


@pytest.mark.parametrize("shape", [(), (131,), (44, 42), (132, 42)])
def test_a_copy_of_another_shape_is_refused(edited: Callable[..., Path], shape: tuple[int, ...]) -> None:
    def change(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = torch.zeros(shape)

    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load(edited(change, tie_word_embeddings=True), 0, 3)


def test_an_untied_model_needs_its_head(edited: Callable[..., Path]) -> None:
    def change(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]

    with pytest.raises(CheckpointError, match=r"missing from the checkpoint: lm_head\.weight;"):
        load(edited(change))


def test_buffers_that_follow_from_the_config_are_tolerated_and_not_read(edited: Callable[..., Path]) -> None:
    def change(tensors: Tensors) -> None:
        for layer in range(2):
            for name in ("inv_freq", "cos_cached", "sin_cached"):
                tensors[f"model.layers.{layer}.self_attn.rotary_emb.{name}"] = torch.ones(4, dtype=torch.int64)

    _, report = load(edited(change))
    assert not [name for name in report.bytes_read if "rotary_emb" in name]


def test_another_name_with_inv_freq_in_it_is_not_tolerated(edited: Callable[..., Path]) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.rotary_emb.inv_freq_scale"] = torch.ones(4)

    with pytest.raises(CheckpointError, match=r"not in the model: .*inv_freq_scale"):
        load(edited(change))


def test_an_element_that_a_loader_left_out_is_found(checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = QKVParallelLinear.weight_loader

    def forgets_v(layer: QKVParallelLinear, param: Any, loaded: Any, shard_id: Any = None) -> None:
        if shard_id != "v":
            loader(layer, param, loaded, shard_id)

    monkeypatch.setattr(QKVParallelLinear, "weight_loader", forgets_v)
    with pytest.raises(CheckpointError, match=r"never written.*qkv_proj\.weight \(1008 of 4032 elements\)"):
        load(checkpoint())


def test_two_tensors_for_one_place_are_found(checkpoint: MakeCheckpoint) -> None:
    model, _ = load(checkpoint())
    with pytest.raises(CheckpointError, match=r"tensor=.* in file=.*overlaps"):
        load_weights(model, checkpoint(), modules=MODULES, tied=model.tied)


def test_a_checkpoint_lists_its_tensors_without_reading_them(checkpoint: MakeCheckpoint) -> None:
    with Checkpoint(checkpoint()) as tensors:
        assert len(tensors) == len(set(tensors)) == len(load_file(checkpoint() / SINGLE_FILE))
        assert tensors["model.norm.weight"].shape == (42,)
        assert sum(tensor.bytes_read for tensor in tensors.values()) == 0
        assert tensors["model.norm.weight"][3:5].shape == (2,)
        assert tensors["model.norm.weight"].bytes_read == 8
