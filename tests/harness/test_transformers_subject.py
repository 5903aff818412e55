"""Transformers' own tensor parallelism under the checks: right as it is, red where a bug is planted into it."""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import _functional_collectives as functional

from engine.checkpoint.checkpoint_files import read_headers
from harness.checks import all_checks
from harness.checks.base import CheckContext, Outcome, together
from harness.checks.logits import compare_logits
from harness.checks.weights import check_own
from harness.errors import UsageError
from harness.subjects.base import Placement, Subject, SubjectFailure
from harness.subjects.dtensor import plain
from harness.subjects.transformers import OLDEST, ExpertParallelSubject, TransformersRank, TransformersSubject
from harness.verification.reference_results import ReferenceResults
from harness.verification.verify import VerifyPlan, verify
from reference.checkpoints import CheckpointError
from reference.shrink import shrink
from tests.harness.checking import OPTIONS, assert_green
from tests.harness.conftest import MakeModel

pytest.importorskip("accelerate", reason="accelerate is not installed here, and transformers shards no model without it")
pytest.importorskip("transformers", minversion=OLDEST, reason=f"before {OLDEST} transformers gives ranks no uneven parts")

pytestmark = pytest.mark.multirank

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 70, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 6, "head_dim": 10, "vocab_size": 101, "max_position_embeddings": 128, "attention_bias": True,
    "mlp_bias": True, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""No size but the heads is one that 2 or 3 ranks get equal parts of."""
MOE: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 48, "intermediate_size": 70, "moe_intermediate_size": 24, "num_experts": 6,
    "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8,
    "vocab_size": 101, "max_position_embeddings": 128, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma2", "phi3", "olmo2", "cohere", "glm4", "deepseek_v3",
                 "starcoder2", "gpt_oss", "granite")


# Bugs, planted into transformers inside a rank: each tells the module that is wrong then, or nothing where the model has no such.

Plant = Callable[[TransformersRank], str | None]


def _sharded_as(rank: TransformersRank, *styles: str) -> list[str]:
    """The modules of these styles of the model's plan."""
    plan = rank.model.tp_plan
    return [name for name, _ in rank.model.named_modules() if plan.get(re.sub(r"\.\d+\.", ".*.", name)) in styles]


def _scaled(rank: TransformersRank) -> str | None:
    modules = _sharded_as(rank, "colwise")
    if not modules:
        return None
    name = modules[len(modules) // 2]
    if rank.tp_rank == 1:
        plain(rank.model.get_submodule(name).weight)[::2].mul_(1.05)  # of all its rows, a norm over a head would undo it
    return name


def _swapped(rank: TransformersRank) -> str | None:
    modules = _sharded_as(rank, "colwise")
    if not modules:
        return None
    own = plain(rank.model.get_submodule(modules[0]).weight)
    by_rank = [torch.empty_like(own) for _ in range(rank.tp_size)]
    dist.all_gather(by_rank, own.clone())
    own.copy_(by_rank[(rank.tp_rank + 1) % rank.tp_size])
    return modules[0]


def _never_reduced(rank: TransformersRank) -> str | None:
    modules = _sharded_as(rank, "rowwise")
    if not modules:
        return None
    module: Any = rank.model.get_submodule(modules[0])
    bias = None if module.bias is None else plain(module.bias)
    module.forward = lambda x: F.linear(x, plain(module.weight), bias)
    return modules[0]


def _bias_twice(rank: TransformersRank) -> str | None:
    modules = [name for name in _sharded_as(rank, "rowwise") if rank.model.get_submodule(name).bias is not None]
    if not modules:
        return None
    module: Any = rank.model.get_submodule(modules[-1])
    right: Callable[[Tensor], Tensor] = module.forward
    module.forward = lambda x: right(x) + plain(module.bias)
    return modules[-1]


def _scaled_experts(rank: TransformersRank) -> str | None:
    modules = _sharded_as(rank, "moe_tp_experts")
    if not modules:
        return None
    if rank.tp_rank == 1:
        plain(rank.model.get_submodule(modules[-1]).down_proj).mul_(1.1)
    return modules[-1]


FAULTS: Mapping[str, tuple[Plant, set[int]]] = {
    "one rank's projection scaled": (_scaled, {1}),
    "shards swapped": (_swapped, {0, 1}),
    "never reduced": (_never_reduced, {0, 1}),
    "bias counted twice": (_bias_twice, {0, 1}),
    "one rank's experts scaled": (_scaled_experts, {0, 1}),  # their sum is wrong on all ranks
}
"""Name -> how it is planted, and the ranks that may be blamed."""


class FaultyRank(TransformersRank):
    """With the bug that the options name."""

    planted: str | None = None

    def load(self, folder: Path, *, dtype: str, options: Mapping[str, Any]) -> None:
        super().load(folder, dtype=dtype, options=options)
        if "fault" in options:
            with torch.no_grad():
                self.planted = FAULTS[options["fault"]][0](self)


class Faulty(TransformersSubject):
    """Ranks import this module to make theirs."""

    rank_class: ClassVar[type[TransformersRank]] = FaultyRank


def _planted(rank: FaultyRank) -> str | None:
    return rank.planted


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Faulty]:
    with Faulty(Placement(tp_size=2, fabric="gloo", job_timeout_s=120)) as subject:
        yield subject


