"""The engine as its users meet it: prompts in, outputs out; what can't run is refused by name."""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from engine import LLM, CheckpointError, RequestOutput, SamplingParams, UnsupportedModelError
from engine.execution.runner import Runner
from engine.ranks.ranks import RankFailure
from tests.engine.conftest import MakeCheckpoint, MakeReference

GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPTS = [[(17 * position + start) % 131 for position in range(3 + 5 * start)] for start in range(5)]
SMALL: dict[str, Any] = {"device": "cpu", "num_kv_blocks": 24, "block_size": 8}


def ids_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def greedy(llm: LLM, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return ids_of(llm.generate(prompts, GREEDY, use_tqdm=False))


@pytest.fixture(scope="module")
def expected(checkpoint: MakeCheckpoint, reference: MakeReference) -> list[list[int]]:
    results = reference(checkpoint(), "float32").greedy(PROMPTS, 12)
    assert min(margin for result in results for margin in result.margins) > 1e-4, "choose other prompts: this is a tie"
    return [result.token_ids for result in results]


@pytest.fixture(scope="module")
def llm(checkpoint: MakeCheckpoint) -> Any:
    with LLM(checkpoint(), **SMALL) as llm:
        yield llm


@pytest.fixture(scope="session")
def folder_with_tokenizer(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose token ids are characters: printable ASCII, then Greek."""
    folder = Path(shutil.copytree(checkpoint(), tmp_path_factory.mktemp("tokenizer") / "model"))
    characters = [*map(chr, range(32, 127)), *map(chr, range(0x391, 0x391 + 36))]
    words = Tokenizer(WordLevel({character: number for number, character in enumerate(characters)}, unk_token=" "))
    words.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=False).save_pretrained(folder)
    return folder


def test_greedy_completions_are_the_references(llm: LLM, expected: list[list[int]]) -> None:
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert ids_of(outputs) == expected
    assert [output.prompt_token_ids for output in outputs] == PROMPTS
    for output in outputs:
        assert output.finished
        assert output.error is None
        assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("tp_size", [2, 3])
def test_ranks_as_threads_draw_what_one_rank_draws(
    checkpoint: MakeCheckpoint, llm: LLM, expected: list[list[int]], tp_size: int
) -> None:
    sampled = SamplingParams(temperature=1.1, top_k=50, top_p=0.95, seed=11, max_tokens=12)
    with LLM(checkpoint(), tensor_parallel_size=tp_size, fabric="threads", **SMALL) as several:
        assert greedy(several) == expected
        ours = ids_of(several.generate(PROMPTS, sampled, use_tqdm=False))
    assert ours == ids_of(llm.generate(PROMPTS, sampled, use_tqdm=False))


@pytest.mark.multirank
def test_ranks_as_processes_draw_what_one_rank_draws(checkpoint: MakeCheckpoint, llm: LLM, expected: list[list[int]]) -> None:
    sampled = SamplingParams(temperature=1.1, top_p=0.95, seed=11, max_tokens=12)
    # Chunks of eight tokens: some steps draw nothing, and gather zero rows.
    chunked = SMALL | {"max_num_batched_tokens": 8, "max_num_seqs": 4}
    with LLM(checkpoint(), tensor_parallel_size=2, fabric="gloo", **chunked) as several:
        assert greedy(several) == expected
        ours = ids_of(several.generate(PROMPTS, sampled, use_tqdm=False))
    assert ours == ids_of(llm.generate(PROMPTS, sampled, use_tqdm=False))


def test_a_seed_gives_the_same_text_whatever_came_before(checkpoint: MakeCheckpoint, llm: LLM) -> None:
    with_seed = SamplingParams(temperature=1, seed=5, max_tokens=12)
    first = ids_of(llm.generate(PROMPTS, with_seed, use_tqdm=False))
    assert ids_of(llm.generate(PROMPTS[::-1], with_seed, use_tqdm=False))[::-1] == first
    unseeded = SamplingParams(temperature=1, max_tokens=12)
    assert ids_of(llm.generate([PROMPTS[1]] * 2, unseeded, use_tqdm=False))[0] not in ids_of(
        llm.generate([PROMPTS[1]] * 2, unseeded, use_tqdm=False)
    )


def test_an_engine_seed_gives_the_same_texts_in_every_engine(checkpoint: MakeCheckpoint) -> None:
    params = SamplingParams(temperature=1, max_tokens=12)
    texts = []
    for seed in (1, 1, 2):
        with LLM(checkpoint(), seed=seed, **SMALL) as llm:
            texts.append(ids_of(llm.generate(PROMPTS, params, use_tqdm=False)))
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], r"len\(token_ids\)=0"),
        ([1] * 192, r"len\(token_ids\)=192 leaves no room .*max_model_len=192"),
        ([1, 131], "token_id=131 is outside the vocabulary of vocab_size=131"),
        ([-1], "token_id=-1 is outside"),
        ("text", "needs a tokenizer"),
    ],
    ids=["empty", "too long", "id too large", "negative id", "no tokenizer"],
)
def test_a_prompt_that_cannot_run_is_refused_and_the_others_go_on(
    llm: LLM, expected: list[list[int]], prompt: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=said):
        llm.generate([prompt], GREEDY, use_tqdm=False)
    outputs = llm.generate([PROMPTS[0], prompt, PROMPTS[1]], GREEDY, use_tqdm=False)
    refused = outputs[1]
    assert refused.finished
    assert refused.outputs == []
    assert refused.error is not None
    assert re.search(said, refused.error)
    assert ids_of([outputs[0], outputs[2]]) == expected[:2]
    assert any(refused.error in record.getMessage() for record in caplog.records)


def test_a_prompt_may_be_as_long_as_leaves_room_for_one_token(llm: LLM) -> None:
    (output,) = llm.generate([[1] * 191], SamplingParams(temperature=0, max_tokens=None), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 1
    assert output.outputs[0].finish_reason == "length"


def test_without_max_tokens_a_text_runs_to_the_models_length(llm: LLM) -> None:
    (output,) = llm.generate([[1, 2]], SamplingParams(temperature=0, max_tokens=None), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 190


def test_one_flat_list_of_ids_is_one_prompt(llm: LLM, expected: list[list[int]]) -> None:
    assert greedy(llm, PROMPTS[1]) == expected[1:2]  # type: ignore[arg-type]
    assert ids_of(llm.generate({"prompt_token_ids": PROMPTS[1]}, GREEDY, use_tqdm=False)) == expected[1:2]
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_each_prompt_may_have_parameters_of_its_own(llm: LLM, expected: list[list[int]]) -> None:
    params = [SamplingParams(temperature=0, max_tokens=count) for count in range(1, 6)]
    assert ids_of(llm.generate(PROMPTS, params, use_tqdm=False)) == [ids[:n] for n, ids in enumerate(expected, start=1)]
    with pytest.raises(ValueError, match=r"len\(sampling_params\)=5 .*len\(prompts\)=2"):
        llm.generate(PROMPTS[:2], params, use_tqdm=False)
    with pytest.raises(ValueError, match=r"len\(sampling_params\)=0"):
        llm.generate(PROMPTS[:2], [], use_tqdm=False)


def test_stop_tokens_are_the_requests_own_and_the_models(checkpoint: MakeCheckpoint, expected: list[list[int]]) -> None:
    model_stop, own_stop = expected[0][4], expected[0][2]
    with LLM(checkpoint(eos_token_id=model_stop), **SMALL) as llm:

        def first(**changes: Any) -> list[int]:
            params = SamplingParams(temperature=0, max_tokens=12, **changes)
            return llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs[0].token_ids

        def up_to(*stops: int) -> list[int]:
            end = min(expected[0].index(stop) for stop in stops)
            return expected[0][: end + 1]

        assert first() == up_to(model_stop)
        assert first(ignore_eos=True) == expected[0]
        assert first(stop_token_ids=[own_stop]) == up_to(model_stop, own_stop)
        assert first(stop_token_ids=[own_stop], ignore_eos=True) == up_to(own_stop)
        late = first(min_tokens=10)
        assert model_stop not in late[:10]
        assert len(late) >= 10


@pytest.mark.parametrize("stop", [131, 10**6])
def test_a_stop_token_outside_the_vocabulary_ends_no_run(llm: LLM, expected: list[list[int]], stop: int) -> None:
    outside = SamplingParams(temperature=0, max_tokens=12, min_tokens=3, stop_token_ids=[stop])
    outputs = llm.generate(PROMPTS[:2], [GREEDY, outside], use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == expected[0]
    assert outputs[1].error is None or str(stop) in outputs[1].error
    assert greedy(llm) == expected


def test_two_engines_live_side_by_side(checkpoint: MakeCheckpoint, reference: MakeReference, expected: list[list[int]]) -> None:
    other_folder = checkpoint(model_type="qwen3", seed=3)
    others = [result.token_ids for result in reference(other_folder, "float32").greedy(PROMPTS, 12)]
    with LLM(checkpoint(), **SMALL) as one, LLM(other_folder, **SMALL) as other:
        assert greedy(one) == expected
        assert greedy(other) == others
        results: dict[str, list[list[int]]] = {}
        threads = [
            threading.Thread(target=lambda: results.update(one=greedy(one))),
            threading.Thread(target=lambda: results.update(other=greedy(other))),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == {"one": expected, "other": others}
        other.close()
        assert greedy(one) == expected


class Interruption(BaseException):
    """As Ctrl-C is: no Exception."""


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_call_interrupted_between_messages_leaves_the_engine_usable(
    checkpoint: MakeCheckpoint, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, tp_size: int
) -> None:
    def interrupted(bar: tqdm[Any], *args: Any) -> None:
        raise Interruption

    with LLM(checkpoint(), tensor_parallel_size=tp_size, fabric="threads" if tp_size > 1 else "auto", **SMALL) as llm:
        long = SamplingParams(temperature=0, max_tokens=100)
        with monkeypatch.context() as patch:
            patch.setattr(tqdm, "update", interrupted)
            with pytest.raises(Interruption):
                llm.generate(PROMPTS, long, use_tqdm=False)
        assert greedy(llm) == expected


def test_a_call_interrupted_in_the_middle_of_a_step_says_that_the_engine_is_lost(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, steps = Runner.launch, []

    def interrupted(runner: Runner, batch: Any) -> Any:
        steps.append(batch)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return launch(runner, batch)

    with LLM(checkpoint(), **SMALL) as llm:
        with monkeypatch.context() as patch:
            patch.setattr(Runner, "launch", interrupted)
            with pytest.raises(KeyboardInterrupt):
                greedy(llm)
        # A step cut off anywhere: blocks and rows may be anywhere too.
        with pytest.raises(RuntimeError, match="make a new one: KeyboardInterrupt"):
            greedy(llm)


def test_a_closed_engine_says_so_and_closing_twice_is_fine(checkpoint: MakeCheckpoint) -> None:
    llm = LLM(checkpoint(), **SMALL)
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        greedy(llm)


def test_text_prompts_are_tokenised_and_texts_decoded(folder_with_tokenizer: Path) -> None:
    with LLM(folder_with_tokenizer, **SMALL) as llm:
        by_text = llm.generate(["Hello, world", {"prompt": "abc"}], GREEDY, use_tqdm=False)
        assert by_text[0].prompt == "Hello, world"
        assert by_text[1].prompt_token_ids == [65, 66, 67]
        by_ids = llm.generate([output.prompt_token_ids for output in by_text], GREEDY, use_tqdm=False)
        assert ids_of(by_text) == ids_of(by_ids)
        for output in by_text + by_ids:
            completion = output.outputs[0]
            prompt = llm.tokenizer.decode(output.prompt_token_ids)
            whole = llm.tokenizer.decode(output.prompt_token_ids + completion.token_ids)
            assert prompt + completion.text == whole


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"tensor_parallel_size": 7}, ValueError, "num_q_heads=6 .*tensor_parallel_size=7"),
        ({"max_model_len": 193}, ValueError, "max_model_len=193 .*max_position_embeddings=192"),
        ({"max_model_len": 100, "num_kv_blocks": 12}, ValueError, "num_kv_blocks=12 x block_size=8 .*max_model_len=100"),
        ({"fabric": "solo", "tensor_parallel_size": 2}, ValueError, "fabric='solo' .*tp_size=2"),
        ({"attention_backend": "magic"}, (ValueError, RankFailure), "attention_backend='magic' is unknown"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused_by_name(
    checkpoint: MakeCheckpoint, options: dict[str, Any], kind: Any, said: str
) -> None:
    with pytest.raises(kind, match=said):
        LLM(checkpoint(), **(SMALL | options))


def test_a_cache_smaller_than_the_model_shortens_what_can_run(checkpoint: MakeCheckpoint) -> None:
    with LLM(checkpoint(), device="cpu", num_kv_blocks=3, block_size=8) as llm:
        assert (llm.num_kv_blocks, llm.max_model_len) == (3, 24)
        with pytest.raises(ValueError, match=r"len\(token_ids\)=24 .*max_model_len=24"):
            llm.generate([[1] * 24], GREEDY, use_tqdm=False)
        (output,) = llm.generate([[1] * 20], GREEDY, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 4


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no config.json in folder={tmp_path}"):
        LLM(tmp_path)
    with pytest.raises(CheckpointError, match="model='/no/such/folder': there is no such folder"):
        LLM("/no/such/folder")


def test_a_hub_that_fails_without_a_word_is_told_by_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def wordless(*args: Any, **options: Any) -> str:
        raise OSError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", wordless)
    with pytest.raises(CheckpointError, match=r"model='some/model' is no folder .*OSError"):
        LLM("some/model")


def test_ranks_that_draw_different_tokens_are_a_finding_that_names_them(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = Runner.collect

    def differs(runner: Runner, drawn: Any) -> list[int]:
        return [token ^ (runner.tp.rank == 1) for token in collect(runner, drawn)]

    with LLM(checkpoint(), tensor_parallel_size=3, fabric="threads", **SMALL) as llm:
        monkeypatch.setattr(Runner, "collect", differs)
        with pytest.raises(RuntimeError, match=r"\b1\b.*rank 0"):
            greedy(llm)


def test_a_model_that_the_engine_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UnsupportedModelError, match="model_type='mamba'"):
        LLM(tmp_path)


def test_a_damaged_checkpoint_is_named_and_leaves_nothing_behind(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint(), tmp_path / "copy"))
    (folder / "model.safetensors").write_bytes(b"")
    before = threading.active_count()
    with pytest.raises((CheckpointError, RankFailure), match=f"file={folder / 'model.safetensors'} is damaged"):
        LLM(folder, tensor_parallel_size=2, fabric="threads", **SMALL)
    assert threading.active_count() == before
