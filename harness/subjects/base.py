"""What is under test, as the checks see it: one object in the driver, with results rank by rank.

A subject is any tensor-parallel implementation of a checkpoint. It owns its ranks, says which elements of each checkpoint tensor
each of them holds, and computes what it is asked for. Names are the reference's (Hugging Face module and checkpoint names), so
that a check can hold any subject against the reference without knowing how it fuses or shards.

Required are ``load``, ``layout``, ``shards``, ``logits``, ``activations`` and ``generate``. What else a subject can do it
declares in ``capabilities``; a check that needs more than is declared is not applicable, and is never green.

Shape suffixes: T = tokens of one sequence, V = vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor

from reference.checkpoints import CheckpointError
from reference.choices import Routes
from reference.hf import Activations
from reference.shards import Ownership

CAPABILITIES: dict[str, str] = {
    "collectives": "collectives of its ranks on tensors of any shape",
    "layers": "one parallel layer alone",
    "attention": "attention and rotary embedding alone",
    "sampler": "drawing tokens from given logits",
    "scheduler": "its scheduler and block manager over a device that is made up",
    "requests": "streams and sampling parameters by vLLM's names",
    "invariance": "the same bits at any tp_size and in any batch, where it is loaded with tp_invariant=True",
    "processes": "ranks that can fail, be reported and be replaced",
}
"""What a subject may declare, and what it means."""


IN_MODULE = "module "
"""How a rank's phase begins while it computes one of the modules: its name follows."""


def missing(capability: str, method: str) -> NotImplementedError:
    """What the default of a capability's method raises."""
    return NotImplementedError(f"capability={capability} is declared, but there is no method {method}: write it, or do not "
                               "declare it")


class SubjectFailure(Exception):  # noqa: N818
    """Ranks of a subject failed.

    failures     by rank: what happened, with ``kind`` ("raised", "died", "stuck"), ``summary``, ``phase`` and ``consequence``
                 (whether it follows from another rank's failure); may be empty
    divergence   lines that say which rank never entered which collective
    job          what ran
    """

    def __init__(self, message: str, *, failures: Mapping[int, Any] | None = None, divergence: Sequence[str] = (),
                 job: str = "") -> None:
        super().__init__(message)
        self.failures = dict(failures or {})
        self.divergence = tuple(divergence)
        self.job = job

    @property
    def module(self) -> str | None:
        """The module in which the first rank raised that did not follow another one; None if its phase names none."""
        phases = [getattr(failure, "phase", "") for _, failure in sorted(self.failures.items()) if not failure.consequence]
        return next((phase.removeprefix(IN_MODULE) for phase in phases if phase.startswith(IN_MODULE)), None)


