"""What people hand to the engine by mistake: refused as what it is, and the engine works afterwards.

One table: (what is called, what it is told). Each is a ValueError, or a TypeError where a name is wrong, before anything runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import LLM, EngineConfig, SamplingParams
from tests.engine.served import SAMPLED, blocks_in_use, open_llm, plain

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
JUNK: list[Any] = [None, True, "a", b"a", 1.5, math.nan, math.inf, -1, 10**30, [], ["a"], {"a": 1}, {1}, 1j, object(),
                   torch.float32, np.array([1, 2])]


@pytest.fixture(scope="module")
def llm(talking: Path) -> Iterator[LLM]:
    with open_llm(talking, 1) as llm:
        yield llm


@pytest.fixture(autouse=True)
def still_works(llm: LLM) -> Iterator[None]:
    yield
    (good,) = llm.generate([[8, 9, 10]], GREEDY)
    assert len(good.outputs[0].token_ids) == 4
    assert blocks_in_use(llm) == [0]


PROMPTS: list[tuple[Any, str]] = [
    (None, "prompt=None must be text, token ids"),
    (b"abc", "prompt=b'abc' must be text"),
    (bytearray(b"abc"), r"prompt=bytearray\(b'abc'\) must be text"),
    (memoryview(b"abc"), "prompt=<memory at .* must be text"),
    (5, "prompt=5 must be text"),
    (1.5, "prompt=1.5 must be text"),
    ({1, 2}, "prompt={1, 2} must be text"),
    (frozenset([1]), r"prompt=frozenset\(\{1\}\) must be text"),
    (object(), "prompt=<object objec.* must be text"),
    ([], "an empty prompt"),
    ((), "an empty prompt"),
    ([True, 1], "token_id=True must be an integer"),
    ([1, False], "token_id=False must be an integer"),
    ([1.0], r"token_id=1\.0 must be an integer"),
    ([math.nan], "token_id=nan must be an integer"),
    (["a", "b"], "token_id='a' must be an integer"),
    ([None], "token_id=None must be an integer"),
    ([[1]], r"token_id=\[1\] must be an integer"),
    ([1, 99], "token_id=99 is outside the vocabulary of vocab_size=14"),
    ([-1], "token_id=-1 is outside"),
    ([10**30], "token_id=10{30} is outside"),
    ([np.bool_(True)], "token_id=.*True.* must be an integer"),
    ([np.float32(1)], "token_id=.*1.0.* must be an integer"),
    ([1] * 500, r"len\(token_ids\)=500 leaves no room"),
    ("a\ud800b", r"lone surrogate '\\ud800' at character 1"),
    ({"prompt": "\udfff"}, r"lone surrogate '\\udfff' at character 0"),
    ({}, r"the keys \[\] and must have"),
    ({"text": "a"}, r"the keys \['text'\] and must have"),
    ({"prompt": "a", "multi_modal_data": {}}, "the keys .*multi_modal_data"),
    ({"prompt": None}, "prompt=None must be text"),
    ({"prompt": 5}, "prompt=5 in a mapping must be text"),
    ({"prompt": [1, 2]}, r"prompt=\[1, 2\] in a mapping must be text: token ids are prompt_token_ids"),
    ({"prompt": b"a", "prompt_token_ids": [1]}, "prompt=b'a' in a mapping must be text"),
    ({"prompt_token_ids": "ab"}, "prompt_token_ids='ab' must be token ids"),
    ({"prompt_token_ids": b"ab"}, "prompt=b'ab' must be text"),
    ({"prompt_token_ids": {"a": 1}}, "prompt_token_ids={'a': 1} must be token ids"),
    ({"prompt_token_ids": [True]}, "token_id=True must be an integer"),
    ({"prompt_token_ids": torch.tensor([[1]])}, r"shape=\(1, 1\)"),
    (torch.tensor(1), r"prompt is a Tensor of shape=\(\) and dtype=torch.int64: it must have one dimension"),
    (torch.tensor([[1, 2], [3, 4]]), r"prompt is a Tensor of shape=\(2, 2\) and dtype=torch.int64: it must have one dimension"),
    (torch.tensor([1.0, 2.0]), r"prompt is a Tensor of shape=\(2,\) and dtype=torch.float32: token ids must be integers"),
    (torch.tensor([True]), r"dtype=torch.bool: token ids must be integers"),
    (torch.tensor([1j]), r"dtype=torch.complex64: token ids must be integers"),
    (torch.tensor([99]), "token_id=99 is outside"),
    (torch.tensor([], dtype=torch.int64), "an empty prompt"),
    (torch.empty(2, dtype=torch.int64, device="meta"), "dtype=torch.int64, and can't be read"),
    (np.array(1), r"prompt is a ndarray of shape=\(\) and dtype=int64: it must have one dimension"),
    (np.array([[1]]), r"prompt is a ndarray of shape=\(1, 1\)"),
    (np.array([1.5]), "dtype=float64: token ids must be integers"),
    (np.array(["a"]), "dtype=<U1: token ids must be integers"),
    (np.array([None]), "dtype=object: token ids must be integers"),
    (np.array([True]), "dtype=bool: token ids must be integers"),
]


@pytest.mark.parametrize(("prompt", "said"), PROMPTS, ids=[f"{number}" for number in range(len(PROMPTS))])
def test_a_prompt_that_is_none_is_refused_alone_and_by_its_place(llm: LLM, prompt: Any, said: str) -> None:
    good, bad, other = llm.generate([[8, 9], prompt, [9]], GREEDY)
    assert plain([good, other]) == plain(llm.generate([[8, 9], [9]], GREEDY))
    assert bad.outputs == []
    with pytest.raises(ValueError, match=f"^prompt 1: .*{said}"):
        raise ValueError(bad.error)


@pytest.mark.parametrize("prompt", [
    [8, 9, 10], (8, 9, 10), range(8, 11), iter([8, 9, 10]), np.array([8, 9, 10]), np.array([8, 9, 10], dtype=np.uint8),
    torch.tensor([8, 9, 10]), torch.tensor([8, 9, 10], dtype=torch.int32), [np.int64(8), 9, 10], {"prompt_token_ids": [8, 9, 10]},
    {"prompt": "x", "prompt_token_ids": torch.tensor([8, 9, 10])}, [torch.tensor([8, 9, 10])], [np.array([8, 9, 10])],
], ids=["list", "tuple", "range", "iterator", "numpy", "numpy bytes", "torch", "torch int32", "numpy numbers", "mapping",
        "mapping with text", "list of torch", "list of numpy"])
def test_ids_may_come_in_any_list_or_array(llm: LLM, prompt: Any) -> None:
    (output,) = llm.generate(prompt, GREEDY)
    assert output.prompt_token_ids == [8, 9, 10]
    assert set(map(type, output.prompt_token_ids)) == {int}
    assert plain([output]) == plain(llm.generate([8, 9, 10], GREEDY))


@pytest.mark.parametrize("prompts", [None, 5, 1.5, object(), {1}, b"abc", torch.tensor([[1]]), np.array([1.5])],
                         ids=["none", "int", "float", "object", "set", "bytes", "torch", "numpy"])
def test_prompts_that_are_none_are_refused(llm: LLM, prompts: Any) -> None:
    for call in (llm.generate, llm.stream):
        with pytest.raises(ValueError, match=r"^(prompt 0: )?prompts?( is a|=)"):
            call(prompts, GREEDY)


@pytest.mark.parametrize("params", [5, "abc", {"n": 1}, [None], [GREEDY, 5], {GREEDY}, object(), SamplingParams],
                         ids=["int", "text", "mapping", "too few", "mixed", "set", "object", "class"])
def test_parameters_that_are_none_are_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(ValueError, match="sampling_params"):
        llm.generate([[1], [2]], params)


# What each field takes of JUNK and of numbers; everything else is refused, and what is taken runs.
TAKEN: dict[str, list[Any]] = {
    "temperature": [1.5], "top_k": [-1, 10**30], "top_p": [], "seed": [None], "n": [], "max_tokens": [None, 10**30],
    "min_tokens": [], "stop": [None, "a", [], ["a"]], "stop_token_ids": [None, []], "logprobs": [None],
    "prompt_logprobs": [None, -1], "detokenize": [True], "truncate_prompt_tokens": [None, -1, 10**30],
    "include_stop_str_in_output": [True], "ignore_eos": [True], "skip_special_tokens": [True],
    "min_p": [], "presence_penalty": [1.5, -1], "frequency_penalty": [1.5, -1], "repetition_penalty": [1.5, 10**30],
    "logit_bias": [None], "allowed_token_ids": [None], "bad_words": [None, [], ["a"]],
}


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingParams)])
def test_every_parameter_takes_what_its_rule_says_and_nothing_else(llm: LLM, name: str) -> None:
    for value in JUNK:
        if any(value is taken or (type(value) is type(taken) and value == taken) for taken in TAKEN[name]):
            (output,) = llm.generate([[8, 9]], SamplingParams(**{"max_tokens": 2} | {name: value}))
            assert output.error is None
            assert output.outputs[0].finish_reason in ("length", "stop")
        else:
            with pytest.raises(ValueError, match=f"^{name}="):
                SamplingParams(**{"max_tokens": 2} | {name: value})


@pytest.mark.parametrize("params", [
    {"temperature": np.float32(0.5), "top_p": np.float64(0.5), "top_k": np.int64(3), "seed": np.int64(3), "n": np.int8(2)},
    {"temperature": Fraction(1, 2), "top_p": Fraction(1, 2), "max_tokens": np.uint8(3), "stop_token_ids": [np.int64(1)]},
], ids=["numpy", "fractions"])
def test_numbers_of_other_libraries_are_numbers(llm: LLM, params: dict[str, Any]) -> None:
    checked = SamplingParams(**params)
    for field in fields(SamplingParams):
        value = getattr(checked, field.name)
        assert type(value) in (int, float, bool, tuple, dict, type(None)), f"{field.name} is a {type(value)}"
    assert llm.generate([[8, 9]], checked)[0].error is None


OPTIONS: dict[str, list[Any]] = {
    "tensor_parallel_size": [10**30], "fabric": ["a"], "device": [], "dtype": [], "attention_backend": ["a"],
    "max_model_len": [None, 10**30], "max_num_seqs": [10**30], "max_num_batched_tokens": [None, 10**30],
    "block_size": [None, 10**30], "num_kv_blocks": [None, 10**30],
    "kv_cache_gib": [1.5, 10**30], "gpu_memory_utilization": [], "enable_prefix_caching": [True],
    "enable_chunked_prefill": [True], "enforce_eager": [True], "seed": [-1, 10**30], "tp_invariant": [True],
}


@pytest.mark.parametrize("name", [field.name for field in fields(EngineConfig)])
def test_every_option_takes_what_its_rule_says_and_nothing_else(name: str) -> None:
    for value in JUNK:
        if any(value is taken or (type(value) is type(taken) and value == taken) for taken in OPTIONS[name]):
            assert getattr(EngineConfig(**{name: value}), name) == value
        else:
            with pytest.raises(ValueError, match=f"^{name}="):
                EngineConfig(**{name: value})


@pytest.mark.parametrize(("options", "kind", "said"), [
    ({"tensor_paralel_size": 2}, TypeError, "LLM has no option tensor_paralel_size: did you mean tensor_parallel_size?"),
    ({"max_len": 2, "sed": 1}, TypeError, "LLM has no option max_len, sed: did you mean max_model_len, seed?"),
    ({"swap_space": 4}, TypeError, "LLM has no option swap_space: there are tensor_parallel_size, fabric, "),
    ({"attention_backend": "xformers"}, ValueError, "attention_backend='xformers' is unknown; supported: auto, triton"),
    ({"fabric": "mpi"}, ValueError, "fabric='mpi' is not one of auto, solo"),
    ({"tensor_parallel_size": 10**30}, ValueError, "num_q_heads=6 can't be split over"),
    ({"max_model_len": 10**30}, ValueError, "max_model_len=10{30} is above max_position_embeddings"),
    ({"dtype": torch.bfloat16}, ValueError, r"dtype=torch.bfloat16 must be a name, such as 'auto'"),
    ({"seed": "a"}, ValueError, "seed='a' must be a whole number"),
], ids=["near", "two", "not near", "attention", "fabric", "ranks", "length", "dtype", "seed"])
def test_options_that_do_not_fit_are_refused_before_ranks_start(
    talking: Path, options: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        LLM(talking, **{"device": "cpu"} | options)


def test_a_surrogate_among_good_prompts_costs_nobody_else_anything(llm: LLM) -> None:
    outputs = llm.generate(["ab", "\ud800", "ba"], SAMPLED)
    assert [output.error is None for output in outputs] == [True, False, True]
    items = list(llm.stream(["ab", "\ud800", "ba"], SAMPLED))
    assert sum(item.error is not None for item in items) == 1
