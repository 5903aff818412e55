"""What is under test, behind one small interface; the engine is the first subject.

A subject's methods run inside a rank. Names are the reference's (Hugging Face module and checkpoint names), so that a
check can hold any subject against the reference without knowing how it fuses or shards.

Shape suffixes: T = tokens of one sequence, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.config import EngineConfig, ModelConfig
from engine.execution.core import EngineCore
from engine.execution.runner import Runner
from engine.frontend.outputs import RequestOutput
from engine.frontend.sampling import SamplingParams
from engine.layers.norm import RMSNorm
from engine.llm import LLM
from engine.models.table import held_in
from engine.parallel.linear import MergedColumnParallelLinear, RowParallelLinear
from engine.ranks.ranks import RankContext, Ranks
from engine.scheduling.batch import StepBatch, build_batch
from engine.scheduling.kv_cache import BlockManager
from engine.scheduling.scheduler import Chunk
from engine.scheduling.sequence import Request
from engine.scheduling.sequence import Sequence as EngineSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Taps:
    """One rank's activations for one sequence, rows in token order, by reference module name."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


class Subject(Protocol):
    """A tensor-parallel model that can be checked. One instance a rank."""

    name: str

    def load(self, rank: RankContext, folder: Path, *, dtype: str, options: Mapping[str, Any]) -> None:
        """Load this rank's shards of the checkpoint in ``folder``."""

    def shards(self) -> dict[str, Tensor]:
        """This rank's shard of each checkpoint tensor, as it is computed with; ``lm_head.weight`` also where it is tied."""

    def logits(self, script: Script) -> list[Tensor]:
        """Logits ``[T, V]`` after every token of each sequence."""

    def taps(self, script: Script, sequence: int) -> Taps:
        """Activations of one sequence of the script, the whole script having run."""

    def generate(self, prompts: Sequence[Sequence[int]], params: Mapping[str, Any]) -> list[list[int]]:
        """Token ids that follow each prompt, all prompts in one batch. ``params``: fields of SamplingParams."""


class EngineSubject:
    """The engine of this project, driven through its runner and its loop."""

    name = "engine"

    def load(self, rank: RankContext, folder: Path, *, dtype: str, options: Mapping[str, Any]) -> None:
        self.tp = rank.tp
        self.model_config = ModelConfig.from_folder(folder)
        config = EngineConfig(tensor_parallel_size=rank.tp.size, device=rank.device.type, dtype=dtype, **options)
        self.config = config.resolve(self.model_config)
        self.runner = Runner(folder, self.model_config, self.config, rank.tp, rank.device)
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

    def logits(self, script: Script) -> list[Tensor]:
        collected: list[list[Tensor]] = [[] for _ in script.sequences]

        def run(batch: StepBatch, rows: list[tuple[int, range]]) -> None:
            logits = self.runner.logits(batch)
            for sequence, span in rows:
                collected[sequence].append(logits[span.start : span.stop].cpu())

        self._play(script, run)
        return [torch.cat(parts) for parts in collected]

    def taps(self, script: Script, sequence: int) -> Taps:
        taps = Taps()
        span = range(0)
        parts: dict[tuple[str, str], list[Tensor]] = {}

        def record(side: str, path: str, module: nn.Module, value: Tensor) -> None:
            pieces = self._split(path, module, value.T) if side == "outputs" else [(path, value.T)]
            for name, piece in pieces:
                parts.setdefault((side, name), []).append(piece.T[span.start : span.stop].cpu().clone())

        def hook(path: str) -> Callable[..., None]:
            def tap(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if not len(span):
                    return
                if isinstance(module, RowParallelLinear):
                    record("inputs", path, module, args[0])
                record("outputs", path, module, output[0] if isinstance(output, tuple) else output)

            return tap

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
            self._play(script, run)
        for (side, name), pieces in parts.items():
            getattr(taps, side)[name] = torch.cat(pieces)
        return taps

    def generate(self, prompts: Sequence[Sequence[int]], params: Mapping[str, Any]) -> list[list[int]]:
        core = EngineCore(self.runner, self.num_blocks)
        sampling = SamplingParams(**params)
        outputs: list[list[int]] = [[] for _ in prompts]
        for number, prompt in enumerate(prompts):
            core.scheduler.add(EngineSequence.from_request(Request(
                request_id=number, prompt_token_ids=tuple(prompt), params=sampling,
                seed=number if sampling.seed is None else sampling.seed, max_tokens=sampling.max_tokens or 16,
                stop_token_ids=frozenset(sampling.stop_token_ids),
            )))
        while core.has_work:
            for sequence, token_id in core.step():
                outputs[sequence.request.request_id].append(token_id)
        return outputs

    @torch.inference_mode()
    def _play(self, script: Script, run: Callable[[StepBatch, list[tuple[int, range]]], None]) -> None:
        """Hand each of the script's steps to ``run``: the batch, and which of its rows are which sequence's."""
        blocks = BlockManager(self.num_blocks, self.block_size, enable_prefix_caching=False)
        sequences = [
            EngineSequence.from_request(Request(
                request_id=number, prompt_token_ids=tuple(token_ids), params=SamplingParams(), seed=0, max_tokens=1,
                stop_token_ids=frozenset(),
            )) for number, token_ids in enumerate(script.sequences)
        ]
        for number, sequence in enumerate(sequences):
            sequence.row = number
        for step in script.steps:
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


SUBJECTS: dict[str, Callable[[], Subject]] = {"engine": EngineSubject}


class EngineGenerator:
    """``LLM`` itself, on ranks that are somebody else's. A context manager; its end frees the ranks."""

    def __init__(self, ranks: Ranks, folder: Path, device: str, options: Mapping[str, Any]) -> None:
        self._llm = LLM(folder, ranks=ranks, tensor_parallel_size=ranks.tp_size, device=device, **options)
        self.stream, self.abort = self._llm.stream, self._llm.abort
        self.block_size = self._llm.config.block_size

    def params(self, values: Mapping[str, Any]) -> SamplingParams:
        """Sampling parameters of these fields."""
        return SamplingParams(**values)

    def generate(self, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> list[RequestOutput]:
        """One output a prompt, in the prompts' order."""
        return self._llm.generate(prompts, params, use_tqdm=False)

    def __enter__(self) -> EngineGenerator:
        return self

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        self._llm.close()


GENERATORS: dict[str, Callable[[Ranks, Path, str, Mapping[str, Any]], EngineGenerator]] = {"engine": EngineGenerator}
"""What takes requests, in the driver's process: ranks, model folder, device and the engine's options -> vLLM's interface."""
