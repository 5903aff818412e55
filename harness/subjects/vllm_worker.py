"""vLLM inside one rank of an interpreter of its own: what ``engine/ranks/foreign_program.py`` serves there.

It imports vLLM and torch as that interpreter has them, and nothing of this project: see docs/vllm_subject.md for what it uses of
vLLM. One engine a rank, which runs by itself what all others run too (``external_launcher``), model after model.

Plain data in and out. Names are those of the checkpoint and of transformers' modules.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

EXPERT = re.compile(r"(?P<parent>.*\.experts)\.(?P<expert>\d+)\.(?P<projection>\w+)\.weight$")
CACHE_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
"""Of a rank's cache, by device: GPUs run models as they are, and CPUs tiny ones."""
ARIA_TEXT = "AriaTextForCausalLM"
ROUTERS = ("FusedTopKRouter", "FusedTopKBiasRouter")
"""Classes of routers that take the best of all experts, as one choice of the reference's: not those of groups, nor of CPUs."""
UNREAD = -1
"""In place of an expert, where no router has written one."""
UNSEEN = ("rotary_emb", "attn", "routed_experts", "quant_method", "act_fn", "logits_processor", "lm_head")
"""Last names of modules that the reference has no counterpart of, or that are called past their hooks."""


@dataclass(frozen=True)
class Place:
    """Where a checkpoint's tensor is in a rank: a part of a parameter, and which part of the tensor that is.

    tensor   this rank's part, as it was before vLLM packed it
    dim      the dimension of the checkpoint's tensor that is cut; None: all of it is here
    ranges   the rows or columns that are here, from and to
    """

    tensor: Tensor
    dim: int | None
    ranges: list[list[int]]


