"""The command line as its users meet it: exit codes, what goes where, what it says when something is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from engine import LLM, SamplingParams
from engine.layers.matmul import linear
from engine.parallel.linear import RowParallelLinear
from harness.checks import all_checks
from harness.checks.base import CheckContext, Outcome
from harness.cli import app
from harness.interrupted import WHY
from reports.records import read_report, whole_checks
from tests.harness.checking import check_of
from tests.harness.conftest import MakeModel
from tests.reference.tiny import small_config

ROOT = Path(__file__).parents[2]
WORDS = [f"w{number}" for number in range(131)]


@pytest.fixture(scope="session")
def model(tiny_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of as many words as its vocabulary, and room for a long text."""
    config = small_config("llama", num_q_heads=4, num_kv_heads=2, max_position_embeddings=16_384)
    folder = tmp_path_factory.mktemp("with-tokenizer") / "model"
    shutil.copytree(tiny_model(config), folder)
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.stdout, result.stderr


def test_verify_ends_with_0_and_writes_its_report(model: Path, tmp_path: Path) -> None:
    code, stdout, stderr = run("verify", model, "--tp", "2", "--fabric", "threads", "--check", "weights",
                               "--check", "logits", "--out", tmp_path)
    assert code == 0, stderr
    assert "all green" in stdout
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".html", ".csv"}
    assert [row.check for row in whole_checks(read_report(tmp_path).checks)] == ["weights", "logits"]


def test_a_config_without_weights_is_verified_shrunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDPROOF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(small_config("llama", num_hidden_layers=40)))
    code, stdout, stderr = run("verify", tmp_path / "large", "--shrink", "--tp", "3", "--fabric", "threads", "--check", "weights",
                               "--out", tmp_path / "out")
    assert code == 0, stderr
    assert "all green" in stdout
    code, _, stderr = run("verify", tmp_path / "nothing", "--shrink", "--tp", "2", "--out", tmp_path / "out")
    assert code == 3, stderr


def test_the_table_of_verify_has_one_line_a_check_and_its_pages_one_a_kind(model: Path, tmp_path: Path) -> None:
    code, stdout, stderr = run("verify", model, "--tp", "1,2", "--fabric", "threads", "--check", "layers", "--out", tmp_path)
    assert code == 0, stderr
    assert [line.split()[0] for line in stdout.splitlines() if "layers" in line] == ["layers"]
    assert [line.split()[0] for line in stderr.splitlines() if "layers" in line] == ["[1/2]", "[2/2]"]
    kinds = [row.kind for row in read_report(tmp_path).checks if row.tp_size == 2]
    assert {"row", "row with bias", "embedding"} < set(kinds)
    for page in ("report.md", "report.html", "report.csv"):
        assert all(f"layers: {kind}" in (tmp_path / page).read_text() for kind in kinds)


