"""A Hugging Face model on one device: the other side of every comparison.

Shape suffixes: T = tokens of one sequence, V = vocabulary.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, is_dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.utils import logging as transformers_logging

from engine.checkpoint.checkpoint_files import CONFIG_FILE
from reference.building import building
from reference.choices import Routes, choosing
from reference.elements import CheckpointError, Element
from reference.exact import compute_in_float64, makes_position_tables

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "exact": torch.float64,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Activations:
    """What went into and came out of each module, by Hugging Face's module name; on the CPU.

    Modules are in the order in which they finished, so the first that differs is the first to blame. The whole model, whose
    name is empty, is the last one. Of several tensors that a module takes or returns the first one stands for all. The k-th
    of n calls of one module within a forward goes by ``NAME (call k of n)``.

    Attributes:
        inputs, outputs: [T, ...] each, a row a token.
        left_out: What was made and can't be compared by token, with the reason.
        scores: [T, ..., n], what was chosen from, by the names of choices (see ``reference.choices``).
        choices: [T, ..., k], the indices of the k best, behind them -1 where there were fewer; not what was forced.
    """

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    left_out: dict[str, str] = field(default_factory=dict)
    scores: dict[str, torch.Tensor] = field(default_factory=dict)
    choices: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopTwo:
    """The two best next tokens after each position.

    Attributes:
        token_ids: The best; among equals the lowest id.
        runners_up: The second best.
        margins: Logit of the best minus logit of the second, 0.0 for a tie.
    """

    token_ids: list[int]
    runners_up: list[int]
    margins: list[float]


class Reference:
    """A causal language model in eval mode on one device. Sequences run one at a time, whole and unpadded.

    So no number depends on a batch, and the same call gives the same bits. Gradients are off, but not by
    inference mode: a caller could neither write to its tensors nor compute with them under autograd.

    Nothing can be judged by logits that are not finite: whatever computes some raises CheckpointError, which
    names the first weight that is not finite either.

    Attributes:
        dtype: As ``load`` was told.
        vocab_size: Token ids are below it.
    """

    def __init__(self, model: Any, *, dtype: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.dtype = dtype
        self.vocab_size: int = self.text_config.vocab_size
        self._arguments = frozenset(inspect.signature(model.forward).parameters)

    @classmethod
    def load(
        cls, folder: str | Path, dtype: str = "bfloat16", device: str | torch.device = "cpu"
    ) -> "Reference":
        """Load the model in ``folder``, to be computed in ``dtype``.

        While it loads, transformers sets torch's default dtype and sets it back. Loads wait for each other;
        load before threads compute.

        Args:
            folder: A Hugging Face model folder.
            dtype: "bfloat16", "float16", "float32" or "float64": as transformers computes it. "exact": float64
                with the model's own float32 taken out too (see ``reference.exact``): what errors are measured
                against.
            device: Where it computes.

        Raises:
            CheckpointError: If transformers cannot load it.
            ValueError: If ``dtype`` is none of these.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not one of {sorted(DTYPES)}")
        if not (Path(folder) / CONFIG_FILE).is_file():
            raise CheckpointError(f"folder={folder} holds no {CONFIG_FILE}; pass a Hugging Face model folder")
        # Never a live module cast to another dtype: that would round RoPE's inv_freq along.
        with building(f"transformers cannot load folder={folder}"), _no_progress_bars():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=DTYPES[dtype],
                attn_implementation=None,  # sdpa, or eager where a model has none
                experts_implementation="eager",  # torch's grouped matrix products know no float64
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
        model.to(torch.device(device))
        if dtype == "exact":
            compute_in_float64(model)
        return cls(model, dtype=dtype)

    @property
    def config(self) -> Any:
        """The transformers config."""
        return self.model.config

    @property
    def text_config(self) -> Any:
        """The part of the config that is about text, of a model of several modalities; else all of it."""
        return self.config.get_text_config(decoder=True)

    @property
    def implementations(self) -> dict[str, str]:
        """Which of transformers' implementations compute, as ``{"attention": "sdpa", "experts": "eager"}``."""
        found = {"attention": self.text_config._attn_implementation}
        if any(name.endswith(".experts") for name, _ in self.model.named_modules()):
            found["experts"] = self.text_config._experts_implementation
        return found

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return torch.device(self.model.device)

    @torch.no_grad()
    def logits(
        self, token_ids: Sequence[Sequence[int]], routes: Sequence[Routes] | None = None
    ) -> list[torch.Tensor]:
        """Logits after every position of each sequence: [T, V] in the model's dtype, on the CPU.

        Args:
            token_ids: The sequences.
            routes: For each what it is to choose (see ``reference.choices``); None: what it chooses by itself.
        """
        each = routes or [{}] * len(token_ids)
        return [self._forward(ids, routes=own)[0].cpu() for ids, own in zip(token_ids, each, strict=True)]

    @torch.no_grad()
    def copies_of_logits(self, token_ids: Sequence[int], copies: int, routes: Routes | None = None) -> torch.Tensor:
        """The same of one sequence, computed in that many rows of a batch: [copies, T, V]."""
        return self._forward(token_ids, copies, routes).cpu()

    @torch.no_grad()
    def margins(self, token_ids: Sequence[int]) -> TopTwo:
        """The two best next tokens after each of the T positions, teacher-forced on ``token_ids``."""
        best_ids, second_ids, margins = _top_two(self._forward(token_ids)[0])
        return TopTwo(token_ids=best_ids, runners_up=second_ids, margins=margins)

    @torch.no_grad()
    def greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[TopTwo]:
        """The ``max_new_tokens`` tokens that follow each prompt greedily, whatever they are, with a KV cache."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} is below 1")
        return [self._continue(prompt, max_new_tokens) for prompt in prompts]

    @torch.no_grad()
    def activations(
        self, token_ids: Sequence[int], modules: Collection[str] | None = None, routes: Routes | None = None
    ) -> Activations:
        """Inputs and outputs of ``modules`` for one sequence; by default of all but those that make RoPE's tables.

        Args:
            token_ids: The sequence.
            modules: Names of those that are wanted; None: all.
            routes: What it is to choose (see ``reference.choices``); None: what it chooses by itself.

        Names are those of ``named_modules``, such as ``model.layers.0.self_attn.q_proj``. Heads that a model
        handles apart keep their dimension: q_norm's are [T, heads, head_dim].

        Raises:
            ValueError: If the model has no module of such a name.
        """
        with recording(self.model, len(token_ids), modules, routes=routes) as taken:
            self._forward(token_ids)
        return taken

    def _forward(self, token_ids: Sequence[int], copies: int = 1, routes: Routes | None = None) -> torch.Tensor:
        """[copies, T, V]."""
        ids = self._ids(token_ids).expand(copies, -1)
        with choosing(self.model, routes) if routes else nullcontext():
            return self._finite(self.model(input_ids=ids, use_cache=False).logits)

    def _finite(self, logits: torch.Tensor) -> torch.Tensor:
        if logits.isfinite().all():
            return logits
        said = f"the reference's logits in dtype={self.dtype} are not finite"
        for name, weight in self.model.named_parameters():
            if len(wrong := (~weight.isfinite()).nonzero()):
                element = Element(name=name, index=tuple(wrong[0].tolist()))
                raise CheckpointError(f"{said}: {element} is {weight[element.index].item()}; get another checkpoint")
        raise CheckpointError(f"{said}, though all weights are: choose a dtype of a wider range")

    def _continue(self, prompt: Sequence[int], max_new_tokens: int) -> TopTwo:
        # What a cache gives is a guess, which one forward without it confirms up to the first token that it would choose
        # otherwise: some models compute otherwise with theirs, and rounding may turn near-ties round.
        found = TopTwo(token_ids=[], runners_up=[], margins=[])
        ids = found.token_ids
        while len(ids) < max_new_tokens:
            known = [*prompt, *ids]
            guess = self._guess(known, max_new_tokens - len(ids))
            top = self.margins([*known, *guess[:-1]])
            chosen = top.token_ids[len(known) - 1 :]
            agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(guess, chosen, strict=False)))
            new = slice(len(known) - 1, len(known) + min(agreed, len(chosen) - 1))
            ids.extend(top.token_ids[new])
            found.runners_up.extend(top.runners_up[new])
            found.margins.extend(top.margins[new])
        return found

    def _guess(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """The same ids, quickly; none if the model has no KV cache that works."""
        ids: list[int] = []
        cache, new_ids = None, self._ids(prompt)
        if self._cache_name is None:
            return ids
        while len(ids) < max_new_tokens:
            try:
                step = self.model(input_ids=new_ids, use_cache=True, **{self._cache_name: cache}, **self._last_logits)
                cache = step[self._cache_name]
            except (RuntimeError, LookupError, TypeError, ValueError, AttributeError):  # whatever a cache fails with
                return []
            ids.append(int(_lowest_argmax(self._finite(step.logits[0, -1:]))))
            new_ids = self._ids(ids[-1:])
        return ids

    @property
    def _cache_name(self) -> str | None:
        """The KV cache as forward takes it and its output bears it; None for a model that has another state."""
        if getattr(self.model, "_is_stateful", False):
            return None
        # Transformers 5.24 renamed it, and the old name warns.
        return next((name for name in ("cache", "past_key_values") if name in self._arguments), None)

    @property
    def _last_logits(self) -> dict[str, int]:
        """The argument of forward that saves computing logits that nobody reads, where there is one."""
        return {"logits_to_keep": 1} if "logits_to_keep" in self._arguments else {}

    def _ids(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[1, T] int64 on the model's device."""
        if len(token_ids) == 0:
            raise ValueError("token_ids is empty; a sequence needs at least one token")
        if wrong := [i for i in token_ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"token_ids holds {wrong[0]}; an id is from 0 to {self.vocab_size - 1}")
        return torch.tensor([list(token_ids)], dtype=torch.int64, device=self.device)


