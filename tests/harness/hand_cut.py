"""A second subject: a small Llama of plain torch functions, cut by hand over threads, with the classic mistakes as options.

It shares no code with the engine, and its rule is another one: rank r of n holds the features from ``size * r // n`` on, the
vocabulary too, and nothing is padded or fused. It has no cache: every step computes its sequences anew.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from harness.subjects.base import Loaded, Placement, Schedule, Subject, SubjectFailure
from harness.subjects.rank import AttentionStep, DrawRow, LayerSpec, Rank, Rotated, SchedulerLimits, StepInputs
from reference.hf import DTYPES, Activations
from reference.shards import Ownership

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW = ("o_proj", "down_proj")
VOCABULARY = ("embed_tokens", "lm_head")
DEADLINE_S = 60.0

MISTAKES: dict[str, tuple[str, str]] = {
    "fused qkv cut as one": ("weights", "model.layers.0.self_attn.q_proj"),
    "fused gate and up cut as one": ("weights", "model.layers.0.mlp.gate_proj"),
    "columns of rank 0 on every rank": ("weights", "model.layers.0.self_attn.o_proj"),
    "bias on every rank": ("layers", "model.layers.0.self_attn.o_proj"),
    "never reduced": ("layers", "model.layers.0.mlp.down_proj"),
    "border token on two ranks": ("layers", "model.embed_tokens"),
    "head ratio of one rank": ("attention", "model.layers.0.self_attn (attention, before o_proj)"),
    "no causal mask": ("attention", "model.layers.0.self_attn (attention, before o_proj)"),
    "rotated the other way": ("attention", "model.layers.0.self_attn (attention, before o_proj)"),
    "heads gathered backwards": ("layers", "lm_head"),
}
"""Mistake -> a check besides ``logits`` that must see it, and the module that ``logits`` must name."""


def span(size: int, rank: int, tp_size: int) -> range:
    """What of so many features a rank holds."""
    return range(size * rank // tp_size, size * (rank + 1) // tp_size)


def head_ranges(num_q_heads: int, num_kv_heads: int, rank: int, tp_size: int) -> tuple[range, range]:
    """A rank's query heads, and the KV heads that they use."""
    q_heads, group = span(num_q_heads, rank, tp_size), num_q_heads // num_kv_heads
    return q_heads, range(q_heads.start // group, (q_heads.stop - 1) // group + 1)


@dataclass(frozen=True, slots=True)
class Row:
    """A module, for the search for the first wrong one."""

    path: str
    kind: str
    fed_by: str
    fused: str | None = None
    has_output: bool = True


def rows_of(num_layers: int) -> Iterator[Row]:
    """In the order of computation."""
    yield Row("model.embed_tokens", "vocabulary", "token ids")
    for number in range(num_layers):
        layer = f"model.layers.{number}"
        norms = f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"
        yield Row(norms[0], "replicated", "residual")
        yield from (Row(f"{layer}.self_attn.{name}_proj", "column", norms[0], f"{layer}.qkv") for name in "qkv")
        yield Row(f"{layer}.self_attn.o_proj", "row", "attention")
        yield Row(norms[1], "replicated", "residual")
        yield from (Row(f"{layer}.mlp.{name}", "column", norms[1], f"{layer}.gate_up") for name in ("gate_proj", "up_proj"))
        yield Row(f"{layer}.mlp.down_proj", "row", "activation")
    yield Row("model.norm", "replicated", "residual")
    yield Row("lm_head", "vocabulary", "model.norm")


@dataclass(slots=True)
class Meeting:
    """Where threads hand each other tensors."""

    size: int
    barrier: threading.Barrier = field(init=False)
    left: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=DEADLINE_S)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.left[rank] = value
        self.barrier.wait()
        everything = [self.left[other] for other in range(self.size)]
        self.barrier.wait()
        return everything


