"""Does a request bring what its parameters ask for, whatever runs beside it?

Part of the generation check. The subject's own front door runs drawn requests on a small model that talks
(``harness.checks.talker``): every parameter, and rows that differ in all of them, in one batch; more requests than run at a time,
prompts longer than a step, a cache that is too small, prompts that come again, some given up on the way. Each answer is held
against a plain model of the parameters over the reference's logits (``semantics.py``), and what draws from a seed must draw
the same alone as in any batch, streamed or not.

On a CPU the model runs in float64: what differs then differs by a fault, not by rounding.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.checks.base import CheckContext, Outcome
from harness.checks.semantics import Asked, Model, WrongAnswerError, answered, require
from harness.checks.talker import LETTERS, MAX_MODEL_LEN, Talker
from harness.verification.budgets import batch_flips

MAX_NUM_SEQS = 16
NUM_TOKENS = 8
"""Tokens of most answers."""
NUM_DRAWS = 64
"""Completions of one token, of which the frequencies are looked at."""
FREE = {"seed", "temperature", "ignore_eos", "max_tokens"}
"""Parameters of a request that nothing but its length ends."""
CHANGING = {"min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids"}
"""Parameters that may leave few tokens to draw."""
CROWD_PROMPT = 45
"""Tokens of each prompt of the crowd: requests that fit with their prompts and not with their answers."""
NUM_ALONE = 3
"""Requests that run once more by themselves."""
DTYPES = {"cpu": "float64", "cuda": "float32"}
BLOCK_SIZES = {"cpu": 4, "cuda": 16}


@dataclass(slots=True)
class Answer:
    """A stream's items put together: as much of vLLM's ``RequestOutput`` as is looked at."""

    prompt_token_ids: list[int] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    finished: bool = False
    error: str | None = None
    prompt_logprobs: list[Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Requests in their order, and the seed of model and engine."""

    asked: tuple[Asked, ...]
    seed: int

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Case:
        """From JSON values."""
        return cls(asked=tuple(map(Asked.from_plain, values["asked"])), seed=values["seed"])


def check_requests(context: CheckContext) -> Outcome:
    """Draw requests, or replay them, and hold each answer against what its parameters ask for."""
    device = context.results.device
    with tempfile.TemporaryDirectory(prefix="shardproof-") as scratch:
        talker = Talker(Path(scratch) / "talker", context.results.config, tp_size=context.tp_size, dtype=DTYPES[device],
                        seed=context.seed if context.case is None else context.case["seed"], device=device)
        if context.case is None:
            case = Case(asked=tuple(draw_requests(random.Random(context.seed), talker)), seed=context.seed)
        else:
            case = Case.from_plain(context.case)
        # One prompt of full length fits and a few others, not as many as may run at a time.
        blocks = (MAX_MODEL_LEN + 96) // BLOCK_SIZES[device]
        options = {"dtype": "auto", "block_size": BLOCK_SIZES[device], "num_kv_blocks": blocks, "max_num_seqs": MAX_NUM_SEQS,
                   "max_num_batched_tokens": 24, "seed": case.seed}
        session = _Session(talker.model, case)
        try:
            with answered("the subject does not start"):
                llm = context.subject.requests(talker.folder, options)
            with llm:
                session.run(llm)
        except WrongAnswerError as wrong:
            return session.outcome(f"{wrong}")
    return session.outcome(None)