def test_ctrl_c_loses_nothing_that_is_done(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(context: CheckContext) -> Outcome:
        raise KeyboardInterrupt

    monkeypatch.setitem(all_checks(), "logits", check_of(press, name="logits"))
    code, stdout, stderr = run("verify", model, "--tp", "1,2", "--fabric", "threads", "--check", "weights", "--check", "logits",
                               "--out", tmp_path)
    assert code == 3
    assert "interrupted" in stderr
    assert "NOT green" in stdout
    rows = [(row.tp_size, row.fabric, row.check, row.verdict, row.message) for row in whole_checks(read_report(tmp_path).checks)]
    assert rows == [(1, "solo", "weights", "pass", ""), (1, "solo", "logits", "error", WHY),
                    (2, "threads", "weights", "error", WHY), (2, "threads", "logits", "error", WHY)]


def bias_of_every_rank(self: RowParallelLinear, x_TI: torch.Tensor) -> torch.Tensor:
    return self.tp.all_reduce(linear(x_TI, self.weight, self.bias))


def test_a_finding_ends_with_1_and_runs_again_from_its_case_file(model: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    clean = RowParallelLinear.forward
    monkeypatch.setattr(RowParallelLinear, "forward", bias_of_every_rank)
    code, stdout, _ = run("verify", model, "--tp", "2", "--fabric", "threads", "--check", "layers", "--check", "logits",
                          "--out", tmp_path)
    assert code == 1
    assert "NOT green" in stdout
    rows = {row.name: row for row in read_report(tmp_path).checks if row.verdict == "finding"}
    assert {name for name in rows if name.startswith("layers")} == {"layers: row with bias", "layers: attention_output with bias"}
    assert rows["logits: model"].module == "model.layers.0.self_attn.o_proj"
    for row in rows.values():
        assert row.replay is not None
        assert row.replay in stdout
        words = row.replay.split()
        assert words[:2] == ["shardproof", "verify"]
        code, stdout_again, _ = run(*words[1:], "--out", tmp_path / "again")
        assert code == 1
        assert "it fails again, to the bit" in stdout_again
    monkeypatch.setattr(RowParallelLinear, "forward", clean)
    for row in rows.values():
        assert row.replay is not None
        code, stdout, _ = run(*row.replay.split()[1:], "--out", tmp_path / "again")
        assert code == 0
        assert "it passes now" in stdout


@pytest.mark.parametrize(("arguments", "says"), [
    (("--tp", "2,x"), "tp='2,x' must be numbers"),
    (("--tp", "0"), "at least 1"),
    (("--tp", "5"), "num_q_heads=4"),
    (("--dtype", "int8"), "dtype='int8' is unknown"),
    (("--fabric", "pigeon"), "fabric='pigeon' is unknown"),
    (("--check", "taste"), "['taste'] are unknown"),
    (("--wrong",), "No such option"),
])
def test_wrong_usage_ends_with_2(model: Path, arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    code, stdout, stderr = run("verify", model, *arguments, "--out", tmp_path)
    assert (code, stdout) == (2, "")
    assert says in stderr
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_case_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "case.safetensors"
    save_file({"x": torch.ones(1)}, path)
    code, _, stderr = run("verify", "--case", path)
    assert code == 3
    assert f"case={path} is not a case file" in stderr
    assert run("verify", "--case", tmp_path / "none")[0] == 3


@pytest.mark.parametrize("command", [("verify", "--tp", "2", "--fabric", "threads"), ("generate", "--tp", "2"), ("generate",)])
def test_a_model_that_is_not_there_ends_with_3(command: tuple[str, ...], tmp_path: Path) -> None:
    name, *options = command
    code, stdout, stderr = run(name, tmp_path / "none", *(["w1"] if name == "generate" else []), *options)
    assert (code, stdout) == (3, "")
    assert f"{tmp_path / 'none'}" in stderr


def delete_a_tensor(file: Path) -> str:
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    return "missing from the checkpoint: model.layers.1.mlp.down_proj.weight;"


def cut_short(file: Path) -> str:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    return f"file={file} is damaged or cut short"


def change_a_shape(file: Path) -> str:
    tensors = load_file(file)
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = tensors[name][:, :-2].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return f"tensor={name} in file={file}: shape=(32, 30) in the checkpoint, but the config asks for (32, 32)"


@pytest.mark.parametrize("damage", [delete_a_tensor, cut_short, change_a_shape])
def test_a_damaged_checkpoint_ends_with_3_and_is_named(model: Path, damage: Callable[[Path], str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    expected = damage(folder / "model.safetensors")
    for arguments in (("verify", folder, "--tp", "2"), ("generate", folder, "w1", "--tp", "2"), ("generate", folder, "w1")):
        code, stdout, stderr = run(*arguments)
        assert (code, stdout) == (3, "")
        assert expected in stderr
        assert str(folder) in stderr
        assert "Traceback" not in stderr


def test_what_ranks_refuse_comes_without_tracebacks(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.extra.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    code, _, stderr = run("generate", folder, "w1", "--tp", "2", "--fabric", "threads")
    assert code == 3
    assert "model.layers.0.extra.weight" in stderr
    assert "Traceback" not in stderr


def test_a_prompt_that_does_not_fit_ends_with_2(model: Path) -> None:
    code, stdout, stderr = run("generate", model, "w1", "--temperature", "-1")
    assert (code, stdout.strip()) == (2, "")
    assert "temperature=-1.0" in stderr


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen([sys.executable, "-m", "harness", *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)


@pytest.mark.multirank
@pytest.mark.slow
def test_generate_writes_the_text_and_nothing_else_to_standard_output(model: Path) -> None:
    with LLM(model, device="cpu", num_kv_blocks=1024) as llm:
        expected = llm.generate("w5 w6 w7", SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)[0].outputs[0].text
    process = start("generate", model, "w5 w6 w7", "--tp", "2", "--max-tokens", "8", "--device", "cpu")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert stdout == f"{expected}\n"


@pytest.mark.multirank
@pytest.mark.slow
def test_a_killed_rank_ends_the_command_within_10_s_named_with_nothing_left(model: Path) -> None:
    process = start("generate", model, "w5 w6 w7", "--tp", "2", "--max-tokens", "16000", "--device", "cpu")
    try:
        assert process.stdout is not None
        process.stdout.read(1)  # it generates
        family = psutil.Process(process.pid).children(recursive=True)
        victim, *_ = ranks = [child for child in family if len(child.threads()) > 2 and child.ppid() != process.pid]
        assert len(ranks) == 2, [child.cmdline() for child in family]
        shared_memory = {mapped.path for child in ranks for mapped in child.memory_maps() if mapped.path.startswith("/dev/shm")}
        ports = {connection.laddr.port for child in (*family, psutil.Process(process.pid))
                 for connection in child.net_connections(kind="tcp") if connection.status == psutil.CONN_LISTEN}
        killed_at = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        _, stderr = process.communicate(timeout=60)
        seconds = time.monotonic() - killed_at
    finally:
        process.kill()
    assert process.returncode == 3
    assert seconds < 10
    assert "killed by SIGKILL" in stderr
    assert "rank " in stderr
    assert "in phase 'generate'" in stderr
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    assert not [path for path in shared_memory if os.path.exists(path)]
    listening = {connection.laddr.port for connection in psutil.net_connections(kind="tcp")
                 if connection.status == psutil.CONN_LISTEN}
    assert not ports & listening


@pytest.mark.multirank
@pytest.mark.endurance
def test_a_command_that_is_told_to_end_takes_its_folders_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    process = start("faults", "--only", "killed-rank-not-seen", "--out", tmp_path / "out")
    try:
        deadline = time.monotonic() + 90
        while len(list(scratch.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)  # until it has a model of its own, and ranks
        assert len(list(scratch.iterdir())) >= 2
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert [row.message for row in read_report(tmp_path / "out").checks] == [f"killed-rank-not-seen, {WHY}"]
    assert psutil.wait_procs(family, timeout=5)[1] == []
    assert list(scratch.iterdir()) == []