class Served:
    """One rank of vLLM. A model is loaded by ``load``, in place of the one before.

    Args:
        tp_rank: this one, and the number of its GPU.
        tp_size: how many there are.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, tp_rank: int, tp_size: int, device: str) -> None:
        self.tp_rank, self.tp_size, self.device = tp_rank, tp_size, device
        os.environ.update(RANK=str(tp_rank), LOCAL_RANK=str(tp_rank), WORLD_SIZE=str(tp_size), MASTER_ADDR="127.0.0.1")
        from vllm.model_executor.model_loader import register_model_loader
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        served = self

        @register_model_loader("shardproof")
        class Loader(DefaultModelLoader):  # type: ignore[misc,unused-ignore]
            """Notes the parameters as they were loaded: on CPUs those of linear layers are packed behind this."""

            def __init__(self, load_config: Any) -> None:
                own = copy.copy(load_config)
                own.load_format = "safetensors"
                super().__init__(own)

            def load_weights(self, model: nn.Module, model_config: Any) -> None:
                super().load_weights(model, model_config)
                served.loaded(model)

        if device == "cpu":
            from vllm.distributed.device_communicators import cpu_communicator

            shared = cpu_communicator._CPUSHMDistributed
            named = shared.make_group_name
            # Under `external_launcher` all models of all jobs of a machine would have memory of the same name.
            shared.make_group_name = staticmethod(lambda own: f"{named(own)}-{os.environ['MASTER_PORT']}")
        self.llm: Any = None
        self.parameters: dict[str, Tensor] = {}
        self.chosen: dict[str, Tensor] = {}
        self._rows_to_read = 0
        self._is_flipped = False
        # What was imported is never garbage. vLLM freezes and thaws all there is around each model, and looks through it nine
        # times: three quarters of the time that a tiny one takes.
        gc.collect()
        gc.freeze()
        gc.freeze = gc.unfreeze = lambda: None

    def loaded(self, model: nn.Module) -> None:
        """Called with the model when its weights are loaded and not yet packed."""
        self.parameters = {name: parameter.detach().clone() for name, parameter in (
            *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))}
        if self._rows_to_read:
            self.chosen = _read_choices(model, self._rows_to_read)

    def load(self, folder: str, dtype: str, port: int, max_model_len: int, max_num_batched_tokens: int, is_eager: bool) -> None:
        """Load a checkpoint.

        Args:
            folder: with config.json and safetensors.
            dtype: as torch names it.
            port: free, for the ranks to find each other; another one for each model.
            max_model_len: tokens of the longest sequence.
            max_num_batched_tokens: of a step.
            is_eager: module by module, so that hooks run; else compiled and in CUDA graphs, as vLLM does by default.
        """
        self.unload()
        os.environ["MASTER_PORT"] = str(port)
        self._rows_to_read = 0 if is_eager else max_num_batched_tokens
        import vllm

        architectures = _architectures(folder)
        if ARIA_TEXT in architectures:
            _know_aria_text()
        _seen_in_this_process(architectures)
        try:
            self.llm = vllm.LLM(
                folder, tokenizer=None, skip_tokenizer_init=True, dtype=dtype, tensor_parallel_size=self.tp_size, seed=0,
                model_impl="vllm", distributed_executor_backend="external_launcher", load_format="shardproof",
                enforce_eager=is_eager, trust_remote_code=False, enable_prefix_caching=False, max_model_len=max_model_len,
                max_num_seqs=8, max_num_batched_tokens=max_num_batched_tokens, gpu_memory_utilization=0.02,
                kv_cache_memory_bytes=CACHE_BYTES[self.device], max_logprobs=-1, logprobs_mode="raw_logits",
                logits_processors=[_forced_class()], generation_config="vllm", disable_log_stats=True, async_scheduling=False)
        except BaseException:
            self.unload()
            raise

    def unload(self) -> None:
        """Let go of the model, its process groups and what they share."""
        from vllm.distributed import parallel_state

        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
        self.llm, self.parameters, self.chosen = None, {}, {}
        parallel_state.cleanup_dist_env_and_memory()
        # Compiled models have the names of groups in them, and vLLM keeps them on disk: the next groups get the same names again.
        parallel_state._group_name_counter.clear()

    @property
    def runner(self) -> Any:
        """The model runner, which lives in this process."""
        return self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner

    @property
    def model(self) -> nn.Module:
        """The loaded model, out of what holds its graphs."""
        model: nn.Module = self.runner.get_model()
        return model

    # What it holds.

    def held(self, names: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Of each tensor of the checkpoint this rank's part, and which part it is; or why it can't be told.

        Args:
            names: by the model's name of it the files' own.
            shapes: by the model's name the whole shape.
        """
        found: dict[str, Any] = {}
        self._is_flipped = False
        for _ in range(2):  # the first time it is seen whether files have matrices the other way round, as Conv1D of GPT-2
            for name, in_files in names.items():
                place = next((place for own in (in_files, name) if (place := self._place(own, list(shapes[name])))), None)
                found[name] = "vLLM's parameters have none that its name leads to" if place is None else {
                    "tensor": place.tensor, "dim": place.dim, "ranges": place.ranges}
        return found

    def _place(self, name: str, shape: list[int]) -> Place | None:
        """Where a tensor of the files is."""
        module, index, parameter = self._parameter_of(name)
        if parameter is None:
            return self._place_of_expert(name, shape)
        dim, parts, starts = _cut(module, index, name.endswith(".bias"), parameter)
        tensor = parameter if dim is None else torch.cat([
            parameter.narrow(dim, at, stop - start) for at, (start, stop) in zip(starts, parts, strict=True)], dim)

        def fits(part: Tensor, cut: int | None) -> bool:
            return part.ndim == len(shape) and all(part.shape[at] == shape[at] for at in range(part.ndim) if at != cut)

        is_linear = "LinearBase" in [base.__name__ for base in type(module).__mro__] and tensor.ndim == 2
        flipped = None if dim is None else 1 - dim
        if is_linear and fits(tensor.T, flipped):
            self._is_flipped |= not fits(tensor, dim)
            if self._is_flipped:  # of square ones no shape tells it, but the others of the model do
                tensor, dim = tensor.T, flipped
        return Place(tensor, dim, parts) if fits(tensor, dim) else None

    def _parameter_of(self, name: str) -> tuple[nn.Module, int | None, Tensor | None]:
        """The module, the number of its part that the tensor is (None: all of it), and the parameter."""
        own = self.own_name(name)
        if own == "lm_head.weight" and own not in self.parameters:
            own = next((other for other in self.parameters if other.endswith("embed_tokens.weight")), own)
        path, _, kind = own.rpartition(".")
        if own in self.parameters:
            return self._module(path), None, self.parameters[own]
        parent, _, last = path.rpartition(".")
        for fused, parts in self.packed().items():
            packed = f"{parent}.{fused}.{kind}"
            if last in parts and packed in self.parameters:
                return self._module(f"{parent}.{fused}"), parts.index(last), self.parameters[packed]
        return self.model, None, None

    def _module(self, path: str) -> Any:
        return self.model.get_submodule(path)

    def own_name(self, name: str) -> str:
        """A tensor's name in the files -> in vLLM, fused ones apart still."""
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        if mapper is None:
            return name
        if hasattr(mapper, "get_rename_mapper"):
            return str(mapper.get_rename_mapper().map_name(name) or name)
        return str(mapper.get_unstacked_mapper()._map_name(name) or name)  # up to 0.26

    def packed(self) -> dict[str, list[str]]:
        """Which modules are fused into which, by the model's own ``packed_modules_mapping``."""
        found: dict[str, list[str]] = {}
        for module in self.model.modules():
            mapping = getattr(module, "packed_modules_mapping", None)
            if isinstance(mapping, dict):
                found |= {fused: list(parts) for fused, parts in mapping.items() if len(parts) > 1}
        return found

    def _place_of_expert(self, name: str, shape: list[int]) -> Place | None:
        """One expert's projection among the fused ones."""
        match = EXPERT.fullmatch(self.own_name(name))
        if match is None:
            return None
        try:
            experts = self._module(f"{match['parent']}.routed_experts")
        except AttributeError:
            return None
        is_fused = {experts.ckpt_gate_proj_name: 0, experts.ckpt_up_proj_name: 1}
        projection, expert = match["projection"], int(match["expert"])
        tp_rank = experts.moe_config.moe_parallel_config.tp_rank
        tp_size = experts.moe_config.moe_parallel_config.tp_size
        path = f"{match['parent']}.routed_experts."
        if projection == experts.ckpt_down_proj_name:
            own, dim, start = self.parameters[f"{path}w2_weight"][expert], 1, 0
        elif projection in is_fused:
            own, dim = self.parameters[f"{path}w13_weight"][expert], 0
            start = is_fused[projection] * (own.shape[0] // 2)
        else:
            return None
        size = shape[dim] // tp_size
        tensor = own.narrow(dim, start, size).narrow(1 - dim, 0, shape[1 - dim])  # padded behind, for its kernels
        if tp_size == 1:
            return Place(tensor, None, [])
        return Place(tensor, dim, [[tp_rank * size, (tp_rank + 1) * size]])

    # What it computes.

    def logits(self, prompts: list[list[int]], forced: list[list[int]]) -> dict[str, list[Any]]:
        """Of each sequence, its prompt and behind it the tokens that are forced upon it: what this one run of all of them gave.

        Returns:
            ``logits``: ``[T, V]`` after every token. ``choices``: of a model in graphs the chosen experts ``[T, k]`` by the path
            of what chose them (see ``blocks``), without those that could not be read.
        """
        vocabulary = int(self.llm.model_config.get_vocab_size())
        with self._choosing() as taken:
            outputs = self._run(prompts, forced)
        parts = list(zip(outputs, prompts, forced, strict=True))
        return {"logits": [_logits(output, prompt, own, vocabulary) for output, prompt, own in parts],
                "choices": [_whole(taken.get(sequence, {}), len(prompt) + len(own))
                            for sequence, (_, prompt, own) in enumerate(parts)]}

    @contextmanager
    def _choosing(self) -> Iterator[dict[int, dict[str, list[Tensor]]]]:
        """By sequence what is chosen in each step of the runner until the end of the block, by the path of what chooses.

        A graph runs no Python, but it writes the rows of its step into ``chosen``, and they are read behind it.
        """
        taken: dict[int, dict[str, list[Tensor]]] = {}
        if not self.chosen:
            yield taken
            return
        runner = self.runner
        run_step = runner.execute_model

        def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            for rows in self.chosen.values():
                rows.fill_(UNREAD)
            output = run_step(scheduled, *args, **kwargs)
            if scheduled.total_num_scheduled_tokens:
                for path, rows in self.chosen.items():
                    read = rows.cpu().long()
                    for sequence, place in self._places().items():
                        taken.setdefault(sequence, {}).setdefault(path, []).append(read[place])
            return output

        runner.execute_model = execute_model
        try:
            yield taken
        finally:
            del runner.execute_model  # and the class's is there again

    def blocks(self, names: Mapping[str, str]) -> dict[str, str]:
        """By the path of what chooses experts in one go the reference's name of the block around them.

        Args:
            names: the checkpoint's tensors, by which modules are found (see ``held``).
        """
        return self._blocks(self._modules_of(names))

    def _blocks(self, modules: Mapping[str, list[tuple[str, int | None]]]) -> dict[str, str]:
        found: dict[str, str] = {}
        for path in _plain_routers(self.model):
            name, part = (modules.get(path.rpartition(".")[0]) or modules.get(path) or [("", 0)])[0]
            if part is None:
                found[path] = name
        return found

    def _run(self, prompts: list[list[int]], forced: list[list[int]], logits: bool = True) -> list[Any]:
        from vllm import SamplingParams

        params = [SamplingParams(
            temperature=0.0, max_tokens=len(own) + 1, ignore_eos=True, detokenize=False, prompt_logprobs=-1 if logits else None,
            logprobs=-1 if logits else None, flat_logprobs=True, extra_args={"forced": own, "sequence": sequence})
            for sequence, own in enumerate(forced)]
        outputs: list[Any] = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        for output, own in zip(outputs, forced, strict=True):
            if list(output.outputs[0].token_ids[: len(own)]) != own:
                raise ValueError("vLLM did not take the tokens that were forced upon it")
        return outputs

    def generate(self, prompts: list[list[int]], params: list[dict[str, Any]]) -> list[list[int]]:
        """The token ids after each prompt, all in one batch."""
        from vllm import SamplingParams

        own = [SamplingParams(**values, detokenize=False) for values in params]
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], own, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def activations(self, prompts: list[list[int]], forced: list[list[int]], sequence: int,
                    names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Of one of these sequences what went into and came out of each module, rows in token order, and the chosen experts.

        Args:
            prompts: as in ``logits``.
            forced: as in ``logits``.
            sequence: its number among them.
            names: the checkpoint's tensors, by which modules are found (see ``held``).
        """
        modules = self._modules_of(names)
        taken: dict[str, dict[str, list[Tensor]]] = {"inputs": {}, "outputs": {}, "choices": {}}
        with self._recording(modules, sequence, len(prompts[sequence]) + len(forced[sequence]), taken):
            self._run(prompts, forced, logits=False)
        own = {name: path for path, entries in modules.items() for name, part in entries if part is None and name != path}
        return {side: {name: torch.cat(parts) for name, parts in of.items()} for side, of in taken.items()} | {"own": own}

    def _modules_of(self, names: Mapping[str, str]) -> dict[str, list[tuple[str, int | None]]]:
        """By vLLM's module the reference's modules that it computes: itself, or those that are fused in it, part by part.

        Modules of one tensor have its name; those around them go by the same names as long as both sides have the same.
        """
        found: dict[str, list[tuple[str, int | None]]] = {}
        for name in names:
            own = self.own_name(names[name])
            theirs, ours = name.rpartition(".")[0], own.rpartition(".")[0]
            parent, _, last = ours.rpartition(".")
            expert = EXPERT.fullmatch(own)
            packed = next((f"{parent}.{fused}" for fused, parts in self.packed().items() if last in parts and (
                f"{parent}.{fused}.weight" in self.parameters)), None)
            if packed is not None:
                parts = self.packed()[packed.rpartition(".")[2]]
                entry = (theirs, parts.index(last))
                if entry not in found.setdefault(packed, []):
                    found[packed].append(entry)
            elif expert is not None and ".experts" in name:  # all experts are one module, here and there
                theirs, ours = name[: name.rindex(".experts") + len(".experts")], expert["parent"]
                found.setdefault(ours, [(theirs, None)])
            elif any(f"{ours}.{kind}" in self.parameters for kind in ("weight", "bias")):
                found.setdefault(ours, [(theirs, None)])
            while "." in ours and "." in theirs and ours.rpartition(".")[2] == theirs.rpartition(".")[2]:
                ours, theirs = ours.rpartition(".")[0], theirs.rpartition(".")[0]
                found.setdefault(ours, [(theirs, None)])
        known = dict(self.model.named_modules())
        for path, module in known.items():
            around = path.rpartition(".")[0]
            if _is_whole_moe(module) and around in found:  # what the reference's block around its experts gives
                found[path] = found.pop(around)
        return {name: entries for name, entries in found.items() if name in known and name.rpartition(".")[2] not in UNSEEN}

    @contextmanager
    def _recording(self, modules: Mapping[str, list[tuple[str, int | None]]], sequence: int, length: int,
                   taken: dict[str, dict[str, list[Tensor]]]) -> Iterator[None]:
        hooks = []

        def note(side: str, name: str, value: Tensor) -> None:
            rows = self._rows(sequence, len(value))
            if rows is not None and sum(map(len, taken[side].get(name, []))) < length:
                own = value[rows][: length - sum(map(len, taken[side].get(name, [])))]
                taken[side].setdefault(name, []).append(own.detach().clone())

        def before(module: nn.Module, path: str, args: Any, kwargs: Any) -> None:
            value = _given([*args, *kwargs.values()], _adds(path, module))
            if value is not None:
                for name, _ in modules[path]:
                    note("inputs", name, value)

        def after(module: nn.Module, path: str, output: Any) -> None:
            values = [x for x in (output if isinstance(output, (tuple, list)) else [output]) if _is_rows(x)]
            if not values:
                return
            value = values[0]
            if len(values) == 2 and values[1].shape == value.shape and path.rpartition(".")[2].isdigit():
                value = value + values[1]  # what a layer adds, and what it was added to
            for name, part in modules[path]:
                if part is None:
                    note("outputs", name, value)
                else:
                    sizes = _sizes(module)
                    note("outputs", name, value.split(sizes, -1)[part])

        plain = _plain_routers(self.model)
        routers = {block: plain[path] for path, block in self._blocks(modules).items()}
        for block, router in routers.items():
            router.set_capture_fn(lambda chosen, block=block: note("choices", block, chosen.long()))
        for path in modules:
            module = self._module(path)
            hooks.append(module.register_forward_pre_hook(
                lambda module, args, kwargs, path=path: before(module, path, args, kwargs), with_kwargs=True))
            hooks.append(module.register_forward_hook(lambda module, args, output, path=path: after(module, path, output)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for router in routers.values():
                router.set_capture_fn(None)

    def _rows(self, sequence: int, num_rows: int) -> slice | None:
        """The rows of one sequence in the step that runs; None if it has none there, or these are no rows of tokens."""
        places = self._places()
        return places.get(sequence) if num_rows == max(place.stop for place in places.values()) else None

    def _places(self) -> dict[int, slice]:
        """By sequence its rows in the step that runs or ran last."""
        batch = self.runner.input_batch
        starts = self.runner.query_start_loc.np[: batch.num_reqs + 1].tolist()
        return {self.runner.requests[request].sampling_params.extra_args["sequence"]: slice(starts[number], starts[number + 1])
                for number, request in enumerate(batch.req_ids)}

    def close(self) -> None:
        """Let go of everything."""
        self.unload()


def _architectures(folder: str) -> list[str]:
    """Those of a model's config."""
    found: list[str] = json.loads((Path(folder) / "config.json").read_text()).get("architectures") or []
    return found


def _know_aria_text() -> None:
    """Aria's text model by itself, which vLLM has inside of the model with vision alone: put together as it is there."""
    from vllm import ModelRegistry

    if ARIA_TEXT in ModelRegistry.models:
        return
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.models.aria import AriaTextModel
    from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

    class AriaTextForCausalLM(nn.Module):
        hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"model.": "language_model."},
                                          orig_to_new_suffix={"router.weight": "router_weight"})

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__()
            config = vllm_config.model_config.hf_config
            self.language_model = AriaTextModel(vllm_config=vllm_config, prefix="language_model")
            self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix="lm_head")
            self.logits_processor = LogitsProcessor(config.vocab_size)

        def embed_input_ids(self, input_ids: Tensor) -> Any:
            return self.language_model.embed_input_ids(input_ids)

        def forward(self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None,
                    inputs_embeds: Any = None) -> Any:
            return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

        def compute_logits(self, hidden_states: Tensor) -> Any:
            return self.logits_processor(self.lm_head, hidden_states)

        def load_weights(self, weights: Any) -> Any:
            return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)

    ModelRegistry.register_model(ARIA_TEXT, AriaTextForCausalLM)


