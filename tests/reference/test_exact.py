import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from reference.checkpoints import random_checkpoint
from reference.exact import compute_in_float64, makes_position_tables
from reference.hf import Reference
from reference.shrink import causal_lm_types, shrink
from tests.reference.test_shrink import NOT_TO_BE_HAD
from tests.reference.tiny import DEVICES, FAMILIES, tiny_config

PROMPT = [5, 17, 100, 3, 64, 5, 88]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        family: random_checkpoint(tmp_path_factory.mktemp(family), tiny_config(family)) for family in FAMILIES
    }


class BelowFloat64(TorchDispatchMode):
    """Names of the operations that give a float narrower than float64, those of the modules that make RoPE's tables apart."""

    def __init__(self, reference):
        super().__init__()
        self.found = []
        self.total = 0
        self.in_tables = 0
        self.hooks = []
        for module in filter(makes_position_tables, reference.model.modules()):
            self.hooks.append(module.register_forward_pre_hook(lambda *_: self.enter(1)))
            self.hooks.append(module.register_forward_hook(lambda *_: self.enter(-1)))

    def enter(self, step):
        self.in_tables += step

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
                self.total += 1
                if value.dtype not in (torch.float64, torch.complex128) and not self.in_tables:
                    self.found.append(str(function))
        return result

    def __exit__(self, *exception):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*exception)


def below_float64(reference):
    with BelowFloat64(reference) as operations:
        reference.logits([PROMPT])
        reference.greedy([PROMPT], 2)
    assert operations.total > 100
    return operations.found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_exact_reference_computes_nothing_in_float32(folders, family, device):
    assert below_float64(Reference.load(folders[family], "exact", device)) == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_count_does_see_the_float32_in_transformers_float64(folders, family, device):
    assert len(below_float64(Reference.load(folders[family], "float64", device))) >= 5


_CONSTANTS = {"aten.lift_fresh.default": "0 and 1 of a normal distribution, made tensors of"}
_NOTHING = {"aten.lift_fresh.default": "an empty tensor"}
STAY = {
    "gemma3n": _CONSTANTS, "gemma3n_text": _CONSTANTS, "qwen4_exp": _NOTHING, "qwen4_exp_text": _NOTHING,
    "ministral3": {"aten.div.Tensor": "positions over a length: a quotient of integers, which is made again"},
}
"""By architecture: operations that give float32 all the same, and why no digit is lost by it."""
EVERY_MECHANISM = ("gpt_oss", "deepseek_v3", "qwen3_next", "mamba2", "bloom", "gemma3n_text")
"""Sinks and experts; latent attention; linear attention; a state-space model; ALiBi; thresholds of a normal distribution."""


LOADED_ALONE = {"emu3": "AutoModelForCausalLM makes its text part, and loads it no more", "mllama": "the same"}
"""Can't be loaded as they were saved."""


def assert_computed_in_float64(model_type, folder):
    reference = Reference.load(shrink(model_type, folder), "exact")
    assert set(below_float64(reference)) == set(STAY.get(model_type, ()))


@pytest.mark.parametrize("model_type", EVERY_MECHANISM)
def test_mechanisms_of_all_kinds_are_computed_in_float64(tmp_path, model_type):
    assert_computed_in_float64(model_type, tmp_path / model_type)


@pytest.mark.endurance
@pytest.mark.parametrize("model_type", [name for name in causal_lm_types() if name not in NOT_TO_BE_HAD | LOADED_ALONE])
def test_every_architecture_is_computed_in_float64(tmp_path, model_type):
    assert_computed_in_float64(model_type, tmp_path / model_type)


