"""Workloads are the ones that they are said to be, and bounds are those that were worked out by hand."""

from __future__ import annotations

import pytest

from engine.config import ModelConfig
from harness.bench.bounds import Bounds, all_reduce_bytes, num_parameters
from harness.bench.shapes import NO_SPECIAL_TOKENS, SHAPES
from harness.bench.workloads import WORKLOADS, GenerateWork, w1_requests, works_of
from reference.checkpoints import as_config, weight_shapes


def config_of(shape: str) -> ModelConfig:
    return ModelConfig.from_hf(as_config(dict(SHAPES[shape]) | NO_SPECIAL_TOKENS))


def on_h200(shape: str, tp_size: int = 1) -> Bounds:
    return Bounds(config=config_of(shape), itemsize=2, tp_size=tp_size, copy_bytes_per_s=4.3e12, matmul_flop_per_s=7.9e14,
                  all_reduce_s=5e-6)


def test_w1_is_nano_vllms_own_benchmark() -> None:
    requests = w1_requests()
    assert len(requests) == 256
    assert sum(len(prompt) for prompt, _ in requests) == 142_827
    assert sum(num_tokens for _, num_tokens in requests) == 133_966
    assert max(len(prompt) + num_tokens for prompt, num_tokens in requests) == 2_011


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_repeats_and_its_engine_has_room_for_it(name: str) -> None:
    for work in works_of([name]):
        if isinstance(work, GenerateWork):
            requests = work.draw()
            assert requests == work.draw()
            assert len(requests) <= work.limits.max_num_seqs, "all requests of a case run at once"
            assert all(len(prompt) + num_tokens <= work.limits.max_model_len for prompt, num_tokens in requests)


def test_no_case_of_a_workload_has_another_ones_name() -> None:
    for name in WORKLOADS:
        cases = [(work.workload, work.case) for work in works_of([name])]
        assert len(set(cases)) == len(cases)


def test_an_unknown_workload_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"workloads=\['w2'\] are unknown; there are: w1, decode"):
        works_of(["w1", "w2"])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_parameters_that_a_step_reads_are_counted_as_the_checkpoint_has_them(shape: str) -> None:
    config = dict(SHAPES[shape]) | NO_SPECIAL_TOKENS
    # Norms are left out, a few thousand of many million; an input embedding of its own is looked up, not read whole.
    read = {name: dims for name, dims in weight_shapes(config).items() if len(dims) == 2}
    if not config["tie_word_embeddings"]:
        del read["model.embed_tokens.weight"]
    assert num_parameters(config_of(shape)) == sum(rows * columns for rows, columns in read.values())


@pytest.mark.parametrize(("shape", "milliseconds"), [
    ("qwen3-0.6b", (0.305, 2.03, 7.38)), ("qwen3-8b", (3.56, 5.77, 13.9)), ("llama-3.1-8b", (3.52, 5.49, 12.9)),
    ("qwen3-14b", (6.55, 9.00, 19.1)), ("qwen3-32b", (14.9, 18.9, 36.7)),
])
def test_decode_bounds_are_those_worked_out_by_hand(shape: str, milliseconds: tuple[float, ...]) -> None:
    found = [1e3 * on_h200(shape).decode_step_s(batch_size=batch, context=1024) for batch in (1, 64, 256)]
    assert [float(f"{value:.3g}") for value in found] == list(milliseconds)


@pytest.mark.parametrize(("shape", "tp_size", "thousand_tokens"), [
    ("qwen3-0.6b", 1, 36.2), ("qwen3-0.6b", 2, 62.7), ("qwen3-8b", 1, 12.7), ("qwen3-8b", 2, 23.7),
])
def test_bounds_of_w1_are_those_worked_out_by_hand(shape: str, tp_size: int, thousand_tokens: float) -> None:
    requests = w1_requests()
    seconds = on_h200(shape, tp_size).generate_s([len(prompt) for prompt, _ in requests], [count for _, count in requests])
    assert round(133_966 / seconds / 1e3, 1) == thousand_tokens


def test_prefill_is_bound_by_arithmetic_and_a_single_token_by_reading_the_weights() -> None:
    least = on_h200("qwen3-0.6b")
    config, size = least.config, num_parameters(least.config)
    assert least.prefill_s([1]) == size * 2 / least.copy_bytes_per_s
    body = size - config.vocab_size * config.hidden_size
    assert least.prefill_s([16_384]) > 16_384 * 2 * body / least.matmul_flop_per_s


def test_an_all_reduce_of_two_ranks_sends_its_message_once() -> None:
    assert [all_reduce_bytes(1000, tp_size) for tp_size in (1, 2, 4)] == [0, 1000, 1500]
