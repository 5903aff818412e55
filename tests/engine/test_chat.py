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
