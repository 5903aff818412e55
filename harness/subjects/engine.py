"""The engine of this project as a subject: its ranks for the parts, ``LLM`` itself for generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from engine.checkpoint.preflight import check_checkpoint
from engine.config import ModelConfig
from engine.frontend.outputs import RequestOutput
from engine.frontend.sampling import SamplingParams
from engine.llm import LLM
from engine.models.registry import family_of
from engine.models.table import Module, in_order
from harness.errors import UsageError, usage
from harness.subjects.base import CAPABILITIES, Placement, SubjectFailure
from harness.subjects.engine_rank import EngineRank
from harness.subjects.on_ranks import OnRanks, as_subject_failure


class EngineSubject(OnRanks):
    """Declares everything."""

    name: ClassVar[str] = "engine"
    capabilities: ClassVar[frozenset[str]] = frozenset(CAPABILITIES)
    has_windows: ClassVar[bool] = False
    rank_class = EngineRank

    def __init__(self, placement: Placement) -> None:
        super().__init__(placement)
        self._llm: EngineRequests | None = None

    @classmethod
    def check_fit(cls, folder: Path, placements: Sequence[Placement]) -> None:
        """Refuse what the engine can't run, before anything starts.

        Raises:
            UsageError: if there are more ranks than query heads, or a fabric does not fit its device.
            UnsupportedModelError: if the engine can't run such a model.
            CheckpointError: if the checkpoint is damaged, or does not fit its config.
        """
        model = ModelConfig.from_folder(folder)
        if too_many := [placement.tp_size for placement in placements if placement.tp_size > model.num_q_heads]:
            raise UsageError(f"tp_sizes={too_many} are above num_q_heads={model.num_q_heads} of the model: every rank needs at "
                             "least one query head")
        with usage():
            for placement in placements:
                cls.fabric_of(placement)
        check_checkpoint(folder, model)

    @staticmethod
    def modules(config: Mapping[str, Any]) -> list[Module]:
        return list(in_order(family_of(config["model_type"]).modules, config["num_hidden_layers"]))

    def load(self, folder: Path, *, dtype: str, options: Mapping[str, Any]) -> None:
        self._close_llm()
        super().load(folder, dtype=dtype, options=options)

    def _ask(self, job: Callable[..., Any] | str, *args: Any) -> list[Any]:
        self._close_llm()
        return super()._ask(job, *args)

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]],
                 options: Mapping[str, Any] | None = None) -> list[list[int]]:
        """By ``LLM``, which loads the weights anew: what the ranks hold is let go, for two copies might not fit."""
        assert self.loaded is not None, "load before"
        asked = {**(options or self.loaded.options), "dtype": self.loaded.dtype}
        if self._llm is None or self._llm.options != asked:
            self._close_llm()
            self.unload()
            self._llm = self.requests(self.loaded.folder, asked)
        try:
            outputs = self._llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts],
                                         [SamplingParams(**values) for values in params])
        except SubjectFailure:  # ranks in place of those that failed know nothing of it
            self._close_llm()
            raise
        if errors := [output.error for output in outputs if output.error]:
            raise ValueError(f"errors={errors}")
        return [list(output.outputs[0].token_ids) for output in outputs]

    def requests(self, folder: Path, options: Mapping[str, Any]) -> EngineRequests:
        return EngineRequests(self, folder, options)

    def alone(self) -> EngineSubject:
        return type(self)(replace(self.placement, tp_size=1, fabric="auto", ranks=None))

    def restart(self) -> None:
        self._close_llm()
        super().restart()

    def forget(self) -> None:
        """Let go of all that is loaded, here and on the ranks, and load nothing again by itself."""
        self._close_llm()
        self.loaded = None

    def close(self) -> None:
        self._close_llm()
        super().close()

    def _close_llm(self) -> None:
        if self._llm is not None:
            self._llm.close()
            self._llm = None


class EngineRequests(AbstractContextManager["EngineRequests"]):
    """``LLM`` itself, on the subject's ranks. A context manager; its end frees the ranks."""

    def __init__(self, subject: EngineSubject, folder: Path, options: Mapping[str, Any]) -> None:
        with as_subject_failure():
            self._llm = LLM(folder, ranks=subject.ranks, tensor_parallel_size=subject.tp_size, device=subject.placement.device,
                            **options)
        self.options = options
        self.abort = self._llm.abort
        self.block_size = self._llm.config.block_size

    def params(self, values: Mapping[str, Any]) -> SamplingParams:
        return SamplingParams(**values)

    def generate(self, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> list[RequestOutput]:
        """One output a prompt, in the prompts' order."""
        with as_subject_failure():
            return self._llm.generate(prompts, params, use_tqdm=False)

    @contextmanager
    def stream(self, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> Iterator[Any]:
        """Outputs as they come, by vLLM's names."""
        with as_subject_failure(), self._llm.stream(prompts, params) as items:
            yield items

    def close(self) -> None:
        self._llm.close()

    def __exit__(self, *exc_info: object) -> None:
        self.close()