class _Session:
    """A case on its way: what was judged so far."""

    def __init__(self, model: Model, case: Case) -> None:
        self.model = model
        self.case = case
        self.compared = 0
        self.failing: Asked | None = None

    def outcome(self, finding: str | None) -> Outcome:
        cases = len(self.case.asked)
        if finding is None:
            return Outcome(cases=cases, compared=self.compared)
        smallest = {} if self.failing is None else {"smallest_case": f"{self.failing}, among {cases} requests"}
        return Outcome(cases=cases, compared=self.compared, module="requests", case=asdict(self.case), extra=smallest,
                       finding=finding)

    def run(self, llm: Any) -> None:
        """Send all requests: alone, mixed, streamed.

        Raises:
            WrongAnswerError: at the first answer that is wrong.
        """
        asked, shuffle = self.case.asked, random.Random(self.case.seed)
        mixed = [one for one in asked if one.n < NUM_DRAWS]
        with answered():
            streamed = stream(llm, mixed)
        self._judge(mixed, streamed, "streamed")
        before = dict(zip(map(id, mixed), streamed, strict=True))
        # Without stop strings several steps go by between two looks at the text.
        others = [one for one in asked if one.abort_after is None and not one.stop]
        shuffle.shuffle(others)
        self._compare(before, others, self._generate(llm, others), "in a batch")
        alone = [one for one in others if one.seed is not None and one.n <= 3][:NUM_ALONE]
        self._compare(before, alone, [self._generate(llm, [one])[0] for one in alone], "alone")
        self._check_crowd(llm)
        self._check_prefix_hits(llm)
        self._check_late_aborts(llm)

    def _generate(self, llm: Any, asked: Sequence[Asked]) -> list[Any]:
        with answered():
            answers: list[Any] = llm.generate(_prompts(asked), [llm.params(one.params) for one in asked])
        return answers

    def _judge(self, asked: Sequence[Asked], answers: Sequence[Any], how: str) -> None:
        require(len(answers) == len(asked), f"{len(answers)} answers to {len(asked)} requests")
        for one, answer in zip(asked, answers, strict=True):
            self.failing = one
            try:
                self.compared += self.model.judge(one, answer)
                if one.n >= NUM_DRAWS:
                    self.model.judge_frequencies(one, answer)
            except WrongAnswerError as wrong:
                raise WrongAnswerError(f"{how}: {one}: {wrong}") from None
        self.failing = None
        seen: dict[tuple[Any, ...], tuple[int | None, int]] = {}
        for one, answer in zip(asked, answers, strict=True):
            for completion in answer.outputs if _never_ends_early(one) else ():
                ids = tuple(completion.token_ids)
                require(len(set(ids)) > 2, f"{how}: {one}: draws nothing but {sorted(set(ids))}")
                key, own = (one.prompt, one.temperature, ids), (one.seed, completion.index)
                require(key not in seen or (one.seed is not None and seen[key] == own),
                        f"{how}: {one}: completion {completion.index} is that of seed, index = {seen.get(key)}")
                seen[key] = own

    def _compare(self, streamed: Mapping[int, Any], asked: Sequence[Asked], answers: Sequence[Any], how: str) -> None:
        """What draws from a seed draws the same tokens in other company."""
        self._judge(asked, answers, how)
        differing = []
        for one, answer in zip(asked, answers, strict=True):
            if one.seed is None or id(one) not in streamed:
                continue
            for mine, its in zip(streamed[id(one)].outputs, answer.outputs, strict=True):
                self.compared += len(its.token_ids)
                if list(mine.token_ids) != list(its.token_ids):
                    differing.append(f"{one}: draws {list(mine.token_ids)} streamed, {list(its.token_ids)} {how}")
                    self.failing = self.failing or one
        require(len(differing) <= batch_flips(self.model.dtype),
                f"{len(differing)} completions differ, the first: {differing[0] if differing else ''}")
        self.failing = None
        firsts = {(one.prompt, one.seed): answer.outputs[0] for one, answer in zip(asked, answers, strict=True)
                  if 1 < one.n < NUM_DRAWS and one.seed is not None}
        for one, answer in zip(asked, answers, strict=True):
            first = firsts.get((one.prompt, one.seed))
            if one.n > 1 or first is None or one.params.keys() - FREE:
                continue
            ids = list(answer.outputs[0].token_ids)
            require(ids == list(first.token_ids),
                    f"{one}: draws {ids}, the first of several completions is {list(first.token_ids)}")

    def _check_crowd(self, llm: Any) -> None:
        """Long prompts like no others: nobody finds a prefix, though the youngest gives way, and finds its own."""
        draw = random.Random(f"crowd {self.case.seed}")
        crowd = [Asked(prompt=tuple(draw.randrange(self.model.vocab_size) for _ in range(CROWD_PROMPT)),
                       params={"temperature": 8.0, "max_tokens": None, "ignore_eos": True, "seed": number, "logprobs": 0, **told})
                 for number, told in enumerate([{}, {"prompt_logprobs": 0}, {"prompt_logprobs": 1}])]
        answers = self._generate(llm, crowd)
        self._judge(crowd, answers, "in a crowd")
        for one, answer in zip(crowd, answers, strict=True):
            found = answer.num_cached_tokens
            require(found == 0, f"{one}: num_cached_tokens={found} of a prompt like no other")

    def _check_prefix_hits(self, llm: Any) -> None:
        """A prompt that was just run is found again but for its last token, in whole blocks."""
        longest = max((one for one in self.case.asked if not isinstance(one.prompt, str)), key=lambda one: len(one.prompt))
        again = Asked(prompt=longest.prompt, params={"temperature": 0.0, "max_tokens": 1, "logprobs": 2})
        short = Asked(prompt=longest.prompt[-2:], params={"temperature": 0.0, "max_tokens": 2})
        self._judge([again], self._generate(llm, [again]), "asked again")
        told = Asked(prompt=longest.prompt, params={**again.params, "prompt_logprobs": 1})
        asked = [short, again, told, short]
        answers = self._generate(llm, asked)
        self._judge(asked, answers, "asked once more")
        for one, answer in zip(asked, answers, strict=True):
            # Of what the cache holds there are no logits, so who asks for the prompt's runs all of it.
            expected = 0 if one is told else (len(one.prompt) - 1) // llm.block_size * llm.block_size
            require(answer.num_cached_tokens == expected,
                    f"{one}: asked once more at once, num_cached_tokens={answer.num_cached_tokens}, must be {expected}")

    def _check_late_aborts(self, llm: Any) -> None:
        """Requests are given up while another stream is read, with tokens that nobody has seen yet."""
        given_up = [Asked(prompt=one.prompt, params={**one.params, "n": 2, "max_tokens": 20}, abort_after=0)
                    for one in self.case.asked if one.abort_after is not None][:1]  # with others there might be no room for both
        others = [Asked(prompt=one.prompt, params={**one.params, "max_tokens": 4}) for one in self.case.asked
                  if one.n == 1 and _never_ends_early(one)][:3]
        with answered(), _open_stream(llm, given_up) as first, _open_stream(llm, others) as second:
            late, read = Merged(first, given_up), Merged(second, others)
            late.take(next(first))
            read.take_all(second)
            for request_id in first.request_ids:
                llm.abort(request_id)
            late.take_all(first)
        self._judge(others, read.answers, "in a second stream")
        self._judge(given_up, late.answers, "given up late")
        for one, answer in zip(given_up, late.answers, strict=True):
            self.failing = one
            require(all(completion.token_ids for completion in answer.outputs), f"{one}: given up late, some has no token")
        self.failing = None


