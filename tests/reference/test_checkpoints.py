import json

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from reference import checkpoints, elements, shrink
from reference.checkpoints import (
    CheckpointError,
    DownloadError,
    ElementIndex,
    checkpoint_shapes,
    index_checkpoint,
    random_checkpoint,
    resolve,
    shapes_and_ties,
    weight_shapes,
)
from reference.hf import Reference
from tests.reference.tiny import FAMILIES, tiny_config


def tensors_in(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_transformers_finds_every_weight_it_wants_and_no_other(tmp_path, model_type, tied):
    folder = random_checkpoint(tmp_path, tiny_config(model_type, tie_word_embeddings=tied))
    _, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert not found["mismatched_keys"]
    assert ("lm_head.weight" in checkpoint_shapes(folder)) is not tied


def test_biases_are_those_of_the_family(tmp_path):
    def layers_with_bias(**config):
        names = weight_shapes(tiny_config(**config))
        return {name.split(".")[-2] for name in names if name.endswith("bias")}

    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert layers_with_bias(model_type="llama", mlp_bias=False) == attention
    assert layers_with_bias(model_type="llama", attention_bias=False) == {"gate_proj", "up_proj", "down_proj"}
    assert layers_with_bias(model_type="qwen2") == {"q_proj", "k_proj", "v_proj"}
    for family in ("qwen3", "mistral", "phi3"):
        assert layers_with_bias(model_type=family) == set()
    assert "model.layers.1.self_attn.k_norm.weight" in weight_shapes(tiny_config("qwen3"))


@pytest.mark.parametrize(("architecture", "tied"), [
    ("gemma3", {"lm_head.weight": "model.language_model.embed_tokens.weight"}),
    ("gpt2", {"lm_head.weight": "transformer.wte.weight"}),
    ("qwen3", {}),
])
def test_tied_tensors_are_those_that_the_model_ties(architecture, tied):
    config = shrink.tiny_config(architecture)
    shapes, found = shapes_and_ties(config)
    assert found == tied
    assert not tied.keys() & shapes.keys()
    assert set(tied.values()) <= shapes.keys()


def test_a_config_that_transformers_refuses_is_told_of(tmp_path):
    refused = shrink.tiny_config("exaone_moe").to_dict() | {"num_hidden_layers": 7}
    with pytest.raises(CheckpointError, match="transformers takes no exaone_moe of this config: StrictDataclass"):
        random_checkpoint(tmp_path, refused)


def test_nothing_is_at_a_value_that_would_hide_it(tmp_path):
    for name, value in tensors_in(random_checkpoint(tmp_path, tiny_config("llama"))).items():
        assert value.abs().min() > 0, name
        if name.endswith("norm.weight"):
            assert (value != 1).all(), name
            assert (value - 1).abs().max() < 0.6, name


def test_values_depend_on_seed_and_name_alone(tmp_path):
    first = tensors_in(random_checkpoint(tmp_path / "1", tiny_config(), seed=3))
    torch.randn(5)
    again = tensors_in(random_checkpoint(tmp_path / "2", tiny_config(), seed=3, max_shard_size="20KB"))
    deeper = tensors_in(random_checkpoint(tmp_path / "3", tiny_config(num_hidden_layers=3), seed=3))
    other = tensors_in(random_checkpoint(tmp_path / "4", tiny_config(), seed=4))
    rounded = tensors_in(random_checkpoint(tmp_path / "5", tiny_config(), seed=3, dtype="bfloat16"))
    assert set(first) == set(again) == set(other) == set(rounded)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, deeper[name]), name
        assert torch.equal(value.bfloat16(), rounded[name]), name
        assert not torch.equal(value, other[name]), name


def test_torchs_generator_and_default_dtype_are_left_alone(tmp_path):
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    random_checkpoint(tmp_path, tiny_config(), dtype="bfloat16")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype


def test_a_sharded_checkpoint_keeps_to_its_size_and_lists_every_tensor(tmp_path):
    folder = random_checkpoint(tmp_path, tiny_config(), max_shard_size="30KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weight_shapes(tiny_config()))
    files = set(index["weight_map"].values())
    assert files == {path.name for path in folder.glob("*.safetensors")}
    assert len(files) > 3
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_in(folder).values())
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(folder / file).values()) <= 30_000
    assert resolve(folder) == folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_of_a_random_model_are_neither_flat_nor_one_sided(tmp_path, model_type, tied):
    config = tiny_config(model_type, tie_word_embeddings=tied, num_hidden_layers=6)
    reference = Reference.load(random_checkpoint(tmp_path, config), "float32")
    assert 1.5 < reference.logits([list(range(40))])[0].std() < 2.5
    if not tied:
        assert 0.9 < reference.model.model.embed_tokens.weight.std() < 1.1