def _seen_in_this_process(architectures: Sequence[str]) -> None:
    """Have vLLM look at the model's class here: by itself it starts another interpreter for that, which takes long."""
    from vllm import ModelRegistry

    for architecture in architectures:
        known = ModelRegistry.models.get(architecture)
        if known is not None and hasattr(known, "module_name"):
            ModelRegistry.register_model(architecture, known.load_model_cls())


def _plain_routers(model: nn.Module) -> dict[str, Any]:
    """What chooses experts in one go, by the path of the module that has it."""
    return {path: router for path, module in model.named_modules() if type(module).__name__ == "MoERunner"
            and type(router := getattr(module, "router", None)).__name__ in ROUTERS}


def _read_choices(model: nn.Module, num_rows: int) -> dict[str, Tensor]:
    """Have plain routers write what they choose into buffers ``[num_rows, k]`` of their own, also in graphs.

    A graph that is captured after this has the copies in it, and writes to the same addresses whenever it runs.
    """
    chosen: dict[str, Tensor] = {}
    for path, router in _plain_routers(model).items():
        chosen[path] = torch.full((num_rows, router.top_k), UNREAD, dtype=torch.int32, device=next(model.parameters()).device)
        router.set_capture_fn(partial(_write, chosen[path]))
    return chosen