def outcome(check: str, subject: Subject, folder: Path, dtype: str = "float32", **options: Any) -> Outcome:
    """What the check says of the model's own checkpoint."""
    subject.load(folder, dtype=dtype, options=OPTIONS | options)
    results = ReferenceResults(folder, dtype=dtype)
    return together(list(all_checks()[check].run(CheckContext(results=results, subject=subject, options=OPTIONS, seed=0,
                                                               kind="model"))))


@pytest.mark.slow
@pytest.mark.endurance
def test_llama_is_right_on_ranks_that_get_unequal_parts(tiny_model: MakeModel) -> None:
    report = verify(VerifyPlan(model="tiny", folder=tiny_model(LLAMA), tp_sizes=(1, 2, 3), subject="transformers"))
    assert [row.message for row in report.checks if row.verdict not in ("pass", "skipped")] == []
    assert {row.name for row in report.checks if row.verdict == "pass"} == {
        "weights: model", "weights: indexed", "logits: model", "logits: near eps", "generation: model"}


@pytest.mark.parametrize(("config", "fault"), [
    pytest.param(MOE if fault == "one rank's experts scaled" else LLAMA, fault,
                 marks=[pytest.mark.endurance] * (fault in ("shards swapped", "bias counted twice"))) for fault in FAULTS])
def test_a_bug_in_it_is_red_at_its_module(two_ranks: Faulty, tiny_model: MakeModel, config: dict[str, Any], fault: str) -> None:
    found = outcome("logits", two_ranks, tiny_model(config), fault=fault)
    assert found.finding is not None
    assert found.module == two_ranks.run(_planted)[0], found.finding
    assert found.rank in FAULTS[fault][1]
    in_weights = outcome("weights", two_ranks, tiny_model(config), fault=fault)
    if fault in ("never reduced", "bias counted twice"):
        assert_green(in_weights)
    else:
        assert in_weights.finding is not None


@pytest.mark.endurance
def test_bugs_in_many_architectures_are_red_at_their_modules(two_ranks: Faulty, tmp_path: Path) -> None:
    planted, unseen, misnamed = 0, [], []
    for architecture in ARCHITECTURES:
        results = ReferenceResults(shrink(architecture, tmp_path / architecture), dtype="float32", beyond_windows=True)
        for fault, (_, ranks) in FAULTS.items():
            two_ranks.load(results.folder, dtype="float32", options={"fault": fault})
            module = two_ranks.run(_planted)[0]
            if module is None:
                continue
            planted += 1
            found = compare_logits(CheckContext(results=results, subject=two_ranks, options={}, seed=0))
            if found.finding is None:
                unseen.append((architecture, fault))
            elif found.module != module or found.rank not in ranks:
                misnamed.append((architecture, fault, found.module, found.rank, module))
    print(f"{planted} planted, {unseen=}, {misnamed=}")  # noqa: T201 - the figures, under -rP
    assert planted > 2 * len(ARCHITECTURES)
    assert unseen == []
    assert len(misnamed) <= planted // 20


