"""``LLM``: text in, text out, on any number of ranks."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm
from transformers import AutoTokenizer

from engine.config import EngineConfig, ModelConfig
from engine.core import News, Progress, advance, start_core
from engine.hub import find_model
from engine.outputs import CompletionOutput, RequestOutput
from engine.parallel.ranks import Ranks
from engine.sampling import SamplingParams
from engine.sequence import Request

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Mapping[str, Any]
STEPS_PER_MESSAGE = 16
"""Ranks run so many steps between two messages: fewer cost time, more make progress coarse."""


class LLM:
    """A language model on one or several ranks. A context manager; without ``with``, call :meth:`close`.

    Args:
        model: a Hugging Face folder or hub id, safetensors.
        tokenizer: another folder for the tokenizer.
        options: those of :class:`engine.config.EngineConfig`, ``tensor_parallel_size`` among them.

    Raises:
        ValueError: if options, config or checkpoint do not fit.
        RankFailure: if a rank fails while loading.
    """

    def __init__(self, model: str | Path, *, tokenizer: str | Path | None = None, **options: Any) -> None:
        folder = find_model(model)
        self.model_config = ModelConfig.from_folder(folder)
        self.config = EngineConfig(**options).resolve(self.model_config)
        self.tokenizer = _load_tokenizer(Path(tokenizer) if tokenizer else folder)
        self._request_numbers = count()
        self._ranks = Ranks(self.config.tensor_parallel_size, fabric=self.config.fabric, device=self.config.device)
        try:
            infos = self._ranks.run(start_core, folder, self.model_config, self.config)
        except BaseException:
            self._ranks.close()
            raise
        self.num_kv_blocks = infos[0].num_kv_blocks
        self.max_model_len = infos[0].max_model_len

    def generate(self, prompts: Prompt | Sequence[Prompt],
                 sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *,
                 use_tqdm: bool = True) -> list[RequestOutput]:
        """Complete prompts: text, token ids, or ``{"prompt": ...}`` / ``{"prompt_token_ids": ...}``.

        A prompt that can't run (empty, too long, an id outside the vocabulary) is refused before anything runs: its output
        carries ``error`` and the others go on.

        Args:
            sampling_params: one for all prompts, or one for each.
            use_tqdm: show a progress bar where standard error is a terminal.

        Returns:
            One output a prompt, in the prompts' order.

        Raises:
            ValueError: if every prompt was refused, or the numbers of prompts and parameters differ.
            RankFailure: if a rank fails. The engine can't be used afterwards.
        """
        prompt_list = _as_list(prompts)
        params = _one_each(sampling_params or SamplingParams(), len(prompt_list))
        outputs: list[RequestOutput] = []
        requests: list[Request] = []
        for prompt, each in zip(prompt_list, params, strict=True):
            output, request = self._admit(prompt, each)
            outputs.append(output)
            if request is not None:
                requests.append(request)
        if errors := [output.error for output in outputs if output.error]:
            if not requests:
                raise ValueError("; ".join(errors))
            for error in errors:
                logger.warning("refused: %s", error)
        self._run(requests, {output.request_id: output for output in outputs}, use_tqdm)
        for output in outputs:
            for completion in output.outputs:
                completion.text = self._decode(completion.token_ids)
        return outputs

    def _run(self, requests: list[Request], outputs: dict[int, RequestOutput], use_tqdm: bool) -> None:
        unfinished = {request.request_id for request in requests}
        with tqdm(total=len(requests), desc="Generating", unit="prompt", disable=None if use_tqdm else True) as bar:
            num_tokens, new = 0, requests
            try:
                while unfinished:
                    progress = self._advance(new, [])
                    new = []
                    for item in progress.news:
                        num_tokens += 1
                        if _take(outputs[item.request_id], item):
                            unfinished.discard(item.request_id)
                            bar.update()
                    bar.set_postfix(tokens=num_tokens, refresh=False)
            except BaseException:
                # On this process's own rank an interrupted call leaves its requests behind; other ranks are gone by now.
                if unfinished and self.config.tensor_parallel_size == 1:
                    self._advance([], sorted(unfinished))
                raise

    def _advance(self, requests: list[Request], abort_ids: list[int]) -> Progress:
        reports: list[Progress] = self._ranks.run(advance, requests, abort_ids, STEPS_PER_MESSAGE)
        differing = [rank for rank, report in enumerate(reports) if report.digest != reports[0].digest]
        if differing:
            self._ranks.close()
            raise RuntimeError(f"ranks {differing} drew other token ids than rank 0: ranks of one engine must agree; "
                               "run `shardproof verify` on this model")
        return reports[0]

    def _admit(self, prompt: Prompt, params: SamplingParams) -> tuple[RequestOutput, Request | None]:
        request_id = next(self._request_numbers)
        text: str | None = None
        token_ids: list[int] = []
        error: str | None = None
        try:
            text, token_ids = self._tokenize(prompt)
            self._check(token_ids)
        except ValueError as refusal:
            error = f"prompt {request_id}: {refusal}"
        output = RequestOutput(request_id=request_id, prompt=text, prompt_token_ids=token_ids, error=error,
                               finished=error is not None)
        if error is not None:
            return output, None
        room = self.max_model_len - len(token_ids)
        eos = () if params.ignore_eos else self.model_config.eos_token_ids
        return output, Request(
            request_id=request_id,
            prompt_token_ids=tuple(token_ids),
            params=params,
            seed=_request_seed(self.config.seed, request_id) if params.seed is None else params.seed,
            max_tokens=min(room, params.max_tokens or room),
            stop_token_ids=frozenset((*params.stop_token_ids, *eos)),
        )

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            prompt = prompt["prompt_token_ids"] if "prompt_token_ids" in prompt else prompt["prompt"]
        if not isinstance(prompt, str):
            return None, list(prompt)  # type: ignore[arg-type]
        if self.tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer, and the model folder holds none: give token ids")
        return prompt, list(self.tokenizer(prompt)["input_ids"])

    def _check(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise ValueError("len(token_ids)=0: an empty prompt can't be completed")
        if len(token_ids) >= self.max_model_len:
            raise ValueError(f"len(token_ids)={len(token_ids)} leaves no room to generate in max_model_len={self.max_model_len}")
        vocab_size = self.model_config.vocab_size
        for token_id in token_ids:
            if not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                raise ValueError(f"token_id={token_id!r} is outside the vocabulary of vocab_size={vocab_size}")

    def _decode(self, token_ids: list[int]) -> str:
        if self.tokenizer is None:
            return ""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def close(self) -> None:
        """Stop the ranks. Nothing is left behind; calling it again does nothing."""
        self._ranks.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _take(output: RequestOutput, item: News) -> bool:
    """Add a token to its output; whether that was the last one."""
    if not output.outputs:
        output.outputs.append(CompletionOutput(index=0, text="", token_ids=[]))
    completion = output.outputs[0]
    completion.token_ids.append(item.token_id)
    completion.finish_reason = item.finish_reason
    output.num_cached_tokens = item.num_cached_prompt_tokens
    output.finished = item.finish_reason is not None
    return output.finished


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several: a flat list of ints is one."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    items = list(prompts)
    return [items] if items and all(isinstance(item, int) for item in items) else items  # type: ignore[list-item, return-value]


def _one_each(params: SamplingParams | Sequence[SamplingParams], num_prompts: int) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if len(params) != num_prompts:
        raise ValueError(f"len(sampling_params)={len(params)} does not match len(prompts)={num_prompts}: give one for all, "
                         "or one for each")
    return list(params)


def _request_seed(engine_seed: int, request_id: int) -> int:
    digest = hashlib.blake2b(f"{engine_seed}:{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None if it holds none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    return AutoTokenizer.from_pretrained(folder)