def _write(rows: Tensor, chosen: Tensor) -> None:
    """What was chosen for the rows of a step; a graph has rows of padding behind them."""
    rows[: len(chosen)].copy_(chosen[: len(rows)])


def _whole(parts: Mapping[str, Sequence[Tensor]], length: int) -> dict[str, Tensor]:
    """What was read of one sequence step by step, where it was read for each of its tokens."""
    read = {path: torch.cat(list(of_steps))[:length] for path, of_steps in parts.items()}
    return {path: rows for path, rows in read.items() if len(rows) == length and bool((rows != UNREAD).all())}


def _forced_class() -> type:
    """A logits processor that has a request draw the tokens of its ``extra_args["forced"]``, one after the other."""
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class Forced(AdapterLogitsProcessor):  # type: ignore[misc,unused-ignore]
        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: Any) -> Any:
            forced: list[int] = (params.extra_args or {}).get("forced") or []

            def force(output_ids: list[int], logits: Tensor) -> Tensor:
                if len(output_ids) < len(forced):
                    logits.fill_(float("-inf"))
                    logits[forced[len(output_ids)]] = 0.0
                return logits

            return force if forced else None

    return Forced


def _logits(output: Any, prompt: Sequence[int], forced: Sequence[int], vocabulary: int) -> Tensor:
    """[T, V] of one request's answer. What follows the last token of the prompt is told with the first one that is drawn."""
    rows = torch.full((len(prompt) + len(forced), vocabulary), float("nan"))
    seen = [(row - 1, output.prompt_logprobs, row) for row in range(1, len(prompt))]
    seen += [(len(prompt) - 1 + step, output.outputs[0].logprobs, step) for step in range(len(forced) + 1)]
    for row, told, position in seen:
        part = slice(told.start_indices[position], told.end_indices[position])
        rows[row, torch.tensor(told.token_ids[part])] = torch.tensor(told.logprobs[part])
    return rows