def _top_two(logits_TV: torch.Tensor) -> tuple[list[int], list[int], list[float]]:
    """Best ids, second ids and margins of each row. topk would promise nothing about the order of ties."""
    logits_TV = logits_TV.double()
    rows = torch.arange(logits_TV.shape[0], device=logits_TV.device)
    best = _lowest_argmax(logits_TV)
    without_best = logits_TV.clone()
    without_best[rows, best] = -torch.inf
    second = _lowest_argmax(without_best)
    margins = logits_TV[rows, best] - logits_TV[rows, second]
    return best.tolist(), second.tolist(), margins.tolist()


def _lowest_argmax(logits_TV: torch.Tensor) -> torch.Tensor:
    """[T]: the lowest id among each row's largest logits."""
    is_largest = logits_TV == logits_TV.amax(dim=-1, keepdim=True)
    ids = torch.arange(logits_TV.shape[-1], device=logits_TV.device)
    return torch.where(is_largest, ids, logits_TV.shape[-1]).amin(dim=-1)


@contextmanager
def recording(
    model: nn.Module,
    num_tokens: int,
    modules: Collection[str] | None = None,
    local: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    routes: Routes | None = None,
    own_tokens: int | None = None,
) -> Iterator[Activations]:
    """Note what goes into and comes out of each module of ``model`` in one forward of one sequence.

    What it yields is whole once the block has ended.

    Args:
        model: Any model of transformers, or one whose modules have the same names.
        num_tokens: How many tokens the forward is given: by this number the dimension of tokens is told.
        modules: Names of those to be noted; None: all but those that make RoPE's tables.
        local: What to keep of a tensor that is spread over ranks.
        routes: What the model is to choose (see ``reference.choices``).
        own_tokens: How many of the tokens a rank has where modules get a part of them; None: they all get all.

    Raises:
        ValueError: If the model has no module of such a name.
    """
    taps = {name: module for name, module in model.named_modules() if not makes_position_tables(module)}
    if modules is not None:
        if unknown := set(modules) - set(taps):
            raise ValueError(f"modules={sorted(unknown)} are not in the model; {list(taps)[1:4]} are")
        taps = {name: taps[name] for name in taps if name in set(modules)}
    calls: list[_Call] = []
    counts = (num_tokens,) if own_tokens is None else (num_tokens, own_tokens)
    taken = Activations(inputs={}, outputs={})
    with ExitStack() as hooks:
        for name, module in taps.items():
            hook = module.register_forward_hook(_recorder(name, counts, local, calls), with_kwargs=True)
            hooks.callback(hook.remove)
        mode = hooks.enter_context(choosing(model, routes))
        yield taken
    _name_calls(calls, taken)
    for choice in mode.made:
        scores, indices = _by_token(choice.scores, counts, local), local(choice.indices).cpu()
        # Neither dimension has changed places with another one: what one is by token the other is too.
        if isinstance(scores, torch.Tensor) and _lengths(scores) == _lengths(choice.scores):
            taken.scores[choice.name] = scores = scores if scores.ndim > 1 else scores[None]  # one token, and one to choose from
            taken.choices[choice.name] = indices.reshape(*scores.shape[:-1], indices.shape[-1])


