"""``LLM``: text in, text out, on any number of ranks."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

from tqdm import tqdm

from engine.checkpoint.checkpoint_files import CheckpointError
from engine.checkpoint.hub import find_model
from engine.checkpoint.preflight import check_checkpoint
from engine.checkpoint.tokenizer import load_tokenizer
from engine.collector import without_collector
from engine.config import ROPE_KEYS, EngineConfig, EngineOptions, ModelConfig
from engine.execution.core import start_core
from engine.execution.driver import Driver
from engine.frontend.chat import Message, render_chats
from engine.frontend.ongoing import OngoingRequest
from engine.frontend.outputs import RequestOutput
from engine.frontend.prompts import Prompt
from engine.frontend.requests import Admission
from engine.frontend.sampling import SamplingParams
from engine.layers.attention_backends import check_name
from engine.ranks.ranks import Ranks, make_ready

logger = logging.getLogger(__name__)

Params = SamplingParams | Sequence[SamplingParams] | None


class LLM(AbstractContextManager["LLM"]):
    """A language model on one or several ranks. A context manager; without ``with``, call :meth:`close`.

    Calls may be made from several threads, and while a stream is open: all that is under way shares the ranks' steps.
    Sampling parameters that a model's ``generation_config.json`` recommends are not applied, its end-of-sequence tokens are.

    Args:
        model: ``smollm2`` once it was fetched, a Hugging Face folder or a hub id, safetensors.
        tokenizer: another folder for the tokenizer.
        skip_tokenizer_init: load none. Prompts are token ids then, and texts stay empty.
        revision: branch, tag or commit of a hub id.
        hf_overrides: other values for RoPE's keys in ``config.json``: ``rope_parameters`` (or ``rope_scaling``), ``rope_theta``,
            ``max_position_embeddings``.
        ranks: live ones to run on, which stay open when the engine closes; ``fabric`` is theirs. None: start some.
        options: those of :class:`engine.config.EngineConfig`, ``tensor_parallel_size`` among them.

    Raises:
        CheckpointError: if the model can't be found or run, naming file and key or tensor. No rank was started.
        TypeError: for an option that there is none of.
        ValueError: if an option breaks its rule, or options and the model's config do not fit.
        RankFailure: if a rank fails while loading.
    """

    def __init__(self, model: str | Path, *, tokenizer: str | Path | None = None, skip_tokenizer_init: bool = False,
                 revision: str | None = None, hf_overrides: Mapping[str, Any] | None = None, ranks: Ranks | None = None,
                 **options: Unpack[EngineOptions]) -> None:
        config = _engine_config(options)
        _check_overrides(hf_overrides)
        if skip_tokenizer_init and tokenizer is not None:
            raise ValueError(f"skip_tokenizer_init=True and tokenizer={str(tokenizer)!r} exclude each other: leave one out")
        folder = find_model(model, revision)
        if ranks is None:
            make_ready(config.tensor_parallel_size, config.fabric, config.resolved_device)  # beside what follows
        self.tokenizer: Any = None
        with without_collector():  # both import much of transformers
            self.model_config = ModelConfig.from_folder(folder, hf_overrides)
            self.config = config.resolve(self.model_config)
            if not skip_tokenizer_init:
                self.tokenizer = load_tokenizer(folder if tokenizer is None else Path(tokenizer).expanduser())
        tp_size, device = self.config.tensor_parallel_size, self.config.device
        if tokenizer is not None and (self.tokenizer is None or not str(tokenizer)):
            raise CheckpointError(f"tokenizer={str(tokenizer)!r} is no folder that holds a tokenizer")
        check_checkpoint(folder, self.model_config)
        if ranks is not None and (ranks.tp_size, ranks.device.type) != (tp_size, device.partition(":")[0]):
            raise ValueError(f"{ranks} do not fit tensor_parallel_size={tp_size}, device={device}: give both alike")
        owns_ranks = ranks is None
        self._ranks = ranks or Ranks(tp_size, fabric=self.config.fabric, device=device)
        try:
            infos = self._ranks.run(start_core, folder, self.model_config.for_ranks(), self.config)
        except BaseException:
            if owns_ranks:
                self._ranks.close()
            raise
        self.num_kv_blocks = infos[0].num_kv_blocks
        self.max_model_len = infos[0].max_model_len
        self._driver = Driver(self._ranks, owns_ranks=owns_ranks)
        self._admission = Admission(self.model_config, self.tokenizer, max_model_len=self.max_model_len, seed=self.config.seed)

    def generate(self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, *,
                 use_tqdm: bool = True) -> list[RequestOutput]:
        """Complete prompts: text, token ids, or ``{"prompt": ...}`` / ``{"prompt_token_ids": ...}``.

        A prompt that can't run (empty, too long, an id outside the vocabulary) is refused before anything runs: its output
        carries ``error`` and the others go on. So does one whose logits turn out not to be finite, with what it has so far and
        ``finish_reason="error"``: also where that happens to every prompt, nothing is raised.

        Args:
            prompts: one, or a list of them.
            sampling_params: one for all prompts, or one for each.
            use_tqdm: show a progress bar where standard error is a terminal.

        Returns:
            One output a prompt, in the prompts' order.

        Raises:
            ValueError: if every prompt was refused, or the numbers of prompts and parameters differ.
            RankFailure: if a rank fails. The engine can't be used afterwards.
        """
        requests = self._admit(prompts, sampling_params, streams=False)
        outputs = [request.output for request in requests]
        with (tqdm(total=len(requests), desc="Generating", unit="prompt", disable=None if use_tqdm else True) as bar,
              closing(self._driver.follow(requests)) as pauses):
            for _ in pauses:
                bar.set_postfix(tokens=sum(output.num_generated_tokens for output in outputs), refresh=False)
                bar.update(sum(output.finished for output in outputs) - bar.n)
        return outputs

    def chat(self, messages: Sequence[Message] | Sequence[Sequence[Message]], sampling_params: Params = None, *,
             use_tqdm: bool = True, **template_options: Any) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them.

        Args:
            messages: one conversation or a list of them; a message is ``{"role": ..., "content": ...}``.
            sampling_params: one for all conversations, or one for each.
            use_tqdm: show a progress bar where standard error is a terminal.
            template_options: those of :meth:`preprocess_chat`.

        Raises:
            ValueError: as :meth:`preprocess_chat` and :meth:`generate`.
        """
        return self.generate(self.preprocess_chat(messages, **template_options), sampling_params, use_tqdm=use_tqdm)

    def preprocess_chat(self, messages: Sequence[Message] | Sequence[Sequence[Message]], *, chat_template: str | None = None,
                        add_generation_prompt: bool = True, continue_final_message: bool = False,
                        tools: Sequence[Mapping[str, Any]] | None = None,
                        chat_template_kwargs: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Conversations as prompts, for :meth:`generate` and :meth:`stream`.

        Args:
            messages: one conversation or a list of them; a message is ``{"role": ..., "content": ...}``.
            chat_template: instead of the tokenizer's own, in Jinja.
            add_generation_prompt: end with what opens an answer.
            continue_final_message: leave the last message open, so that the model continues it;
                ``add_generation_prompt`` must be False then.
            tools: functions to tell the model of, as JSON schemas.
            chat_template_kwargs: further variables of the template.

        Raises:
            ValueError: if the model has no chat template, or the template refuses a conversation.
        """
        if add_generation_prompt and continue_final_message:
            raise ValueError("continue_final_message=True must come with add_generation_prompt=False: either the last message "
                             "is open, or a new one is")
        if tools is not None and not isinstance(tools, (list, tuple)):
            raise ValueError(f"tools={tools!r} must be a list of JSON schemas")
        options = {"chat_template": chat_template, "add_generation_prompt": add_generation_prompt,
                   "continue_final_message": continue_final_message, "tools": list(tools) if tools else None}
        own = {} if chat_template_kwargs is None else chat_template_kwargs
        if not isinstance(own, Mapping) or {*options, "tokenize"} & set(own):
            raise ValueError(f"chat_template_kwargs={own!r} must be a mapping of the template's own variables, none of them "
                             f"called {', '.join(options)} or tokenize")
        return render_chats(self.tokenizer, messages, **options, **own)

    def stream(self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None) -> Stream:
        """As :meth:`generate`, but the text comes as it grows. For conversations: ``stream(preprocess_chat(messages))``.

        Prompts are checked at once; they start to run with the first item that is asked for.
        """
        return Stream(self._driver, self._admit(prompts, sampling_params, streams=True))

    def abort(self, request_id: int) -> None:
        """End a request early, from any thread: its completions get ``finish_reason="abort"``, its blocks are free at once.

        Ids of requests that do not run are ignored.
        """
        self._driver.abort(request_id)

    def get_tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer.

        Raises:
            ValueError: if its folder holds none, or none was to be loaded.
        """
        if self.tokenizer is None:
            raise ValueError("none was loaded, or the model folder holds no tokenizer: give LLM one by tokenizer=")
        return self.tokenizer

    def _admit(self, prompts: Prompt | Sequence[Prompt], params: Params, *, streams: bool) -> list[OngoingRequest]:
        self._driver.check_usable()
        requests = self._admission.admit(prompts, params, streams=streams)
        for request in requests:
            if request.output.error:
                logger.warning("refused: %s", request.output.error)
        return requests

    def close(self) -> None:
        """Stop the ranks, from any thread. Nothing is left behind; calling it again does nothing.

        Calls and streams that are under way end with a RuntimeError, and so do later calls.
        """
        self._driver.close()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Stream(Iterator[RequestOutput], AbstractContextManager["Stream"]):
    """What prompts bring, piece by piece. Each item holds what is new for one prompt.

    The texts of a completion's items make up the text that :meth:`LLM.generate` gives, and so do the token ids, which may run
    ahead of the text. No item ends inside a character, and none holds a part of a stop string that is to be left out. Counts
    and sums in an item are of all that has come so far. A completion's last item has its ``finish_reason``.

    Leaving early (``break``, :meth:`close`, or letting go of the stream) aborts what still runs, on every rank.

    Attributes:
        request_ids: one a prompt, for :meth:`LLM.abort`.
    """

    def __init__(self, driver: Driver, requests: Sequence[OngoingRequest]) -> None:
        self.request_ids = [request.output.request_id for request in requests]
        self._items = _deltas(driver, requests)

    def __next__(self) -> RequestOutput:
        return next(self._items)

    def close(self) -> None:
        """Abort what still runs."""
        self._items.close()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _deltas(driver: Driver, requests: Sequence[OngoingRequest]) -> Generator[RequestOutput, None, None]:
    yield from (request.output for request in requests if request.output.error)
    with closing(driver.follow(requests)) as pauses:
        for _ in pauses:
            yield from (delta for request in requests if (delta := request.delta()) is not None)


def _check_overrides(hf_overrides: Any) -> None:
    if hf_overrides is None:
        return
    if not isinstance(hf_overrides, Mapping) or set(hf_overrides) - set(ROPE_KEYS):
        raise ValueError(f"hf_overrides={hf_overrides!r} must be a mapping with no other keys than {', '.join(ROPE_KEYS)}")


def _engine_config(options: Mapping[str, Any]) -> EngineConfig:
    known = [field.name for field in fields(EngineConfig)]
    if unknown := sorted(set(options) - set(known)):
        near = [close for name in unknown for close in get_close_matches(name, known, n=1)]
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise TypeError(f"LLM has no option {', '.join(unknown)}: {hint}")
    config = EngineConfig(**options)
    check_name(config.attention_backend)
    return config
