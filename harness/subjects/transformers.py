"""Transformers' own tensor parallelism as a subject: its ``DistributedConfig`` in this project's rank processes.

Two names: ``transformers`` shards by the model's own ``tp_plan``, ``transformers-ep`` by that and its ``ep_plan``, which deals
whole experts to ranks. Both want transformers 5.17 or later, ``accelerate``, and ranks that are processes: its tensors are
DTensors, which need process groups.

Steps that mix sequences are taken apart: each sequence runs by itself with a cache of its own, its first chunk as a prefill and
the others onto the cache. Models that keep a state between tokens (``_is_stateful``) take no further chunks, on one device
neither: what follows the first chunk comes to them token by token.

Shape suffixes: T = tokens of one sequence, V = vocabulary.
"""

from __future__ import annotations

import gc
import importlib.util
import inspect
import logging
import os
import re
import weakref
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

from harness.errors import UsageError
from harness.subjects.base import Placement, Schedule
from harness.subjects.on_ranks import LiveRank, OnRanks
from reference.checkpoints import CheckpointError, read_config
from reference.hf import DTYPES, Activations, joined, recording
from reference.shards import Ownership

EXPERT = re.compile(r"\.experts(\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharded:
    """How much of a model is sharded at all: a right answer of a model that is whole on every rank proves nothing.

    parameters   share of the parameters that no rank holds whole
    flops        the same of the multiplications a token that their weights take part in: none for embeddings, an expert's by
                 the chance that a token is routed to it; attention scores are left out
    """

    parameters: float
    flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What one rank holds of a checkpoint's tensor: the indices along ``dim``; ``dim`` None: all of it."""

    shape: tuple[int, ...]
    dim: int | None
    indices: NDArray[np.int64]


class TransformersRank(LiveRank):
    """One rank of a model that transformers has sharded while it loaded it."""

    expert_parallel: ClassVar[bool] = False

    def load(self, folder: Path, *, dtype: str, options: Mapping[str, Any]) -> None:
        """Load and shard by the model's ``tp_plan``.

        Raises:
            ValueError: as transformers refuses the model or the number of ranks.
        """
        transformers_logging.disable_progress_bar()
        if self.device.type == "cuda":  # by it transformers finds its device
            os.environ["LOCAL_RANK"] = str(self.device.index or 0)
        gc.collect()  # what was loaded before is full of cycles, and its groups have threads and sockets
        with self._own_groups(), self._heard(quiet=bool(options.get("quiet"))):
            self.model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=DTYPES[dtype], local_files_only=True, use_safetensors=True, trust_remote_code=False,
                distributed_config=DistributedConfig(tp_size=self.tp_size, ep_size=self.tp_size if self.expert_parallel else 1))
        self.model.to(self.device).eval().requires_grad_(False)
        # Renamed by transformers 5.24.
        self._cache_name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"

    @contextmanager
    def _own_groups(self) -> Iterator[None]:
        """Process groups that are made meanwhile end with this object: transformers makes six a model, and ends none."""
        before = set(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else set()
        yield
        if dist.is_initialized():
            weakref.finalize(self, _end_groups, [group for group in dist.distributed_c10d._world.pg_map if group not in before])

    @contextmanager
    def _heard(self, *, quiet: bool) -> Iterator[None]:
        """The library's warnings are noted in ``said``, those too that it would give once a process; ``quiet``: nowhere else."""
        self.said: list[str] = []
        transformers_logging.warning_once.cache_clear()
        note = logging.Handler(logging.WARNING)
        note.emit = lambda record: self.said.append(record.getMessage())  # type: ignore[method-assign]
        library = transformers_logging.get_logger("transformers")
        library.addHandler(note)
        if quiet:
            transformers_logging.disable_default_handler()
        try:
            yield
        finally:
            library.removeHandler(note)
            if quiet:
                transformers_logging.enable_default_handler()

    # What it holds.

    def sharded(self) -> Sharded:
        """How much of the model is sharded."""
        sizes, costs = [], []
        for name, parameter in self.model.named_parameters():
            is_sharded = isinstance(parameter, DTensor) and any(not place.is_replicate() for place in parameter.placements)
            sizes.append((parameter.numel(), is_sharded))
            costs.append((self._flops(name, parameter), is_sharded))
        return Sharded(parameters=_share(sizes), flops=_share(costs))

    def _flops(self, name: str, parameter: Tensor) -> float:
        """Multiplications a token; 0 of what is looked up or added."""
        owner = self.model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.Embedding):
            head = self.model.get_output_embeddings()
            return float(parameter.numel()) if head is not None and head.weight is parameter else 0.0
        if parameter.ndim < 2:
            return 0.0
        if not EXPERT.search(name):
            return float(parameter.numel())
        config = self.model.config.get_text_config()
        chosen = next((int(value) for key in ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
                       if isinstance(value := getattr(config, key, None), int)), 1)
        count = parameter.shape[0] if parameter.ndim == 3 else max(1, getattr(config, "num_experts", None) or getattr(
            config, "n_routed_experts", None) or getattr(config, "num_local_experts", None) or 1)
        return parameter.numel() * min(1.0, chosen / count)

    @cached_property
    def _shards(self) -> dict[str, tuple[Held, Tensor]]:
        """By checkpoint name: which part of the tensor this rank holds, and the part.

        Where transformers renames, merges or splits tensors while it loads them, its own way back is run on tensors that hold
        the number of each element, which tells where every element of a checkpoint's tensor is.
        """
        tensors: dict[str, Tensor] = self.model.state_dict(keep_vars=True)
        starts = [0, *accumulate(tensor.numel() for tensor in tensors.values())]
        numbers = {name: torch.arange(start, start + tensor.numel()).reshape(tensor.shape)
                   for start, (name, tensor) in zip(starts, tensors.items(), strict=False)}
        held = torch.cat([_local_part(numbers[name], tensor).flatten() for name, tensor in tensors.items()])
        values = torch.cat([plain(tensor).detach().cpu().flatten() for tensor in tensors.values()])  # in the widest dtype
        place = torch.full((starts[-1],), -1).index_copy(0, held, torch.arange(len(held)))
        dtypes = [tensor.dtype for tensor in tensors.values()]
        found = {}
        for name, number in revert_weight_conversion(self.model, numbers).items():
            part = _held(name, place[number] >= 0)
            if part.dim is not None:
                number = number.index_select(part.dim, torch.from_numpy(part.indices))
            dtype = dtypes[bisect(starts, int(number.min())) - 1] if number.numel() else values.dtype
            found[name] = part, values[place[number]].to(dtype)
        return found

    def shards(self) -> dict[str, Tensor]:
        return {name: shard for name, (_, shard) in self._shards.items()}

    def held(self) -> dict[str, Held]:
        """By checkpoint name: which part of the tensor this rank holds, as transformers itself says where it is placed."""
        return {name: held for name, (held, _) in self._shards.items()}

    # What it computes.

    @torch.no_grad()
    def logits(self, schedule: Schedule) -> list[Tensor]:
        return [torch.cat(self._play(schedule, sequence)) for sequence in range(len(schedule.sequences))]

    @torch.no_grad()
    def activations(self, schedule: Schedule, sequence: int) -> Activations:
        """This rank's part of what each module took and gave."""
        chunks: list[Activations] = []

        @contextmanager
        def around_chunk(length: int) -> Iterator[None]:
            with recording(self.model, length, local=plain) as taken:
                yield
            chunks.append(taken)

        self._play(schedule, sequence, around_chunk)
        return joined(chunks)

    def _play(self, schedule: Schedule, sequence: int,
              around_chunk: Callable[[int], AbstractContextManager[Any]] = lambda length: nullcontext()) -> list[Tensor]:
        """The sequence's chunks one after the other: logits ``[T, V]`` of each."""
        ids = schedule.sequences[sequence]
        cache, done, logits = None, 0, []
        for length in self._chunks(schedule, sequence):
            given = torch.tensor([ids[done : done + length]], device=self.device)
            with around_chunk(length):
                step = self.model(input_ids=given, use_cache=True, **{self._cache_name: cache})
            cache = step.get(self._cache_name)
            logits.append(plain(step.logits)[0].detach().cpu())
            done += length
        return logits

    def _chunks(self, schedule: Schedule, sequence: int) -> Iterator[int]:
        lengths = [length for step in schedule.steps for number, length in step if number == sequence]
        if not self.model._is_stateful:
            return iter(lengths)
        return chain(lengths[:1], (1 for length in lengths[1:] for _ in range(length)))

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]],
                 before_step: Callable[[str], None] = lambda phase: None) -> list[list[int]]:
        """By ``generate``, prompt by prompt; every rank draws from a generator of one seed."""
        return [self._continue(prompt, own) for prompt, own in zip(prompts, params, strict=True)]

    def _continue(self, prompt: Sequence[int], own: Mapping[str, Any]) -> list[int]:
        ends = None if own.get("ignore_eos") else self.model.generation_config.eos_token_id
        asked: dict[str, Any] = {"max_new_tokens": own["max_tokens"], "pad_token_id": 0, "eos_token_id": ends}
        if own["temperature"] > 0:
            asked |= {"do_sample": True, "temperature": own["temperature"], "top_p": own.get("top_p", 1.0), "top_k": 0}
        given = torch.tensor([list(prompt)], device=self.device)
        before = self.model.generation_config
        self.model.generation_config = GenerationConfig(**asked)  # what it leaves open, generate takes from the model's
        try:
            with torch.random.fork_rng():
                torch.manual_seed(own.get("seed") or 0)
                ids = self.model.generate(given, attention_mask=torch.ones_like(given))
        finally:
            self.model.generation_config = before
        return [int(token_id) for token_id in plain(ids)[0, len(prompt) :]]


