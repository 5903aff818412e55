"""The decode step's buckets and padding, on the CPU: the eager form of what a GPU replays."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from engine.config import EngineConfig, ModelConfig
from engine.execution.decode_graph import DecodeGraphs, StepInputs, buckets
from engine.execution.runner import Runner
from engine.frontend.sampling import SamplingParams
from engine.parallel.group import SoloGroup
from engine.scheduling.batch import build_batch
from engine.scheduling.scheduler import Chunk
from engine.scheduling.sequence import Request, Sequence
from tests.engine.conftest import MakeCheckpoint


@pytest.fixture
def tiny_runner(checkpoint: MakeCheckpoint) -> Runner:
    folder = checkpoint(vocab_size=53)
    model_config = ModelConfig.from_folder(folder)
    config = EngineConfig(max_num_seqs=6, num_kv_blocks=16, block_size=4, max_model_len=32, device="cpu",
                          dtype="float64").resolve(model_config)
    runner = Runner(folder, model_config, config, SoloGroup(), torch.device("cpu"))
    runner.make_cache()
    return runner


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 40, 64, 100, 256, 512])
def test_buckets_rise_to_the_most_sequences(most: int) -> None:
    sizes = buckets(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    assert all(later <= 2 * earlier + 8 for earlier, later in pairwise(sizes))


def sequence(number: int, token_ids: list[int], blocks: list[int], *, temperature: float = 0.0) -> Sequence:
    params = SamplingParams(temperature=temperature, max_tokens=4)
    made = Sequence.from_request(Request(request_id=number, prompt_token_ids=tuple(token_ids), params=params, seed=17 + number,
                                         max_tokens=4, stop_token_ids=frozenset()))
    made.blocks, made.row, made.num_computed = blocks, number, len(token_ids)
    return made


def decode_chunks(sequences: list[Sequence]) -> list[Chunk]:
    return [Chunk(each, len(each.token_ids) - 1, 1, samples=True, in_flight=False) for each in sequences]


def test_staged_inputs_hold_the_batch_and_padding_behind_it() -> None:
    batch = build_batch(decode_chunks([sequence(0, [5, 6, 7], [3]), sequence(2, [8] * 6, [1, 4], temperature=0.5)]), 4)
    staged = StepInputs(4, 5, padding_row=9, device=torch.device("cpu"))
    staged.buffer.fill_(255)  # whatever an earlier step left
    staged.fill(batch)
    assert staged.context_S.tolist() == [3, 6, 0, 0]
    assert staged.row_S.tolist() == [0, 2, 9, 9]
    assert staged.token_S[:2].tolist() == [7, 8]
    assert staged.seed_S[:2].tolist() == [17, 19]
    assert staged.temperature_S[:2].tolist() == [0.0, 0.5]
    assert staged.tables_SB[0, 0].item() == 3
    assert staged.tables_SB[1, :2].tolist() == [1, 4]


def test_a_bucket_with_padding_gives_what_the_plain_step_gives(tiny_runner: Runner) -> None:
    """The same tokens and logits, whatever stands in the padding; no other sequence's row is written."""
    sequences = [sequence(number, list(range(1, 3 + 3 * number)), [4 * number, 4 * number + 1, 4 * number + 2], temperature=0.7)
                 for number in range(3)]
    prefill = [Chunk(each, 0, len(each.token_ids) - 1, samples=False, in_flight=False) for each in sequences]
    prefill.sort(key=lambda chunk: chunk.num_tokens > 1)
    tiny_runner.launch(build_batch(prefill, tiny_runner.config.block_size or 0))
    batch = build_batch(decode_chunks(sequences), tiny_runner.config.block_size or 0)
    with torch.inference_mode():
        plain_logits, plain_tokens = tiny_runner._step(batch)
        tiny_runner.last_token_M.fill_(-7)
        graphs = DecodeGraphs(tiny_runner._step, max_num_seqs=tiny_runner.config.max_num_seqs, max_blocks=8,
                              block_size=tiny_runner.config.block_size or 0, padding_row=tiny_runner.config.max_num_seqs,
                              last_token_M=tiny_runner.last_token_M, device=torch.device("cpu"))
        assert graphs.can_run(batch)
        logits, tokens = graphs.run(batch)
    assert tokens.tolist() == plain_tokens.tolist()
    # In float64 another number of rows can only change the order of sums.
    assert (logits - plain_logits).abs().max() <= 2.0**-40 * plain_logits.abs().max()
    assert tiny_runner.last_token_M[:3].tolist() == plain_tokens.tolist()
    assert set(tiny_runner.last_token_M[3:-1].tolist()) <= {-7}


def test_a_batch_with_a_prefill_chunk_is_not_for_the_graph() -> None:
    chunks = decode_chunks([sequence(0, [5, 6, 7], [3])])
    chunks.append(Chunk(sequence(1, [1, 2, 3], [1]), 0, 3, samples=True, in_flight=False))
    assert not DecodeGraphs.can_run(build_batch(chunks, 4))