def _lengths(x: torch.Tensor) -> list[int]:
    return [length for length in x.shape if length > 1]


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of one module: what its first tensors are by token, or of which shape if they are not."""

    name: str
    input: torch.Tensor | str | None
    output: torch.Tensor | str | None


def joined(parts: Sequence[Activations]) -> Activations:
    """The activations of one sequence from those of its chunks, which ran one after the other."""
    left_out = {name: why for part in parts for name, why in part.left_out.items()}

    def cat(side: str) -> dict[str, torch.Tensor]:
        chunks = [getattr(part, side) for part in parts]
        names = [name for name in chunks[0] if name not in left_out and all(name in chunk for chunk in chunks)]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in names
                if len({chunk[name].shape[1:] for chunk in chunks}) == 1}

    found = Activations(inputs=cat("inputs"), outputs=cat("outputs"), left_out=left_out, scores=cat("scores"))
    for name in parts[0].choices:
        chunks = [part.choices[name] for part in parts if name in part.choices]
        if len(chunks) == len(parts) and len({(chunk.ndim, chunk.shape[1:-1]) for chunk in chunks}) == 1:
            most = max(chunk.shape[-1] for chunk in chunks)  # of earlier keys there are fewer
            found.choices[name] = torch.cat([F.pad(chunk, (0, most - chunk.shape[-1]), value=-1) for chunk in chunks])
    for name in (name for part in parts for name in part.outputs if name not in found.outputs):
        found.left_out.setdefault(name, "its output has other dimensions in some chunks, or none")
    return found


def _recorder(
    name: str, counts: Sequence[int], local: Callable[[torch.Tensor], torch.Tensor], calls: list[_Call]
) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(_Call(name, *(_by_token(value, counts, local) for value in ((args, kwargs), output))))

    return record


def _name_calls(calls: list[_Call], taken: Activations) -> None:
    total = Counter(call.name for call in calls)
    done: Counter[str] = Counter()
    for call in calls:
        done[call.name] += 1
        of = total[call.name]
        name = call.name if of == 1 else f"{call.name} (call {done[call.name]} of {of})"
        for side, x in ((taken.inputs, call.input), (taken.outputs, call.output)):
            if isinstance(x, torch.Tensor):
                side[name] = x
        if not isinstance(call.output, torch.Tensor):
            taken.left_out[name] = f"its output is {call.output or 'no tensor'}"


def _by_token(
    value: Any, counts: Sequence[int], local: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor | str | None:
    """The first tensor of ``value`` as [T, ...], a copy on the CPU: what follows in the model may write over it.

    T is the first of ``counts`` that it has a dimension of. Its shape in words if it has no dimension of T, or several
    and not the first one; None if there is no tensor.
    """
    x = _first_tensor(value)
    if x is None:
        return None
    x = local(x)
    shape = tuple(x.shape)
    num_tokens = next((count for count in counts if count in shape), counts[0])
    while x.ndim >= 2 and x.shape[0] == 1 and (x.shape[0] != num_tokens or x.shape[1] == 1):
        x = x[0]  # of one sequence
    if x.ndim == 0 or x.shape[0] != num_tokens:
        if x.shape.count(num_tokens) != 1:
            return f"of shape {shape}, with no dimension, or not one alone, of {num_tokens} tokens"
        x = x.movedim(x.shape.index(num_tokens), 0)  # heads come before tokens
    return x.detach().to("cpu", copy=True)


def _first_tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value
    if is_dataclass(value) and not isinstance(value, Mapping):
        value = vars(value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((x for x in map(_first_tensor, parts) if x is not None), None)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
