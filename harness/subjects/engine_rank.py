"""The engine inside one rank, as checks see it: the model through its runner, and its parts alone.

Shape suffixes: T = tokens of one step, R = rows, V = vocabulary, Q / N = this rank's query / KV heads, H = head dim, L = all
tokens of a sequence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import engine.layers.rotary as rotary
from engine.config import EngineConfig, ModelConfig
from engine.execution.core import EngineCore
from engine.execution.runner import Runner
from engine.frontend.sampling import SamplingParams
from engine.kernels.rope import rope_store_kv, rope_store_kv_torch
from engine.layers.attention_backends import BACKENDS
from engine.layers.attention_layout import AttentionLayout, LayerCache
from engine.layers.dispatch import pick
from engine.layers.norm import RMSNorm
from engine.layers.sampler import sample
from engine.models.table import held_in
from engine.parallel.embedding import ParallelLMHead, VocabParallelEmbedding
from engine.parallel.group import TPGroup
from engine.parallel.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from engine.parallel.sharding import HeadShard, head_shard, scale_range
from engine.ranks.ranks import RankContext
from engine.scheduling.batch import SamplingBatch, StepBatch, build_batch
from engine.scheduling.kv_cache import BlockManager
from engine.scheduling.scheduler import Chunk
from engine.scheduling.sequence import Request
from engine.scheduling.sequence import Sequence as EngineSequence
from harness.subjects.base import Schedule
from harness.subjects.on_ranks import LiveRank
from harness.subjects.rank import AttentionStep, DrawRow, LayerSpec, Rotated, SchedulerLimits, StepInputs
from harness.verification.budgets import bits
from reference.checkpoints import as_config
from reference.hf import Activations
from reference.shards import Ownership, owners


class EngineRank(LiveRank):
    """The engine on one rank. Its layout is the rule of ``reference/shards.py``, which shares no code with the engine's."""

    @property
    def tp(self) -> TPGroup:
        """This rank's group, as the context has it now."""
        return self.context.tp

    @property
    def collectives(self) -> TPGroup:
        return self.tp

    @property
    def attention(self) -> EngineAttention:
        return EngineAttention(self.context)

    @staticmethod
    def layout(config: Mapping[str, Any], name: str, shape: tuple[int, ...], tp_size: int) -> Ownership:
        return owners(config, name, shape, tp_size)

    def load(self, folder: Path, *, dtype: str, options: Mapping[str, Any]) -> None:
        self.model_config = ModelConfig.from_folder(folder)
        config = EngineConfig(tensor_parallel_size=self.tp_size, device=self.device.type, dtype=dtype, **options)
        self.config = config.resolve(self.model_config)
        self.runner = Runner(folder, self.model_config, self.config, self.tp, self.device, at_most=self.context.at_most)
        self.num_blocks = self.runner.make_cache()
        assert self.config.block_size is not None, "config must be resolved"
        self.block_size = self.config.block_size

    def shards(self) -> dict[str, Tensor]:
        shards: dict[str, Tensor] = {}
        for path, module in self.runner.model.named_modules():
            for kind, parameter in module.named_parameters(recurse=False):
                for name, part in self._split(path, module, parameter.data):
                    shards[f"{name}.{kind}"] = part
        return shards

    def logits(self, schedule: Schedule) -> list[Tensor]:
        collected: list[list[Tensor]] = [[] for _ in schedule.sequences]

        def run(batch: StepBatch, rows: list[tuple[int, range]]) -> None:
            logits = self.runner.logits(batch)
            for sequence, span in rows:
                collected[sequence].append(logits[span.start : span.stop].cpu())

        self._play(schedule, run)
        return [torch.cat(parts) for parts in collected]

    def activations(self, schedule: Schedule, sequence: int) -> Activations:
        found = Activations(inputs={}, outputs={})
        span = range(0)
        parts: dict[tuple[str, str], list[Tensor]] = {}

        def record(side: str, path: str, module: nn.Module, value: Tensor) -> None:
            pieces = self._split(path, module, value.T) if side == "outputs" else [(path, value.T)]
            for name, piece in pieces:
                parts.setdefault((side, name), []).append(piece.T[span.start : span.stop].cpu().clone())

        def hook(path: str) -> Callable[..., None]:
            def record_call(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if not len(span):
                    return
                if isinstance(module, RowParallelLinear):
                    record("inputs", path, module, args[0])
                record("outputs", path, module, output[0] if isinstance(output, tuple) else output)

            return record_call

        def run(batch: StepBatch, rows: list[tuple[int, range]]) -> None:
            nonlocal span
            span = next((rows_of for number, rows_of in rows if number == sequence), range(0))
            # Module by module, never as a graph: no hook runs in a replay.
            self.runner.model.logits(self.runner.forward(batch.to(self.runner.device)))

        with ExitStack() as hooks:
            for path, module in self.runner.model.named_modules():
                if isinstance(module, (MergedColumnParallelLinear, RowParallelLinear, RMSNorm)) or path.endswith(
                        ("embed_tokens", "lm_head")):
                    hooks.callback(module.register_forward_hook(hook(path)).remove)
            self._play(schedule, run)
        for (side, name), pieces in parts.items():
            getattr(found, side)[name] = torch.cat(pieces)
        return found

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]],
                 before_step: Callable[[str], None] = lambda phase: None) -> list[list[int]]:
        core = EngineCore(cast(Runner, _Announcing(self.runner, before_step)), self.num_blocks)
        outputs: list[list[int]] = [[] for _ in prompts]
        for number, (prompt, values) in enumerate(zip(prompts, params, strict=True)):
            sampling = SamplingParams(**values)
            core.scheduler.add(_sequence(number, prompt, sampling, max_tokens=sampling.max_tokens or 16))
        while core.has_work:
            for sequence, token_id in core.step():
                outputs[sequence.request.request_id].append(token_id)
        return outputs

    @torch.inference_mode()
    def layer(self, spec: LayerSpec) -> Callable[[Tensor], Tensor]:
        layer, tensors = _build(self.tp, self.device, spec)
        for parameter, loaded, shard_id in tensors:
            parameter.weight_loader(*((parameter, loaded) if shard_id is None else (parameter, loaded, shard_id)))

        @torch.inference_mode()
        def show(given: Tensor) -> Tensor:
            shown: Tensor = layer(given.to(self.device)).cpu()
            return shown

        return show

    @torch.inference_mode()
    def draw(self, logits_V: Tensor, rows: Sequence[DrawRow]) -> Tensor:
        def column(name: str, dtype: torch.dtype) -> Tensor:
            return torch.tensor([getattr(row, name) for row in rows], dtype=dtype, device=self.device)

        banned = [(number, token_id) for number, row in enumerate(rows) for token_id in row.banned]
        sampling = SamplingBatch(
            temperature_R=column("temperature", torch.float32), top_k_R=column("top_k", torch.int32),
            top_p_R=column("top_p", torch.float32), seed_R=column("seed", torch.int64),
            position_R=column("position", torch.int64),
            banned_row_X=torch.tensor([row for row, _ in banned], dtype=torch.int64, device=self.device),
            banned_token_X=torch.tensor([token_id for _, token_id in banned], dtype=torch.int64, device=self.device),
            filters=True,
        )
        return sample(logits_V.to(self.device).expand(len(rows), -1).contiguous(), sampling).cpu()

    def scheduler(self, limits: SchedulerLimits, launch: Callable[[StepInputs], list[int]]) -> EngineScheduler:
        return EngineScheduler(limits, launch)

    def cache_blocks(self) -> tuple[int, int]:
        held = {tensor.shape[0] for cache in self.runner.caches for tensor in (cache.k_PNBH, cache.v_PNBH)}
        return self.num_blocks, min(held)

    @torch.inference_mode()
    def _play(self, schedule: Schedule, run: Callable[[StepBatch, list[tuple[int, range]]], None]) -> None:
        """Hand each of the schedule's steps to ``run``: the batch, and which of its rows are which sequence's."""
        blocks = BlockManager(self.num_blocks, self.block_size, enable_prefix_caching=False)
        sequences = [_sequence(number, token_ids) for number, token_ids in enumerate(schedule.sequences)]
        for number, sequence in enumerate(sequences):
            sequence.row = number
        for step in schedule.steps:
            chunks = []
            for number, num_tokens in sorted(step, key=lambda part: part[1] > 1):
                sequence = sequences[number]
                blocks.grow(sequence, sequence.num_computed + num_tokens)
                # A single token draws one, which nobody looks at: so it runs as a decode step of generation does.
                chunks.append(Chunk(sequence, sequence.num_computed, num_tokens, samples=num_tokens == 1, in_flight=False))
                sequence.num_computed += num_tokens
            rows, first = [], 0
            for chunk in chunks:
                rows.append((chunk.sequence.request.request_id, range(first, first + chunk.num_tokens)))
                first += chunk.num_tokens
            run(build_batch(chunks, self.block_size), rows)

    def _split(self, path: str, module: nn.Module, value: Tensor) -> list[tuple[str, Tensor]]:
        """(reference name, its rows of ``value``) for each module that the engine fuses in ``module``."""
        held = held_in(self.runner.family.modules, path)
        if len(held) < 2 or not isinstance(module, MergedColumnParallelLinear):
            return [(held[0].path if held else path, value)]
        return [(source.path, part) for source, part in zip(held, value.split(list(module.local_sizes)), strict=True)]


