"""Any config, made tiny: a random checkpoint of the same architecture, small enough for a test and odd enough to be cut badly.

What a field of a config means is told by its name: a count of heads, a width, a number of layers, a period of layers. Its tiny
value follows from the name and from what it was beside other fields (as many KV heads as heads, fewer, or one). So a model of
the next release mostly needs nothing here; what names don't tell stands by ``model_type`` in ``_BESIDE_DEFAULTS``, ``_MUST_BE``,
``_FEWEST_LAYERS`` and ``_OF_EACH_KIND``.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from engine.checkpoint.checkpoint_files import CONFIG_FILE, CheckpointError
from engine.checkpoint.hub import find_config
from reference.building import building, read_config
from reference.writing import DTYPES, generator_of

HEADS = 12  # goes into 2, 3 and 4 ranks; half as many KV heads go into 2 and 3
HEAD_DIM = 8
HIDDEN = HEADS * HEAD_DIM
OWN_HEAD_DIM = 16  # where heads times head_dim is not the hidden size
INTERMEDIATE = 50  # over 4: 13, 13, 12, 12, or 13, 13, 13, 11; over 3: 17, 17, 16
EXPERT_INTERMEDIATE = 48  # torch's grouped matmuls take strides of 16 bytes alone: 24, 16 and 12 are such
EXPERTS = 12  # as heads: whole experts go to 2, 3 and 4 ranks
VOCABULARY = 131  # a prime
POSITIONS = 256
WINDOW = 8
LAYERS = 2
MOST_LAYERS = 6

# The whole name of a field, and the most that it may be; the first pattern that fits holds. Other fields stay as they are.
_AT_MOST: tuple[tuple[str, int], ...] = (
    (r"vocab_size(_per_layer_input)?|\w*_vocab_size(_base)?|encoder_hash_byte_group_vocab", VOCABULARY),
    (r"n_(input|recurrent|output)_layers", 1),
    (r"((num|n)_)?(hidden_|encoder_|decoder_)?layers?|num_blocks|num_layers_per_stack", LAYERS),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|\w*_layer_offset|num_kv_shared_layers"
     r"|max_window_layers|topk_group", 1),
    (r"\w*(_period|_pattern|_interval|every_n_layers|every_n|sparse_step|layer_group_size|layers_per_attn_res_block|layer_interval|"
     r"moe_layer_step)|loop_num_passes|n_recurrent_loops|[HL]_cycles|altup_num_inputs|hc_mult|hc_count|"
     r"n_group|num_expert_group|(mamba_)?n_?groups|mamba_ngroups|o_groups|\w*shared_experts", 2),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts", 3),
    (r"index_topk(_blocks)?|indexer_budget|index_block_size|index_n_heads|indexer_n_heads|zero_expert_num", 4),
    (r"(n|num|moe_num|moe)_(routed_|local_)?experts", EXPERTS),
    (r"qk_rope_head_dim|(index|linear|swa)_(key_|value_)?head_dim|linear_head_dim|(mamba_)?d_state"
     r"|(ssm_)?state_size|(mamba_)?chunk_size|mamba_chunk_size|block_size|query_pre_attn_scalar|d_rel", HEAD_DIM),
    (r"qk_nope_head_dim|v_head_dim|hidden_size_per_layer_input|\w*_lowrank|laurel_rank|loop_gate_rank|gated_norm_rank|adapter_rank"
     r"|time_step_rank|mamba_dt_rank", 12),
    (r"rotary_dim", HEAD_DIM // 2),
    (r"indexer_head_dim", OWN_HEAD_DIM),
    (r"qk_head_dim", 20),
    (r"kv_lora_rank|o_lora_rank|rel_extent", 16),
    (r"q_lora_rank|router_hidden_size", 24),
    (r"(moe_|expert_|shared_experts?_|moe_shared_expert_|shared_)(intermediate|ffn_hidden)_size", EXPERT_INTERMEDIATE),
    (r"\w*intermediate_size(_mlp)?|\w*ffn_dim|dff|dim_ff|ffn_hidden_size|n_inner|d_inner|feed_forward_size", INTERMEDIATE),
    (r"(linear|num|n|encoder|decoder|swa)_(num_)?(encoder_|decoder_)?(attention_|value_|linear_)?heads?|attention_heads"
     r"|n_mamba_heads|num_query_groups", HEADS),
    (r"(linear_num_key|swa_num_key_value)_heads", HEADS // 2),
    (r"\w*sliding_window(_size)?|\w*window_size|\w*window_len|local_attention|attention_chunk_size", WINDOW),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length|max_\w+_positions"
     r"|original_max_position_embeddings", POSITIONS),
    (r"hidden_size|d_model|n_embd|emb_dim|embedding_dim|word_embed_proj_dim|embedding_size|input_embedding_size|attention_hidden_size"
     r"|lru_width|ple_embed_dim", HIDDEN),
)
_WIDTH = ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
_HEAD_DIM = ("head_dim", "kv_channels", "attention_head_dim", "d_head", "dim_head", "attention_head_size")
_DERIVED = ("transformers_version", "architectures", "model_type", "dtype", "id2label", "label2id")
_EXPERTS_OWN_WIDTH = r"(moe_|expert_)(intermediate|ffn_hidden)_size"
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_QWEN4_INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 4,
                  "indexer_compress_ratio": 2}
# What a class's defaults leave open, though its models need it, or set so that a kind of layer is missing.
_BESIDE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4}
                                                for kind in ("full_attention", "sliding_attention")}},
    "deepseek_v2": {"num_experts_per_tok": 3},
    "dots1": {"num_experts_per_tok": 3, "n_routed_experts": 64, "n_shared_experts": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": _QWEN4_INDEXER},
    "qwen4_exp_text": _QWEN4_INDEXER,
    "xmod": {"default_language": "en_XX"},
}
# Relations of sizes that names don't tell.
_MUST_BE: Mapping[str, Mapping[str, Any]] = {
    "dory": {"num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2,
             "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"]},
    "dots3_note_text": {"head_dim": 20},  # a sliding layer's qk_nope_head_dim and qk_rope_head_dim
    "hrm_text": {"num_hidden_layers": LAYERS * 2 * (2 + 1)},
    "reformer": {"axial_pos_embds_dim": [HIDDEN // 3, HIDDEN - HIDDEN // 3], "axial_pos_shape": [POSITIONS // 16, 16]},
    "xlstm": {"embedding_dim": 128, "hidden_size": 128, "num_heads": 8},
}
# Where a layer of one kind is no model: blocks that come in threes, weights shared between the layers of a kind.
_FEWEST_LAYERS: Mapping[str, int] = {"inkling2_loop_text": 6, "recurrent_gemma": 3}
_OF_EACH_KIND: Mapping[str, int] = {"zamba": 2, "zamba2": 2}
_LAYER_NUMBERS = r"\w*_(indices|idxs|layer_ids)|mlp_only_layers|moe_layers|cross_attention_layers"  # lists of layers
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers")
_MAMBA_HEADS = ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads")


def causal_lm_types() -> tuple[str, ...]:
    """Every ``model_type`` that the installed transformers has a causal language model of."""
    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def tiny_config(model: str | Path | Mapping[str, Any], **changes: Any) -> PretrainedConfig:
    """A config of the same architecture as ``model``'s, tiny.

    Layers are as few as show every combination that the config's lists by layer have, and at least two. Widths, experts and the
    vocabulary are such that 2, 3 or 4 ranks cut them unevenly; query heads go into 2, 3 and 4 ranks, KV heads into 2 and 3.

    Args:
        model: a ``model_type`` (then it is shrunk from its class's defaults), a folder with config.json, a hub id, or values of
            a config, ``model_type`` among them.
        **changes: fields that are set to these values in the end. Names common to all architectures, such as
            ``num_attention_heads``, stand for what this one calls them.

    Raises:
        CheckpointError: if there is no such type or folder, or transformers refuses the tiny config.
        DownloadError: if it is a hub id that can't be downloaded.
    """
    config = _config_of(model)
    with building(f"transformers takes no tiny {config.model_type}"):
        tiny = _shrunk(config)
        _set(tiny, config, changes)
        return type(config)(**tiny)


def shrink(model: str | Path | Mapping[str, Any], folder: str | Path, *, seed: int = 0, dtype: str = "float32",
           own_names: bool = False, **changes: Any) -> Path:
    """Write a tiny random checkpoint of ``model``'s architecture into ``folder``, in the format in which its hub files are.

    Args:
        model: as for `tiny_config`.
        folder: made if need be; must hold no checkpoint.
        seed: of the weights. A tensor's values follow from this and its name alone.
        dtype: of the tensors: one of `reference.writing.DTYPES`.
        own_names: whether tensors are to be as the model itself has them, as training saves them at times.
        **changes: as for `tiny_config`.

    Returns:
        ``folder``.

    Raises:
        CheckpointError: as for `tiny_config`; or transformers can't build or save such a model.
        DownloadError: if ``model`` is a hub id that can't be downloaded.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {sorted(DTYPES)}")
    folder = Path(folder)
    if folder.is_dir() and (left := sorted(path.name for path in folder.glob("*.safetensors*"))):
        raise CheckpointError(f"folder={folder} already holds {', '.join(left)}; choose an empty one")
    config = tiny_config(model, **changes)
    with building(f"transformers can't build or save a tiny {config.model_type}"):
        network = tiny_model(config, seed=seed).to(DTYPES[dtype])
        network.save_pretrained(folder, save_original_format=not own_names)
    return folder


def tiny_model(config: PretrainedConfig, *, seed: int = 0) -> Any:
    """The model of ``config`` in float32 on the CPU, with no parameter left at what it starts with, such as 0 or 1.

    A matrix keeps the scale of its input. A vector is near what it starts as: norms near 1, biases near 0. Buffers that a
    checkpoint holds, such as the biases of a router, are random too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # some vectors start at random
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager",
                                                   trust_remote_code=False)
    persistent = set(network.state_dict())
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if name in persistent and tensor.is_floating_point():
                tensor.copy_(_random_like(name, tensor, seed))
            elif name in persistent and tensor.dim() == 2 and not tensor.any():
                tensor.copy_(_random_table(name, tensor.shape, seed))
    return network.eval()


def _random_like(name: str, tensor: torch.Tensor, seed: int) -> torch.Tensor:
    draw = torch.empty(tensor.shape, dtype=torch.float32).normal_(generator=generator_of(name, seed))
    if tensor.dim() < 2 or name.endswith("bias"):
        start = tensor.float()
        return torch.where(start.isfinite(), start, 0.0) + draw * 0.2
    if "embed" in name or "lm_head" in name or "wte" in name:
        return draw
    return draw.div_(tensor.shape[-1] ** 0.5)


def _random_table(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Of a fixed table of experts by token, ``[vocabulary, experts a token]``: different experts in each row."""
    order = torch.rand(shape[0], EXPERTS, generator=generator_of(name, seed)).argsort(-1)
    return order[:, : shape[1]]


def _config_of(model: str | Path | Mapping[str, Any]) -> Any:
    if isinstance(model, Mapping):
        values = dict(model)
        model_type = values.pop("model_type", None)
        if model_type not in CONFIG_MAPPING:
            raise CheckpointError(f"model_type={model_type!r} is unknown to transformers")
        with building(f"transformers can't make a {model_type} of this config"):
            return CONFIG_MAPPING[model_type](**values)
    if str(model) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        with building(f"transformers can't make a {model} of its own defaults"):
            return CONFIG_MAPPING[str(model)](**_BESIDE_DEFAULTS.get(str(model), {}))
    folder = find_config(model)
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"folder={folder} holds no {CONFIG_FILE}; pass a Hugging Face model folder")
    return read_config(folder)


