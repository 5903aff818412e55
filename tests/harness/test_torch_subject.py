"""A module and its plan for ``parallelize_module`` under the checks: right ones green, each classic mistake red at its module."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel
from typer.testing import CliRunner

from harness.checks import all_checks
from harness.checks.base import CheckContext, Outcome, together
from harness.cli import app
from harness.errors import UsageError
from harness.subjects import subject_class
from harness.subjects.base import Placement
from harness.subjects.torch_plan import TorchSubject
from harness.verification.reference_results import ReferenceResults
from harness.verification.verify import VerifyPlan, verify
from reference.checkpoints import checkpoint_shapes
from reports.records import read_report
from tests.harness.checking import OPTIONS, assert_green
from tests.harness.conftest import MakeModel
from tests.harness.installed import ROOT

EXAMPLES = ROOT / "docs" / "examples" / "torch_tp"
sys.path.append(str(EXAMPLES))  # ranks import from there too

pytestmark = pytest.mark.multirank

SIZES: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 12, "num_key_value_heads": 3,
    "head_dim": 4, "vocab_size": 101, "max_position_embeddings": 128, "tie_word_embeddings": False, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None}
"""At tp 2 and 4 every rank has all KV heads, at tp 3 one of them."""
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "tied": SIZES | {"model_type": "llama", "tie_word_embeddings": True},
    "12 KV heads": SIZES | {"model_type": "llama", "attention_bias": True, "num_attention_heads": 24, "num_key_value_heads": 12},
    "qwen3": SIZES | {"model_type": "qwen3", "attention_bias": True},
    "olmo2": SIZES | {"model_type": "olmo2"},
}
RIGHT = {
    "decoder:decoder": ("llama", "tied", "12 KV heads", "qwen3", "olmo2"),
    "decoder:with_sequence_parallelism": ("llama", "qwen3", "olmo2"),
    "mistakes:grouped_qkv": ("12 KV heads",),
    "mistakes:interleaved_gate_up": ("llama",),
}
"""Function -> the configs that it is for. The sequences' lengths, 41, 37 and 23, are divided by no tp_size."""
WRONG = {
    "fused_qkv": ("12 KV heads", "model.layers.0.self_attn (before o_proj)", None),
    "fused_gate_up": ("llama", "model.layers.0.mlp (before down_proj)", None),
    "local_head_ratio": ("llama", "model.layers.0.self_attn (before o_proj)", None),
    "fixed_head_count": ("llama", "model.layers.0.self_attn", None),
    "norm_of_own_heads": ("olmo2", "model.layers.0.self_attn.q_norm", None),
    "only_rank_0_loads": ("llama", "model.layers.0.input_layernorm", "model.layers.0.input_layernorm"),
    "embedding_without_input_layouts": ("llama", "model.embed_tokens", None),
}
"""Mistake -> a config that shows it at tp 2, and the modules that ``logits`` and ``weights`` must name."""

Load = Callable[[str, str], ReferenceResults]


class AnyFunction(TorchSubject):
    """Of whichever function is to be loaded next."""

    name = "torch:any"


@pytest.fixture(scope="module")
def results_of(tiny_model: MakeModel) -> Callable[[str, str], ReferenceResults]:
    return cache(lambda config, dtype: ReferenceResults(tiny_model(CONFIGS[config], dtype), dtype=dtype))


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[AnyFunction]:
    with AnyFunction(Placement(tp_size=2, fabric="gloo", job_timeout_s=300)) as subject:
        yield subject


def outcome(check: str, subject: AnyFunction, function: str, results: ReferenceResults, kind: str | None = "model") -> Outcome:
    """What the check says of the model's own checkpoint; ``kind`` None: of made-up ones too."""
    placement = Placement(tp_size=subject.tp_size, fabric="gloo")
    subject_class(f"torch:{function}").check_fit(results.folder, [placement])
    type(subject).function = function
    subject.load(results.folder, dtype=results.dtype, options=OPTIONS)
    return together(list(all_checks()[check].run(CheckContext(results=results, subject=subject, options=OPTIONS, seed=0,
                                                              kind=kind))))


