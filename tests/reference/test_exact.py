import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from reference.checkpoints import random_checkpoint
from reference.exact import compute_in_float64
from reference.hf import Reference
from tests.reference.tiny import DEVICES, FAMILIES, tiny_config

PROMPT = [5, 17, 100, 3, 64, 5, 88]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        family: random_checkpoint(tmp_path_factory.mktemp(family), tiny_config(family)) for family in FAMILIES
    }


class BelowFloat64(TorchDispatchMode):
    """Names of the operations that give a float narrower than float64, the rotary tables' apart."""

    def __init__(self, reference):
        super().__init__()
        self.found = []
        self.total = 0
        self.in_rotary = False
        rotary = reference.model.model.rotary_emb
        self.hooks = [
            rotary.register_forward_pre_hook(lambda *_: setattr(self, "in_rotary", True)),
            rotary.register_forward_hook(lambda *_: setattr(self, "in_rotary", False)),
        ]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.total += 1
                if value.dtype != torch.float64 and not self.in_rotary:
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


def test_the_count_does_see_the_float32_of_eager_attentions_softmax(folders):
    exact = Reference.load(folders["llama"], "exact")
    exact.model.set_attn_implementation("eager")
    assert "aten._softmax.default" in below_float64(exact)


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


def test_only_the_one_model_is_patched(folders):
    Reference.load(folders["llama"], "exact")
    other = Reference.load(folders["llama"], "float64")
    assert "forward" not in vars(other.model.model.norm)
    assert below_float64(other)


class ScaledFromOneRMSNorm(nn.Module):
    """Gemma's: the weight is an offset from 1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 0.1, dtype=torch.float64))
        self.variance_epsilon = 1e-6

    def forward(self, x):
        return (1 + self.weight) * x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize(
    ("norm", "message"), [(ScaledFromOneRMSNorm(), "is no plain RMSNorm"), (nn.LayerNorm(8), "is not known")]
)
def test_a_norm_of_another_formula_is_refused(norm, message):
    with pytest.raises(NotImplementedError, match=message):
        compute_in_float64(nn.ModuleDict({"norm": norm}))
