"""Faults in what is read of a model's config: one or more for each field of ``ModelConfig``. Alike wherever it is read.

Most sizes can't be read wrong in silence, for the checkpoint's tensors have others: it is refused. What fits all the same, and
what no tensor shows, must be seen by what the model says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.config import ModelConfig
from engine.frontend.requests import Admission
from engine.parallel.group import TPGroup
from harness.faults.base import LOAD, Patches, Plant, around, fault
from harness.faults.layers import BEFORE_O_PROJ

Change = dict[str, Any]
"""New values by field."""


def _read_as(change: Callable[[ModelConfig], Change]) -> Plant:
    def plant(patch: Patches, tp: TPGroup) -> None:
        def make(original: Any) -> Any:
            def from_folder(cls: type[ModelConfig], folder: str | Path) -> ModelConfig:
                right: ModelConfig = original.__func__(cls, folder)
                return replace(right, **change(right))

            return classmethod(from_folder)

        patch.replace(ModelConfig, "from_folder", make)

    return plant


def _declare(name: str, field: str, what: str, change: Callable[[ModelConfig], Change], checks: tuple[str, ...],
             layout: str = "llama", module: str | None = None, rows: tuple[int, ...] = ()) -> None:
    fault(rows=rows, name=name, what=what, checks=checks, layout=layout, module=module, where="both",
          field=f"ModelConfig.{field}")(_read_as(change))


# What the checkpoint's tensors contradict.

REFUSED: dict[str, tuple[str, str, str, Callable[[ModelConfig], Change]]] = {
    "qwen3-taken-for-a-llama": (
        "model_type", "qwen3", "A Qwen3 is run as a Llama of the same sizes.",
        lambda right: {"model_type": "llama", "qk_norm": False}),
    "vocabulary-rounded-up": (
        "vocab_size", "llama", "The vocabulary's size is rounded up to a multiple of 64 where the config is read.",
        lambda right: {"vocab_size": -(-right.vocab_size // 64) * 64}),
    "width-of-all-heads": (
        "hidden_size", "llama", "The hidden size is computed from the heads, which need not make it up.",
        lambda right: {"hidden_size": right.num_q_heads * right.head_dim}),
    "mlp-four-times-as-wide": (
        "intermediate_size", "llama", "The MLP is taken to be four times as wide as the model, whatever the config says.",
        lambda right: {"intermediate_size": 4 * right.hidden_size}),
    "last-layer-left-out": (
        "num_layers", "llama", "Layers are counted from 0 up to the last one's number, which is not among them.",
        lambda right: {"num_layers": right.num_layers - 1}),
    "query-heads-from-the-width": (
        "num_q_heads", "llama", "The number of query heads is computed from hidden size and head size.",
        lambda right: {"num_q_heads": right.hidden_size // right.head_dim}),
    "kv-heads-as-many-as-query-heads": (
        "num_kv_heads", "llama", "Every query head gets a KV head of its own: num_key_value_heads is not looked at.",
        lambda right: {"num_kv_heads": right.num_q_heads}),
    "head-size-from-the-width": (
        "head_dim", "llama", "The size of a head is computed from the hidden size, though the config gives another.",
        lambda right: {"head_dim": right.hidden_size // right.num_q_heads}),
    "tie-not-seen": (
        "tie_word_embeddings", "llama-odd", "A model with tied embeddings is taken for one with an LM head of its own.",
        lambda right: {"tie_word_embeddings": False}),
    "qkv-bias-looked-up-in-the-config": (
        "qkv_bias", "qwen2", "Whether queries, keys and values have biases is read from attention_bias, which Qwen2 lacks.",
        lambda right: {"qkv_bias": bool(getattr(right.hf_config, "attention_bias", False))}),
    "output-bias-of-qwen2": (
        "o_bias", "qwen2", "Where queries, keys and values have biases, the attention's output is taken to have one too.",
        lambda right: {"o_bias": right.qkv_bias}),
    "output-bias-not-seen": (
        "o_bias", "llama", "The config's attention_bias is taken to be of queries, keys and values alone, as in Qwen2.",
        lambda right: {"o_bias": False}),
    "mlp-bias-not-seen": (
        "mlp_bias", "llama", "Biases of the MLP are not seen: mlp_bias is not looked at.", lambda right: {"mlp_bias": False}),
    "head-norms-not-seen": (
        "qk_norm", "qwen3", "The norms of query and key heads are left out.", lambda right: {"qk_norm": False}),
}
for _name, (_field, _layout, _what, _change) in REFUSED.items():
    _declare(_name, _field, _what, _change, (LOAD,), layout=_layout)


# What fits all the same.


def _eos_of_config(right: ModelConfig) -> tuple[int, ...]:
    ids = right.hf_config.eos_token_id
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


def _rope(right: ModelConfig, parameters: dict[str, Any]) -> Change:
    config = right.hf_config
    return {"hf_config": type(config)(**{**config.to_dict(), "rope_parameters": parameters})}


_declare("heads-of-half-the-size", "head_dim",
         "Twice as many heads, queries' and keys', of half the size each are read: every tensor fits.",
         lambda right: {"head_dim": right.head_dim // 2, "num_q_heads": 2 * right.num_q_heads,
                        "num_kv_heads": 2 * right.num_kv_heads}, ("logits",), module=BEFORE_O_PROJ)
_declare("tie-though-there-is-a-head", "tie_word_embeddings",
         "Embeddings are tied, as is a family's default, though the config unties them and the checkpoint holds a head.",
         lambda right: {"tie_word_embeddings": True}, ("weights", "logits"), module="lm_head")
_declare("rope-theta-defaulted", "hf_config", "The base of the rotary frequencies is 10,000: rope_theta is not looked at.",
         lambda right: _rope(right, right.hf_config.rope_parameters | {"rope_theta": 10_000.0}), ("logits",),
         layout="llama-yarn", module=BEFORE_O_PROJ)
_declare("rope-scaling-not-seen", "hf_config", "RoPE is never stretched: rope_type is not looked at.",
         lambda right: _rope(right, {"rope_type": "default", "rope_theta": right.hf_config.rope_parameters["rope_theta"]}),
         ("logits",), layout="llama-yarn", module=BEFORE_O_PROJ)
_declare("yarn-without-its-attention-factor", "hf_config",
         "YaRN's frequencies are taken over, and the factor of its cosines and sines is not.",
         lambda right: _rope(right, right.hf_config.rope_parameters | {"attention_factor": 1.0}), ("logits",),
         layout="llama-yarn", module=BEFORE_O_PROJ)
_declare("half-the-positions", "max_position_embeddings", "A sequence ends at half of the positions that the model has.",
         lambda right: {"max_position_embeddings": right.max_position_embeddings // 2}, ("generation",))
_declare("twice-the-positions", "max_position_embeddings", "A sequence goes on to twice the positions that the model has.",
         lambda right: {"max_position_embeddings": right.max_position_embeddings * 2}, ("generation",))
_declare("dtype-always-float32", "dtype", "The checkpoint's dtype is not looked at: it is taken for float32.",
         lambda right: {"dtype": torch.float32}, ("generation",))
_declare("eos-of-the-config-alone", "eos_token_ids",
         "The end of sequence is that of config.json, though generation_config.json lists others.",
         lambda right: {"eos_token_ids": _eos_of_config(right)}, ("generation",), rows=(106,))
_declare("eos-of-the-config-too", "eos_token_ids",
         "The end of sequence of config.json counts beside those that generation_config.json lists instead.",
         lambda right: {"eos_token_ids": right.eos_token_ids + _eos_of_config(right)}, ("generation",))
_declare("first-eos-alone", "eos_token_ids", "Of several end-of-sequence tokens only the first ends a completion.",
         lambda right: {"eos_token_ids": right.eos_token_ids[:1]}, ("generation",))
_declare("eos-never-read", "eos_token_ids", "A list of end-of-sequence tokens is not understood: the model has none.",
         lambda right: {"eos_token_ids": ()}, ("generation",))


@fault(checks=("generation",), where="driver", field="ModelConfig.vocab_size")
@around(Admission, "__init__")
def last_token_refused(original: Any, self: Admission, model_config: ModelConfig, *arguments: Any, **options: Any) -> None:
    """Admission takes the vocabulary to end before its last token: a prompt or a stop token with that one is refused."""
    original(self, replace(model_config, vocab_size=model_config.vocab_size - 1), *arguments, **options)
