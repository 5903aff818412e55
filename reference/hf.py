"""A Hugging Face model on one device: the other side of every comparison.

Shape suffixes: T = tokens of one sequence, V = vocabulary.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from engine.checkpoint.checkpoint_files import CONFIG_FILE
from reference.building import building
from reference.elements import CheckpointError, Element
from reference.exact import compute_in_float64

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "exact": torch.float64,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Activations:
    """What went into and came out of each module, by Hugging Face's module name; [T, ...] on the CPU.

    Modules are in the order in which they finished, so the first that differs is the first to blame.
    """

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TopTwo:
    """The two best next tokens after each position.

    token_ids    the best; among equals the lowest id
    runners_up   the second best
    margins      logit of the best minus logit of the second, 0.0 for a tie
    """

    token_ids: list[int]
    runners_up: list[int]
    margins: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyResult(TopTwo):
    """One prompt's greedy continuation; ``token_ids`` ends with the end-of-sequence id where one was met.

    finish_reason   "stop" at an end-of-sequence id, "length" at max_new_tokens
    """

    finish_reason: str


class Reference:
    """A model in eval mode on one device. Sequences run one at a time, whole and unpadded.

    So no number depends on a batch, and the same call gives the same bits. Gradients are off, but not by
    inference mode: a caller could neither write to its tensors nor compute with them under autograd.

    Nothing can be judged by logits that are not finite: whatever computes some raises CheckpointError, which
    names the first weight that is not finite either.
    """

    def __init__(self, model: Any, *, dtype: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.dtype = dtype
        self.vocab_size: int = self.config.vocab_size
        # The KV cache as forward takes it and its output bears it: transformers 5.24 renamed it, and the old name warns.
        self._cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    @classmethod
    def load(
        cls, folder: str | Path, dtype: str = "bfloat16", device: str | torch.device = "cpu"
    ) -> "Reference":
        """The model in ``folder``, computed in ``dtype``.

        Parameters
        ----------
        dtype
            "bfloat16", "float16", "float32" or "float64": as transformers computes it. "exact": float64 with
            the norms' float32 taken out too (see ``reference.exact``): what errors are measured against.

        While it loads, transformers sets torch's default dtype and sets it back. Loads wait for each other;
        load before threads compute.

        Raises
        ------
        CheckpointError
            transformers cannot load it.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not one of {sorted(DTYPES)}")
        if not (Path(folder) / CONFIG_FILE).is_file():
            raise CheckpointError(f"folder={folder} holds no {CONFIG_FILE}; pass a Hugging Face model folder")
        # Never a live module cast to another dtype: that would round RoPE's inv_freq along.
        with building(f"transformers cannot load folder={folder}"), _no_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=DTYPES[dtype],
                attn_implementation="sdpa",
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
        model.to(torch.device(device))
        if dtype == "exact":
            with torch.no_grad():
                compute_in_float64(model)
        return cls(model, dtype=dtype)

    @property
    def config(self) -> Any:
        """The transformers config."""
        return self.model.config

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The model's own end-of-sequence ids, from its generation_config.json or else its config."""
        ids = self.model.generation_config.eos_token_id
        return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return torch.device(self.model.device)

    @torch.no_grad()
    def logits(self, token_ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Logits after every position of each sequence: [T, V] in the model's dtype, on the CPU."""
        return [self._forward(ids)[0].cpu() for ids in token_ids]

    @torch.no_grad()
    def copies_of_logits(self, token_ids: Sequence[int], copies: int) -> torch.Tensor:
        """The same of one sequence, computed in that many rows of a batch: [copies, T, V]."""
        return self._forward(token_ids, copies).cpu()

    @torch.no_grad()
    def margins(self, token_ids: Sequence[int]) -> TopTwo:
        """The two best next tokens after each of the T positions, teacher-forced on ``token_ids``."""
        best_ids, second_ids, margins = _top_two(self._forward(token_ids)[0])
        return TopTwo(token_ids=best_ids, runners_up=second_ids, margins=margins)

    @torch.no_grad()
    def greedy(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_token_ids: Collection[int] = ()
    ) -> list[GreedyResult]:
        """Continue each prompt greedily, with a KV cache, until one of ``eos_token_ids`` comes."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} is below 1")
        return [self._continue(prompt, max_new_tokens, frozenset(eos_token_ids)) for prompt in prompts]

    @torch.no_grad()
    def activations(
        self, token_ids: Sequence[int], modules: Collection[str] | None = None
    ) -> Activations:
        """Inputs and outputs of ``modules`` for one sequence; by default of all but the rotary embedding.

        Names are those of ``named_modules``, such as ``model.layers.0.self_attn.q_proj``. Heads that a model
        handles apart keep their dimension: q_norm's are [T, heads, head_dim].
        """
        taps = {name: module for name, module in self.model.named_modules() if _can_be_tapped(name)}
        if modules is not None:
            if unknown := set(modules) - set(taps):
                raise ValueError(f"modules={sorted(unknown)} are not in the model; {list(taps)[:3]} are")
            taps = {name: taps[name] for name in taps if name in set(modules)}
        taken = Activations(inputs={}, outputs={})
        with ExitStack() as hooks:
            for name, module in taps.items():
                hook = module.register_forward_hook(_recorder(name, taken), with_kwargs=True)
                hooks.callback(hook.remove)
            self._forward(token_ids)
        return taken

    def _forward(self, token_ids: Sequence[int], copies: int = 1) -> torch.Tensor:
        ids = self._ids(token_ids).expand(copies, -1)
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

    def _continue(
        self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: frozenset[int]
    ) -> GreedyResult:
        token_ids: list[int] = []
        runners_up: list[int] = []
        margins: list[float] = []
        cache = None
        new_ids = self._ids(prompt)
        while len(token_ids) < max_new_tokens:
            step = self.model(input_ids=new_ids, use_cache=True, logits_to_keep=1, **{self._cache_name: cache})
            cache = step[self._cache_name]
            best_ids, second_ids, step_margins = _top_two(self._finite(step.logits)[0])
            token_ids += best_ids
            runners_up += second_ids
            margins += step_margins
            if token_ids[-1] in eos_token_ids:
                break
            new_ids = torch.tensor([best_ids], device=self.device)
        reason = "stop" if token_ids[-1] in eos_token_ids else "length"
        return GreedyResult(token_ids=token_ids, runners_up=runners_up, margins=margins, finish_reason=reason)

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


def _can_be_tapped(name: str) -> bool:
    # The two outermost modules return more than a tensor; the rotary embedding has no activations.
    return name not in ("", "model") and not name.endswith("rotary_emb")


def _recorder(name: str, taken: Activations) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        taken.inputs[name] = _of_one_sequence(args[0] if args else kwargs["hidden_states"])
        taken.outputs[name] = _of_one_sequence(output[0] if isinstance(output, tuple) else output)

    return record


def _of_one_sequence(x: torch.Tensor) -> torch.Tensor:
    """[1, T, ...] -> [T, ...], a copy on the CPU: what follows in the model may write over ``x``."""
    return x[0].detach().to("cpu", copy=True)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
