import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.checkpoint.checkpoint_files import CheckpointError, DownloadError
from reference.shrink import EXPERTS, HEADS, VOCABULARY, causal_lm_types, shrink, tiny_config, tiny_model

# What transformers itself can't build of its own defaults, or builds into a part of another model.
NOT_TO_BE_HAD = {
    "blt": "BltConfig has no num_hidden_layers", "dbrx": "DbrxAttentionConfig has no rope_theta",
    "dots3_note": "its vision part's adapter_in_dim is of the whole size",
    "gemma3n": "needs timm for its vision part",
    "gemma4_assistant": "its defaults are refused by its own class", "gemma4_unified_assistant": "reads another model's cache",
    "musicgen": "MusicgenConfig has no dropout", "musicgen_melody": "MusicgenMelodyConfig has no dropout",
}
EVERY_MECHANISM = ["llama", "bloom", "gemma3n_text", "gpt_oss", "deepseek_v3", "jamba", "qwen3_next", "falcon_h1", "rwkv"]


def runs_whole(model_type):
    model = tiny_model(tiny_config(model_type))
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 15)[None]).logits
    assert logits.isfinite().all()
    assert logits.std() > 1e-3
    same = [name for name, weight in model.named_parameters() if weight.numel() > 1 and (weight == weight.flatten()[0]).all()]
    assert not same
    assert sum(weight.numel() for weight in model.parameters()) < 5e6
    return model


@pytest.mark.parametrize("model_type", EVERY_MECHANISM)
def test_an_architecture_is_made_tiny_runs_and_is_loaded_as_it_was_saved(tmp_path, model_type):
    model = runs_whole(model_type)
    folder = shrink(model_type, tmp_path / "tiny")
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.endurance
@pytest.mark.parametrize("model_type", [name for name in causal_lm_types() if name not in NOT_TO_BE_HAD])
def test_every_architecture_is_made_tiny_and_runs(model_type):
    runs_whole(model_type)


@pytest.mark.endurance
@pytest.mark.parametrize("model_type", NOT_TO_BE_HAD)
def test_what_is_said_not_to_be_had_is_not(model_type):
    with pytest.raises((CheckpointError, AttributeError, ImportError, ValueError)):
        runs_whole(model_type)


def test_heads_go_into_the_ranks_and_widths_do_not():
    config = tiny_config("mixtral")
    assert (config.num_attention_heads, config.num_key_value_heads) == (HEADS, HEADS // 2)
    assert config.num_local_experts == tiny_config("flex_olmo").num_experts == EXPERTS
    assert config.vocab_size == VOCABULARY
    assert all(VOCABULARY % tp_size for tp_size in (2, 3, 4))
    assert tiny_config("llama").intermediate_size % 4
    assert tiny_config("llama").num_key_value_heads == HEADS  # as many KV heads as query heads stay as many
    assert tiny_config("gemma").head_dim * HEADS != tiny_config("gemma").hidden_size  # a head_dim of its own stays that


def test_layers_show_every_combination_that_lists_by_layer_have():
    config = tiny_config({"model_type": "qwen3_next", "num_hidden_layers": 48})
    assert set(config.layer_types) == {"linear_attention", "full_attention"}
    assert config.num_hidden_layers == len(config.layer_types) == 2
    config = tiny_config({"model_type": "gpt_oss", "num_hidden_layers": 3, "layer_types": ["full_attention"] * 3})
    assert config.layer_types == ["full_attention"] * 2


def test_changes_hold_by_common_and_by_own_names():
    assert tiny_config("gpt2", num_attention_heads=4).n_head == 4
    assert tiny_config("gpt2", n_head=6).n_head == 6
    assert tiny_config("gemma3", num_key_value_heads=3).text_config.num_key_value_heads == 3


def test_a_folder_with_a_config_alone_is_shrunk(tmp_path):
    source = tmp_path / "source"
    AutoConfig.for_model("qwen2", num_hidden_layers=80, hidden_size=8192, vocab_size=150_000).save_pretrained(source)
    folder = shrink(source, tmp_path / "tiny", dtype="bfloat16", seed=3)
    values = json.loads((folder / "config.json").read_text())
    assert values["num_hidden_layers"] == 2
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_a_fixed_table_of_experts_is_drawn_too():
    model = tiny_model(tiny_config("deepseek_v4"))
    (table,) = (buffer for name, buffer in model.named_buffers() if name.endswith("tid2eid"))
    assert all(len(set(row)) == len(row) for row in table.tolist())
    assert len(table.unique()) == EXPERTS


def test_values_follow_from_the_seed():
    config = tiny_config("llama")
    first, again, other = (tiny_model(config, seed=seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_there_is_not_is_told(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="model_type='no_such'"):
        tiny_config({"model_type": "no_such"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        tiny_config(tmp_path / "empty")

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(DownloadError, match=r"could not be downloaded .*no network.* copy its config.json"):
        tiny_config("someone/no-model-of-theirs")
    shrink("llama", tmp_path / "tiny")
    with pytest.raises(CheckpointError, match=r"already holds model\.safetensors"):
        shrink("llama", tmp_path / "tiny")
    with pytest.raises(ValueError, match="dtype='int8'"):
        shrink("llama", tmp_path / "other", dtype="int8")