@pytest.mark.parametrize(("function", "config"), [
    pytest.param(function, config, marks=[pytest.mark.endurance] * (config in ("tied", "qwen3")))
    for function, configs in RIGHT.items() for config in configs])
def test_a_right_module_is_green(two_ranks: AnyFunction, results_of: Load, function: str, config: str) -> None:
    results, kind = results_of(config, "float32"), None if config == "llama" else "model"
    assert_green(outcome("weights", two_ranks, function, results, kind))
    assert_green(outcome("logits", two_ranks, function, results, kind))


@pytest.mark.parametrize("mistake", WRONG)
def test_a_classic_mistake_is_red_at_its_module(two_ranks: AnyFunction, results_of: Load, mistake: str) -> None:
    config, module, in_weights = WRONG[mistake]
    found = outcome("logits", two_ranks, f"mistakes:{mistake}", results_of(config, "float32"))
    assert found.finding is not None
    assert found.module == module, found.finding
    assert outcome("weights", two_ranks, f"mistakes:{mistake}", results_of(config, "float32")).module == in_weights


def test_what_is_not_of_the_file_on_one_rank_is_told_element_by_element(two_ranks: AnyFunction, results_of: Load) -> None:
    found = outcome("weights", two_ranks, "mistakes:only_rank_0_loads", results_of("llama", "float32"))
    assert found.rank == 1
    assert "first model.layers.0.input_layernorm.weight: 48 of 48 elements differ" in (found.finding or "")
    assert "it holds 1.0 where" in (found.finding or "")


def parts_where_only_rank_0_loads(config: dict[str, Any], tp_rank: int, tp_size: int) -> Any:
    from decoder import sequence_parallel_plan  # type: ignore[import-not-found]
    from mistakes import only_rank_0_loads  # type: ignore[import-not-found]

    return only_rank_0_loads(config, tp_rank, tp_size)[0], sequence_parallel_plan(config, tp_size)


def test_of_a_sequence_that_is_cut_the_rank_with_the_wrong_tokens_is_named(two_ranks: AnyFunction, results_of: Load) -> None:
    found = outcome("logits", two_ranks, f"{__name__}:parts_where_only_rank_0_loads", results_of("llama", "float32"))
    assert (found.module, found.rank) == ("model.layers.0.input_layernorm", 1), found.finding
    assert found.extra["token"] == 21  # rank 0 has the first 21 of 41


def test_an_embedding_that_takes_its_ids_for_parts_has_too_many_rows(two_ranks: AnyFunction, results_of: Load) -> None:
    found = outcome("logits", two_ranks, "mistakes:embedding_without_input_layouts", results_of("llama", "float32"))
    assert "its output is of shape (1, 82, 48)" in (found.finding or "")


def test_what_a_module_raises_names_it(two_ranks: AnyFunction, results_of: Load) -> None:
    found = outcome("logits", two_ranks, "mistakes:fixed_head_count", results_of("llama", "float32"))
    assert "in phase 'module model.layers.0.self_attn': RuntimeError: shape '[1, 41, 12, 4]' is invalid" in (found.finding or "")


def test_a_subject_that_is_wrong_on_one_rank_too_is_told_apart(results_of: Load) -> None:
    folder = results_of("llama", "float32").folder
    plan = VerifyPlan(model="tiny", folder=folder, tp_sizes=(2,), checks=("logits",),
                      subject="torch:mistakes:wrong_on_one_rank_too")
    (row, *_) = verify(plan).checks
    assert row.message.startswith("not TP: differs at tp_size=1 too, first at model.layers.0.mlp (before down_proj); ")
    assert (row.verdict, row.module, row.extra["not_tp"]) == ("finding", "model.layers.0.mlp (before down_proj)", True)


def test_what_is_right_on_one_rank_is_a_matter_of_tensor_parallelism(results_of: Load) -> None:
    folder = results_of("llama", "float32").folder
    plan = VerifyPlan(model="tiny", folder=folder, tp_sizes=(1, 2), checks=("logits",), subject="torch:mistakes:local_head_ratio")
    rows = [row for row in verify(plan).checks if row.kind == "model"]
    assert [(row.tp_size, row.verdict) for row in rows] == [(1, "pass"), (2, "finding")]
    assert "not TP" not in rows[1].message
    assert "not_tp" not in rows[1].extra


