"""Chat templates.

Covers: what transformers' templates may use, the forms of a message's content, and the errors of templates and
messages. Not covered: whether the text is what transformers renders; the recorded prompts of test_request.py do.
"""

from __future__ import annotations

from typing import Any

import pytest

from kvcache.chat.request import ChatRenderer, ChatRequestError
from kvcache.chat.template import ChatTemplate, ChatTemplateError
from kvcache.tokens.tokenizer import Tokenizer

USER = {"role": "user", "content": "hi"}


def render(source: str, *messages: dict[str, Any], **special: str) -> str:
    return ChatRenderer({"default": source}, special).render({"messages": [*messages] or [USER]})


def test_the_bundled_template(gpt2: Tokenizer) -> None:
    conversation = [{"role": "system", "content": "Be brief."}, USER]
    assert gpt2.render_chat({"messages": conversation}) == "<|system|>\nBe brief.\n<|user|>\nhi\n<|assistant|>\n"
    assert gpt2.render_chat({"messages": [USER], "add_generation_prompt": False}) == "<|user|>\nhi\n"


def test_a_growing_conversation_keeps_its_beginning(gpt2: Tokenizer) -> None:
    asked = [USER]
    answered = [*asked, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "and?"}]
    assert gpt2.render_chat({"messages": answered}).startswith(gpt2.render_chat({"messages": asked}) + "hello\n")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("a", "a"),
        pytest.param("", "", id="empty"),
        pytest.param(None, "", id="none"),
        pytest.param([], "", id="no parts"),
        pytest.param([{"type": "text", "text": "a"}], "a", id="one part"),
        pytest.param([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb", id="two parts"),
        pytest.param(
            ["a", {"type": "input_text", "text": "b"}, {"type": "refusal", "refusal": "c"}],
            "a\nb\nc",
            id="parts of other APIs",
        ),
    ],
)
def test_content_becomes_text(content: object, text: str) -> None:
    assert render("{{ messages[0].content }}", {"role": "user", "content": content}) == text


@pytest.mark.parametrize(
    ("message", "says"),
    [
        pytest.param("hi", "must be an object, not str", id="text"),
        pytest.param({"content": "hi"}, "needs a role", id="without a role"),
        pytest.param({"role": 5, "content": "hi"}, "needs a role", id="role: a number"),
        pytest.param({"role": "user", "content": 5}, "a string or a list of parts, not int", id="content: a number"),
        pytest.param({"role": "user", "content": [5]}, "not int", id="a part: a number"),
        pytest.param(
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "not one of type 'image_url'",
            id="an image",
        ),
        pytest.param(
            {"role": "user", "content": [{"type": "text"}]}, "not one of type 'text'", id="a part without text"
        ),
        pytest.param({"role": "user", "content": [{"type": ["text"]}]}, "not dict", id="type: a list"),
    ],
)
def test_what_is_no_message_of_text_is_refused(gpt2: Tokenizer, message: Any, says: str) -> None:
    with pytest.raises(ChatRequestError, match=says):
        gpt2.render_chat({"messages": [message]})


def test_what_transformers_gives_to_templates() -> None:
    assert render("{{ bos_token }}{{ messages | tojson }}", bos_token="<s>") == '<s>[{"role": "user", "content": "hi"}]'
    assert render("{{ '<é&>' | tojson }}") == '"<é&>"'
    assert render("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}") == "1"
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "hi"
    assert render("{{ strftime_now('%Y') | length }}") == "4"
    assert render("{% if true %}\n  {% if true %}\nx{% endif %}\n{% endif %}\n") == "x"


def test_a_template_that_complains_is_quoted() -> None:
    with pytest.raises(ChatRequestError, match="roles must alternate") as complaint:
        render("{{ raise_exception('roles must alternate') }}")
    assert complaint.value.reason == "roles must alternate"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 / 0 }}", "{{ messages[0].content + 5 }}", "{{ messages.append(1) }}",
        "{{ messages.__class__.__base__.__subclasses__() }}", "{{ nothing.at.all }}",
        "{% for i in range(10**9) %}{% endfor %}", "{% macro loop() %}{{ loop() }}{% endmacro %}{{ loop() }}",
    ],
)  # fmt: skip
def test_whatever_a_template_does_wrong_is_one_error(source: str) -> None:
    with pytest.raises(ChatRequestError, match="the chat template failed"):
        render(source)


def test_a_template_that_does_not_compile_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match="does not compile"):
        ChatTemplate("{% for %}", {})