def decoder_in_numpy(reference, token_ids):
    """[T, V] float64: the model written out anew; only RoPE's cos and sin are taken from transformers."""
    config = reference.config
    weights = {name: value.numpy() for name, value in reference.model.state_dict().items()}
    num_tokens = len(token_ids)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    positions = torch.arange(num_tokens)[None]
    cos, sin = (
        table[0].numpy()[:, None, :]
        for table in reference.model.model.rotary_emb(torch.zeros(1, dtype=torch.float64), positions)
    )

    def split(name, sizes, names):
        """Projections that a checkpoint holds fused, one by one."""
        if (fused := weights.pop(f"{name}.weight", None)) is not None:
            parts = np.split(fused, np.cumsum(sizes)[:-1])
            parent = name.rpartition(".")[0]
            weights.update({f"{parent}.{one}.weight": part for one, part in zip(names, parts, strict=True)})

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def norm(x, name):
        if f"{name}.weight" not in weights:
            return x
        return weights[f"{name}.weight"] * x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps)

    def rope(x):
        turned, rest = np.split(x, [cos.shape[-1]], axis=-1)
        first, second = np.split(turned, 2, axis=-1)
        return np.concatenate([turned * cos + np.concatenate([-second, first], -1) * sin, rest], -1)

    def heads(x):
        return x.reshape(num_tokens, -1, head_dim)

    x = weights["model.embed_tokens.weight"][token_ids]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        heads_of = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        split(f"{layer}.self_attn.qkv_proj", [head_dim * number for number in heads_of], ("q_proj", "k_proj", "v_proj"))
        split(f"{layer}.mlp.gate_up_proj", [config.intermediate_size] * 2, ("gate_proj", "up_proj"))
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (heads(linear(h, f"{layer}.self_attn.{p}_proj")) for p in "qkv")
        q = rope(norm(q, f"{layer}.self_attn.q_norm"))
        k = rope(norm(k, f"{layer}.self_attn.k_norm"))
        attended = np.empty_like(q)
        for head in range(config.num_attention_heads):
            kv = head * config.num_key_value_heads // config.num_attention_heads
            for t in range(num_tokens):
                scores = k[: t + 1, kv] @ q[t, head] / np.sqrt(head_dim)
                share = np.exp(scores - scores.max())
                attended[t, head] = share @ v[: t + 1, kv] / share.sum()
        x = x + linear(attended.reshape(num_tokens, -1), f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate = linear(h, f"{layer}.mlp.gate_proj")
        silu = gate / (1 + np.exp(-gate))
        x = x + linear(silu * linear(h, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    return linear(norm(x, "model.norm"), "lm_head")


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_logits_are_those_of_the_decoder_written_out_in_float64(folders, family):
    exact = Reference.load(folders[family], "exact")
    written_out = decoder_in_numpy(exact, PROMPT)
    assert np.abs(exact.logits([PROMPT])[0].numpy() - written_out).max() < 1e-13
    # The control: with its float32 norms, transformers' float64 model is a million times further away.
    plain = Reference.load(folders[family], "float64")
    assert np.abs(plain.logits([PROMPT])[0].numpy() - written_out).max() > 1e-8


def test_only_the_one_model_computes_in_float64(folders):
    Reference.load(folders["llama"], "exact")
    assert below_float64(Reference.load(folders["llama"], "float64"))


def in_float64(compute):
    """What ``compute`` returns as the forward of a model that computes in float64."""
    model = nn.Module()
    model.forward = compute
    compute_in_float64(model)
    return model(torch.tensor([1 + 1e-12, 2.0], dtype=torch.float64))


UPCASTS = {
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.float32),
    "to half": lambda x: x.to(torch.bfloat16),
    "to, by keyword": lambda x: x.to(dtype=torch.float32, copy=True),
    "type": lambda x: x.type(torch.float32),
    "type_as": lambda x: x.type_as(torch.zeros(1)),
    "sum": lambda x: x.sum(dtype=torch.float32),
    "copy": lambda x: torch.empty(2, dtype=torch.float32).copy_(x),
}


@pytest.mark.parametrize("name", UPCASTS)
@pytest.mark.parametrize("inference", [False, True])
def test_no_conversion_loses_a_digit(name, inference):
    with torch.inference_mode(inference):
        found = in_float64(UPCASTS[name])
    expected = torch.tensor([1 + 1e-12, 2.0], dtype=torch.float64)
    assert torch.equal(found, expected.sum() if name == "sum" else expected)


NEW_TENSORS = {
    "zeros": lambda x: torch.zeros(2),
    "full": lambda x: torch.full((2,), 0.1),
    "full, its dtype given": lambda x: torch.full((2,), 0.1, dtype=torch.float32),
    "arange": lambda x: torch.arange(0.1, 1.0),
    "a quotient of integers": lambda x: torch.arange(1, 4) / 3,
    "an integer to a power": lambda x: 0.1 ** torch.arange(1, 4),
    "softmax": lambda x: torch.softmax(x, -1, dtype=torch.float32),
    "complex": lambda x: torch.view_as_complex(x.float()),
    "where": lambda x: torch.where(torch.tensor([True, False]), 0.0, -torch.inf),
}


@pytest.mark.parametrize("name", NEW_TENSORS)
def test_whatever_is_made_is_made_in_float64(name):
    found = in_float64(NEW_TENSORS[name])
    x = torch.tensor([1 + 1e-12, 2.0], dtype=torch.float64)
    expected = {
        "zeros": torch.zeros(2), "full": [0.1, 0.1], "full, its dtype given": [0.1, 0.1], "arange": [0.1],
        "a quotient of integers": [1 / 3, 2 / 3, 1.0], "an integer to a power": [0.1, 0.1**2, 0.1**3], "softmax": x.softmax(-1),
        "complex": torch.view_as_complex(x), "where": [0.0, -torch.inf],
    }[name]
    assert found.dtype == (torch.complex128 if name == "complex" else torch.float64)
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=1e-15, atol=0)


@pytest.mark.parametrize("make", [lambda x: torch.arange(3), lambda x: torch.full((2,), 3), lambda x: x > 0])
def test_integers_and_booleans_stay_what_they_are(make):
    assert in_float64(make).dtype == make(torch.ones(2)).dtype


def test_it_ends_with_the_forward_and_other_threads_are_left_alone():
    seen = []

    def forward(x):
        thread = threading.Thread(target=lambda: seen.append(torch.zeros(1).dtype))
        thread.start()
        thread.join()
        if x[1] == 2:
            raise RuntimeError
        return x

    with pytest.raises(RuntimeError):
        in_float64(forward)
    assert [*seen, torch.zeros(1).dtype] == [torch.float32] * 2


class Tables(nn.Module):
    """Makes cos in float32 out of frequencies, as rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.inv_freq = nn.Buffer(torch.tensor([0.1], dtype=torch.float32))

    def forward(self, x):
        return (x.float() * self.inv_freq).cos()


def test_rotary_tables_are_computed_in_float32_and_carried_as_float64():
    model = nn.Sequential(Tables())
    compute_in_float64(model)
    x = torch.arange(40, dtype=torch.float64)
    table = model(x)
    assert table.dtype == torch.float64
    assert torch.equal(table, (x.float() * torch.tensor(0.1)).cos().double())
    assert not torch.equal(table, (x * torch.tensor(0.1).double()).cos())


def test_what_a_model_holds_in_float32_becomes_float64_with_its_values():
    model = nn.Linear(2, 2, dtype=torch.float32)
    model.table = torch.tensor([0.1])
    before = model.weight.detach().double()
    compute_in_float64(model)
    assert torch.equal(model.weight, before)
    assert model.table.dtype == torch.float64
    assert model(torch.ones(1, 2, dtype=torch.float64)).dtype == torch.float64
