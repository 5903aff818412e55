"""Folders in which something is wrong: one line that names file and key, before any rank starts; never wrong numbers, or a crash.

A table of what is changed in a sound folder. What is not refused must run as transformers runs it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from engine import LLM, CheckpointError, ModelConfig, SamplingParams
from harness.verification.verify import VerifyPlan, verify
from reference.checkpoints import random_checkpoint
from reference.hf import Reference
from tests.reference.tiny import small_config

Edit = Callable[[Path], None]
MISSING = "(missing)"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GREEDY = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
PROMPT = [5, 6, 7]


def put(name: str, content: str | bytes | None) -> Edit:
    """Another content for a file; None: a folder in its place."""

    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return edit


def key(name: str, path: str, value: Any) -> Edit:
    """Another value in a JSON file, at a path such as ``rope_parameters.factor``."""

    def edit(folder: Path) -> None:
        values = inner = json.loads((folder / name).read_text())
        *parents, last = path.split(".")
        for parent in parents:
            inner = inner[parent]
        if value == MISSING:
            inner.pop(last)
        else:
            inner[last] = value
        (folder / name).write_text(json.dumps(values))

    return edit


def both(*edits: Edit) -> Edit:
    def edit(folder: Path) -> None:
        for each in edits:
            each(folder)

    return edit


def stored(change: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / WEIGHTS)

    return edit


def cut(keep: Callable[[bytes], bytes]) -> Edit:
    return lambda folder: (folder / WEIGHTS).write_bytes(keep((folder / WEIGHTS).read_bytes())) and None


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "max_position_embeddings")
NO_SIZE = (0, -1, "64", 8.0, None, math.nan, math.inf, [8], {}, True, 10**9, 10**400, MISSING)
NO_NUMBER = (-1.0, "x", None, math.nan, -math.inf, [], True)
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 96, "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 96, "rope_theta": 1e4}
NO_JSON = ("", "{", "[1]", "null", '"llama"', "5", b"\xff\xfe\x00", b"\xef\xbb\xbf{}", "[" * 100_000, "1" * 5000, None)

CONFIG = [(f"{name}={value!r:.20}", key("config.json", name, value)) for name in SIZES for value in NO_SIZE]
CONFIG += [(f"{name}={value!r}", key("config.json", name, value)) for name, values in {
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), NO_NUMBER),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), ("yes", 1, None, [], True, False)),
    "model_type": (MISSING, None, 5, [], {}, "", "bert", "Llama"),
    "sliding_window": (0, "8", 1.5, []),
    "partial_rotary_factor": (0, -0.5, 1.5, "half", []),
    "hidden_act": (None, 5, "gelu", [], MISSING),
    "eos_token_id": ("</s>", 1.5, ["a"], [None], {}, True, [True], -5, 10**30, []),
    "bos_token_id": ("<s>", 1.5, []),
    "pad_token_id": ("x", 1.5),
    "dtype": ("auto", 5, "float8", "torch.float32", "int8", None, MISSING, []),
    "torch_dtype": ("auto", 5),
    "quantization_config": ({}, [], "gptq", {"quant_method": "gptq"}, None),
    "layer_types": (5, "full_attention", ["sliding_attention"] * 2, ["full_attention"], [5]),
    "architectures": (5, ["Nope"], None),
    "auto_map": ({"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, 5),
    "id2label": (5, {"a": "b"}),
    "use_cache": ("x", None),
    "attention_dropout": ("x", math.nan),
    "transformers_weights": ("../model.safetensors", "/etc/passwd", "gone.safetensors", "x.bin", 5, "config.json", ""),
    "rope_parameters": (5, [], "yarn", {}, {"rope_type": 5}, {"rope_type": "nope"}, {"rope_type": "yarn"},
                        {"rope_type": "linear"}, {"rope_type": "llama3", "factor": 2.0}),
    "rope_scaling": (5, [], {"type": "yarn"}, {"type": "dynamic", "factor": 2.0}, {"type": None}),
}.items() for value in values]
CONFIG += [(f"yarn {name}={value!r}", both(key("config.json", "rope_parameters", YARN),
                                           key("config.json", f"rope_parameters.{name}", value)))
           for name, values in {"factor": (0, -2.0, "4", None, math.nan, [], 1e30, MISSING),
                                "rope_theta": (0, -1, "x", None, math.inf, 1, MISSING),
                                "original_max_position_embeddings": (0, -1, "x", 96.0, None, MISSING),
                                "beta_fast": (0, "x"), "attention_factor": (-1, "x", math.nan), "rope_type": (MISSING,)}.items()
           for value in values]
CONFIG += [(f"llama3 {name}={value!r}", both(key("config.json", "rope_parameters", LLAMA3),
                                             key("config.json", f"rope_parameters.{name}", value)))
           for name, values in {"low_freq_factor": (0, "x", 4.0, MISSING), "high_freq_factor": (1.0, None, MISSING)}.items()
           for value in values]
CONFIG += [(f"config.json: {content!r:.20}", put("config.json", content)) for content in NO_JSON]
CONFIG += [("config.json missing", lambda folder: (folder / "config.json").unlink())]
EOS = ('{"eos_token_id": "x"}', '{"eos_token_id": [1.5]}', '{"eos_token_id": {}}', '{"eos_token_id": null}')
GENERATION = [(f"generation_config.json: {content!r:.30}", put("generation_config.json", content))
              for content in (*NO_JSON, *EOS)]
NO_FILE = (5, None, [], {}, "", ".", "..", "../a.safetensors", "/a.safetensors", "x/../a.safetensors", "a.bin",
           "gone.safetensors", "a\0.safetensors", "a\n.safetensors", "\ud800.safetensors",
           "a" * 300 + ".safetensors", "parts", "a.safetensors/")
NO_INDEX = (*NO_JSON, "{}", '{"weight_map": null}', '{"weight_map": []}', '{"weight_map": {}, "metadata": {}}',
            '{"weight_map": "a.safetensors", "metadata": {}}', '{"weight_map": {"a": "a.safetensors"}}',
            '{"weight_map": {"a": "a.safetensors"}, "metadata": 5}', '{"weight_map": {"a": "a.safetensors"}, "metadata": {}}',
            *(json.dumps({"weight_map": {"a": name}, "metadata": {}}) for name in NO_FILE))
INDEXES = [(f"index: {content!r:.60}",
            both(put(INDEX, content), lambda folder: (folder / WEIGHTS).rename(folder / "a.safetensors") and None))
           for content in NO_INDEX]
FILES = [
    ("weights empty", cut(lambda whole: b"")), ("weights of 7 bytes", cut(lambda whole: whole[:7])),
    ("weights cut in the header", cut(lambda whole: whole[:100])),
    ("weights cut in half", cut(lambda whole: whole[:len(whole) // 2])),
    ("weights cut by a byte", cut(lambda whole: whole[:-1])), ("weights with a byte too many", cut(lambda whole: whole + b"\0")),
    ("weights of a header too long", cut(lambda whole: b"\xff" * 8 + whole[8:])),
    ("weights that are text", cut(lambda whole: b"version https://git-lfs.github.com/spec/v1\n" * 20)),
    ("weights whose header is no JSON", cut(lambda whole: whole[:8] + b"x" + whole[9:])),
    ("weights without a tensor", stored(lambda tensors: tensors.clear())),
    ("weights a folder", put(WEIGHTS, None)), ("weights missing", lambda folder: (folder / WEIGHTS).unlink()),
    ("only pickled weights", lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin") and None),
    *((f"weights of dtype {dtype}", stored(lambda tensors, dtype=dtype: tensors.update(  # type: ignore[misc]
        {"model.norm.weight": tensors["model.norm.weight"].to(dtype)})))
      for dtype in (torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float64)),
    *((f"weights with norm of shape {tuple(shape)}", stored(lambda tensors, shape=shape: tensors.update(  # type: ignore[misc]
        {"model.norm.weight": torch.ones(shape)}))) for shape in ([], [0], [1], [71], [72, 1])),
    ("weights without a layer", stored(lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1" in name])),
    ("weights of a layer more", stored(lambda tensors: tensors.update({name.replace("layers.1", "layers.2"): tensors[name]
                                                                       for name in list(tensors) if "layers.1" in name}))),
    ("weights under names of another model", stored(lambda tensors: [tensors.update({f"transformer.{name}": tensors.pop(name)})
                                                                     for name in list(tensors)])),
]
TOKENIZERS = [(f"{name}: {content!r:.60}", put(name, content)) for name, contents in {
    "tokenizer.json": (*NO_JSON, "{}", '{"version": "1.0"}', '{"model": {}}', '{"model": null, "added_tokens": []}',
                       '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}',
                       '{"version": "1.0", "added_tokens": [], "model": {"type": "Nope"}}'),
    "tokenizer_config.json": (*NO_JSON, "{}", '{"tokenizer_class": 5}', '{"tokenizer_class": "Nope"}', '{"eos_token": 5}',
                              '{"model_max_length": "x"}', '{"chat_template": 5}', '{"chat_template": "{% if %}"}',
                              '{"added_tokens_decoder": 5}', '{"added_tokens_decoder": {"x": {}}}', '{"extra_special_tokens": 5}',
                              '{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}'),
    "special_tokens_map.json": ("{", "[]", '{"eos_token": 5}'),
    "added_tokens.json": ("{", "[]", '{"a": "b"}'),
    "chat_template.jinja": ("{% if %}", "{{ raise_exception('no') }}"),
}.items() for content in contents]

TABLE: dict[str, Edit] = dict(CONFIG + GENERATION + INDEXES + FILES + TOKENIZERS)


class Started(Exception):  # noqa: N818 - raised where a rank would start
    pass


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = random_checkpoint(tmp_path_factory.mktemp("sound") / "model", small_config(rope_theta=1e4))
    tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(131)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


def attempt(what: Callable[[], Any]) -> str | None:
    """What a refusal says; None: there was none."""
    try:
        what()
    except CheckpointError as refusal:
        return str(refusal)
    except Started:
        pass
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error
    return None


def test_there_are_many() -> None:
    assert len(TABLE) >= 300


@pytest.mark.parametrize("change", TABLE)
def test_a_malformed_folder_is_refused_in_one_line_or_runs_as_transformers_runs_it(
    sound: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    TABLE[change](folder)

    def started(*_: Any, **__: Any) -> None:
        raise Started

    with monkeypatch.context() as patch:
        patch.setattr("engine.llm.Ranks", started)
        patch.setattr("harness.subjects.on_ranks.Ranks", started)
        refusals = [attempt(lambda: LLM(folder, device="cpu")),
                    attempt(lambda: verify(VerifyPlan(model="malformed", folder=folder, tp_sizes=(1,))))]
    if config_refusal := attempt(lambda: ModelConfig.from_folder(folder)):
        assert refusals[0] == config_refusal
    assert refusals[0] == refusals[1]
    if (said := refusals[0]) is not None:
        assert "\n" not in said
        assert str(folder) in said
        assert len(said) < 800
        return
    right = Reference.load(folder, "float32").greedy([PROMPT], 3)[0].token_ids
    with LLM(folder, device="cpu", dtype="float32", num_kv_blocks=8, max_num_seqs=2) as llm:
        (output,) = llm.generate([PROMPT], GREEDY, use_tqdm=False)
        if llm.tokenizer is not None:
            assert llm.tokenizer("w5 w6")["input_ids"] == PROMPT[:2]
    assert output.outputs[0].token_ids == right


@pytest.mark.parametrize("tokenizer", ["/nope", "", "model"])
def test_a_tokenizer_that_is_not_there_is_refused(sound: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sound.parent)
    (sound / "tokenizer.json").rename(sound.parent / "tokenizer.json")
    (sound / "tokenizer_config.json").rename(sound.parent / "tokenizer_config.json")
    try:
        with pytest.raises(CheckpointError, match=f"tokenizer='{tokenizer}'"):
            LLM(sound, tokenizer=tokenizer)
    finally:
        (sound.parent / "tokenizer.json").rename(sound / "tokenizer.json")
        (sound.parent / "tokenizer_config.json").rename(sound / "tokenizer_config.json")