def _never_ends_early(asked: Asked) -> bool:
    """Whether its completions are so long and so random that no two are alike by chance."""
    ends_early = asked.stop or asked.stop_token_ids or not asked.ignore_eos or len(asked.prompt) > MAX_MODEL_LEN - NUM_TOKENS
    return (asked.temperature > 1 and asked.max_tokens == NUM_TOKENS and asked.abort_after is None
            and not (ends_early or asked.top_k > 0 or asked.top_p < 1 or asked.params.keys() & CHANGING))


def _prompts(asked: Sequence[Asked]) -> list[Any]:
    return [one.prompt if isinstance(one.prompt, str) else {"prompt_token_ids": list(one.prompt)} for one in asked]


def _open_stream(llm: Any, asked: Sequence[Asked]) -> Any:
    return llm.stream(_prompts(asked), [llm.params(one.params) for one in asked])


class Merged:
    """The answers as a stream brings them, put together."""

    def __init__(self, items: Any, asked: Sequence[Asked]) -> None:
        self.asked = asked
        self.answers = [Answer() for _ in asked]
        self.num_items = [0] * len(asked)
        self._place = {request_id: number for number, request_id in enumerate(items.request_ids)}

    def take(self, item: Any) -> int:
        """Returns whose it is."""
        number = self._place[item.request_id]
        self.num_items[number] += 1
        answer = self.answers[number]
        answer.prompt_token_ids, answer.finished, answer.error = list(item.prompt_token_ids), item.finished, item.error
        if item.prompt_logprobs is not None:
            require(answer.prompt_logprobs is None, f"{self.asked[number]}: prompt_logprobs come in two items")
            answer.prompt_logprobs = item.prompt_logprobs
        for new in item.outputs:
            before = next((one for one in answer.outputs if one.index == new.index), None)
            if before is None:
                answer.outputs.append(new)
                answer.outputs.sort(key=lambda one: one.index)
                continue
            require(before.finish_reason is None, f"{self.asked[number]}: an item comes after the last one")
            before.text += new.text
            before.token_ids = [*before.token_ids, *new.token_ids]
            before.logprobs = None if new.logprobs is None else [*before.logprobs, *new.logprobs]
            before.cumulative_logprob = new.cumulative_logprob
            before.finish_reason, before.stop_reason = new.finish_reason, new.stop_reason
        return number

    def take_all(self, items: Any) -> None:
        for item in items:
            self.take(item)