class HandCutRank(Rank):
    """One rank, in a thread."""

    def __init__(self, rank: int, meeting: Meeting, mistake: str) -> None:
        self.tp_rank, self.tp_size, self.device = rank, meeting.size, torch.device("cpu")
        self._meeting = meeting
        self._mistake = mistake
        self.weights: dict[str, Tensor] = {}

    @staticmethod
    def layout(config: Mapping[str, Any], name: str, shape: tuple[int, ...], tp_size: int) -> Ownership:
        *_, layer, kind = name.split(".")
        dim = 0 if layer in COLUMN + VOCABULARY else 1 if layer in ROW and kind == "weight" else None
        owned = (tuple(HandCutRank._indices(config, layer, shape[dim], rank, tp_size) for rank in range(tp_size))
                 if dim is not None else tuple(np.arange(0) for _ in range(tp_size)))
        return Ownership(name=name, shape=tuple(shape), tp_size=tp_size, dim=dim, indices=owned)

    @staticmethod
    def _indices(config: Mapping[str, Any], layer: str, size: int, rank: int, tp_size: int) -> Any:
        if layer not in ("q_proj", "k_proj", "v_proj", "o_proj"):
            return np.array(span(size, rank, tp_size))
        num_q = config["num_attention_heads"]
        q_heads, kv_heads = head_ranges(num_q, config.get("num_key_value_heads") or num_q, rank, tp_size)
        heads = q_heads if layer in ("q_proj", "o_proj") else kv_heads
        head_dim = config.get("head_dim") or config["hidden_size"] // num_q
        return np.arange(heads.start * head_dim, heads.stop * head_dim)

    def load(self, folder: Path, *, dtype: str, options: Mapping[str, Any]) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        whole = {name: tensor.to(DTYPES[dtype]) for name, tensor in load_file(folder / "model.safetensors").items()}
        if self.config.get("tie_word_embeddings") and "lm_head.weight" not in whole:
            whole["lm_head.weight"] = whole["model.embed_tokens.weight"]
        self.weights = {name: self._cut(self.config, name, tensor) for name, tensor in whole.items()}
        for mistake, names in (("fused qkv cut as one", ("q_proj", "k_proj", "v_proj")),
                               ("fused gate and up cut as one", ("gate_proj", "up_proj"))):
            if self._mistake == mistake:
                self._cut_as_one(whole, names)
        self.tables = [table[0] for table in LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))(
            torch.zeros(1, dtype=torch.float32), torch.arange(self.config["max_position_embeddings"])[None])]

    def _cut(self, config: Mapping[str, Any], name: str, whole: Tensor) -> Tensor:
        owned = self.layout(config, name, tuple(whole.shape), self.tp_size)
        rank = 0 if self._mistake == "columns of rank 0 on every rank" and owned.dim == 1 else self.tp_rank
        return whole if owned.dim is None else whole.index_select(owned.dim, torch.from_numpy(owned.indices[rank]))

    def _cut_as_one(self, whole: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
        """As if the fused tensor were one matrix: rank r gets its r-th part, and reads it as if it were cut one by one."""
        for first in [name for name in whole if name.split(".")[-2] == names[0]]:
            paths = [first.replace(names[0], name) for name in names]
            fused = torch.cat([whole[path] for path in paths])
            sizes = [len(self.weights[path]) for path in paths]
            start = min(len(fused) * self.tp_rank // self.tp_size, len(fused) - sum(sizes))
            self.weights |= dict(zip(paths, fused[start : start + sum(sizes)].split(sizes), strict=True))

    def shards(self) -> dict[str, Tensor]:
        return self.weights

    def logits(self, schedule: Schedule) -> list[Tensor]:
        return [self._run(list(ids), Activations(inputs={}, outputs={})) for ids in schedule.sequences]

    def activations(self, schedule: Schedule, sequence: int) -> Activations:
        found = Activations(inputs={}, outputs={})
        self._run(list(schedule.sequences[sequence]), found)
        return found

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]],
                 before_step: Callable[[str], None] = lambda phase: None) -> list[list[int]]:
        answers = []
        for prompt, own in zip(prompts, params, strict=True):
            ids = list(prompt)
            for _ in range(own["max_tokens"]):
                row = DrawRow(temperature=own["temperature"], top_k=0, top_p=own.get("top_p", 1.0), seed=own.get("seed") or 0,
                              position=len(ids))
                ids += self.draw(self._run(ids, Activations(inputs={}, outputs={}))[-1], [row]).tolist()
            answers.append(ids[len(prompt) :])
        return answers

    # The model.

    def _run(self, ids: list[int], seen: Activations) -> Tensor:
        """Logits ``[T, V]`` after each token, and what every module gave."""
        eps, weights = self.config["rms_norm_eps"], self.weights

        def norm(x: Tensor, path: str) -> Tensor:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
            seen.outputs[path] = weights[f"{path}.weight"] * normed.to(x.dtype)
            return seen.outputs[path]

        def column(x: Tensor, path: str) -> Tensor:
            seen.outputs[path] = F.linear(x, weights[f"{path}.weight"], weights.get(f"{path}.bias"))
            return seen.outputs[path]

        def row(x: Tensor, path: str) -> Tensor:
            seen.inputs[path] = x
            seen.outputs[path] = self._row(x, weights[f"{path}.weight"], weights.get(f"{path}.bias"), path)
            return seen.outputs[path]

        x = seen.outputs["model.embed_tokens"] = self._embed(torch.tensor(ids), weights["model.embed_tokens.weight"],
                                                             self.config["vocab_size"])
        for number in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{number}"
            h = norm(x, f"{layer}.input_layernorm")
            q, k, v = (column(h, f"{layer}.self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj"))
            x = x + row(self._attention(q, k, v), f"{layer}.self_attn.o_proj")
            h = norm(x, f"{layer}.post_attention_layernorm")
            gate, up = (column(h, f"{layer}.mlp.{name}") for name in ("gate_proj", "up_proj"))
            x = x + row(F.silu(gate) * up, f"{layer}.mlp.down_proj")
        seen.outputs["lm_head"] = self._head(norm(x, "model.norm"), weights["lm_head.weight"], None)
        return seen.outputs["lm_head"]

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        head_dim = self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]
        q_THD, k_THD, v_THD = (x.unflatten(-1, (-1, head_dim)) for x in (q, k, v))
        cos, sin = (table[: len(q), None].to(q.dtype) for table in self.tables)
        q_THD, k_THD = (self._turn(x, cos, sin) for x in (q_THD, k_THD))
        sizes = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        return self._attend(q_THD, k_THD, v_THD, *sizes).flatten(1)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        sin = -sin if self._mistake == "rotated the other way" else sin
        return x * cos + torch.cat((-second, first), -1) * sin

    def _attend(self, q_TQH: Tensor, k_LNH: Tensor, v_LNH: Tensor, num_q_heads: int, num_kv_heads: int) -> Tensor:
        """The last T tokens of L, for this rank's heads."""
        q_heads, kv_heads = head_ranges(num_q_heads, num_kv_heads, self.tp_rank, self.tp_size)
        group = num_q_heads // num_kv_heads
        kv_of_q = [head // group - kv_heads.start for head in q_heads]
        if self._mistake == "head ratio of one rank":
            kv_of_q = [place * len(kv_heads) // len(q_heads) for place in range(len(q_heads))][::-1]
        wide = torch.promote_types(q_TQH.dtype, torch.float32)
        k_QLH, v_QLH = (x[:, kv_of_q].transpose(0, 1).to(wide) for x in (k_LNH, v_LNH))
        scores = q_TQH.transpose(0, 1).to(wide) @ k_QLH.transpose(1, 2) * q_TQH.shape[-1] ** -0.5
        before = len(k_LNH) - len(q_TQH)
        if self._mistake != "no causal mask":
            visible = torch.arange(len(k_LNH)) <= before + torch.arange(len(q_TQH))[:, None]
            scores = scores.masked_fill(~visible, -torch.inf)
        return (scores.softmax(-1) @ v_QLH).transpose(0, 1).to(q_TQH.dtype)

    def _embed(self, ids: Tensor, weight: Tensor, vocab_size: int) -> Tensor:
        mine = span(vocab_size, self.tp_rank, self.tp_size)
        stop = mine.stop + (self._mistake == "border token on two ranks")
        is_mine = (ids >= mine.start) & (ids < stop)
        rows = (ids - mine.start).clamp(0, len(mine) - 1)
        return self.all_reduce(weight[rows] * is_mine[:, None])

    def _row(self, x: Tensor, weight: Tensor, bias: Tensor | None, path: str = "down_proj") -> Tensor:
        if self._mistake == "bias on every rank":
            return self.all_reduce(F.linear(x, weight, bias))
        part = F.linear(x, weight)
        total = part if self._mistake == "never reduced" and path.endswith("down_proj") else self.all_reduce(part)
        return total if bias is None else total + bias

    def _head(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.all_gather(F.linear(x, weight, bias), dim=-1)

    # Capabilities.

    @property
    def collectives(self) -> HandCutRank:
        return self

    def all_reduce(self, x: Tensor) -> Tensor:
        """Summed in at least float32 and rounded once."""
        parts = self._meeting.exchange(self.tp_rank, x.clone())
        wide = torch.promote_types(x.dtype, torch.float32)
        total = parts[0].to(wide)
        for part in parts[1:]:
            total = total + part
        return total.to(x.dtype)

    def all_gather(self, x: Tensor, *, dim: int) -> Tensor:
        parts = self._meeting.exchange(self.tp_rank, x.clone())
        return torch.cat(parts[::-1] if self._mistake == "heads gathered backwards" else parts, dim)

    def all_reduce_min(self, value: int) -> int:
        return int(min(self._meeting.exchange(self.tp_rank, value)))

    @torch.inference_mode()
    def layer(self, spec: LayerSpec) -> Callable[[Tensor], Tensor]:
        names = {"replicated": ("norm",), "column": ("gate_proj",), "merged": ("gate_proj", "up_proj"),
                 "qkv": ("q_proj", "k_proj", "v_proj"), "row": ("down_proj",), "attention_output": ("o_proj",),
                 "embedding": ("embed_tokens",), "lm_head": ("lm_head",)}[spec.kind]
        weights, biases = ([self._cut(spec.config, f"x.{name}.{kind}", whole) for name, whole in
                            zip(names, wholes or (), strict=wholes is not None)]
                           for kind, wholes in (("weight", spec.weights), ("bias", spec.biases)))
        weight, bias = torch.cat(weights), torch.cat(biases) if biases else None

        @torch.inference_mode()
        def show(given: Tensor) -> Tensor:
            if spec.kind == "embedding":
                return self._embed(given, weight, spec.config["vocab_size"])
            if spec.kind in ("row", "attention_output"):
                return self._row(given, weight, bias)
            return self._head(given, weight, bias) if spec.kind == "lm_head" else F.linear(given, weight, bias)

        return show

    @property
    def attention(self) -> HandCutRank:
        return self

    def heads(self, num_q_heads: int, num_kv_heads: int) -> tuple[range, range]:
        return head_ranges(num_q_heads, num_kv_heads, self.tp_rank, self.tp_size)

    def attend(self, step: AttentionStep) -> dict[str, list[Tensor]]:
        q_heads, kv_heads = self.heads(step.num_q_heads, step.num_kv_heads)
        q, kv = slice(q_heads.start, q_heads.stop), slice(kv_heads.start, kv_heads.stop)
        return {"dense": [self._attend(queries[:, q], keys[:, kv], values[:, kv], step.num_q_heads, step.num_kv_heads)
                          for queries, keys, values in zip(step.queries, step.keys, step.values, strict=True)]}

    def rotary_tables(self, config: Mapping[str, Any], num_positions: int) -> tuple[Tensor, Tensor]:
        tables = LlamaRotaryEmbedding(LlamaConfig.from_dict(dict(config)))(torch.zeros(1, dtype=torch.float32),
                                                                          torch.arange(num_positions)[None])
        cos, sin = (table[0, :, : table.shape[-1] // 2] for table in tables)
        return cos, sin

    def rotate(self, config: Mapping[str, Any], tables: tuple[Tensor, Tensor], qkv: Tensor, positions: Tensor, slots: Tensor, *,
               num_slots: int, block_size: int, norms: Sequence[Tensor | None]) -> Rotated:
        q_heads, kv_heads = self.heads(config["num_attention_heads"], config["num_key_value_heads"])
        sizes = [len(q_heads), len(kv_heads), len(kv_heads)]
        q, k, v = qkv.unflatten(1, (sum(sizes), -1)).split(sizes, dim=1)
        cos, sin = (torch.cat((table, table), -1)[positions, None].to(qkv.dtype) for table in tables)
        cache = torch.full((2, num_slots, len(kv_heads), q.shape[-1]), float("nan"), dtype=qkv.dtype)
        stored = slots >= 0
        cache[0, slots[stored]], cache[1, slots[stored]] = self._turn(k, cos, sin)[stored], v[stored]
        return Rotated(q=self._turn(q, cos, sin), k_slots=cache[0], v_slots=cache[1])

    def draw(self, logits: Tensor, rows: Sequence[DrawRow]) -> Tensor:
        drawn = []
        for row in rows:
            own = logits.double().index_fill(0, torch.tensor(row.banned, dtype=torch.int64), -torch.inf)
            order = own.sort(descending=True, stable=True)
            if row.temperature == 0:
                drawn.append(int(order.indices[0]))
                continue
            kept = order.indices[: row.top_k or len(own)]
            p = (own[kept] / row.temperature).softmax(0)
            p = p.masked_fill((p.cumsum(0) - p >= row.top_p) & (row.top_p < 1), 0.0)
            key = hashlib.blake2b(f"{row.seed}/{row.position}".encode(), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key))
            drawn.append(int(kept[torch.multinomial(p, 1, generator=generator)]))
        return torch.tensor(drawn)

    def scheduler(self, limits: SchedulerLimits, launch: Callable[[StepInputs], list[int]]) -> OneAtATime:
        return OneAtATime(limits, launch)

    def cache_blocks(self) -> tuple[int, int]:
        return 1, 1


class OneAtATime:
    """A scheduler that finishes a request before it begins the next."""

    def __init__(self, limits: SchedulerLimits, launch: Callable[[StepInputs], list[int]]) -> None:
        self.limits, self.launch = limits, launch
        self.waiting: list[SimpleNamespace] = []
        self.free = list(range(limits.num_blocks))

    @property
    def has_work(self) -> bool:
        return bool(self.waiting)

    def add(self, number: int, prompt: tuple[int, ...], num_tokens: int) -> None:
        self.waiting.append(SimpleNamespace(number=number, ids=list(prompt), end=len(prompt) + num_tokens, computed=0, blocks=[]))

    def abort(self, number: int) -> None:
        for request in [request for request in self.waiting if request.number == number]:
            self._finish(request)

    def step(self) -> list[tuple[int, int]]:
        one, size = self.waiting[0], self.limits.block_size
        start, stop = one.computed, min(len(one.ids), one.computed + self.limits.max_num_batched_tokens)
        while len(one.blocks) * size < stop:
            one.blocks.append(self.free.pop())
        positions = list(range(start, stop))
        drawn = self.launch(StepInputs(
            cu_seqlens=[0, stop - start], context_lens=[stop], block_tables=[one.blocks], token_ids=one.ids[start:stop],
            slots=[one.blocks[at // size] * size + at % size for at in positions], positions=positions, rows=[0],
            samples=[0] if stop == len(one.ids) else [], digest=repr((one.ids[start:stop], one.blocks)).encode()))
        one.computed = stop
        one.ids += drawn
        if len(one.ids) == one.end:
            self._finish(one)
        return [(one.number, token_id) for token_id in drawn]

    def blocks(self) -> tuple[list[int], list[int], int]:
        held = [block for request in self.waiting for block in request.blocks]
        return held, [held.count(block) for block in range(self.limits.num_blocks)], len(self.free)

    def _finish(self, request: SimpleNamespace) -> None:
        self.waiting.remove(request)
        self.free += request.blocks


class HandCut(Subject):
    """Threads, one a rank, for as long as a call takes."""

    name: ClassVar[str] = "hand-cut"
    capabilities: ClassVar[frozenset[str]] = frozenset({"collectives", "layers", "attention", "sampler", "scheduler"})
    mistake: ClassVar[str] = ""
    rank_class: ClassVar[type[HandCutRank]] = HandCutRank

    def __init__(self, placement: Placement) -> None:
        self.tp_size, self.fabric = placement.tp_size, "threads" if placement.tp_size > 1 else "solo"
        self._ranks = self._make()

    def _make(self) -> list[HandCutRank]:
        meeting = Meeting(self.tp_size)
        return [self.rank_class(rank, meeting, self.mistake) for rank in range(self.tp_size)]

    def load(self, folder: Path, *, dtype: str, options: Mapping[str, Any]) -> None:
        self.run(type(self).rank_class.load, folder, dtype=dtype, options=options)
        self.loaded = Loaded(folder=folder, dtype=dtype, options=options)

    def layout(self, config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Ownership:
        return self.rank_class.layout(config, name, shape, self.tp_size)

    @staticmethod
    def modules(config: Mapping[str, Any]) -> list[Row]:
        return list(rows_of(config["num_hidden_layers"]))

    def shards(self) -> Iterator[tuple[str, list[Tensor | None]]]:
        by_rank = self.run(self.rank_class.shards)
        yield from ((name, [held.get(name) for held in by_rank]) for name in by_rank[0])

    def logits(self, schedule: Schedule) -> list[list[Tensor]]:
        return self.run(self.rank_class.logits, schedule)

    def activations(self, schedule: Schedule, sequence: int) -> list[Activations]:
        return self.run(self.rank_class.activations, schedule, sequence)

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]],
                 options: Mapping[str, Any] | None = None) -> list[list[int]]:
        first: list[list[int]] = self.run(self.rank_class.generate, prompts, params)[0]
        return first

    def run(self, job: Callable[..., Any], *args: Any, timeout_s: float | None = None, **how: Any) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, Any] = {}

        def on_rank(rank: HandCutRank) -> None:
            try:
                with torch.inference_mode():
                    results[rank.tp_rank] = job(rank, *args, **how)
            except Exception as error:
                failures[rank.tp_rank] = SimpleNamespace(
                    kind="raised", summary=f"{type(error).__name__}: {error}", phase=rank.phase,
                    consequence=isinstance(error, threading.BrokenBarrierError))
                rank._meeting.barrier.abort()

        threads = [threading.Thread(target=on_rank, args=(rank,)) for rank in self._ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            for rank in self._ranks:
                rank._meeting.barrier.reset()
            raise SubjectFailure("; ".join(f"rank {rank}: {failure.summary}" for rank, failure in sorted(failures.items())),
                                 failures=failures)
        return [results[rank] for rank in range(self.tp_size)]


def with_mistake(mistake: str) -> type[HandCut]:
    """The subject with one of ``MISTAKES``."""
    return type("HandCutWith", (HandCut,), {"mistake": mistake})
