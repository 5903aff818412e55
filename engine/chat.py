"""Conversations to prompts, by the chat template that the tokenizer brings along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

Message = Mapping[str, Any]


def render_chats(tokenizer: Any, messages: Sequence[Message] | Sequence[Sequence[Message]],
                 **template_args: Any) -> list[dict[str, Any]]:
    """One prompt for each conversation: ``{"prompt": text, "prompt_token_ids": ids}``.

    Args:
        messages: one conversation or a list of them; each message has a ``role``, and mostly ``content``.
        template_args: those of ``apply_chat_template``, and whatever the template itself knows.

    Raises:
        ValueError: if there is no tokenizer or template, or the template refuses a conversation.
    """
    if tokenizer is None:
        raise ValueError("chat needs a tokenizer, and the model folder holds none: give generate token ids")
    if template_args.get("chat_template") is None and not tokenizer.chat_template:
        raise ValueError("chat_template=None, and the model's tokenizer has no chat template: give one, "
                         "or complete plain text with generate")
    prompts = []
    for conversation in _as_conversations(messages):
        try:
            text = tokenizer.apply_chat_template(conversation, tokenize=False, **template_args)
        except TemplateError as refusal:
            raise ValueError(f"the chat template refuses messages={conversation!r}: {refusal}") from refusal
        # The template has written the special tokens already.
        prompts.append({"prompt": text, "prompt_token_ids": list(tokenizer(text, add_special_tokens=False)["input_ids"])})
    return prompts


def _as_conversations(messages: Any) -> list[list[dict[str, Any]]]:
    rule = "must be a list of messages such as {'role': 'user', 'content': 'Hello'}, or a list of such lists"
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages={messages!r} {rule}")
    conversations = [messages] if isinstance(messages[0], Mapping) else messages
    for conversation in conversations:
        if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
            raise ValueError(f"messages={messages!r} {rule}")
        for message in conversation:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(f"message={message!r}: messages {rule}")
    return [[dict(message) for message in conversation] for conversation in conversations]
