"""One rank's engine end to end: the same tokens however the work is cut up, cached, batched and spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig, ModelConfig
from engine.execution.core import CoreInfo, Progress, TokenOutput, advance, start_core
from engine.frontend.sampling import SamplingParams
from engine.parallel.group import SoloGroup, TPGroup
from engine.ranks.jobs import RankContext
from engine.scheduling.sequence import Request
from tests.engine.conftest import MakeCheckpoint, MakeReference
from tests.engine.support import FEW, on_ranks

GREEDY = SamplingParams(temperature=0, max_tokens=24)
TEXT = [(29 * position + 7 * (position // 3)) % 131 for position in range(90)]
PROMPTS = [
    TEXT[:40],
    [*TEXT[:40], 5],  # shares two whole blocks of 16 with the first
    TEXT[:16],  # exactly one block
    TEXT[:17],
    TEXT[50:],
    [130],
    TEXT[:40],  # once more
]


class Core:
    """One rank's engine, driven by the jobs that drive it on live ranks."""

    def __init__(self, folder: Path, tp: TPGroup, **options: Any) -> None:
        options = {"num_kv_blocks": 64, "dtype": "float32"} | options
        model_config = ModelConfig.from_folder(folder)
        config = EngineConfig(tensor_parallel_size=tp.size, device="cpu", **options).resolve(model_config)
        self.rank = RankContext(tp=tp, device=torch.device("cpu"))
        self.info: CoreInfo = start_core(self.rank, folder, model_config, config)
        self.num_preemptions = 0

    def advance(self, requests: Sequence[Request] = (), abort_ids: Sequence[int] = (), num_steps: int = 1) -> Progress:
        core = self.rank.state["core"]
        running = {id(sequence): sequence for sequence in core.scheduler.running}
        progress = advance(self.rank, list(requests), list(abort_ids), num_steps)
        self.num_preemptions += sum(sequence.row < 0 and sequence.finish_reason is None for sequence in running.values())
        return progress

    def serve(self, requests: Sequence[Request], *, together: bool = True) -> tuple[dict[int, list[TokenOutput]], list[bytes]]:
        """The outputs of each request, and every message's digest."""
        outputs: dict[int, list[TokenOutput]] = {request.request_id: [] for request in requests}
        digests = []
        for batch in [requests] if together else [[request] for request in requests]:
            new: Sequence[Request] = batch
            while True:
                progress = self.advance(new)
                new = ()
                digests.append(progress.digest)
                for item in progress.outputs:
                    outputs[item.request_id].append(item)
                if not progress.has_work:
                    break
        return outputs, digests


def requests_for(prompts: Sequence[Sequence[int]], params: SamplingParams = GREEDY, **changes: Any) -> list[Request]:
    return [
        replace(
            Request(
                request_id=number,
                prompt_token_ids=tuple(prompt),
                params=params,
                seed=1000 + number,
                max_tokens=params.max_tokens or 50,
                stop_token_ids=frozenset(),
            ),
            **changes,
        )
        for number, prompt in enumerate(prompts)
    ]


def ids_of(outputs: dict[int, list[TokenOutput]]) -> list[list[int]]:
    return [[item.token_id for item in outputs[number]] for number in sorted(outputs)]


@pytest.fixture(scope="module")
def expected(checkpoint: MakeCheckpoint, reference: MakeReference) -> list[list[int]]:
    """The reference's greedy continuations, none of them near a tie."""
    results = reference(checkpoint(), "float32").greedy(PROMPTS, 24)
    assert min(margin for result in results for margin in result.margins) > 1e-4, "choose other prompts: this is a tie"
    token_ids = [result.token_ids for result in results]
    assert len(set(map(tuple, token_ids))) == 6, "all but the two equal prompts must go on differently"
    return token_ids


