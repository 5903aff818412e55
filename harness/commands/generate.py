"""``shardproof generate`` and ``shardproof fetch``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.bench.shapes import model_folder
from harness.commands.options import DEFAULT_MODEL, Fabric, Model, begin_ranks, check_device
from harness.errors import CouldNotRunError, UsageError, usage
from harness.names import DTYPES

if TYPE_CHECKING:
    from engine import LLM
    from engine.llm import Stream


def generate_command(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text; the model's chat template is applied if it has one. -, or none where "
                                               "standard input is no terminal: the text is read from there.")] = "-",
    tp: Annotated[int, typer.Option(help="Number of ranks.")] = 1,
    fabric: Fabric = "auto",
    dtype: Annotated[str, typer.Option(autocompletion=lambda: ["auto", *DTYPES], help=(
        f"{', '.join(DTYPES)}; auto is the checkpoint's on a GPU, and at least float32 on a CPU, unlike in verify."))] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the smallest set of best tokens whose probability reaches this.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep so many best tokens; 0 keeps all.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End the text before this string (again for more).")] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Completions of the prompt, one after the other, with an empty line "
                                                     "between them; needs a temperature.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
) -> None:
    """Generate text. Standard output holds the text alone, as it comes."""
    if prompt == "-":
        prompt = _from_standard_input()
    begin_ranks((tp,), fabric, preload=("engine.execution.core",))
    check_device(device)
    from engine import LLM, SamplingParams

    with usage():
        params = SamplingParams(n=n, temperature=temperature, top_p=top_p, top_k=top_k, stop=stop, max_tokens=max_tokens,
                                seed=seed)
    folder = model_folder(model, dtype=dtype)
    with usage():
        llm = LLM(folder, tensor_parallel_size=tp, fabric=fabric, dtype=dtype, device=device)
    with llm:
        with usage():
            stream = llm.stream(_as_chat(llm, prompt), params)
        _print(stream, n)


def _print(stream: Stream, n: int) -> None:
    """The first completion as it comes, the others after it. What was begun ends its line, whatever ends it."""
    later: dict[int, list[str]] = {index: [] for index in range(1, n)}
    has_begun = False
    try:
        for item in stream:
            if item.error is not None:
                raise CouldNotRunError(item.error)
            for completion in item.outputs:
                if completion.index:
                    later[completion.index].append(completion.text)
                else:
                    sys.stdout.write(completion.text)
                    has_begun = has_begun or completion.text != ""
            sys.stdout.flush()
    except BaseException:
        if has_begun:
            sys.stdout.write("\n")
        raise
    sys.stdout.write("\n")
    for texts in later.values():
        sys.stdout.write(f"\n{''.join(texts)}\n")


def _from_standard_input() -> str:
    if sys.stdin.isatty():
        raise UsageError("prompt is missing: give it as an argument, or on standard input")
    prompt = sys.stdin.read().removesuffix("\n")
    if not prompt:
        raise UsageError("prompt is missing: there is no argument, and standard input is empty")
    return prompt


def _as_chat(llm: LLM, prompt: str) -> Any:
    """The prompt as a user's message, or plain where the model has no chat template."""
    if llm.tokenizer is None or not llm.tokenizer.chat_template:
        return prompt
    return llm.preprocess_chat([{"role": "user", "content": prompt}])


def fetch_command(model: Model = DEFAULT_MODEL) -> None:
    """Get a model and print where it is."""
    sys.stdout.write(f"{model_folder(model)}\n")
