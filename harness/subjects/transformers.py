"""Transformers' own tensor parallelism as a subject: its ``DistributedConfig`` in this project's rank processes.

Two names: ``transformers`` shards by the model's own ``tp_plan``, ``transformers-ep`` by that and its ``ep_plan``, which deals
whole experts to ranks. Both want transformers 5.21 or later, ``accelerate``, and ranks that are processes: its tensors are
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

from engine.checkpoint.checkpoint_files import read_headers
from harness.errors import UsageError
from harness.subjects.base import Placement, Schedule, Sharded
from harness.subjects.dtensor import DTensorRank, DTensorSubject, own_groups, plain
from reference.checkpoints import CheckpointError, read_config
from reference.hf import DTYPES, Activations, joined, recording
from reference.loaded import as_in_files

OLDEST = "5.21"
"""The first release that gives ranks uneven parts of a vocabulary."""
EXPERT = re.compile(r"\.experts(\.|$)")


class TransformersRank(DTensorRank):
    """One rank of a model that transformers has sharded while it loaded it."""

    expert_parallel: ClassVar[bool] = False

    def load(self, folder: Path, *, dtype: str, options: Mapping[str, Any]) -> None:
        """Load and shard by the model's ``tp_plan``.

        Args:
            folder: of the checkpoint.
            dtype: of the parameters.
            options: ``quiet``: warnings are noted alone; ``experts_implementation``: as transformers takes it.

        Raises:
            ValueError: as transformers refuses the model or the number of ranks.
        """
        transformers_logging.disable_progress_bar()
        if self.device.type == "cuda":  # by it transformers finds its device
            os.environ["LOCAL_RANK"] = str(self.device.index or 0)
        gc.collect()  # what was loaded before is full of cycles, and its groups have threads and sockets
        name = "experts_implementation"  # None would be a choice
        experts = {name: options[name]} if name in options else {}
        with own_groups(self), self._heard(quiet=bool(options.get("quiet"))):
            self.model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=DTYPES[dtype], local_files_only=True, use_safetensors=True, trust_remote_code=False,
                distributed_config=DistributedConfig(tp_size=self.tp_size, ep_size=self.tp_size if self.expert_parallel else 1),
                **experts)
        self.model.to(self.device).eval().requires_grad_(False)
        self._in_files = read_headers(folder).keys()
        # Renamed by transformers 5.24.
        self._cache_name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"

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

    def by_checkpoint_name(self, numbers: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Where transformers renames, merges or splits tensors while it loads them, by its own way back."""
        return as_in_files(self.model, numbers, self._in_files)

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


class TransformersSubject(DTensorSubject):
    """Declares nothing but a model: its layers are parts of transformers that nobody uses alone."""

    name: ClassVar[str] = "transformers"
    atlas_from: ClassVar[int | None] = 2  # one rank is the reference
    rank_class: ClassVar[type[TransformersRank]] = TransformersRank

    @classmethod
    def check_fit(cls, folder: Path, placements: Sequence[Placement]) -> None:
        """Refuse what transformers can't shard, before anything starts.

        Raises:
            UsageError: if ranks would be threads; or as ``check_installed``.
            CheckpointError: if it is no causal language model of transformers.
        """
        cls.check_installed()
        super().check_fit(folder, placements)
        config = read_config(folder)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise CheckpointError(f"folder={folder}: model_type={config.model_type!r} is no causal LM of transformers")

    @classmethod
    def check_installed(cls) -> None:
        """Refuse libraries that can't do what the checks ask for.

        Raises:
            UsageError: if ``accelerate`` is missing, or transformers is of before ``OLDEST``.
        """
        if importlib.util.find_spec("accelerate") is None:
            raise UsageError(f"subject={cls.name!r}: transformers shards no model without accelerate: pip install accelerate")
        if Version(transformers.__version__) < Version(OLDEST):
            raise UsageError(f"subject={cls.name!r}: transformers={transformers.__version__} gives ranks no uneven parts, which "
                             f"checks ask for: pip install 'transformers>={OLDEST}'")

    def sharded(self) -> Sharded:
        """How much of the loaded model is sharded."""
        found: Sharded = self._ask("sharded")[0]
        return found

    def said(self) -> list[str]:
        """What transformers warned of while it loaded, on any rank."""
        return list(dict.fromkeys(message for of_rank in self._ask(_said) for message in of_rank))


class ExpertParallelSubject(TransformersSubject):
    """The same with whole experts dealt to ranks."""

    name: ClassVar[str] = "transformers-ep"
    rank_class: ClassVar[type[TransformersRank]] = ExpertParallelRank


def _share(parts: Sequence[tuple[float, bool]]) -> float:
    return sum(size for size, is_sharded in parts if is_sharded) / max(1.0, sum(size for size, _ in parts))


def _said(rank: TransformersRank) -> list[str]:
    return rank.said
