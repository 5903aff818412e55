"""A module of one's own and its plan for torch's ``parallelize_module`` as a subject: ``torch:package.module:function``.

The function gets a config, this rank and the number of ranks, and gives a module with its plan::

    def decoder(config: dict, tp_rank: int, tp_size: int) -> tuple[nn.Module, dict[str, ParallelStyle]]: ...

The module takes token ids ``[1, T]`` and gives logits ``[1, T, V]`` (or an object that has them as ``logits``). It is made on
every rank, whole; its parameters are cast to the dtype under test, and nothing else is; the checkpoint is loaded with
``load_state_dict``, so a module that holds tensors fused has a load hook (``register_load_state_dict_pre_hook``), which may move
elements and not compute with them. Then ``parallelize_module`` cuts it. On one rank the plan is not used.

There is no cache: each sequence runs by itself, in one forward, and generation computes it anew for every token.

Shape suffixes: T = tokens of one sequence, V = vocabulary.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from functools import partial
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from engine.checkpoint.checkpoint_files import StoredTensor, open_file
from harness.checks.weights import TIED, stored_tensors
from harness.errors import UsageError, one_line
from harness.subjects.base import IN_MODULE, Placement, Schedule
from harness.subjects.dtensor import DTensorRank, DTensorSubject, own_groups, plain
from reference.checkpoints import read_config
from reference.hf import DTYPES, Activations, recording

Plan = dict[str, ParallelStyle]
Make = Callable[[dict[str, Any], int, int], tuple[nn.Module, Plan]]


class TorchRank(DTensorRank):
    """One rank of a module that ``parallelize_module`` has cut."""

    def load(self, folder: Path, *, dtype: str, options: Mapping[str, Any]) -> None:
        gc.collect()  # what was loaded before is full of cycles, and its groups have threads and sockets
        self.config = read_config(folder).to_dict()
        self.stored = stored_tensors(folder, self.config)
        self._make = function_of(options["function"])
        self.model, plan = self._made(DTYPES[dtype])
        load_into(self.model, {name: open_file(tensor.file).get_tensor(tensor.name) for name, tensor in self.stored.items()})
        self.model.to(self.device)
        if self.tp_size > 1:
            with own_groups(self), warnings.catch_warnings():
                warnings.filterwarnings("error", "Parallelize plan key")  # one that no module has, of another config's plan
                parallelize_module(self.model, init_device_mesh(self.device.type, (self.tp_size,)), plan)
        self.model.eval().requires_grad_(False)

    def _made(self, dtype: torch.dtype) -> tuple[nn.Module, Plan]:
        """The module, whole, with parameters of this dtype, and its plan."""
        module, plan = self._make(dict(self.config), self.tp_rank, self.tp_size)
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
        return module, plan

    # What it holds.

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def by_checkpoint_name(self, numbers: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """By loading the number of every element, plus a half so that no value that was not loaded looks like one."""
        sizes = [torch.Size(tensor.shape).numel() for tensor in self.stored.values()]
        starts = dict(zip(self.stored, accumulate(sizes, initial=0), strict=False))
        elements = {name: torch.arange(start, start + size, dtype=torch.float64).reshape(self.stored[name].shape)
                    for (name, start), size in zip(starts.items(), sizes, strict=True)}
        whole, _ = self._made(torch.float64)
        load_into(whole, {name: element + 0.5 for name, element in elements.items()})
        loaded = dict(whole.named_parameters(remove_duplicate=False))
        if self.tp_size > 1:  # parallelize_module sends out rank 0's
            for parameter in whole.parameters():
                dist.broadcast(value := parameter.detach().to(self.device), 0)
                parameter.data = value.cpu()
        place = torch.full((sum(sizes),), -1)
        for name, number in numbers.items():
            is_shared = any(loaded[other] is loaded[name] for other in loaded if other != name)  # the last that is loaded wins
            element = elements[name] if is_shared and name in elements else loaded[name].detach() - 0.5
            is_known = (element == element.round()) & (element >= 0) & (element < len(place))
            place[element[is_known].long()] = number[is_known]
        found = {name: place[element.long()] for name, element in elements.items()}
        found = {name: number for name, number in found.items() if (number >= 0).all()}
        for copy, original in TIED.items():  # of a module that has no tensor of that name
            if copy in elements and copy not in found and copy not in loaded and original in found:
                found[copy] = found[original]
        return found

    # What it computes.

    @torch.no_grad()
    def logits(self, schedule: Schedule) -> list[Tensor]:
        return [self._forward(ids) for ids in schedule.sequences]

    @torch.no_grad()
    def activations(self, schedule: Schedule, sequence: int) -> Activations:
        """This rank's part of what each module took and gave: of its features, or of its rows where a sequence is cut."""
        ids = schedule.sequences[sequence]
        parts = torch.arange(len(ids)).chunk(self.tp_size)  # as DTensor cuts
        own = len(parts[self.tp_rank]) if self.tp_rank < len(parts) else 0
        with recording(self.model, len(ids), local=plain, own_tokens=own) as taken, suppress(Exception):
            self._forward(ids)  # what raises is told by ``logits``; a module before it may be wrong
        return taken

    def _forward(self, ids: Sequence[int]) -> Tensor:
        """Logits ``[T, V]``, on the CPU."""
        with self._modules_as_phases():
            given = self.model(torch.tensor([list(ids)], device=self.device))
        logits = getattr(given, "logits", given)
        logits = plain(logits.full_tensor() if isinstance(logits, DTensor) else logits)
        return (logits[0] if logits.ndim == 3 else logits).cpu()

    @contextmanager
    def _modules_as_phases(self) -> Iterator[None]:
        """Where a rank raises or hangs, the report names the module that it was in."""
        within = [self.phase]

        def enter(name: str, *_: Any) -> None:
            within.append(f"{IN_MODULE}{name}" if name else "the model itself")
            self.phase = within[-1]

        def leave(*_: Any) -> None:
            within.pop()
            self.phase = within[-1]

        with ExitStack() as hooks:
            for name, module in self.model.named_modules():
                hooks.callback(module.register_forward_pre_hook(partial(enter, name), prepend=True).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
            yield

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]],
                 before_step: Callable[[str], None] = lambda phase: None) -> list[list[int]]:
        """Prompt by prompt; every rank draws from a generator of one seed."""
        return [self._continue(prompt, own) for prompt, own in zip(prompts, params, strict=True)]

    def _continue(self, prompt: Sequence[int], own: Mapping[str, Any]) -> list[int]:
        ends = self.config.get("eos_token_id")
        stops = () if own.get("ignore_eos") or ends is None else ends if isinstance(ends, list) else (ends,)
        generator = torch.Generator().manual_seed(own.get("seed") or 0)
        ids = list(prompt)
        while len(ids) < len(prompt) + own["max_tokens"]:
            ids.append(_draw(self._forward(ids)[-1].double(), own, generator))
            if ids[-1] in stops:
                break
        return ids[len(prompt) :]