def test_the_config_on_disk_is_the_one_given_with_dtype_and_architecture(tmp_path):
    given = LlamaConfig(**{k: v for k, v in tiny_config().items() if k != "model_type"})
    config = AutoConfig.from_pretrained(random_checkpoint(tmp_path, given, dtype="bfloat16"))
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.dtype == torch.bfloat16
    assert (config.head_dim, config.num_key_value_heads, config.mlp_bias) == (10, 2, True)
    assert given.architectures is None, "the caller's config was changed"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_index_checkpoint_names_each_element(tmp_path, model_type):
    folder = index_checkpoint(tmp_path, tiny_config(model_type))
    index = ElementIndex.of_checkpoint(folder)
    tensors = tensors_in(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    down_proj = tensors[name]
    assert down_proj.dtype == torch.float32
    assert str(index.decode(down_proj[5, 7].item())) == f"{name}[5, 7]"
    every_value = torch.cat([tensor.flatten() for tensor in tensors.values()])
    assert len(every_value.unique()) == index.num_elements


def test_an_index_checkpoint_too_large_for_float32_is_float64(tmp_path, monkeypatch):
    monkeypatch.setattr(elements, "FLOAT32_EXACT_UP_TO", 1000)
    folder = index_checkpoint(tmp_path, tiny_config())
    assert {tensor.dtype for tensor in tensors_in(folder).values()} == {torch.float64}


def test_weights_are_never_written_beside_others(tmp_path):
    random_checkpoint(tmp_path, tiny_config())
    with pytest.raises(CheckpointError, match=r"already holds model\.safetensors; choose an empty one"):
        index_checkpoint(tmp_path, tiny_config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float8"}, "dtype='float8' is not one of"),
        ({"max_shard_size": "5 bananas"}, "max_shard_size='5 bananas' is not a size"),
        ({"config": {"hidden_size": 8}}, "has no model_type"),
        ({"config": {"model_type": "lama"}}, "model_type='lama' is unknown"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        random_checkpoint(tmp_path, **({"config": tiny_config()} | changes))


def test_one_name_in_two_files_is_refused(tmp_path):
    folder = random_checkpoint(tmp_path, tiny_config(), max_shard_size="30KB")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=f"tensor=.* is in file={first} and again in file={second}"):
        checkpoint_shapes(folder)


def test_files_that_are_no_part_of_the_checkpoint_are_passed_over(tmp_path):
    folder = random_checkpoint(tmp_path, tiny_config())
    shapes = checkpoint_shapes(folder)
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert checkpoint_shapes(folder) == shapes
    assert resolve(folder) == folder


def test_a_folder_resolves_to_itself_and_smollm2_to_the_fetched_one(tmp_path, monkeypatch):
    folder = random_checkpoint(tmp_path, tiny_config())
    assert resolve(str(folder)) == folder
    monkeypatch.setattr(checkpoints, "fetch_smollm2", lambda: folder / "fetched")
    assert resolve("smollm2") == folder / "fetched"


def test_a_folder_with_a_part_missing_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        resolve(tmp_path)
    random_checkpoint(tmp_path, tiny_config(), max_shard_size="30KB")
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    second.unlink()
    with pytest.raises(CheckpointError, match=second.name):
        resolve(tmp_path)


def test_pickled_weights_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"found pytorch_model\.bin: refused.*convert it to safetensors"):
        resolve(tmp_path)


@pytest.mark.parametrize("model", ["/no/such/folder", "./here", "~/models/x", "a/b/c"])
def test_a_path_is_never_taken_for_a_model_id(model, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match="there is no such folder"):
        resolve(model)


def test_a_model_id_brings_weights_and_tokenizer_and_no_code(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(model, **how):
        asked.update(model=model, **how)
        return str(random_checkpoint(tmp_path, tiny_config()))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("someone/some-model") == tmp_path
    assert asked["model"] == "someone/some-model"
    offered = ["model.safetensors", "tokenizer.json", "chat_template.jinja"]
    offered += ["modeling.py", "pytorch_model.bin", "onnx/model.safetensors"]
    taken = huggingface_hub.utils.filter_repo_objects(
        offered, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(taken) == ["model.safetensors", "tokenizer.json", "chat_template.jinja"]


def test_a_model_id_without_network_says_what_to_do_instead(monkeypatch):
    def snapshot_download(model, **how):
        raise LocalEntryNotFoundError("cannot reach the hub\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = r"\(LocalEntryNotFoundError: cannot reach the hub\).*into a folder"
    with pytest.raises(DownloadError, match=message):
        resolve("someone/some-model")


def test_what_cannot_be_a_model_id_is_said_to_be_neither(monkeypatch):
    with pytest.raises(DownloadError, match="is no folder here"):
        resolve("not a model")