@pytest.mark.endurance
def test_its_tokens_are_the_references(two_ranks: AnyFunction, results_of: Load) -> None:
    assert_green(outcome("generation", two_ranks, "decoder:decoder", results_of("qwen3", "float32")))


def test_the_command_tells_what_is_sharded(results_of: Load, tmp_path: Path) -> None:
    folder = results_of("llama", "float32").folder
    done = CliRunner().invoke(app, ["verify", str(folder), "--tp", "2", "--subject", "torch:decoder:decoder", "--check",
                                    "weights", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (share,) = [row.extra["sharded_parameters"] for row in read_report(tmp_path).checks if row.kind == "model"]
    sizes = {name: math.prod(shape) for name, shape in checkpoint_shapes(folder).items()}
    whole = re.compile(r"norm\.|[kv]_proj\.|(o|down)_proj\.bias")
    assert share == round(1 - sum(size for name, size in sizes.items() if whole.search(name)) / sum(sizes.values()), 4)
    assert f"sharded: {share:.1%} of the parameters at tp 2\n" in done.stdout


# What is refused before anything starts


def nothing_is_sharded(config: dict[str, Any], tp_rank: int, tp_size: int) -> Any:
    from decoder import decoder

    return decoder(config, tp_rank, tp_size)[0], {}


def no_pair(config: dict[str, Any], tp_rank: int, tp_size: int) -> Any:
    return nn.Linear(2, 2)


def another_module(config: dict[str, Any], tp_rank: int, tp_size: int) -> Any:
    return nn.Sequential(nn.Linear(2, 2)), {"0": ColwiseParallel()}


def raising(config: dict[str, Any], tp_rank: int, tp_size: int) -> Any:
    raise KeyError("num_experts")


@pytest.mark.parametrize(("function", "says"), [
    ("mistakes:plan_that_matches_nothing", r"2 of 7 names of the plan match no module, first 'model.layers.*.attention.q_proj'"),
    (f"{__name__}:nothing_is_sharded", "gives an empty plan: nothing would be sharded"),
    (f"{__name__}:no_pair", r"must give \(nn.Module, {module name: ParallelStyle}\), it gives Linear"),
    (f"{__name__}:another_module", "its module does not fit the checkpoint: .*\n.*Missing key"),
    (f"{__name__}:raising", "raises KeyError: 'num_experts'"),
])
def test_what_can_not_be_is_refused_before_ranks_start(results_of: Load, function: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        subject_class(f"torch:{function}").check_fit(results_of("llama", "float32").folder, [Placement(tp_size=2, fabric="gloo")])


@pytest.mark.parametrize("name", ["torch:", "torch:decoder", "torch:decoder:nothing", "torch:nowhere:f"])
def test_a_function_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"give torch:package\.module:function"):
        subject_class(name)


# More of the same


@pytest.mark.endurance
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
def test_right_modules_are_green_on_any_number_of_ranks(results_of: Load, tp_size: int, dtype: str) -> None:
    with AnyFunction(Placement(tp_size=tp_size, fabric="gloo" if tp_size > 1 else "solo", job_timeout_s=120)) as subject:
        for function, configs in RIGHT.items():
            for config in configs:
                for check in ("weights", "logits"):
                    assert_green(outcome(check, subject, function, results_of(config, dtype)))


@pytest.mark.endurance
def test_parts_of_a_sequence_that_do_not_know_its_length_are_red_whatever_the_ranks_run_into(results_of: Load) -> None:
    with AnyFunction(Placement(tp_size=2, fabric="gloo", job_timeout_s=20)) as subject:
        found = outcome("logits", subject, "mistakes:sequence_parts_without_their_length", results_of("llama", "float32"))
    assert found.finding is not None
    assert "in phase 'module model.layers.0." in found.finding