def stream(llm: Any, asked: Sequence[Asked]) -> list[Answer]:
    """Stream all requests. They are given up where they say so."""
    with _open_stream(llm, asked) as items:
        merged = Merged(items, asked)
        for item in items:
            number = merged.take(item)
            if merged.num_items[number] == asked[number].abort_after:
                llm.abort(item.request_id)
    return merged.answers


def draw_requests(draw: random.Random, talker: Talker) -> list[Asked]:
    """Every parameter, at several values and beside others; in a drawn order."""
    plain = [token_id for token_id in range(talker.exact.vocab_size) if token_id not in talker.pieces]

    def of_length(num_tokens: int) -> tuple[int, ...]:
        return tuple(draw.choice(plain) for _ in range(num_tokens))

    prompts, shared = [of_length(draw.randint(3, 12)) for _ in range(4)], of_length(17)

    def some() -> tuple[int, ...]:
        """A prompt of a few tokens; some begin alike, beyond a block or two."""
        kind = draw.random()
        if kind < 0.3:
            return draw.choice(prompts)
        beginning = shared[: draw.randint(4, 17)] if kind < 0.6 else ()
        return (*beginning, *of_length(draw.randint(1, 6)))

    def seed() -> int:
        return draw.randrange(1, 2**63)

    letters = [letter.replace(LETTERS[-1], " ") for letter in LETTERS]

    def stop_ids() -> list[int]:
        return draw.sample(plain, 8)

    def all_but(number: int) -> list[int]:
        return draw.sample(range(talker.exact.vocab_size), talker.exact.vocab_size - number)

    def stops() -> list[str]:
        return sorted({"".join(draw.choice(letters) for _ in range(draw.choice((2, 2, 3)))) for _ in range(5)})

    hot = {"temperature": 8.0, "max_tokens": NUM_TOKENS}
    free = {**hot, "ignore_eos": True}
    greedy = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    several = some(), seed()
    asked: list[tuple[tuple[int, ...] | str, dict[str, Any]]] = [
        # Temperatures and filters, alone and together; a greedy row filters nothing.
        *((some(), {**greedy, "logprobs": num_best}) for num_best in (0, 20)),
        (some(), {**greedy, "top_k": 3, "top_p": 0.5, "seed": seed()}),
        *((some(), {**free, "temperature": temperature, "seed": seed()}) for temperature in (0.05, 1.0, 30.0)),
        (some(), {**free, "top_k": 1, "seed": seed()}),
        (some(), {**free, "top_k": draw.randint(2, 4), "seed": seed(), "logprobs": 2}),
        (some(), {**free, "top_k": -1, "seed": 0}),
        (some(), {**free, "top_p": draw.uniform(0.1, 0.3), "seed": seed(), "logprobs": 1}),
        (some(), {**free, "temperature": 2.0, "top_k": 5, "top_p": 0.6, "seed": seed()}),
        *((several[0], {**free, "seed": several[1] % 2**31 + high}) for high in (2**31, 2**31 + 2**32, 2**62)),
        *((several[0], dict(free)) for _ in range(2)),  # without a seed
        # Several completions of a prompt, the first of which is the one that n=1 gives.
        *((several[0], {**free, "n": 3, "seed": number}) for number in (several[1], several[1] // 2)),
        (several[0], {**free, "seed": several[1]}),
        (some(), {**free, "n": 2, "logprobs": 2}),
        # Lengths.
        (some(), {"temperature": 8.0, "max_tokens": 1, "seed": seed()}),
        (of_length(draw.randint(36, 40)), {"temperature": 0.5, "max_tokens": None, "ignore_eos": True, "seed": seed()}),
        (of_length(MAX_MODEL_LEN - 1), {**free, "seed": seed(), "logprobs": 1}),
        (some(), {"temperature": 8.0, "ignore_eos": True, "seed": seed()}),
        # Of the prompt: in one step and in several, before anything is changed, and for several completions once.
        *((prompt, {**greedy, "prompt_logprobs": num_best}) for prompt, num_best in zip(prompts, (0, 20, -1), strict=False)),
        (of_length(1), {**greedy, "prompt_logprobs": 1}),
        (of_length(MAX_MODEL_LEN - draw.randint(1, 9)), {**free, "seed": seed(), "prompt_logprobs": 2}),
        (some(), {**free, "n": 2, "seed": seed(), "prompt_logprobs": 1, "logprobs": 2, "logit_bias": {draw.choice(plain): 9.0}}),
        # A prompt's last tokens alone, and tokens without text.
        (of_length(draw.randint(13, 20)), {**greedy, "truncate_prompt_tokens": draw.randint(2, 5), "prompt_logprobs": 0}),
        (of_length(MAX_MODEL_LEN - 1), {**free, "seed": seed(), "truncate_prompt_tokens": -1}),
        (some(), {**hot, "n": 2, "seed": seed(), "detokenize": False, "stop_token_ids": stop_ids(), "logprobs": 1}),
        # What changes the logits.
        *((some(), {**free, **changed, "seed": seed(), "logprobs": 1}) for changed in (
            {"presence_penalty": 2.0, "temperature": 1.0},
            {"frequency_penalty": -1.5, "temperature": 2.0}, {"repetition_penalty": draw.uniform(1.2, 1.5), "temperature": 2.0},
            {"logit_bias": dict.fromkeys(draw.sample(plain, 3), 30.0)},
            {"allowed_token_ids": draw.sample(plain, 5), "frequency_penalty": 2.0, "temperature": 2.0},
            {"min_p": 0.3, "top_k": 6, "top_p": 0.7, "temperature": 4.0})),
        # Below 1, a temperature that is forgotten leaves more tokens than min_p does: one of so many draws is among them.
        *((some(), {**free, "n": 8, "seed": seed(), "min_p": 0.25, "temperature": 0.5}) for _ in range(2)),
        *((some(), {**greedy, **changed}) for changed in (
            {"repetition_penalty": draw.uniform(1.2, 1.5)}, {"repetition_penalty": 0.8, "presence_penalty": 2.0},
            {"frequency_penalty": 2.0}, {"logit_bias": {draw.choice(plain): 200.0, draw.choice(plain): -5.0}},
            {"allowed_token_ids": draw.sample(plain, 3), "frequency_penalty": 1.0},
            {"allowed_token_ids": draw.sample(plain, 2), "presence_penalty": 2.0})),
        # Two tokens that take turns as each is counted, one of them often in the prompt, which does not count.
        *(((one,) * NUM_TOKENS, {**greedy, "allowed_token_ids": [one, other], "frequency_penalty": 2.0})
          for one, other in (draw.sample(plain, 2) for _ in range(2))),
        # One token whose bias holds out against a penalty, and not against one for each time that it came.
        (tuple(plain[:3]), {**greedy, "allowed_token_ids": plain[:2], "logit_bias": {plain[0]: 10.0}, "presence_penalty": 2.0,
                            "max_tokens": 2 * NUM_TOKENS}),
        # Letters alone, so that words come up.
        *((some(), {**free, "n": 3, "seed": seed(), "logit_bias": dict.fromkeys(talker.letters, 50.0), "bad_words": words})
          for words in (letters[:2], [one + other for one in letters[:3] for other in letters[:5]], ["abc", "cab", "bb", "e"])),
        # What ends a completion, and what must not end it yet.
        (some(), {**hot, "n": 6, "seed": seed()}),
        (some(), {**hot, "n": 6, "seed": seed(), "min_tokens": 6, "logprobs": 1}),
        (some(), {**free, "n": 4, "seed": seed(), "stop_token_ids": stop_ids()}),
        (some(), {**hot, "n": 6, "seed": seed(), "stop_token_ids": stop_ids(), "min_tokens": 5}),
        (some(), {**free, "n": 6, "seed": seed(), "stop_token_ids": stop_ids(), "min_tokens": 4}),
        (some(), {**hot, "n": 4, "seed": seed(), "stop_token_ids": [*stop_ids(), *talker.eos_token_ids[:3]],
                  "include_stop_str_in_output": True}),
        (some(), {**free, "n": 4, "seed": seed(), "stop_token_ids": talker.eos_token_ids[:4]}),
        # Almost any token ends these, as soon as it may.
        (some(), {**greedy, "stop_token_ids": all_but(3), "min_tokens": 4}),
        (some(), {**free, "n": 6, "seed": seed(), "stop_token_ids": all_but(3), "min_tokens": 4}),
        (some(), {**free, "n": 4, "seed": seed(), "stop": stops()}),
        (some(), {**free, "n": 4, "seed": seed(), "stop": stops(), "include_stop_str_in_output": True, "logprobs": 1}),
        (some(), {**free, "n": 6, "seed": seed(), "stop": stops(), "min_tokens": 4}),
        # One that may begin before min_tokens and end after, and one that the last token completes.
        (some(), {**free, "n": 3, "seed": seed(), "min_tokens": 3,
                  "stop": sorted(one + other for one in letters for other in letters)}),
        (some(), {**free, "n": 8, "seed": seed(), "stop": letters[:3], "max_tokens": 1}),
        (some(), {**hot, "n": 4, "seed": seed(), "stop": stops(), "stop_token_ids": stop_ids(), "skip_special_tokens": False}),
        # Text.
        (some(), {**free, "n": 10, "seed": seed(), "skip_special_tokens": False}),
        (some(), {**free, "n": 3, "seed": seed()}),
        ("".join(draw.choice("abcde ") for _ in range(7)), {**free, "seed": seed(), "logprobs": 3}),
    ]
    # Given up after so many items.
    aborted = [(some(), {**free, "max_tokens": 24, "seed": seed(), "n": n, "logprobs": 1}, after)
               for n, after in ((1, 1), (1, 4), (2, 3))]
    counted = [(some(), {"n": NUM_DRAWS, "max_tokens": 1, "seed": seed(), **params}) for params in (
        {"temperature": 0.5}, {"temperature": 5.0, "top_k": -1}, {"temperature": 3.0, "top_k": 6},
        {"temperature": 4.0, "top_p": 0.6}, {"temperature": 4.0, "top_k": 12, "top_p": 0.5},
        {"temperature": 5.0, "min_p": 0.2})]  # above 1, a temperature that is forgotten leaves a few of many tokens
    requests = [*(Asked(prompt=prompt, params=params) for prompt, params in (*asked, *counted)),
                *(Asked(prompt=prompt, params=params, abort_after=after) for prompt, params, after in aborted)]
    draw.shuffle(requests)
    return requests
