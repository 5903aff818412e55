"""Conversations are written by the model's template, or refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.served import SAMPLED, MakeLLM, joined, plain
from tests.engine.talking import EOS


def test_chat_writes_the_conversation_by_the_template(served: MakeLLM) -> None:
    llm = served(1)
    messages = [{"role": "user", "content": "ab a"}, {"role": "assistant", "content": "ba"}]
    (output,) = llm.chat(messages, SAMPLED)
    assert output.prompt == "ab a ba ab"
    assert llm.generate("ab a ba ab", SAMPLED)[0].prompt_token_ids == [EOS, *output.prompt_token_ids]
    assert llm.get_tokenizer().decode(output.prompt_token_ids) == output.prompt
    assert plain([output]) == plain(llm.generate({"prompt_token_ids": output.prompt_token_ids}, SAMPLED))
    two = llm.chat([messages, messages[:1]], SAMPLED, add_generation_prompt=False, chat_template_kwargs={"suffix": "aa"})
    assert [each.prompt for each in two] == ["ab a ba aa", "ab a aa"]
    (own,) = llm.chat(messages, SAMPLED, chat_template="{{ messages[1]['content'] }}")
    assert own.prompt == "ba"
    assert joined(list(llm.stream(llm.preprocess_chat(messages), SAMPLED))) == plain([output])


@pytest.mark.parametrize(
    ("messages", "options", "said"),
    [
        ([{"role": "nobody", "content": "a"}], {}, "the chat template refuses .* who is that"),
        ([], {}, r"messages=\[\] must be a list of messages"),
        ("Hello", {}, "messages='Hello' must be a list of messages"),
        ([[]], {}, r"messages=\[\[\]\] must be a list of messages"),
        ([{"content": "a"}], {}, r"message=\{'content': 'a'\}: messages must be"),
        (["Hello"], {}, r"messages=\['Hello'\] must be"),
        ([{"role": "user", "content": "a"}], {"continue_final_message": True}, "add_generation_prompt=False"),
    ],
    ids=["refused", "empty", "text", "empty one", "no role", "texts", "open and new"],
)
def test_conversations_that_are_none_are_refused(served: MakeLLM, messages: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        served(1).chat(messages, **options)


def test_a_model_without_a_chat_template_says_so(served: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = served(1)
    monkeypatch.setattr(llm.get_tokenizer(), "chat_template", None)
    with pytest.raises(ValueError, match="chat_template=None, and the model's tokenizer has no chat template"):
        llm.chat([{"role": "user", "content": "a"}])
    assert llm.chat([{"role": "user", "content": "a"}], SAMPLED, chat_template="b")[0].prompt == "b"


TEXTS_ONLY = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
ADDS_TEXTS = "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}{% endfor %}"
AS_JSON = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] | tojson }}{% endfor %}"
PARTS = "{% for part in message.content %}{% if part.type == 'text' %}[{{ part.text }}]{% endif %}{% endfor %}"
PARTS_ONLY = "{% for message in messages %}<{{ message.role }}>" + PARTS + "{% endfor %}"
EITHER = ("{% for message in messages %}<{{ message.role }}>{% if message.content is string %}{{ message.content }}"
          "{% else %}" + PARTS + "{% endif %}{% endfor %}")
USERS_ALONE = EITHER.replace("message.content is string", "message.role != 'user'")
SYSTEM = {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
USER = {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]}


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (TEXTS_ONLY, "<system>a\nb<user>c\nd"),
        (ADDS_TEXTS, "<system>a\nb<user>c\nd"),
        (AS_JSON, '<system>"a\\nb"<user>"c\\nd"'),
        (PARTS_ONLY, "<system>[a][b]<user>[c][d]"),
        (EITHER, "<system>[a][b]<user>[c][d]"),
        (USERS_ALONE, "<system>a\nb<user>[c][d]"),
    ],
    ids=["texts only", "adds texts", "as json", "parts only", "either", "users alone"],
)
def test_parts_go_to_templates_that_read_them_and_are_joined_for_others(served: MakeLLM, template: str, written: str) -> None:
    llm = served(1)
    (prompt,) = llm.preprocess_chat([SYSTEM, USER], chat_template=template)
    assert prompt["prompt"] == written


def test_parts_and_texts_may_stand_side_by_side(served: MakeLLM) -> None:
    llm = served(1)
    mixed = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ["b", {"type": "text", "text": "a"}]}]
    assert llm.preprocess_chat(mixed, chat_template=TEXTS_ONLY)[0]["prompt"] == "<user>a<assistant>b\na"
    assert llm.preprocess_chat(mixed, chat_template=EITHER)[0]["prompt"] == "<user>a<assistant>[b][a]"
    (output,) = llm.chat(mixed, SAMPLED)
    assert output.prompt == "a b\na ab"


CALL = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
WITH_CALLS = ("{% for message in messages %}{{ message.content or '' }}"
              "{% for call in message.tool_calls %}({{ call.function.name }}){% endfor %}{% endfor %}")


def test_a_call_of_a_tool_needs_no_content(served: MakeLLM) -> None:
    llm = served(1)
    for message in ({"role": "assistant", "content": None, "tool_calls": CALL}, {"role": "assistant", "tool_calls": CALL}):
        conversation = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, message]
        assert llm.preprocess_chat(conversation, chat_template=WITH_CALLS)[0]["prompt"] == "a(look)"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "content=None of a message must be text, or a list of parts"),
        (5, "content=5 of a message must be text"),
        (b"a", "content=b'a' of a message must be text"),
        ({"type": "text", "text": "a"}, "content={'text': 'a', 'type': 'text'} of a message must be text"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "a part of type='image_url' in a message's content is not"),
        ([{"text": "a"}], "a part {'text': 'a'} in a message's content is not"),
        ([5], "a part 5 in a message's content is not"),
        ([{"type": "text"}], "text=None of a part in a message's content must be text"),
        ([{"type": "text", "text": 5}], "text=5 of a part in a message's content must be text"),
        ("a\ud800", r"the conversation has a lone surrogate '\\ud800' at character \d"),
    ],
)
def test_content_that_is_no_text_is_refused_as_what_it_is(served: MakeLLM, content: Any, said: str) -> None:
    for template in (None, TEXTS_ONLY, EITHER):
        with pytest.raises(ValueError, match=said):
            served(1).chat([{"role": "user", "content": content}], SAMPLED, chat_template=template)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"chat_template": "{{ 1 / 0 }}"}, "the chat template refuses .* division"),
        ({"chat_template": "{% for %}"}, "the chat template refuses"),
        ({"chat_template": "{{ messages + 1 }}"}, "the chat template refuses"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs={'tokenize': True} must be a mapping"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs=5 must be a mapping"),
        ({"tools": "look"}, "tools='look' must be a list of JSON schemas"),
    ],
)
def test_options_of_a_template_that_can_be_none_are_refused(served: MakeLLM, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        served(1).chat([{"role": "user", "content": "a"}], SAMPLED, **options)