def test_it_says_what_share_is_sharded(two_ranks: Faulty, tiny_model: MakeModel) -> None:
    two_ranks.load(tiny_model(LLAMA), dtype="float32", options=OPTIONS)
    sharded = two_ranks.sharded()
    assert 0.9 < sharded.parameters < 1  # norms and biases of row-parallel layers are whole
    assert sharded.flops == 1


def test_ranks_hold_unequal_parts_where_transformers_says_that_they_are(two_ranks: Faulty, tiny_model: MakeModel) -> None:
    two_ranks.load(tiny_model(LLAMA), dtype="float32", options=OPTIONS)
    owned = two_ranks.layout(LLAMA, "lm_head.weight", (101, 48))
    assert (owned.dim, [len(indices) for indices in owned.indices]) == (0, [51, 50])
    with pytest.raises(CheckpointError, match="tensor=nothing: the loaded model has no parameter that it went to"):
        two_ranks.layout(LLAMA, "nothing", (1,))


@pytest.mark.parametrize("make", [Faulty, ExpertParallelSubject])
def test_experts_that_were_merged_while_loading_are_found_again(make: type[TransformersSubject], tiny_model: MakeModel) -> None:
    folder = tiny_model(MOE)
    with make(Placement(tp_size=2, fabric="gloo", job_timeout_s=120)) as subject:
        assert_green(outcome("weights", subject, folder))


def _num_groups(rank: FaultyRank) -> int:
    gc.collect()
    return len(dist.distributed_c10d._world.pg_map)


def test_a_refused_model_leaves_no_process_groups_behind(two_ranks: Faulty, tmp_path: Path) -> None:
    folder = shrink("gpt_bigcode", tmp_path)
    counts = []
    for _ in range(3):
        with pytest.raises((CheckpointError, SubjectFailure), match="tp_size=2"):
            two_ranks.load(folder, dtype="float32", options={"quiet": True})
        counts.append(two_ranks.run(_num_groups)[0])
    assert counts[1:] == counts[:-1]


def _norm_in_float32(rank: FaultyRank) -> None:
    rank.model.get_submodule("model.norm").float()


def test_what_the_model_keeps_in_float32_may_be_so_and_nothing_else(two_ranks: Faulty, tmp_path: Path) -> None:
    folder = shrink("deepseek_v3", tmp_path, dtype="bfloat16")
    assert_green(outcome("weights", two_ranks, folder, dtype="bfloat16"))
    two_ranks.load(folder, dtype="bfloat16", options=OPTIONS)
    two_ranks.run(_norm_in_float32)
    results = ReferenceResults(folder, dtype="bfloat16")
    assert "e_score_correction_bias" in {name.rpartition(".")[2] for name in results.kept_wider}
    found = check_own(CheckContext(results=results, subject=two_ranks, options=OPTIONS, seed=0)).finding
    assert found is not None
    assert "first model.norm.weight: the shard is (96,) torch.float32, it should be (96,) torch.bfloat16" in found


def test_of_nine_columns_over_four_ranks_the_last_one_has_none(tmp_path: Path) -> None:
    """Parts are as long as the first one, of three: 3, 3, 3 and nothing."""
    folder = shrink("llama", tmp_path, intermediate_size=9, num_key_value_heads=4, num_attention_heads=4)
    with Faulty(Placement(tp_size=4, fabric="gloo", job_timeout_s=120)) as subject:
        assert_green(outcome("weights", subject, folder))
        owned = subject.layout(json.loads((folder / "config.json").read_text()), "model.layers.0.mlp.down_proj.weight", (96, 9))
        assert (owned.dim, [len(indices) for indices in owned.indices]) == (1, [3, 3, 3, 0])


def test_a_rank_without_an_expert_has_nothing_of_it_in_the_dtype_that_others_have(two_ranks: Faulty, tmp_path: Path) -> None:
    """Beside a router's bias in float32, nothing was taken for nothing in float32."""
    folder = shrink("glm4_moe", tmp_path, dtype="bfloat16")
    with ExpertParallelSubject(Placement(tp_size=2, fabric="gloo", job_timeout_s=120, ranks=two_ranks.ranks)) as subject:
        assert_green(outcome("weights", subject, folder, dtype="bfloat16"))