class ExpertParallelRank(TransformersRank):
    """The same with whole experts dealt to ranks."""

    expert_parallel = True


class TransformersSubject(OnRanks):
    """Declares nothing but a model: its layers are parts of transformers that nobody uses alone."""

    name: ClassVar[str] = "transformers"
    rank_class: ClassVar[type[TransformersRank]] = TransformersRank

    @classmethod
    def check_fit(cls, folder: Path, placements: Sequence[Placement]) -> None:
        """Refuse what transformers can't shard, before anything starts.

        Raises:
            UsageError: if ranks would be threads, or ``accelerate`` is missing.
            CheckpointError: if it is no causal language model of transformers.
        """
        if importlib.util.find_spec("accelerate") is None:
            raise UsageError(f"subject={cls.name!r}: transformers shards no model without accelerate: pip install accelerate")
        if threads := [placement.tp_size for placement in placements if placement.fabric == "threads"]:
            raise UsageError(f"tp_sizes={threads} would run as threads, and DTensor needs processes: use --fabric gloo")
        config = read_config(folder)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise CheckpointError(f"folder={folder}: model_type={config.model_type!r} is no causal LM of transformers")

    def load(self, folder: Path, *, dtype: str, options: Mapping[str, Any]) -> None:
        self._layout: list[dict[str, Held]] | None = None
        super().load(folder, dtype=dtype, options=options)

    def layout(self, config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Ownership:
        """Where transformers itself says that the elements are, of what is loaded."""
        if self._layout is None:
            self._layout = self._ask(_held_on_rank)
        held = [of_rank[name] for of_rank in self._layout if name in of_rank]
        if len(held) < self.tp_size:
            raise CheckpointError(f"tensor={name}: the loaded model has no parameter that it went to")
        dims = {part.dim for part in held if part.dim is not None}
        dim = dims.pop() if len(dims) == 1 else None
        whole = np.arange(shape[dim] if dim is not None else 0)
        return Ownership(name=name, shape=held[0].shape, tp_size=self.tp_size, dim=dim,
                         indices=tuple(whole if part.dim is None else part.indices for part in held))

    def sharded(self) -> Sharded:
        """How much of the loaded model is sharded."""
        found: Sharded = self._ask(_sharded)[0]
        return found

    def said(self) -> list[str]:
        """What transformers warned of while it loaded, on any rank."""
        return list(dict.fromkeys(message for of_rank in self._ask(_said) for message in of_rank))


class ExpertParallelSubject(TransformersSubject):
    """The same with whole experts dealt to ranks."""

    name: ClassVar[str] = "transformers-ep"
    rank_class: ClassVar[type[TransformersRank]] = ExpertParallelRank


def plain(value: Tensor) -> Tensor:
    """This rank's own values: of a DTensor its part, and of a collective under way what comes of it.

    An un-waited collective's tensor, pickled, would be the sum of some ranks only.
    """
    if isinstance(value, DTensor):
        value = value.to_local()
    if isinstance(value, AsyncCollectiveTensor):
        value = value.wait()
    return value


def _local_part(whole: Tensor, like: Tensor) -> Tensor:
    """The part of ``whole`` that this rank holds of a tensor that is placed as ``like`` is."""
    if not isinstance(like, DTensor) or all(isinstance(place, Replicate) for place in like.placements):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


def _held(name: str, mask: Tensor) -> Held:
    """From which elements are there to indices along one dimension."""
    shape = tuple(mask.shape)
    if bool(mask.all()):
        return Held(shape=shape, dim=None, indices=np.arange(0))
    for dim in range(mask.ndim):
        rest = [other for other in range(mask.ndim) if other != dim]
        some, every = (mask.amax(rest), mask.amin(rest)) if rest else (mask, mask)
        if torch.equal(some, every):
            return Held(shape=shape, dim=dim, indices=some.nonzero().flatten().numpy())
    raise ValueError(f"tensor={name}: what this rank holds of it is no set of rows of one dimension")


def _share(parts: Sequence[tuple[float, bool]]) -> float:
    return sum(size for size, is_sharded in parts if is_sharded) / max(1.0, sum(size for size, _ in parts))


def _end_groups(groups: Sequence[dist.ProcessGroup]) -> None:
    for group in groups:
        if group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


def _held_on_rank(rank: TransformersRank) -> dict[str, Held]:
    return rank.held()


def _sharded(rank: TransformersRank) -> Sharded:
    return rank.sharded()


def _said(rank: TransformersRank) -> list[str]:
    return rank.said
