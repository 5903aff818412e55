"""What the reference loaded is what the files hold; whatever it is instead is named."""

import pytest
import torch

from engine.checkpoint.checkpoint_files import read_headers
from harness.verification.reference_results import ReferenceResults
from reference.checkpoints import random_checkpoint, read_config
from reference.hf import Reference
from reference.loaded import differences, hub_names, to_hub_format
from reference.shrink import shrink
from reference.writing import edited
from tests.reference.tiny import tiny_config

TYPES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt2", "gemma2", "gpt_oss", "phi3", "mamba2")
"""Names that are renamed, merged and split while they are loaded; tied embeddings; names with and without a prefix."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: shrink({"model_type": kind}, tmp_path_factory.mktemp("loaded") / kind) for kind in TYPES}


@pytest.mark.parametrize("dtype", ["exact", "bfloat16"])
@pytest.mark.parametrize("model_type", TYPES)
def test_what_was_loaded_is_what_the_files_hold(folders, model_type, dtype):
    assert list(differences(Reference.load(folders[model_type], dtype).model, folders[model_type])) == []


@pytest.mark.parametrize("model_type", TYPES)
def test_one_wrong_value_in_every_parameter_is_as_many_wrong_values(folders, model_type):
    model = Reference.load(folders[model_type], "exact").model
    parameters = list(model.parameters())  # tied ones once
    for parameter in parameters:
        parameter.data.view(-1)[-1] += 1e-9
    found = list(differences(model, folders[model_type]))
    assert all(" differs from the file: 1 of " in line for line in found)
    assert len(found) == len(parameters)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v4"])
def test_files_under_the_models_own_names_are_compared_by_these(tmp_path, model_type):
    shrink(model_type, tmp_path, own_names=True)
    loaded = Reference.load(tmp_path, "float32").model
    assert list(differences(loaded, tmp_path)) == []
    name, parameter = next((name, x) for name, x in loaded.named_parameters() if "experts" in name)
    parameter.data.view(-1)[0] += 1
    assert [line.split()[0] for line in differences(loaded, tmp_path)] == [name]


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen3_moe", "phi3"])
def test_made_up_checkpoints_come_into_the_format_of_the_hubs_files(tmp_path, model_type):
    own = shrink(model_type, tmp_path / "own", own_names=True)
    mine = Reference.load(own, "float32").model.state_dict()
    to_hub_format(own)
    hub = shrink(model_type, tmp_path / "hub")
    assert read_headers(own).keys() == read_headers(hub).keys()
    theirs = Reference.load(own, "float32").model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    names = hub_names(read_config(hub))
    assert names.keys() == read_headers(hub).keys()
    assert set(names.values()) == mine.keys()


def test_names_of_the_hub_lead_to_the_models_own(folders):
    names = hub_names(read_config(folders["mixtral"]))
    assert names["model.layers.0.block_sparse_moe.gate.weight"] == "model.layers.0.mlp.gate.weight"
    assert names["model.layers.1.block_sparse_moe.experts.3.w3.weight"] == "model.layers.1.mlp.experts.gate_up_proj"


def test_merged_tensors_go_by_their_names_in_the_files(folders):
    model = Reference.load(folders["mixtral"], "exact").model
    merged = model.model.layers[1].mlp.experts.gate_up_proj.data
    merged[[0, 1]] = merged[[1, 0]]
    names = [line.split()[0] for line in differences(model, folders["mixtral"])]
    experts = "model.layers.1.block_sparse_moe.experts"
    assert names == [f"{experts}.{expert}.{name}.weight" for expert in (0, 1) for name in ("w1", "w3")]


@pytest.fixture
def llama(tmp_path):
    return random_checkpoint(tmp_path / "llama", tiny_config("llama"))


def test_a_tensor_that_went_nowhere_and_one_that_was_made_up_are_named(llama):
    with edited(llama) as tensors:
        tensors["model.layers.0.mlp.gate_proj.scale"] = torch.ones(1)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)  # derived: old files have it
        del tensors["model.layers.1.mlp.up_proj.weight"]
    assert list(differences(Reference.load(llama, "float32").model, llama)) == [
        "model.layers.0.mlp.gate_proj.scale is in the files, and went to no parameter",
        "model.layers.1.mlp.up_proj.weight is not in the files: it was made up"]


def test_a_model_of_which_the_files_hold_no_head_may_have_tied_it(tmp_path):
    folder = random_checkpoint(tmp_path / "tied", tiny_config("llama", tie_word_embeddings=True))
    assert list(differences(Reference.load(folder, "float32").model, folder)) == []


def test_a_report_says_that_the_reference_is_the_wrong_one(llama):
    results = ReferenceResults(llama, dtype="float32")
    results.baseline.model.model.norm.weight.data[3] += 1
    (line,) = results.wrongly_loaded
    assert line.startswith("model.norm.weight differs from the file: 1 of 48 values, element 3 is ")