def test_tensors_under_the_models_own_names_are_found_too(two_ranks: Faulty, tmp_path: Path) -> None:
    folder = shrink("qwen3_moe", tmp_path, own_names=True)
    assert any(name.endswith("experts.gate_up_proj") for name in read_headers(folder))
    assert_green(outcome("weights", two_ranks, folder))


@pytest.mark.parametrize("architecture", [
    "gemma3",  # the language model is a part, files have names of their own, and the LM head is another part's embedding
    "glm4_moe",  # biases of routers are buffers that a checkpoint holds
    pytest.param("deepseek_v4", marks=pytest.mark.endurance),  # so is a table of integers
    pytest.param("apertus", marks=pytest.mark.endurance),  # and parameters without a dimension
])
def test_every_check_has_rows_for_models_that_the_engine_does_not_run(two_ranks: Faulty, tmp_path: Path,
                                                                      architecture: str) -> None:
    folder = shrink(architecture, tmp_path / "tiny")
    two_ranks.load(folder, dtype="float32", options=OPTIONS | {"quiet": True})
    results = ReferenceResults(folder, dtype="float32", schedule_lengths=(9, 4))
    context = CheckContext(subject=two_ranks, results=results, options=OPTIONS | {"quiet": True}, seed=0)
    checks = all_checks()
    outcomes = [outcome for name in ("weights", "logits") for outcome in checks[name].run(context)]
    assert {"model", "indexed", "near eps"} <= {outcome.kind for outcome in outcomes}
    assert [str(outcome) for outcome in outcomes if outcome.finding or outcome.error] == []
    assert all(outcome.compared or "not applicable: " in (outcome.skipped or "") for outcome in outcomes)
    assert outcomes[0].compared > 100_000


def test_process_groups_end_with_their_model(two_ranks: Faulty, tiny_model: MakeModel) -> None:
    counts = []
    for _ in range(5):
        two_ranks.load(tiny_model(LLAMA), dtype="float32", options=OPTIONS)
        counts.append(two_ranks.run(_open_files))
    assert counts[1:] == [counts[-1]] * 4


def _open_files(rank: TransformersRank) -> int:
    return len(os.listdir("/proc/self/fd"))


def test_what_can_not_be_sharded_is_refused(two_ranks: Faulty, tiny_model: MakeModel) -> None:
    folder = tiny_model(LLAMA)
    with pytest.raises(UsageError, match="would run as threads, and DTensor needs processes: use --fabric gloo"):
        TransformersSubject.check_fit(folder, [Placement(tp_size=5, fabric="threads")])
    five_heads = tiny_model(LLAMA | {"hidden_size": 50, "num_attention_heads": 5, "num_key_value_heads": 5})
    two_ranks.load(five_heads, dtype="float32", options=OPTIONS)
    with pytest.raises(SubjectFailure, match="is invalid for input of size"):
        two_ranks.logits(ReferenceResults(five_heads, dtype="float32").schedule)


def test_a_release_that_cuts_nothing_unevenly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.subjects.transformers.transformers.__version__", "5.20.0")
    with pytest.raises(UsageError, match=r"transformers=5\.20\.0 gives ranks no uneven parts, which checks ask for: pip install"):
        TransformersSubject.check_installed()


def test_what_is_still_under_way_is_waited_for(two_ranks: Faulty) -> None:
    for total, kind in two_ranks.run(_sum_under_way):
        assert (total.tolist(), kind) == ([3.0] * 1000, "Tensor")


def _sum_under_way(rank: TransformersRank) -> tuple[Tensor, str]:
    own = torch.full((1000,), rank.tp_rank + 1.0)
    under_way = functional.all_reduce(own, "sum", dist.group.WORLD)
    assert type(under_way).__name__ == "AsyncCollectiveTensor"
    value = plain(under_way)
    return value, type(value).__name__