def _cut(module: nn.Module, index: int | None, is_bias: bool, parameter: Tensor) -> tuple[int | None, list[list[int]], list[int]]:
    """How a module cuts its parameter, as its class and its attributes say.

    Returns:
        The dimension (None: it is whole); which rows or columns of the checkpoint's tensor are here; where they begin in the
        parameter.
    """
    classes = [base.__name__ for base in type(module).__mro__]
    own: Any = module
    if "VocabParallelEmbedding" in classes and parameter.ndim:
        at = own.shard_indices
        return 0, [[at.org_vocab_start_index, at.org_vocab_end_index]], [0]
    rank, size = getattr(module, "tp_rank", 0), getattr(module, "tp_size", 1)
    if "QKVParallelLinear" in classes:
        heads = [(own.num_heads * own.head_size, own.total_num_heads * own.head_size, rank),
                 (own.num_kv_heads * own.head_size, own.total_num_kv_heads * own.head_size, rank // own.num_kv_head_replicas),
                 (own.num_kv_heads * own.v_head_size, own.total_num_kv_heads * own.v_head_size, rank // own.num_kv_head_replicas)]
    elif "MergedColumnParallelLinear" in classes:
        heads = [(total // size, total, rank) for total in own.output_sizes]
    elif "ColumnParallelLinear" in classes:
        heads = [(own.output_size // size, own.output_size, rank)]
    elif "RowParallelLinear" in classes and not is_bias and size > 1:
        each = own.input_size // size
        return 1, [[rank * each, (rank + 1) * each]], [0]
    else:
        return None, [], []
    parts, starts, at, before = [], [], 0, 0
    for number, (each, total, place) in enumerate(heads):
        if index is None or index == number:
            base = before if index is None else 0  # fused in the files too
            parts.append([base + place * each, base + (place + 1) * each])
            starts.append(at)
        at, before = at + each, before + total
    return 0, parts, starts


def _sizes(module: nn.Module) -> list[int]:
    """How many of a fused module's features are each part's."""
    own: Any = module
    if hasattr(own, "num_kv_heads"):
        return [own.num_heads * own.head_size, own.num_kv_heads * own.head_size, own.num_kv_heads * own.v_head_size]
    return [size // own.tp_size for size in own.output_sizes]


def _is_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1


def _adds(path: str, module: nn.Module) -> bool:
    """Whether a module takes what it adds up first: norms and layers are given the residual apart."""
    return "Norm" in type(module).__name__ or path.rpartition(".")[2].isdigit()


def _given(values: Sequence[Any], adds: bool) -> Tensor | None:
    tensors: list[Tensor] = [value for value in values if _is_rows(value)]
    if not tensors:
        return None
    if adds and len(tensors) > 1 and tensors[1].shape == tensors[0].shape:
        return tensors[0] + tensors[1]
    return tensors[0]


def _is_whole_moe(module: nn.Module) -> bool:
    """Whether it has shared experts in its output, which the reference's module of that name has not."""
    return type(module).__name__ == "MoERunner" and getattr(module, "shared_experts", None) is not None