class TorchSubject(DTensorSubject):
    """Declares nothing but a model: its layers are torch's."""

    name: ClassVar[str] = "torch"
    has_uneven: ClassVar[bool] = False  # a plan of plain tensors has DTensor guess that all ranks' parts are as long
    function: ClassVar[str]
    rank_class: ClassVar[type[TorchRank]] = TorchRank

    @classmethod
    def check_fit(cls, folder: Path, placements: Sequence[Placement]) -> None:
        """Refuse a function, a module or a plan that can't be, before anything starts: on the meta device.

        Raises:
            UsageError: if ranks would be threads; the function raises or gives something else; a name in its plan matches no
                module; or its module does not fit the checkpoint.
        """
        super().check_fit(folder, placements)
        config = read_config(folder).to_dict()
        for placement in placements:
            _check_made(cls.name, function_of(cls.function), config, stored_tensors(folder, config), placement.tp_size)

    def load(self, folder: Path, *, dtype: str, options: Mapping[str, Any]) -> None:
        super().load(folder, dtype=dtype, options={**options, "function": self.function})


def torch_subject(function: str) -> type[TorchSubject]:
    """The subject of a function, as ``package.module:function``.

    Raises:
        UsageError: if there is none.
    """
    function_of(function)
    return type("TorchSubject", (TorchSubject,), {"name": f"torch:{function}", "function": function})


def function_of(path: str) -> Make:
    """The function of that name.

    Raises:
        UsageError: if there is none.
    """
    module, _, attribute = path.partition(":")
    try:
        found: Make = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"subject='torch:{path}' can't be imported ({one_line(error)}): give torch:package.module:function, "
                         "importable from here") from error
    if not callable(found):
        raise UsageError(f"subject='torch:{path}' must be a function, it is a {type(found).__name__}")
    return found


def load_into(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a checkpoint's tensors; of tied ones those that the module has names for."""
    names = module.state_dict().keys()
    module.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in TIED or name in names or (
        TIED[name] not in tensors)})


def _check_made(name: str, make: Make, config: dict[str, Any], stored: Mapping[str, StoredTensor], tp_size: int) -> None:
    where = f"subject={name!r} at tp_size={tp_size}"
    try:
        with torch.device("meta"):
            made = make(dict(config), 0, tp_size)
    except Exception as error:
        raise UsageError(f"{where} raises {one_line(error)}") from error
    match made:
        case (nn.Module() as module, dict() as plan) if all(isinstance(style, ParallelStyle) for style in plan.values()):
            pass
        case _:
            raise UsageError(f"{where} must give (nn.Module, {{module name: ParallelStyle}}), it gives {type(made).__name__}")
    modules = [name for name, _ in module.named_modules()]
    if tp_size > 1 and not plan:
        raise UsageError(f"{where} gives an empty plan: nothing would be sharded")
    if unmatched := [pattern for pattern in plan if not any(_matches(module, pattern) for module in modules)]:
        raise UsageError(f"{where}: {len(unmatched)} of {len(plan)} names of the plan match no module, first {unmatched[0]!r}; "
                         f"modules are {', '.join(modules[-4:])}, …: torch would leave them whole")
    try:
        load_into(module, {name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()})
    except Exception as error:
        raise UsageError(f"{where}: its module does not fit the checkpoint: {str(error).strip()}") from error


def _matches(module: str, pattern: str) -> bool:
    """As ``parallelize_module`` has it: name by name. The empty pattern is the whole module."""
    names, patterns = module.split("."), pattern.split(".")
    return len(names) == len(patterns) and all(map(fnmatch, names, patterns))


def _draw(logits_V: Tensor, own: Mapping[str, Any], generator: torch.Generator) -> int:
    """The next token: the best, or one from the smallest set of likeliest ones whose probabilities reach ``top_p``."""
    if not own["temperature"]:
        return int(logits_V.argmax())
    p, order = (logits_V / own["temperature"]).softmax(0).sort(descending=True)
    p[p.cumsum(0) - p >= own.get("top_p", 1.0)] = 0
    return int(order[torch.multinomial(p, 1, generator=generator)])