@settings(FEW, max_examples=6)
@given(
    block_size=st.sampled_from([1, 16, 48, 256]),
    enable_prefix_caching=st.booleans(),
    enable_chunked_prefill=st.booleans(),
    max_num_seqs=st.sampled_from([1, 3, 16]),
    max_num_batched_tokens=st.sampled_from([16, 37, 2048]),
    together=st.booleans(),
)
def test_greedy_tokens_are_the_references_under_any_options(
    checkpoint: MakeCheckpoint,
    expected: list[list[int]],
    together: bool,
    block_size: int,
    max_num_batched_tokens: int,
    enable_chunked_prefill: bool,
    **options: Any,
) -> None:
    if not enable_chunked_prefill:
        max_num_batched_tokens = max(max_num_batched_tokens, 192)
    core = Core(
        checkpoint(),
        SoloGroup(),
        block_size=block_size,
        num_kv_blocks=-(-900 // block_size),
        max_num_batched_tokens=max_num_batched_tokens,
        enable_chunked_prefill=enable_chunked_prefill,
        **options,
    )
    outputs, _ = core.serve(requests_for(PROMPTS), together=together)
    assert ids_of(outputs) == expected


@pytest.mark.parametrize(("block_size", "num_kv_blocks"), [(1, 75), (4, 20), (16, 5), (16, 8)])
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_a_cache_so_small_that_sequences_are_preempted_changes_no_token(
    checkpoint: MakeCheckpoint, expected: list[list[int]], block_size: int, num_kv_blocks: int, enable_prefix_caching: bool
) -> None:
    core = Core(
        checkpoint(),
        SoloGroup(),
        block_size=block_size,
        num_kv_blocks=num_kv_blocks,
        enable_prefix_caching=enable_prefix_caching,
        max_num_batched_tokens=32,
        max_num_seqs=8,
    )
    outputs, _ = core.serve(requests_for(PROMPTS))
    assert core.num_preemptions > 0, "the cache is not small enough to test anything"
    assert ids_of(outputs) == expected


def test_what_the_prefix_cache_gives_is_counted(checkpoint: MakeCheckpoint) -> None:
    core = Core(checkpoint(), SoloGroup(), block_size=16)
    outputs, _ = core.serve(requests_for(PROMPTS), together=False)
    cached = [outputs[number][-1].num_cached_prompt_tokens for number in sorted(outputs)]
    # The third prompt is one whole block, but its last token must run.
    assert cached == [0, 32, 0, 16, 0, 0, 32]


def test_a_cache_that_came_to_hold_generated_tokens_serves_them(
    checkpoint: MakeCheckpoint, reference: MakeReference, expected: list[list[int]]
) -> None:
    core = Core(checkpoint(), SoloGroup(), block_size=16)
    core.serve(requests_for(PROMPTS[:1]))
    longer = PROMPTS[0] + expected[0] + [3]
    outputs, _ = core.serve(requests_for([longer]))
    # 64 of 65 tokens are known; the very last of the first run was drawn and never computed.
    assert outputs[0][-1].num_cached_prompt_tokens == 48
    (exact,) = reference(checkpoint(), "float32").greedy([longer], 24)
    assert ids_of(outputs) == [exact.token_ids]


SAMPLED = SamplingParams(temperature=1.2, top_k=40, top_p=0.95, max_tokens=16)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_every_rank_of_any_tp_size_draws_the_same_tokens(checkpoint: MakeCheckpoint, params: SamplingParams) -> None:
    def job(tp: TPGroup) -> tuple[list[bytes], list[list[int]]]:
        core = Core(checkpoint(), tp, dtype="float64", block_size=8, num_kv_blocks=16, max_num_batched_tokens=24, max_num_seqs=4)
        outputs, digests = core.serve(requests_for(PROMPTS[:4], params))
        return digests, ids_of(outputs)

    ((digests, solo),) = on_ranks(1, job)
    for tp_size in (2, 3):
        ranks = on_ranks(tp_size, job)
        assert ranks[0][1] == solo
        # The other ranks draw too, and keep the tokens to themselves.
        assert [rank_digests for rank_digests, _ in ranks] == [digests] * tp_size
        assert all(tokens == [[], [], [], []] for _, tokens in ranks[1:])


def test_sampled_tokens_do_not_depend_on_who_else_runs(checkpoint: MakeCheckpoint) -> None:
    requests = requests_for(PROMPTS, SAMPLED)
    together, _ = Core(checkpoint(), SoloGroup(), dtype="float64").serve(requests)
    alone, _ = Core(checkpoint(), SoloGroup(), dtype="float64").serve(requests, together=False)
    assert ids_of(together) == ids_of(alone)
    # Two equal prompts with two seeds are two texts.
    assert ids_of(together)[0] != ids_of(together)[6]


def test_a_digest_says_what_was_drawn(checkpoint: MakeCheckpoint) -> None:
    first, second = (Core(checkpoint(), SoloGroup()) for _ in range(2))
    _, digests = first.serve(requests_for(PROMPTS[:2]))
    _, others = second.serve(requests_for([PROMPTS[0], PROMPTS[4]]))
    assert digests[:1] == others[:1], "nothing has come home yet"
    assert digests != others


def test_stop_tokens_end_a_sequence_and_are_its_last_token(checkpoint: MakeCheckpoint, expected: list[list[int]]) -> None:
    stops = frozenset({expected[0][3], expected[4][0]})
    outputs, _ = Core(checkpoint(), SoloGroup()).serve(requests_for(PROMPTS, stop_token_ids=stops))
    for number, tokens in enumerate(expected):
        end = next((index for index, token in enumerate(tokens) if token in stops), None)
        assert ids_of(outputs)[number] == tokens[: None if end is None else end + 1]
        assert outputs[number][-1].finish_reason == ("length" if end is None else "stop")
        assert {item.finish_reason for item in outputs[number][:-1]} <= {None}


def test_no_stop_token_is_drawn_before_min_tokens(checkpoint: MakeCheckpoint, expected: list[list[int]]) -> None:
    stops = frozenset(expected[0][:2])
    params = SamplingParams(temperature=0, max_tokens=24, min_tokens=5)
    outputs, _ = Core(checkpoint(), SoloGroup()).serve(requests_for(PROMPTS, params, stop_token_ids=stops))
    for tokens in ids_of(outputs):
        assert not stops & set(tokens[:5])
        assert len(tokens) >= 5


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_no_more_than_max_tokens_are_drawn(checkpoint: MakeCheckpoint, expected: list[list[int]], max_tokens: int) -> None:
    outputs, _ = Core(checkpoint(), SoloGroup()).serve(requests_for(PROMPTS, max_tokens=max_tokens))
    assert ids_of(outputs) == [tokens[:max_tokens] for tokens in expected]


def test_a_sequence_may_fill_the_model_to_its_last_position(checkpoint: MakeCheckpoint, reference: MakeReference) -> None:
    prompt = TEXT + TEXT[:82]
    outputs, _ = Core(checkpoint(), SoloGroup(), max_model_len=192).serve(requests_for([prompt], max_tokens=20))
    (exact,) = reference(checkpoint(), "float32").greedy([prompt], 20)
    assert len(prompt) + 20 == 192
    assert ids_of(outputs) == [exact.token_ids]


@settings(FEW, max_examples=6)
@given(num_steps=st.integers(0, 12))
def test_an_aborted_request_brings_nothing_more_and_disturbs_nobody(
    checkpoint: MakeCheckpoint, expected: list[list[int]], num_steps: int
) -> None:
    core = Core(checkpoint(), SoloGroup(), block_size=4, num_kv_blocks=48, max_num_seqs=3, max_num_batched_tokens=16)
    requests = requests_for(PROMPTS[:4])
    outputs = {number: [] for number in range(4)}
    progress = core.advance(requests, num_steps=0)
    for step in range(400):
        progress = core.advance(abort_ids=[1] if step == num_steps else [])
        for item in progress.outputs:
            outputs[item.request_id].append(item.token_id)
        if step == num_steps:
            brought = len(outputs[1])
        if not progress.has_work:
            break
    assert [outputs[0], outputs[2], outputs[3]] == [expected[0], expected[2], expected[3]]
    assert outputs[1] == expected[1][:brought]
    scheduler = core.rank.state["core"].scheduler
    scheduler.blocks.check_integrity()
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


def test_requests_may_come_while_others_run(checkpoint: MakeCheckpoint, expected: list[list[int]]) -> None:
    core = Core(checkpoint(), SoloGroup(), max_num_batched_tokens=16, max_num_seqs=8)
    outputs: dict[int, list[int]] = {number: [] for number in range(len(PROMPTS))}
    waiting = requests_for(PROMPTS)
    while True:
        progress = core.advance([waiting.pop(0)] if waiting else [], num_steps=2)
        for item in progress.outputs:
            outputs[item.request_id].append(item.token_id)
        if not progress.has_work and not waiting:
            break
    assert list(outputs.values()) == expected


def test_the_longest_sequence_is_what_the_cache_holds(checkpoint: MakeCheckpoint) -> None:
    assert Core(checkpoint(), SoloGroup(), block_size=16, num_kv_blocks=3).info == CoreInfo(num_kv_blocks=3, max_model_len=48)
    assert Core(checkpoint(), SoloGroup(), block_size=16, num_kv_blocks=30).info.max_model_len == 192
    assert Core(checkpoint(), SoloGroup(), max_model_len=100).info.max_model_len == 100


def test_a_cache_too_small_for_the_longest_sequence_is_refused(checkpoint: MakeCheckpoint) -> None:
    # A block of 2 layers x 2 x 3 heads x 16 slots x 8 x 4 bytes is 6 KiB.
    with pytest.raises(ValueError, match=r"num_kv_blocks=3 x block_size=16 tokens, fewer than max_model_len=100"):
        Core(checkpoint(), SoloGroup(), block_size=16, num_kv_blocks=None, kv_cache_gib=19 / 2**20, max_model_len=100)
    with pytest.raises(ValueError, match=r"num_kv_blocks=0 .*give the cache more memory"):
        Core(checkpoint(), SoloGroup(), num_kv_blocks=None, kv_cache_gib=1e-9)


def test_cache_memory_becomes_blocks_as_many_on_every_rank(checkpoint: MakeCheckpoint) -> None:
    # Six query heads on four ranks: the first two hold one KV head of three, the others one too, with nine: uneven.
    family = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 45}

    def job(tp: TPGroup) -> int:
        # A block of one KV head: 2 layers x 2 x 16 slots x 8 x 4 bytes = 2 KiB; two blocks of two heads fit in 9 KiB.
        return Core(checkpoint(**family), tp, num_kv_blocks=None, kv_cache_gib=9 / 2**20, block_size=16).info.num_kv_blocks

    assert on_ranks(2, job) == [2, 2]
    assert on_ranks(9, job) == [4] * 9
