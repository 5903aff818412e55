"""Conversations to prompts, by the chat template that the tokenizer brings along."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from engine.frontend.prompts import check_text

Message = Mapping[str, Any]

_MARK = "7c1e4b"


def render_chats(tokenizer: Any, messages: Sequence[Message] | Sequence[Sequence[Message]],
                 **template_args: Any) -> list[dict[str, Any]]:
    """One prompt for each conversation: ``{"prompt": text, "prompt_token_ids": ids}``.

    Args:
        tokenizer: of transformers, or None where the model brings none.
        messages: one conversation or a list of them; each message has a ``role``, and mostly ``content``: text, or a list of
            parts ``{"type": "text", "text": ...}``, which templates that know no lists get as one text.
        template_args: those of ``apply_chat_template``, and whatever the template itself knows.

    Raises:
        ValueError: if there is no tokenizer or template, a conversation is none, holds parts that are no text, or is refused by
            the template.
    """
    if tokenizer is None:
        raise ValueError("chat needs a tokenizer, and the model folder holds none: give generate token ids")
    if template_args.get("chat_template") is None and not tokenizer.chat_template:
        raise ValueError("chat_template=None, and the model's tokenizer has no chat template: give one, "
                         "or complete plain text with generate")
    prompts = []
    for conversation in _as_conversations(messages):
        text = _render(tokenizer, _with_text_where_it_is_due(tokenizer, conversation, template_args), template_args)
        check_text(text, "the conversation")
        # The template has written the special tokens already.
        prompts.append({"prompt": text, "prompt_token_ids": list(tokenizer(text, add_special_tokens=False)["input_ids"])})
    return prompts


def _render(tokenizer: Any, conversation: list[dict[str, Any]], template_args: Mapping[str, Any]) -> str:
    try:
        text: str = tokenizer.apply_chat_template(conversation, tokenize=False, **template_args)
    except Exception as refusal:  # a template is a program: it may refuse, and it may fail in any way
        raise ValueError(f"the chat template refuses messages={reprlib.repr(conversation)}: {refusal}") from refusal
    return text


def _with_text_where_it_is_due(tokenizer: Any, conversation: list[dict[str, Any]],
                               template_args: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conversation with the parts of a message joined, by line breaks as in vLLM, unless the template reads parts itself.

    Whether it does is tried: it is given marked parts in their place, and must write the marks, and not as Python or JSON
    would write the list.
    """
    in_parts = [number for number, message in enumerate(conversation) if isinstance(message.get("content"), list)]
    if not in_parts:
        return conversation
    marks = {number: f"part-{number}-{_MARK}" for number in in_parts}
    marked = [message if number not in marks else message | {"content": [{"type": "text", "text": marks[number]}]}
              for number, message in enumerate(conversation)]
    try:
        text = _render(tokenizer, marked, template_args)
    except ValueError:
        text = ""
    reads_parts = {number for number, mark in marks.items() if re.search(rf"(?<![\"']){mark}(?![\"'])", text)}
    return [message if number not in marks or number in reads_parts else
            message | {"content": "\n".join(part["text"] for part in message["content"])}
            for number, message in enumerate(conversation)]


def _as_conversations(messages: Any) -> list[list[dict[str, Any]]]:
    rule = "must be a list of messages such as {'role': 'user', 'content': 'Hello'}, or a list of such lists"
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages={reprlib.repr(messages)} {rule}")
    conversations = [messages] if isinstance(messages[0], Mapping) else messages
    for conversation in conversations:
        if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
            raise ValueError(f"messages={reprlib.repr(messages)} {rule}")
        for message in conversation:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(f"message={reprlib.repr(message)}: messages {rule}")
    return [[dict(message) | _content_of(message) for message in conversation] for conversation in conversations]


def _content_of(message: Message) -> dict[str, Any]:
    """The message's content, if it has one: text, text parts, or None beside calls of tools."""
    if "content" not in message:
        return {}
    content = message["content"]
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return {"content": content}
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"content={reprlib.repr(content)} of a message must be text, or a list of parts such as "
                         "{'type': 'text', 'text': 'Hello'}; None only beside tool_calls")
    return {"content": [_text_part(part) for part in content]}


def _text_part(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        what = reprlib.repr(part) if kind is None else f"of type={kind!r}"
        raise ValueError(f"a part {what} in a message's content is not supported: parts are texts, such as "
                         "{'type': 'text', 'text': 'Hello'}")
    if not isinstance(part.get("text"), str):
        raise ValueError(f"text={reprlib.repr(part.get('text'))} of a part in a message's content must be text")
    return dict(part)