def _sequence(number: int, token_ids: Sequence[int], params: SamplingParams | None = None, *,
              max_tokens: int = 1) -> EngineSequence:
    params = params or SamplingParams()
    return EngineSequence.from_request(Request(
        request_id=number, prompt_token_ids=tuple(token_ids), params=params, seed=number if params.seed is None else params.seed,
        max_tokens=max_tokens, stop_token_ids=frozenset(params.stop_token_ids)))


class _Announcing:
    """A runner that says which phase each step is."""

    def __init__(self, runner: Runner, before_step: Callable[[str], None]) -> None:
        self._runner = runner
        self._before_step = before_step

    def launch(self, batch: StepBatch) -> Any:
        self._before_step("decode" if batch.num_decodes == batch.num_seqs else "prefill")
        return self._runner.launch(batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


def _build(tp: TPGroup, device: torch.device, spec: LayerSpec) -> tuple[nn.Module, list[tuple[Any, Tensor, Any]]]:
    """The layer, and (parameter, whole checkpoint tensor, shard_id) for each tensor to load."""
    config, kind = spec.config, spec.kind
    hidden, width, vocab, head_dim = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    common: dict[str, Any] = {"tp": tp, "dtype": spec.dtype, "device": device}
    if kind != "embedding":
        common["bias"] = spec.biases is not None
    shard_ids: Sequence[Any] = (None,)
    layer: Any
    if kind == "replicated":
        layer = ReplicatedLinear(hidden, width, **common)
    elif kind == "column":
        layer = ColumnParallelLinear(hidden, width, **common)
    elif kind == "merged":
        layer, shard_ids = MergedColumnParallelLinear(hidden, (width, width), **common), (0, 1)
    elif kind == "qkv":
        layer, shard_ids = QKVParallelLinear(hidden, head_dim, *heads, **common), ("q", "k", "v")
    elif kind == "attention_output":
        mine = head_shard(*heads, tp_rank=tp.rank, tp_size=tp.size)
        layer = RowParallelLinear(heads[0] * head_dim, hidden, input_range=scale_range(mine.q_heads, head_dim), **common)
    elif kind == "row":
        layer = RowParallelLinear(width, hidden, **common)
    elif kind == "embedding":
        layer = VocabParallelEmbedding(vocab, hidden, **common)
    else:
        layer = ParallelLMHead(vocab, hidden, **common)
    tensors = [(layer.weight, whole, shard_id) for whole, shard_id in zip(spec.weights, shard_ids, strict=True)]
    if spec.biases is not None:
        tensors += [(layer.bias, whole, shard_id) for whole, shard_id in zip(spec.biases, shard_ids, strict=True)]
    return layer, tensors


class EngineAttention:
    """Attention backends and rotary embedding of one rank."""

    def __init__(self, context: RankContext) -> None:
        self._tp = context.tp
        self._device = context.device

    def heads(self, num_q_heads: int, num_kv_heads: int) -> tuple[range, range]:
        shard = self._shard(num_q_heads, num_kv_heads)
        return shard.q_heads, shard.kv_heads

    @torch.inference_mode()
    def attend(self, step: AttentionStep) -> dict[str, list[Tensor]]:
        heads = self._shard(step.num_q_heads, step.num_kv_heads)
        layout = AttentionLayout(heads=heads, head_dim=step.head_dim, block_size=step.block_size, dtype=step.dtype,
                                 device=self._device)
        chunks, num_blocks = _chunks(step)
        cache, batch = self._cache(step, heads, chunks, num_blocks), build_batch(chunks, step.block_size).to(self._device)
        order = [chunk.sequence.request.request_id for chunk in chunks]
        given_TQH = torch.cat([step.queries[number][:, heads.q_heads.start : heads.q_heads.stop] for number in order])
        found: dict[str, list[Tensor]] = {}
        for name, backend in BACKENDS.items():
            if backend.refusal(layout) is None:
                parts = backend(layout)(given_TQH.to(self._device), cache, batch).cpu().split([c.num_tokens for c in chunks])
                found[name] = [parts[order.index(number)] for number in range(len(order))]
        return found

    def rotary_tables(self, config: Mapping[str, Any], num_positions: int) -> tuple[Tensor, Tensor]:
        model = ModelConfig.from_hf(as_config(config))
        cos, sin = rotary.rope_tables(model.hf_config, model.head_dim, num_positions, device=self._device)
        return cos, sin

    @torch.inference_mode()
    def rotate(self, config: Mapping[str, Any], tables: tuple[Tensor, Tensor], qkv_TC: Tensor, positions_T: Tensor,
               slots_T: Tensor, *, num_slots: int, block_size: int, norms: Sequence[Tensor | None]) -> Rotated:
        model = ModelConfig.from_hf(as_config(config))
        heads = self._shard(model.num_q_heads, model.num_kv_heads)
        shape = (2, num_slots // block_size, heads.local_num_kv_heads, block_size, model.head_dim)
        caches = torch.full(shape, float("nan"), dtype=qkv_TC.dtype, device=self._device)
        q_norm_H, k_norm_H = (None if norm is None else norm.to(self._device) for norm in norms)
        q_TQH = pick(caches, rope_store_kv, rope_store_kv_torch)(
            qkv_TC.to(self._device), positions_T.to(self._device), *tables, caches[0], caches[1], slots_T.to(self._device),
            q_norm_weight_H=q_norm_H, k_norm_weight_H=k_norm_H, eps=model.rms_norm_eps)
        k_slots, v_slots = (cache.cpu().transpose(1, 2).flatten(0, 1) for cache in caches)
        return Rotated(q=q_TQH.cpu(), k_slots=k_slots, v_slots=v_slots)

    def _shard(self, num_q_heads: int, num_kv_heads: int) -> HeadShard:
        return head_shard(num_q_heads, num_kv_heads, tp_rank=self._tp.rank, tp_size=self._tp.size)

    def _cache(self, step: AttentionStep, heads: HeadShard, chunks: Sequence[Chunk], num_blocks: int) -> LayerCache:
        """This rank's cache, NaN where no token stands. A shared block is written by each of its holders, alike."""
        shape = (num_blocks, heads.local_num_kv_heads, step.block_size, step.head_dim)
        caches = torch.full((2, *shape), float("nan"), dtype=step.dtype)
        for chunk in chunks:
            number = chunk.sequence.request.request_id
            for cache, values_LNH in zip(caches, (step.keys[number], step.values[number]), strict=True):
                for position, row in enumerate(values_LNH[:, heads.kv_heads.start : heads.kv_heads.stop]):
                    block, slot = divmod(position, step.block_size)
                    cache[chunk.sequence.blocks[block], :, slot] = row
        return LayerCache(*caches.to(self._device))


def _chunks(step: AttentionStep) -> tuple[list[Chunk], int]:
    """The step, decodes first, its blocks handed out by the engine's own bookkeeping; and the number of blocks."""
    num_blocks = 1 + sum(-(-len(keys) // step.block_size) for keys in step.keys)
    blocks = BlockManager(num_blocks, step.block_size)
    # Hand all blocks out and take them back in another order, so that no table counts up.
    fillers = [_sequence(-1 - number, [0]) for number in range(num_blocks)]
    for filler in fillers:
        blocks.grow(filler, 1)
    for filler in random.Random(step.seed).sample(fillers, num_blocks):
        blocks.release(filler)
    chunks = []
    for number, (queries, keys) in enumerate(zip(step.queries, step.keys, strict=True)):
        total, new = len(keys), len(queries)
        ids = [token if token < step.shared else (number + 1) * 100_000 + token for token in range(total)]
        sequence = _sequence(number, ids)
        hits = blocks.cached_prefix(sequence)[: (total - new) // step.block_size]
        blocks.take_prefix(sequence, hits)
        blocks.grow(sequence, total)
        sequence.num_computed = total
        blocks.register(sequence)
        chunks.append(Chunk(sequence, total - new, new, samples=False, in_flight=False))
    return sorted(chunks, key=lambda chunk: chunk.num_tokens > 1), num_blocks


class EngineScheduler:
    """The engine's loop over a device that somebody else makes up."""

    def __init__(self, limits: SchedulerLimits, launch: Callable[[StepInputs], list[int]]) -> None:
        self._core = EngineCore(cast(Runner, _MadeUpRunner(limits, launch)), limits.num_blocks)

    @property
    def has_work(self) -> bool:
        return self._core.has_work

    def add(self, number: int, prompt: tuple[int, ...], num_tokens: int) -> None:
        self._core.scheduler.add(_sequence(number, prompt, SamplingParams(temperature=0.0, seed=0), max_tokens=num_tokens))

    def abort(self, number: int) -> None:
        self._core.scheduler.abort(number)

    def step(self) -> list[tuple[int, int]]:
        return [(sequence.request.request_id, token_id) for sequence, token_id in self._core.step()]

    def blocks(self) -> tuple[list[int], list[int], int]:
        blocks = self._core.scheduler.blocks
        held = [block for sequence in self._core.scheduler.running for block in sequence.blocks]
        return held, list(blocks.ref_counts), blocks.num_free


class _MadeUpRunner:
    """As much of ``Runner`` as the loop uses."""

    def __init__(self, limits: SchedulerLimits, launch: Callable[[StepInputs], list[int]]) -> None:
        self.config = limits
        self._launch = launch

    def launch(self, batch: StepBatch) -> list[int]:
        return self._launch(StepInputs(
            cu_seqlens=batch.cu_seqlens_S1.tolist(), context_lens=batch.context_lens_S.tolist(),
            block_tables=batch.block_tables_SB.tolist(), slots=batch.slots_T.tolist(), token_ids=batch.token_ids_T.tolist(),
            positions=batch.positions_T.tolist(), rows=batch.rows_S.tolist(), samples=batch.sample_S.tolist(),
            digest=digest_of(batch)))

    def collect(self, drawn: list[int]) -> list[int]:
        return drawn


def digest_of(batch: StepBatch) -> bytes:
    """Hash of everything that a step is given."""
    total = hashlib.blake2b(digest_size=8)

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            total.update(repr((tuple(value.shape), value.dtype)).encode() + bits(value.cpu()).numpy().tobytes())
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                total.update(field.name.encode())
                add(getattr(value, field.name))
        else:
            total.update(repr(value).encode())

    add(batch)
    return total.digest()
