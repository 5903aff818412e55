import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers.utils import logging as transformers_logging

from reference.checkpoints import CheckpointError, random_checkpoint
from reference.hf import DTYPES, Reference
from tests.reference.tiny import DEVICES, FAMILIES, tiny_config

PROMPT = [5, 17, 100, 3, 64, 5]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        family: random_checkpoint(tmp_path_factory.mktemp(family), tiny_config(family)) for family in FAMILIES
    }


@pytest.fixture(scope="module")
def llama(folders):
    return Reference.load(folders["llama"], "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "exact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_dtype_computes_in_it_and_keeps_the_rotary_frequencies_in_float32(folders, family, dtype):
    reference = Reference.load(folders[family], dtype)
    assert {p.dtype for p in reference.model.parameters()} == {DTYPES[dtype]}
    assert reference.logits([PROMPT])[0].dtype == DTYPES[dtype]
    assert reference.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not reference.model.training


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_wherever_the_model_computes_results_are_on_the_cpu_and_repeat_bit_for_bit(folders, family, device):
    reference = Reference.load(folders[family], "bfloat16", device)
    assert reference.device.type == device
    first, again = (reference.logits([PROMPT])[0] for _ in range(2))
    assert first.device.type == "cpu"
    assert torch.equal(first, again)
    taken = reference.activations(PROMPT)
    assert {x.device.type for x in [*taken.inputs.values(), *taken.outputs.values()]} == {"cpu"}
    assert reference.greedy([PROMPT], 5) == reference.greedy([PROMPT], 5)


def test_a_sequence_has_the_same_bits_whatever_runs_beside_it(llama):
    alone = llama.logits([PROMPT])[0]
    beside = llama.logits([[9] * 30, PROMPT, [1]])
    assert [tuple(x.shape) for x in beside] == [(30, 101), (6, 101), (1, 101)]
    assert torch.equal(alone, beside[1])


def test_a_token_sees_those_before_it_and_none_after(llama):
    whole = llama.logits([PROMPT])[0]
    torch.testing.assert_close(llama.logits([PROMPT[:4]])[0], whole[:4])
    other_end, other_start = (llama.logits([ids])[0] for ids in ([*PROMPT[:-1], 99], [99, *PROMPT[1:]]))
    torch.testing.assert_close(other_end[:5], whole[:5])
    assert (other_start[-1] - whole[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_hold_what_went_into_and_came_out_of_each_module(folders, family):
    reference = Reference.load(folders[family], "float32")
    taken = reference.activations(PROMPT)
    assert list(taken.inputs) == list(taken.outputs)
    modules = dict(reference.model.named_modules())
    linear = [name for name in taken.outputs if isinstance(modules[name], torch.nn.Linear)]
    assert len(linear) == 2 * (4 if family == "phi3" else 7) + 1
    for name in linear:
        layer = modules[name]
        recomputed = F.linear(taken.inputs[name], layer.weight, layer.bias)
        torch.testing.assert_close(taken.outputs[name], recomputed, msg=name)
    assert taken.inputs["model.embed_tokens"].tolist() == PROMPT
    assert torch.equal(taken.outputs["lm_head"], reference.logits([PROMPT])[0])
    layer = "model.layers.1"
    # What a layer adds to the residual stream is kept, although the model may write over it afterwards.
    residual = taken.inputs[layer] + taken.outputs[f"{layer}.self_attn"]
    torch.testing.assert_close(taken.inputs[f"{layer}.post_attention_layernorm"], residual)
    torch.testing.assert_close(taken.outputs[layer], residual + taken.outputs[f"{layer}.mlp"])
    if family == "qwen3":
        assert taken.outputs[f"{layer}.self_attn.q_norm"].shape == (6, 6, 10)
        assert taken.outputs[f"{layer}.self_attn.k_norm"].shape == (6, 2, 10)


def test_activations_are_kept_when_the_model_writes_over_them(folders):
    reference = Reference.load(folders["llama"], "float32")
    before = reference.activations(PROMPT)
    for layer in reference.model.model.layers:
        layer.mlp.act_fn = torch.nn.SiLU(inplace=True)
    name = "model.layers.0.mlp.gate_proj"
    assert torch.equal(reference.activations(PROMPT).outputs[name], before.outputs[name])


def test_activations_come_in_the_order_in_which_modules_finished(llama):
    order = list(llama.activations(PROMPT).outputs)
    layer = [name.removeprefix("model.layers.0.") for name in order if name.startswith("model.layers.0.")]
    assert layer[0] == "input_layernorm"
    assert layer.index("self_attn.q_proj") < layer.index("self_attn.o_proj") < layer.index("self_attn")
    assert layer.index("mlp.down_proj") < layer.index("mlp")
    assert order[0] == "model.embed_tokens"
    assert order[-3:] == ["model", "lm_head", ""]


def test_chosen_modules_alone_are_tapped_and_every_hook_is_taken_off(llama):
    name = "model.layers.0.mlp.up_proj"
    assert list(llama.activations(PROMPT, [name]).outputs) == [name]
    with pytest.raises(ValueError, match=r"modules=\['model.layers.9'\] are not in the model"):
        llama.activations(PROMPT, ["model.layers.9"])
    with pytest.raises(ValueError, match="token_ids is empty"):
        llama.activations([], [name])
    assert not any(module._forward_hooks for module in llama.model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_and_margins_are_those_of_the_model_without_a_cache(folders, family):
    reference = Reference.load(folders[family], "float32")
    results = reference.greedy([PROMPT, [1, 2]], 12)
    for prompt, result in zip([PROMPT, [1, 2]], results, strict=True):
        assert len(result.token_ids) == 12
        whole = reference.margins([*prompt, *result.token_ids])
        start = len(prompt) - 1
        assert result.token_ids == whole.token_ids[start : start + 12]
        assert result.runners_up == whole.runners_up[start : start + 12]
        assert result.margins == pytest.approx(whole.margins[start : start + 12], abs=1e-4)


def test_margins_are_the_two_largest_logits_apart(llama):
    top = llama.margins(PROMPT)
    values, ids = llama.logits([PROMPT])[0].double().topk(2, dim=-1)
    assert [top.token_ids, top.runners_up] == ids.T.tolist()
    assert top.margins == pytest.approx((values[:, 0] - values[:, 1]).tolist())
    assert min(top.margins) > 0


def test_among_equal_logits_the_lowest_id_is_best_and_the_margin_is_zero(folders):
    reference = Reference.load(folders["llama"], "float32")
    best = reference.margins(PROMPT).token_ids[-1]
    tied = best + 1 if best == 0 else best - 1
    with torch.no_grad():
        reference.model.lm_head.weight[tied] = reference.model.lm_head.weight[best]
    top = reference.margins(PROMPT)
    assert (top.token_ids[-1], top.runners_up[-1]) == (min(best, tied), max(best, tied))
    assert top.margins[-1] == 0.0


def test_greedy_draws_no_warning_from_transformers(llama):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        llama.greedy([PROMPT], 2)
    assert [str(warning.message) for warning in seen] == []


class Step(dict):
    __getattr__ = dict.get


def older_forward(input_ids, past_key_values=None, **rest):
    seen = [*(past_key_values or []), *input_ids[0].tolist()]
    return Step(logits=counts(seen, input_ids), past_key_values=seen)


def newer_forward(input_ids, cache=None, **rest):
    seen = [*(cache or []), *input_ids[0].tolist()]
    return Step(logits=counts(seen, input_ids), cache=seen)


def counts(seen, input_ids):
    """After each token the next one is how many there have been."""
    return F.one_hot(torch.arange(len(seen) + 1)[-input_ids.shape[1] :][None], 101)


@pytest.mark.parametrize("forward", [older_forward, newer_forward])
def test_greedy_hands_the_cache_on_under_the_name_that_the_models_forward_gives_it(forward):
    model = torch.nn.Module()
    config = SimpleNamespace(vocab_size=101)
    config.get_text_config = lambda decoder: config
    model.config, model.device, model.forward = config, "cpu", forward
    # The next token is the number of those in the cache.
    assert Reference(model, dtype="float32").greedy([[7, 8]], 4)[0].token_ids == [2, 3, 4, 5]


def test_loading_and_running_leave_torch_and_transformers_as_they_were(folders):
    def state():
        return (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_rng_state().tolist(),
            transformers_logging.is_progress_bar_enabled(),
        )

    transformers_logging.enable_progress_bar()
    before = state()
    for dtype in ("bfloat16", "exact"):
        reference = Reference.load(folders["llama"], dtype)
        reference.greedy([PROMPT], 3)
        reference.activations(PROMPT)
    with pytest.raises(CheckpointError, match="bad"):
        Reference.load(_broken(folders["llama"]), "float32")
    assert state() == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "compute",
    [
        lambda reference: reference.logits([PROMPT]),
        lambda reference: reference.copies_of_logits(PROMPT, 2),
        lambda reference: reference.margins(PROMPT),
        lambda reference: reference.greedy([PROMPT], 3),
        lambda reference: reference.activations(PROMPT),
    ],
    ids=["logits", "copies", "margins", "greedy", "activations"],
)
def test_logits_that_are_not_finite_are_refused_by_the_weight_to_blame(folders, value, compute):
    reference = Reference.load(folders["llama"], "exact")
    with torch.no_grad():
        reference.model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises((CheckpointError, IndexError)) as refusal:
        compute(reference)
    assert f"model.layers.1.mlp.up_proj.weight[3, 5] is {value}" in str(refusal.value)


def test_logits_that_leave_the_dtypes_range_are_said_to(folders):
    reference = Reference.load(folders["llama"], "float16")
    with torch.no_grad():
        reference.model.lm_head.weight.fill_(60000)
    with pytest.raises(CheckpointError, match="dtype=float16 are not finite, though all weights are"):
        reference.logits([PROMPT])


def _broken(folder):
    broken = folder.parent / "bad"
    broken.mkdir(exist_ok=True)
    (broken / "config.json").write_text((folder / "config.json").read_text())
    return broken


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.logits([[]]), "token_ids is empty"),
        (lambda r: r.margins([0, 101]), "token_ids holds 101; an id is from 0 to 100"),
        (lambda r: r.greedy([[-1]], 2), "token_ids holds -1"),
        (lambda r: r.greedy([[1]], 0), "max_new_tokens=0 is below 1"),
        (lambda r: Reference.load("x", "float8"), "dtype='float8' is not one of"),
    ],
)
def test_wrong_arguments_are_named(llama, call, message):
    with pytest.raises(ValueError, match=message):
        call(llama)


def test_a_folder_without_config_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        Reference.load(tmp_path)
