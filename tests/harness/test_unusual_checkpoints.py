"""Checkpoints as people have them, which transformers runs: here they run alike, in engine, reference and checks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from engine import LLM, CheckpointError, SamplingParams
from engine.config import ModelConfig
from harness.checks.base import Outcome
from harness.subjects.engine import EngineSubject
from harness.verification.verify import VerifyPlan, verify
from reference.checkpoints import random_checkpoint, read_config, resolve, weight_shapes
from reference.hf import Reference
from reports.records import Report, whole_checks
from tests.harness.checking import assert_green, run_check
from tests.reference.tiny import small_config

Tensors = dict[str, Tensor]
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PROMPT, NUM_NEW = [5, 6, 7], 12
LAYERS = [f"model.layers.{layer}.self_attn.rotary_emb" for layer in range(2)]


def retensor(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    """Write the one file's tensors anew, as ``change`` leaves them."""

    def edit(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in change(load_file(folder / WHOLE)).items()}
        save_file(tensors, folder / WHOLE, metadata={"format": "pt"})

    return edit


def rename(change: Callable[[str], str]) -> Callable[[Path], None]:
    return retensor(lambda tensors: {change(name): tensor for name, tensor in tensors.items()})


def reconfig(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | changes))

    return edit


def sharded(change: Callable[[Path, dict[str, str]], None], *, keep_whole: bool = False) -> Callable[[Path], None]:
    """In two files with an index, which goes through ``change``."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / WHOLE)
        weight_map = {name: f"model-{1 + (number > 9):05}-of-00002.safetensors" for number, name in enumerate(sorted(tensors))}
        for file in set(weight_map.values()):
            save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file,
                      metadata={"format": "pt"})
        if not keep_whole:
            (folder / WHOLE).unlink()
        change(folder, weight_map)
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))

    return edit


def stale_index(folder: Path, weight_map: dict[str, str]) -> None:
    for file in set(weight_map.values()):
        (folder / file).unlink()


def other_weights_in_shards(folder: Path, weight_map: dict[str, str]) -> None:
    for file in set(weight_map.values()):
        save_file({name: tensor + 1 for name, tensor in load_file(folder / file).items()}, folder / file)


def in_subfolder(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "parts").mkdir()
    for name, file in list(weight_map.items()):
        if (folder / file).exists():
            (folder / file).rename(folder / "parts" / file)
        weight_map[name] = f"parts/{file}"


def second_copy(folder: Path) -> None:
    save_file({"tok_embeddings.weight": torch.ones(3, 3)}, folder / "consolidated.safetensors")
    (folder / "original").mkdir()
    shutil.copy(folder / WHOLE, folder / "original" / WHOLE)


def under_its_head_alone(tensors: Tensors) -> Tensors:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    return tensors


def with_head(scale: float) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * scale}


def with_buffers(tensors: Tensors) -> Tensors:
    names = ("cos_cached", "sin_cached", "inv_freq")
    return tensors | {f"{layer}.{name}": torch.ones(4, 2) for layer in LAYERS for name in names}


def explicit_file(folder: Path) -> None:
    shutil.move(folder / WHOLE, folder / "weights.safetensors")
    save_file({"not": torch.ones(1)}, folder / WHOLE)
    reconfig(transformers_weights="weights.safetensors")(folder)


def explicit_index(folder: Path) -> None:
    sharded(in_subfolder)(folder)
    (folder / INDEX).rename(folder / "parts" / INDEX)
    reconfig(transformers_weights=f"parts/{INDEX}")(folder)


TIED = {"tie_word_embeddings": True}
KINDS: dict[str, tuple[dict[str, Any], Callable[[Path], None]]] = {
    "no prefix": (small_config("qwen3", **TIED), rename(lambda name: name.removeprefix("model."))),
    "no prefix beside a head": (small_config(), rename(lambda name: name.removeprefix("model."))),
    "a prefix before the head too": (small_config(), rename(lambda name: f"model.{name.removeprefix('model.')}")),
    "no prefix for some": (small_config(), rename(lambda name: name.replace("model.layers.1", "layers.1"))),
    "prefix twice": (small_config(), rename(lambda name: f"model.{name}")),
    "derived buffers": (small_config(), retensor(with_buffers)),
    "no prefix and derived buffers": (small_config(), lambda folder: (
        retensor(with_buffers)(folder), rename(lambda name: name.removeprefix("model."))(folder))[0]),
    "stale index beside a whole file": (small_config(), sharded(stale_index, keep_whole=True)),
    "index of other weights beside a whole file": (small_config(), sharded(other_weights_in_shards, keep_whole=True)),
    "index that misses a tensor": (small_config(), sharded(lambda folder, weight_map: weight_map.pop("lm_head.weight") and None)),
    "index that names a tensor too many": (small_config(), sharded(
        lambda folder, weight_map: weight_map.update(ghost=weight_map["lm_head.weight"]))),
    "index that swaps two tensors' files": (small_config(), sharded(lambda folder, weight_map: weight_map.update(
        {"lm_head.weight": weight_map["model.norm.weight"], "model.norm.weight": weight_map["lm_head.weight"]}))),
    "shards in a sub-folder": (small_config(), sharded(in_subfolder)),
    "a second copy": (small_config(), second_copy),
    "a file named by the config": (small_config(), explicit_file),
    "an index named by the config": (small_config(), explicit_index),
    "quantization_config null": (small_config(), reconfig(quantization_config=None)),
    "tied, saved under lm_head": (small_config(**TIED), retensor(under_its_head_alone)),
    "tied, under lm_head, no prefix": (small_config(**TIED), lambda folder: (
        retensor(under_its_head_alone)(folder), rename(lambda name: name.removeprefix("model."))(folder))[0]),
    "tied, both saved and equal": (small_config("qwen2"), retensor(with_head(1.0))),
    "tied, both saved and different": (small_config(**TIED), retensor(with_head(-1.0))),
    "YaRN as Qwen documents it": (small_config("qwen2"), reconfig(rope_parameters=None, rope_theta=1e4, rope_scaling={
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 192})),
}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config, edit = KINDS[request.param]
    made = random_checkpoint(tmp_path / "model", config)
    edit(made)
    return made


def ids_of_transformers(folder: Path) -> list[int]:
    transformers_logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    finally:
        transformers_logging.enable_progress_bar()
    ids = torch.tensor([PROMPT])
    for _ in range(NUM_NEW):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(PROMPT):].tolist()


def ids_of_engine(folder: Path, tp_size: int) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
    fabric = "solo" if tp_size == 1 else "threads"
    with LLM(folder, tensor_parallel_size=tp_size, fabric=fabric, device="cpu", num_kv_blocks=8) as llm:
        (output,) = llm.generate([PROMPT], params, use_tqdm=False)
    return output.outputs[0].token_ids


def result_of(what: Callable[[], Any]) -> Any:
    """What it returns, or the exception that it raises, to be compared."""
    try:
        return what()
    except Exception as error:
        return error


@torch.no_grad()
def test_it_runs_as_transformers_runs_it(folder: Path) -> None:
    right = ids_of_transformers(folder)
    assert Reference.load(folder, "float32").greedy([PROMPT], NUM_NEW)[0].token_ids == right
    assert [result_of(lambda tp_size=tp_size: ids_of_engine(folder, tp_size)) for tp_size in (1, 2)] == [right, right]


def test_every_shard_of_it_is_what_the_file_holds(folder: Path) -> None:
    outcome = result_of(lambda: run_check("weights", folder))
    assert isinstance(outcome, Outcome), outcome
    assert_green(outcome)


@pytest.mark.parametrize("kind", ["no prefix", "tied, both saved and different", "YaRN as Qwen documents it"])
def test_its_checks_are_green(tmp_path: Path, kind: str) -> None:
    config, edit = KINDS[kind]
    folder = random_checkpoint(tmp_path, config)
    edit(folder)
    plan = VerifyPlan(model="unusual", folder=resolve(folder), tp_sizes=(1, 2), fabric="threads", checks=("weights", "logits"))
    report = result_of(lambda: verify(plan))
    assert isinstance(report, Report), report
    assert [(row.check, row.verdict, row.message) for row in whole_checks(report.checks)] == 2 * [
        ("weights", "pass", ""), ("logits", "pass", "")]


def test_a_tied_head_that_differs_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = random_checkpoint(tmp_path, small_config(**TIED))
    assert ModelConfig.from_folder(folder).tie_word_embeddings
    retensor(with_head(1.0))(folder)
    assert ModelConfig.from_folder(folder).tie_word_embeddings
    EngineSubject.check_fit(folder, [])
    weight_shapes(read_config(folder))
    assert caplog.text == ""
    retensor(lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] * 2})(folder)
    assert not ModelConfig.from_folder(folder).tie_word_embeddings
    EngineSubject.check_fit(folder, [])
    weight_shapes(read_config(folder))
    assert f"tie_word_embeddings=true in folder={folder}" in caplog.text


@pytest.mark.parametrize(
    ("positions", "rope", "usable"),
    [
        (192, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 192}, 768),
        (768, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 192}, 768),
        (240, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 192}, 768),
        (192, {"rope_type": "yarn", "factor": 4.0}, 768),
        (192, {"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 101}, 192),
        (192, {"rope_type": "linear", "factor": 4.0}, 192),
        (192, {"rope_type": "default"}, 192),
        (192, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 96}, 192),
    ],
    ids=str,
)
def test_yarn_reaches_its_factor_times_the_length_it_starts_from(
    tmp_path: Path, positions: int, rope: dict[str, Any], usable: int
) -> None:
    folder = random_checkpoint(tmp_path, small_config())
    reconfig(max_position_embeddings=positions, rope_parameters=rope | {"rope_theta": 1e4})(folder)
    with LLM(folder, device="cpu") as llm:
        assert llm.max_model_len == usable
        long = [[token % 131 for token in range(usable - 3)]]
        (output,) = llm.generate(long, SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True), use_tqdm=False)
    reference = Reference.load(folder, "float32")
    assert output.outputs[0].token_ids == reference.greedy(long, 3)[0].token_ids


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "one tensor under two names": (
        retensor(lambda tensors: tensors | {"norm.weight": tensors["model.norm.weight"]}), r"means tensor=model\.norm\.weight"),
    "max_position_embeddings 512.0": (reconfig(max_position_embeddings=512.0), r"max_position_embeddings=512\.0 must be a whole"),
    "torch_dtype auto": (reconfig(dtype=None, torch_dtype="auto"), "torch_dtype.* is not supported"),
    "index that leaves the folder": (
        sharded(lambda folder, weight_map: weight_map.update(ghost="../x.safetensors")), "leaves the folder"),
    "index without metadata": (lambda folder: (sharded(lambda *_: None)(folder), (folder / INDEX).write_text(
        json.dumps({"weight_map": json.loads((folder / INDEX).read_text())["weight_map"]})))[0], 'add "metadata"'),
    "a tensor too many": (retensor(lambda tensors: tensors | {"model.extra.weight": torch.ones(2)}), r"model\.extra\.weight"),
    "no head": (retensor(lambda tensors: {name: tensors[name] for name in tensors if name != "lm_head.weight"}),
                r"missing from the checkpoint: lm_head\.weight"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_refused_alike_before_a_rank_starts(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit, said = REFUSED[kind]
    folder = random_checkpoint(tmp_path, small_config())
    edit(folder)
    for module in ("engine.llm.Ranks", "harness.subjects.on_ranks.Ranks"):
        monkeypatch.setattr(module, lambda *_, **__: pytest.fail("started ranks"))
    refusals = [result_of(lambda: LLM(folder)),
                result_of(lambda: verify(VerifyPlan(model="refused", folder=folder, tp_sizes=(1,))))]
    assert [isinstance(refusal, CheckpointError) for refusal in refusals] == [True, True], refusals
    assert str(refusals[0]) == str(refusals[1])
    assert re.search(said, str(refusals[0]))
    assert "\n" not in str(refusals[0])