def _shrunk(config: Any) -> dict[str, Any]:
    """The values of a tiny config."""
    old = {name: value for name, value in config.to_dict().items() if name not in _DERIVED}
    new = {name: _at_most(name, value) for name, value in old.items()}
    for name in config.sub_configs:
        below = getattr(config, name, None)
        if isinstance(below, PretrainedConfig):
            new[name] = type(below)(**_shrunk(below))
    for name in old:
        if name.endswith(("token_id", "pad_index")) or name == "eos_token_id":
            new[name] = _tiny_id(old[name])
    _keep_relations(old, new)
    _choose_layers(config, old, new)
    if not getattr(config, "is_encoder_decoder", False) and "is_decoder" in new:
        new["is_decoder"] = True
    return {**new, **_MUST_BE.get(config.model_type, {})}


def _at_most(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    return next((min(value, most) for pattern, most in _AT_MOST if re.fullmatch(pattern, name)), value)


def _tiny_id(token_id: Any) -> Any:
    if isinstance(token_id, list):
        return [_tiny_id(one) for one in token_id]
    return token_id if token_id is None or token_id < 100 else 100 + token_id % 23


def _first(names: tuple[str, ...], values: Mapping[str, Any]) -> str | None:
    return next((name for name in names if isinstance(values.get(name), int)), None)


def _keep_relations(old: dict[str, Any], new: dict[str, Any]) -> None:
    """What one field must be because of others."""
    width, heads, kv_heads, head_dim = (_first(names, old) for names in (_WIDTH, _HEADS, _KV_HEADS, _HEAD_DIM))
    if width:
        new[width] = HIDDEN
        if old.get("attention_hidden_size") == 2 * old[width]:
            new["attention_hidden_size"] = 2 * HIDDEN
    if heads:
        new[heads] = HEADS
        if kv_heads:
            new[kv_heads] = HEADS if old[kv_heads] >= old[heads] else 1 if old[kv_heads] == 1 else HEADS // 2
    if heads and head_dim and width:
        new[head_dim] = HEAD_DIM if old[head_dim] * old[heads] == old[width] else OWN_HEAD_DIM
        if old[head_dim] == old.get("qk_rope_head_dim"):
            new[head_dim] = new["qk_rope_head_dim"]
    if _first(_EXPERTS, old) and "intermediate_size" in old and not any(re.fullmatch(_EXPERTS_OWN_WIDTH, name) for name in old):
        new["intermediate_size"] = EXPERT_INTERMEDIATE
    for name in _EXPERTS:
        if isinstance(old.get(name), int) and old[name] > 1:
            new[name] = EXPERTS
    for name in ("head_dim", "v_head_dim"):
        if name in old and old[name] is None:
            new[name] = HEAD_DIM
    if "qk_head_dim" in old and {"qk_nope_head_dim", "qk_rope_head_dim"} <= set(old):
        new["qk_head_dim"] = new["qk_nope_head_dim"] + new["qk_rope_head_dim"]
    expand, mamba_heads = (_first(names, old) for names in (("mamba_expand", "expand"), _MAMBA_HEADS))
    if expand and width and mamba_heads:
        inner = new[expand] * HIDDEN
        if isinstance(old.get("mamba_d_ssm"), int):
            new["mamba_d_ssm"] = inner
        new[mamba_heads] = HEADS
        for name in ("mamba_d_head", "mamba_head_dim", "mamba_headdim"):
            if name in old:
                new[name] = inner // HEADS
    for name, value in old.items():
        if name.startswith("rope") and isinstance(value, dict):
            new[name] = _shrunk_rope(value)


def _shrunk_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """The positions from which a scaled rotary embedding was stretched are few."""
    shrunk = {name: _shrunk_rope(value) if isinstance(value, dict) else value for name, value in rope.items()}
    if "original_max_position_embeddings" in shrunk:
        shrunk["original_max_position_embeddings"] = POSITIONS // 2
    return shrunk


def _choose_layers(config: Any, old: dict[str, Any], new: dict[str, Any]) -> None:
    """As many layers as show each combination of what the config's lists say of a layer."""
    layers = _first(_LAYERS, old)
    if layers is None:
        return
    everyone = range(old[layers])
    by_layer = [name for name, value in old.items() if isinstance(value, list | tuple) and len(value) == len(everyone) > 1]
    members = [name for name, value in old.items() if re.fullmatch(_LAYER_NUMBERS, name) and isinstance(value, list | tuple)]
    by_layer = [name for name in by_layer if name not in members]
    others = {int(index): values for index, values in (old.get("per_layer_config") or {}).items()}
    kinds: dict[str, list[int]] = {}
    for index in everyone:
        kind = [*(old[name][index] for name in by_layer), *(index in old[name] for name in members), others.get(index)]
        kinds.setdefault(repr(kind), []).append(index)
    of_each = _OF_EACH_KIND.get(config.model_type, 1)
    chosen = sorted(index for indices in kinds.values() for index in indices[:of_each])[:MOST_LAYERS]
    spare = (index for index in everyone if index not in set(chosen))
    while len(chosen) < min(_FEWEST_LAYERS.get(config.model_type, LAYERS), len(everyone)):
        chosen = sorted([*chosen, next(spare)])
    new[layers] = len(chosen)
    for name in by_layer:
        new[name] = [_at_most(name, old[name][index]) for index in chosen]
    for name in members:
        new[name] = [place for place, index in enumerate(chosen) if index in old[name]]
    if others:
        usual = {name: new.get(name) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")}
        new["per_layer_config"] = {
            place: {name: _per_layer(name, value, old[name], usual) for name, value in others[index].items()}
            for place, index in enumerate(chosen) if index in others}


def _per_layer(name: str, value: Any, general: Any, usual: Mapping[str, Any]) -> Any:
    """Where a layer has more or fewer of something than the rest, the tiny one has."""
    if usual.get(name) is None:
        return _at_most(name, value)
    return usual[name] * 2 if value > general else usual[name] // 2


def _set(tiny: dict[str, Any], config: Any, changes: Mapping[str, Any]) -> None:
    names = type(config).attribute_map
    for name, value in changes.items():
        own = names.get(name, name)
        below = next((tiny[part] for part in config.sub_configs if own not in tiny and hasattr(tiny.get(part), name)), None)
        if below is None:
            tiny[own] = value
        else:
            setattr(below, name, value)
