"""The reference's side of a verification: computed once, then held against every tp_size.

*exact* is float64 on one device, *baseline* the same model on one device in the dtype under test, *simulated* is exact but for
simulated rounding of that dtype.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.checkpoint_files import read_headers
from engine.checkpoint.tokenizer import load_tokenizer
from harness.errors import one_line
from harness.subjects.base import Schedule
from harness.verification.budgets import digest
from harness.verification.simulated import SimulatedRounding
from reference.checkpoints import CheckpointError, longest_sequence, read_config
from reference.choices import Routes
from reference.hf import DTYPES, Activations, Reference, TopTwo
from reference.loaded import as_in_files, differences

TEXTS = (
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "List three differences between a violin and a cello.",
    "Explain why the sky is blue to a child.",
)
NUM_NEW_TOKENS = 24
NUM_SIMULATED = 8
"""Draws of simulated rounding: of one alone a row might come out right by luck."""
NUM_SIMULATED_GREEDY = 2
"""For near-ties, which both this and the baseline must have missed by luck to forbid one wrongly."""
PROMPT_LENGTHS = (5, 17, 9, 12)
SCHEDULE_LENGTHS = (41, 37, 23)


class ReferenceResults:
    """Prompts, scripts and the reference's answers for one model, dtype and seed.

    Args:
        folder: A Hugging Face model folder.
        dtype: Of the candidate and the baseline.
        device: Where the reference computes.
        prompt_lengths: Tokens of each prompt, where they are drawn; fewer where the model takes fewer.
        schedule_lengths: Tokens of each sequence of the schedule; fewer where the model takes fewer.
        beyond_windows: Whether sequences may be longer than a sliding window of the model.
    """

    def __init__(self, folder: Path, *, dtype: str, seed: int = 0, device: str = "cpu",
                 prompt_lengths: tuple[int, ...] = PROMPT_LENGTHS, schedule_lengths: tuple[int, ...] = SCHEDULE_LENGTHS,
                 beyond_windows: bool = False) -> None:
        self.folder = folder
        self.dtype = dtype
        self.seed = seed
        self.device = device
        self.prompt_lengths = prompt_lengths
        self.schedule_lengths = schedule_lengths
        self.beyond_windows = beyond_windows
        self._routes: Sequence[Routes] | None = None
        self._followed: dict[tuple[Schedule, bytes], ReferenceResults] = {}
        self._activations: dict[tuple[str, int], Activations] = {}
        self._simulated_activations: dict[int, list[Activations]] = {}
        # Transformers' own reading of config.json: what the file leaves out is there.
        config = read_config(folder)
        self.config: dict[str, Any] = config.to_dict()
        self._text_config = config.get_text_config(decoder=True)
        self.tokenizer = load_tokenizer(folder)

    @cached_property
    def exact(self) -> Reference:
        return Reference.load(self.folder, "exact", device=self.device)

    @cached_property
    def baseline(self) -> Reference:
        return Reference.load(self.folder, self.dtype, device=self.device)

    @property
    def switches(self) -> dict[str, str]:
        """How the exact model computes, as far as it was needed: for ``RunInfo.switches``."""
        how = self.exact.implementations if "exact" in vars(self) else {}
        return {f"reference {part}": implementation for part, implementation in how.items()}

    @cached_property
    def wrongly_loaded(self) -> tuple[str, ...]:
        """What the reference itself holds otherwise than the files say, a line each."""
        models = self.exact.model, self.baseline.model
        return tuple(dict.fromkeys(line for model in models for line in differences(model, self.folder)))

    @cached_property
    def kept_wider(self) -> dict[str, torch.dtype]:
        """By the files' names, the dtype of what the model keeps wider than the one under test, on one device too."""
        model = self.baseline.model
        held = as_in_files(model, model.state_dict(), read_headers(self.folder).keys())
        return {name: tensor.dtype for name, tensor in held.items()
                if tensor.is_floating_point() and tensor.dtype.itemsize > DTYPES[self.dtype].itemsize}

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence that the candidate must take."""
        return longest_sequence(self._text_config, beyond_windows=self.beyond_windows)

    @property
    def num_new_tokens(self) -> int:
        """Tokens that are generated for each prompt."""
        return min(NUM_NEW_TOKENS, self.longest // 2)

    @cached_property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """Texts through the chat template if the model has a tokenizer, random ids if not; cut where no answer would fit."""
        tokenizer, room = self.tokenizer, self.longest - self.num_new_tokens
        if tokenizer is None:
            return self._random_sequences(random.Random(self.seed), [min(length, room) for length in self.prompt_lengths])
        try:
            return tuple(ids[:room] for ids in self._tokenized(tokenizer))
        except Exception as error:  # of any kind: libraries raise what they like over a file that they did not write
            raise CheckpointError(f"folder={self.folder}: its tokenizer does not work: {one_line(error)}") from error

    @staticmethod
    def _tokenized(tokenizer: Any) -> tuple[tuple[int, ...], ...]:
        chats = [[{"role": "user", "content": text}] for text in TEXTS]
        if tokenizer.chat_template is None:
            return tuple(tuple(tokenizer(text)["input_ids"]) for text in TEXTS)
        return tuple(tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True,
                                                         return_dict=False)) for chat in chats)

    @cached_property
    def schedule(self) -> Schedule:
        """Sequences of random ids, borders of the vocabulary among them, in prefill chunks mixed with decode steps."""
        draw = random.Random(self.seed + 1)
        lengths = tuple(min(length, self.longest) for length in self.schedule_lengths)
        return Schedule(sequences=self._random_sequences(draw, lengths), steps=mixed_steps(lengths, draw))

    def _random_sequences(self, draw: random.Random, lengths: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Ids of these lengths, a third of them where a vocabulary is cut: borders of the shards of 2 ranks, of 3, and so on."""
        last = self._text_config.vocab_size - 1
        cuts = (at * -(-(last + 1) // ranks) for ranks in range(2, 9) for at in range(1, ranks))
        borders = iter(dict.fromkeys([*(token_id for cut in cuts if cut <= last for token_id in (cut - 1, cut)), 0]))
        sequences = []
        for length in lengths:
            ids = [draw.randint(0, last) for _ in range(length)]
            # Always the last id: it is the one that goes missing where a vocabulary is cut without its remainder.
            for place, token_id in zip(draw.sample(range(length), length // 3 + 1), chain([last], borders), strict=False):
                ids[place] = token_id
            sequences.append(tuple(ids))
        return tuple(sequences)

    def following(self, routes: Sequence[Routes]) -> ReferenceResults:
        """The same with these choices forced upon every model, on each sequence of the schedule.

        A choice between near-equals that rounding turned round changes all that follows. Behind it a candidate is to be held
        against models that chose alike.
        """
        key = self.schedule, digest([route for of_sequence in routes for route in of_sequence.values()])
        if key in self._followed:
            return self._followed[key]
        other = self._followed[key] = copy.copy(self)
        other.exact, other.baseline, other.schedule = self.exact, self.baseline, self.schedule
        for name in ("exact_logits", "baseline_logits", "simulated_logits"):
            vars(other).pop(name, None)
        other._activations, other._simulated_activations, other._routes = {}, {}, routes
        return other

    def _routes_of(self, sequence: int) -> Routes | None:
        return None if self._routes is None else self._routes[sequence]

    @cached_property
    def exact_logits(self) -> list[Tensor]:
        return self.exact.logits(self.schedule.sequences, self._routes)

    @cached_property
    def baseline_logits(self) -> list[Tensor]:
        return self.baseline.logits(self.schedule.sequences, self._routes)

    @cached_property
    def simulated_logits(self) -> list[Tensor]:
        """The exact model's with simulated rounding, all draws of a sequence: ``[NUM_SIMULATED, T, V]``."""
        return self._simulated(self.schedule.sequences, NUM_SIMULATED, self._routes)

    def _simulated(self, sequences: Sequence[Sequence[int]], draws: int, routes: Sequence[Routes] | None = None) -> list[Tensor]:
        exact = self.exact  # loaded before: only what it computes is to be rounded
        each: Sequence[Routes] = routes or [{}] * len(sequences)
        with SimulatedRounding(self.dtype, seed=0):  # in one batch: each weight is read and squared once for all draws
            return [exact.copies_of_logits(sequence, draws, own) for sequence, own in zip(sequences, each, strict=True)]

    def exact_activations(self, sequence: int) -> Activations:
        """Of one sequence of the schedule; computed once."""
        return self._activations_of(self.exact, sequence)

    def baseline_activations(self, sequence: int) -> Activations:
        """The same of the baseline."""
        return self._activations_of(self.baseline, sequence)

    def simulated_activations(self, sequence: int) -> list[Activations]:
        """The exact model's with simulated rounding, a draw each."""
        if sequence not in self._simulated_activations:
            exact, draws = self.exact, []
            for number in range(NUM_SIMULATED):
                with SimulatedRounding(self.dtype, seed=number):
                    draws.append(exact.activations(self.schedule.sequences[sequence], routes=self._routes_of(sequence)))
            self._simulated_activations[sequence] = draws
        return self._simulated_activations[sequence]

    def _activations_of(self, reference: Reference, sequence: int) -> Activations:
        key = reference.dtype, sequence
        if key not in self._activations:
            self._activations[key] = reference.activations(self.schedule.sequences[sequence], routes=self._routes_of(sequence))
        return self._activations[key]

    @cached_property
    def greedy(self) -> list[TopTwo]:
        """The exact reference's greedy continuation of each prompt, to ``num_new_tokens`` whatever is drawn."""
        return self.exact.greedy(self.prompts, self.num_new_tokens)

    @cached_property
    def greedy_sequences(self) -> list[list[int]]:
        """Each prompt with its exact greedy continuation."""
        return [[*prompt, *result.token_ids] for prompt, result in zip(self.prompts, self.greedy, strict=True)]

    @cached_property
    def greedy_exact_logits(self) -> list[Tensor]:
        """Exact logits from which each greedy token is drawn, ``[num_new_tokens, V]`` a prompt."""
        return self._drawing_rows(self.exact)

    @cached_property
    def greedy_baseline_logits(self) -> list[Tensor]:
        return self._drawing_rows(self.baseline)

    @cached_property
    def greedy_simulated_logits(self) -> list[Tensor]:
        """The exact ones with simulated rounding, all draws of a prompt: ``[NUM_SIMULATED_GREEDY, num_new_tokens, V]``."""
        return [draws[:, len(prompt) - 1 : -1].clone() for prompt, draws in
                zip(self.prompts, self._simulated(self.greedy_sequences, NUM_SIMULATED_GREEDY), strict=True)]

    def _drawing_rows(self, reference: Reference) -> list[Tensor]:
        whole = reference.logits(self.greedy_sequences)
        return [logits[len(prompt) - 1 : -1] for prompt, logits in zip(self.prompts, whole, strict=True)]


def mixed_steps(lengths: tuple[int, ...], draw: random.Random) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Steps over sequences of these lengths: chunks of different sizes, single tokens, sequences that join late.

    The first sequence's last token comes in the end, alone: for one row engines take other paths than for several.
    """
    left = [lengths[0] - 1, *lengths[1:]]
    steps: list[tuple[tuple[int, int], ...]] = []
    while any(left):
        step = []
        for sequence, num_left in enumerate(left):
            if not num_left or (len(steps) < sequence):  # one more sequence joins each step
                continue
            size = 1 if len(steps) % 2 else min(num_left, draw.randint(1, 13))
            step.append((sequence, size))
            left[sequence] -= size
        steps.append(tuple(step))
    return (*steps, ((0, 1),))