class NotShownError(CheckpointError):
    """What a subject has and can't show, such as a tensor under a name that leads nowhere: that is no finding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a subject's ranks are to live.

    fabric        ``auto``, or one of ``harness.names.FABRICS``; a subject that brings its own processes may ignore it
    auto_restart  whether ranks that broke are replaced by the next call that needs them
    ranks         ranks that live elsewhere already, as torchrun's; None: the subject starts its own
    python        the interpreter of the ranks, of a subject that runs in one of its own
    """

    tp_size: int
    fabric: str = "auto"
    device: str = "cpu"
    job_timeout_s: float | None = None
    collective_timeout_s: float = 600.0
    auto_restart: bool = True
    ranks: Any = None
    python: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Sequences and the steps in which to run them, teacher-forced: each step names (sequence, number of its next tokens)."""

    sequences: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[tuple[int, int], ...], ...]

    def __post_init__(self) -> None:
        done = [0] * len(self.sequences)
        for step in self.steps:
            for sequence, num_tokens in step:
                done[sequence] += num_tokens
        if done != [len(sequence) for sequence in self.sequences]:
            raise ValueError(f"the steps run {done} tokens of sequences of {[len(s) for s in self.sequences]}")


class ModuleRow(Protocol):
    """A module under the reference's name.

    kind         ``column``, ``row``, ``vocabulary`` or ``replicated``: by what its weight is cut
    fed_by       the module whose output it takes; or "token ids", or what else feeds it
    fused        the same for modules of one input that are computed as one; None: by itself
    has_output   whether activations have its output; of a row-parallel one they also have the input
    """

    @property
    def path(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def fed_by(self) -> str: ...
    @property
    def fused(self) -> str | None: ...
    @property
    def has_output(self) -> bool: ...


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
class Loaded:
    """What a subject was asked to load last."""

    folder: Path
    dtype: str
    options: Mapping[str, Any]


class Subject(ABC):
    """A tensor-parallel model that can be checked: a context manager, whose end ends its ranks.

    name           as the command line and reports call it
    capabilities   those of ``CAPABILITIES`` that it has
    takes_ranks    whether it runs on ranks that live elsewhere (``Placement.ranks``)
    has_windows    whether sequences may be longer than a sliding window of the model
    has_uneven     whether it computes with sizes that do not split evenly over its ranks, whatever the model
    loads_uneven   whether it loads such sizes, though it may not compute with them
    dtypes         that it loads
    head_dim       the smallest head that it computes with
    atlas_from     an atlas of it says something from so many ranks on; None: there is none
    shown_as       what to know of activations that are not of the run whose logits were judged; empty: they are
    tp_size        number of its ranks
    fabric         what joins them, for the report
    loaded         what is loaded; ranks that replace failed ones load it by themselves
    """

    name: ClassVar[str]
    capabilities: ClassVar[frozenset[str]] = frozenset()
    takes_ranks: ClassVar[bool] = False
    has_windows: ClassVar[bool] = True
    has_uneven: ClassVar[bool] = True
    loads_uneven: ClassVar[bool] = True
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16", "float64")
    head_dim: ClassVar[int] = 4
    atlas_from: ClassVar[int | None] = None
    shown_as: ClassVar[str] = ""
    tp_size: int
    fabric: str = ""
    loaded: Loaded | None = None

    @abstractmethod
    def __init__(self, placement: Placement) -> None:
        """Start the ranks. ``SubjectFailure`` if they can't."""

    @classmethod  # noqa: B027 - a default
    def check_fit(cls, folder: Path, placements: Sequence[Placement]) -> None:
        """Refuse a model or a placement before anything starts: UsageError, CheckpointError or an error of the subject's own."""

    @abstractmethod
    def load(self, folder: Path, *, dtype: str, options: Mapping[str, Any]) -> None:
        """Load every rank's shards of a checkpoint, in place of what was loaded before, and note it in ``loaded``.

        Args:
            folder: a Hugging Face model folder.
            dtype: as torch names it, such as "bfloat16".
            options: sizes of the cache and of a step by vLLM's names, which a subject without a paged cache may ignore.

        Raises:
            CheckpointError: if it can't be loaded, and another one might.
            SubjectFailure: if ranks failed over it.
        """

    @abstractmethod
    def layout(self, config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Ownership:
        """Which elements of a checkpoint tensor each rank holds, by whatever rule: padded, interleaved, replicated.

        Args:
            config: a model's config.json, as transformers reads it: not only of what is loaded.
            name: as in the checkpoint, such as ``model.layers.0.self_attn.q_proj.weight``.
            shape: as in the checkpoint.
        """

    @staticmethod
    def modules(config: Mapping[str, Any]) -> Sequence[ModuleRow]:
        """Modules whose activations it shows, in the order of computation: among them the first wrong one is looked for."""
        return ()

    @abstractmethod
    def shards(self) -> Iterator[tuple[str, list[Tensor | None]]]:
        """Each checkpoint tensor with every rank's shard of it, as it is computed with, on the CPU; None of a rank that has none.

        ``lm_head.weight`` also where it is tied.
        """

    @abstractmethod
    def logits(self, schedule: Schedule) -> list[list[Tensor]]:
        """By rank: logits ``[T, V]`` after every token of each sequence, whole, on the CPU."""

    @abstractmethod
    def activations(self, schedule: Schedule, sequence: int) -> list[Activations]:
        """By rank: its part of each module's activations of one sequence, rows in token order, the whole schedule having run."""

    @abstractmethod
    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]],
                 options: Mapping[str, Any] | None = None) -> list[list[int]]:
        """The token ids that follow each prompt, all prompts in one batch.

        Args:
            prompts: token ids.
            params: sampling parameters of each, by vLLM's names.
            options: sizes of the cache and of a step for this call, in place of those that were loaded; may be ignored as there.
        """

    # What follows has defaults.

    def choices(self, schedule: Schedule, sequence: int) -> Routes:
        """What the run that ``logits`` gives chose for one sequence, by the reference's names; without what can't be seen."""
        return self.activations(schedule, sequence)[0].choices

    @classmethod
    def versions(cls, placement: Placement) -> dict[str, str]:
        """Of libraries that are not this interpreter's, for the record of a run."""
        return {}

    @classmethod
    def tiny_sizes(cls, config: Any) -> dict[str, Any]:
        """What must be otherwise in a tiny config (``reference.shrink``) for this subject to compute with it."""
        return {}

    @classmethod
    def fabric_of(cls, placement: Placement) -> str:
        """What will join the ranks, for rows of layouts that never started."""
        return placement.fabric

    def own_name(self, module: str) -> str:
        """What it calls a module of the reference whose activations it has shown last."""
        return module

    def sharded(self) -> Sharded | None:
        """How much of the loaded model is sharded; None of a subject that can't tell."""
        return None

    def said(self) -> list[str]:
        """What its library warned of while it loaded, on any rank."""
        return []

    @property
    def is_healthy(self) -> bool:
        """Whether the next call can run on the ranks that are there."""
        return True

    @property
    def is_usable(self) -> bool:
        """Whether the next call can run, on these ranks or on new ones in their place."""
        return True

    def find(self, folder: Path) -> None:  # noqa: B027 - a default
        """Raise CheckpointError where some rank can't read this folder: ranks may be on hosts of their own."""

    @contextmanager
    def beside(self, folder: Path, *, dtype: str, options: Mapping[str, Any]) -> Iterator[None]:
        """Another checkpoint in the place of the one that is loaded, until the end of the block."""
        before = self.loaded
        try:
            self.load(folder, dtype=dtype, options=options)
            yield
        finally:
            if before is not None:
                self.load(before.folder, dtype=before.dtype, options=before.options)

    def run(self, job: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> list[Any]:
        """``job(rank, *args)`` on every rank, with its ``rank.Rank``; the results by rank. For declared capabilities.

        Raises:
            SubjectFailure: if it did not succeed on every rank.
        """
        raise missing(", ".join(sorted(self.capabilities)), "run")

    def requests(self, folder: Path, options: Mapping[str, Any]) -> Any:
        """A context manager that takes requests for this checkpoint as vLLM's ``LLM`` does. Capability ``requests``.

        It has ``generate(prompts, params)``, ``stream(prompts, params)`` (a context manager of an iterator over outputs as they
        come, with ``request_ids``), ``abort(request_id)``, ``params(values)`` and ``block_size``.
        """
        raise missing("requests", "requests")

    def alone(self) -> Subject:
        """Another subject of this kind, of one rank, for the caller to close. Capability ``invariance``."""
        raise missing("invariance", "alone")

    def restart(self) -> None:
        """New ranks, nothing loaded. Capability ``processes``."""
        raise missing("processes", "restart")

    def close(self) -> None:  # noqa: B027 - a default
        """End the ranks."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
