"""Chat requests are read as vLLM reads them.

Covers: prompts recorded from a running engine, token by token; each rule of reading by itself; that no odd value gets
past the reader unseen. Not covered: images and other media (they raise, and the engine reads them), engines other
than the recorded version (tests/real_vllm does).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.chat.request import ChatOptions, ChatRenderer, ChatRequestError
from kvcache.prompts import PromptError, chat_request_prompt, completion_request_prompts
from kvcache.tokens.tokenizer import Tokenizer
from tests.kvcache.conftest import VLLM_DATA

RECORDED = json.loads((VLLM_DATA / "chat_prompts.json").read_bytes())["pairs"]
MAX_MODEL_LEN = 2048
"""Of the engine that they were recorded with."""

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}


def digest(tokens: list[int]) -> str:
    return hashlib.sha256(array("I", tokens).tobytes()).hexdigest()[:16]


def render(source: str, fields: dict[str, Any], **options: Any) -> str:
    return ChatRenderer({"default": source}, {"bos_token": "<s>"}, ChatOptions(**options)).render(
        {"messages": [USER], **fields}
    )


@pytest.mark.parametrize("pair", RECORDED, ids=range(len(RECORDED)))
def test_a_request_becomes_the_tokens_that_vllm_computes(recorded_model: Tokenizer, pair: dict[str, Any]) -> None:
    if "messages" in pair["body"]:
        read = [chat_request_prompt(pair["body"], recorded_model, MAX_MODEL_LEN)]
    else:
        read = completion_request_prompts(pair["body"], recorded_model, MAX_MODEL_LEN)
    texts = [recorded_model.decode(ids, skip_special_tokens=False) for ids in read]
    assert texts == [prompt["text"] for prompt in pair["prompts"]]
    assert [digest(ids) for ids in read] == [prompt["digest"] for prompt in pair["prompts"]]


def test_the_recorded_requests_cover_every_field_that_changes_a_prompt() -> None:
    fields = {name for pair in RECORDED for name in pair["body"]}
    assert fields >= {
        "tools", "tool_choice", "reasoning_effort", "chat_template_kwargs", "documents", "add_generation_prompt",
        "continue_final_message", "add_special_tokens", "truncate_prompt_tokens", "truncation_side", "chat_template",
    }  # fmt: skip
    roles = {message["role"] for pair in RECORDED for message in pair["body"].get("messages", [])}
    assert roles >= {"system", "developer", "user", "assistant", "tool"}


@pytest.mark.parametrize(
    ("source", "form"),
    [
        pytest.param("{{ messages[0].content }}", "string", id="no loop"),
        pytest.param("{% for m in messages %}{{ m.content }}{% endfor %}", "string", id="a loop over messages"),
        pytest.param(
            "{% for m in messages %}{% for c in m.content %}{% endfor %}{% endfor %}",
            "openai",
            id="a loop over content",
        ),
        pytest.param(
            "{% for m in messages %}{% for c in m['content'] | list %}{% endfor %}{% endfor %}",
            "openai",
            id="a loop over a filtered item",
        ),
        pytest.param(
            "{% set ms = messages[1:] %}{% for m in ms %}{% for c in m.content %}{% endfor %}{% endfor %}",
            "openai",
            id="a loop over a slice",
        ),
        pytest.param(
            "{% for content in x %}{% for c in content %}{% endfor %}{% endfor %}",
            "openai",
            id="a loop over any content",
        ),
        pytest.param(
            "{% macro f(content) %}{% for c in content %}{% endfor %}{% endmacro %}",
            "string",
            id="a macro that nobody calls",
        ),
        pytest.param(
            "{% macro f(b) %}{% for c in b %}{% endfor %}{% endmacro %}{% for m in messages %}{{ f(m.content) }}"
            "{% endfor %}",
            "openai",
            id="a macro with an argument",
        ),
        pytest.param(
            "{% macro f(b) %}{% for c in b %}{% endfor %}{% endmacro %}{% for m in messages %}{{ f(b=m.content) }}"
            "{% endfor %}",
            "openai",
            id="a macro with a named argument",
        ),
        pytest.param(
            "{% set ns = namespace() %}{% set ns.x = messages %}{% for m in messages %}{% for c in m.content %}"
            "{% endfor %}{% endfor %}",
            "string",
            id="a namespace",
        ),
    ],
)
def test_the_form_of_content_is_what_the_templates_loops_say(source: str, form: str) -> None:
    """The same sources were given to vLLM's own detection: it decides so."""
    shown = render(source + "|{{ messages[0].content | tojson }}", {})
    assert shown.rpartition("|")[2] == ('"hi"' if form == "string" else '[{"type": "text", "text": "hi"}]')


def test_the_engines_options_decide() -> None:
    assert render("{{ messages[0].content | tojson }}", {}, chat_template_content_format="openai").startswith("[{")
    kwargs = {"style": "terse", "thinking": True}
    assert render("{{ style }} {{ thinking }}", {}, default_chat_template_kwargs=kwargs) == "terse True"
    asked = {"chat_template_kwargs": {"style": "long", "thinking": None}}
    assert render("{{ style }} {{ thinking }}", asked, default_chat_template_kwargs=kwargs) == "long True"
    none = {"tools": [TOOL], "tool_choice": "none"}
    assert render("{{ tools is none }}", none) == "False"
    assert render("{{ tools is none }}", none, exclude_tools_when_tool_choice_none=True) == "True"


def test_only_a_trusted_request_brings_its_own_template() -> None:
    own = {"chat_template": "own"}
    assert render("default", own, trust_request_chat_template=True) == "own"
    variable = {"chat_template_kwargs": own}
    assert render("default", variable, trust_request_chat_template=True) == "own"
    assert render("default", variable, trust_request_chat_template=True, chat_template="given") == "given"
    for fields in (own, variable):
        with pytest.raises(ChatRequestError, match="not trusted") as refused:
            render("default", fields)
        assert refused.value.param == "chat_template"


def test_many_own_templates_are_not_all_kept() -> None:
    renderer = ChatRenderer({}, {}, ChatOptions(trust_request_chat_template=True))
    for at in range(100):
        assert renderer.render({"messages": [USER], "chat_template": f"own {at}"}) == f"own {at}"


def test_reasoning_effort_turns_thinking_on_and_off() -> None:
    source = "{{ reasoning_effort }} {{ enable_thinking }}"
    assert render(source, {"reasoning_effort": "low"}) == "low True"
    assert render(source, {"reasoning_effort": "none"}) == "none False"
    said = {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "high"}}
    assert render(source, said) == "low False"


def test_a_developer_speaks_as_the_system_where_the_template_knows_none() -> None:
    messages = [{"role": "system", "content": "a"}, USER, {"role": "developer", "content": "b", "tools": [TOOL]}]
    source = "{% for m in messages %}{{ m.role }}={{ m.content }};{{ m.tools | length }} {% endfor %}"
    assert render(source, {"messages": messages}) == "system=a\n\nb;0 user=hi;0 "
    assert "developer=b;1" in render(source + "{# 'developer' #}", {"messages": messages})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        pytest.param({"messages": "hi"}, "messages", id="messages: text"),
        pytest.param({"messages": []}, "messages", id="messages: none"),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            id="an image",
        ),
        pytest.param({"messages": [{"role": "assistant", "tool_calls": "x"}]}, "messages", id="tool calls: text"),
        pytest.param(
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]},
            "messages",
            id="tool calls without a function",
        ),
        pytest.param(
            {"messages": [{"role": "assistant", "content": "", "reasoning": 5}]}, "messages", id="reasoning: a number"
        ),
        pytest.param({"tools": [{"type": "function"}]}, "tools", id="a tool without a function"),
        pytest.param({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools", id="a custom tool"),
        pytest.param(
            {"tools": [{"function": {"name": "f", "parameters": 5}}]}, "tools", id="tool parameters: a number"
        ),
        pytest.param({"tools": [{"function": {"name": "f", "strict": "yes"}}]}, "tools", id="strict: text"),
        pytest.param({"documents": "x"}, "documents", id="documents: text"),
        pytest.param({"reasoning_effort": "extreme"}, "reasoning_effort", id="an unknown effort"),
        pytest.param({"chat_template_kwargs": []}, "chat_template_kwargs", id="template variables: a list"),
        pytest.param(
            {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", id="a variable of transformers"
        ),
        pytest.param({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", id="a variable of ours"),
        pytest.param({"add_generation_prompt": "no"}, "add_generation_prompt", id="a flag: text"),
        pytest.param({"continue_final_message": True}, "messages", id="continue and generate"),
        pytest.param({"kv_transfer_params": {"prompt_token_ids": [1]}}, "kv_transfer_params", id="a forwarded prompt"),
    ],
)
def test_what_cannot_be_read_exactly_is_not_read(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ChatRequestError) as refused:
        render("{% for m in messages %}{{ m.content }}{% endfor %}", fields)
    assert refused.value.param == param


@pytest.mark.parametrize(
    "source", ["{{ messages[0].role }}", "{{ messages[-1].content | upper }}", "{% for c in messages %}{% endfor %}"]
)
def test_a_message_that_the_template_does_not_show_cannot_be_continued(source: str) -> None:
    with pytest.raises(ChatRequestError, match="continue_final_message"):
        render(source, {"continue_final_message": True, "add_generation_prompt": False})


def test_a_continued_message_ends_where_it_ends() -> None:
    last = {"messages": [USER, {"role": "assistant", "content": " so "}]}
    ask = {**last, "continue_final_message": True, "add_generation_prompt": False}
    assert render("{% for m in messages %}<{{ m.content }}>{% endfor %}", ask) == "<hi>< so "
    assert render("{% for m in messages %}<{{ m.content | trim }}>{% endfor %}", ask) == "<hi><so"


# --- truncation ---------------------------------------------------------------------------------------------

TOKENS = st.lists(st.integers(0, 50256), min_size=1, max_size=40)


@given(tokens=TOKENS, keep=st.integers(0, 50), side=st.sampled_from([None, "left", "right"]))
def test_truncation_keeps_one_end(gpt2: Tokenizer, tokens: list[int], keep: int, side: str | None) -> None:
    fields = {"prompt": tokens, "truncate_prompt_tokens": keep, "truncation_side": side}
    (kept,) = completion_request_prompts(fields, gpt2)
    assert kept == (tokens[:keep] if side == "right" else tokens[max(len(tokens) - keep, 0) :])


@pytest.mark.parametrize(("max_tokens", "kept"), [(0, 8), (1, 7), (None, 8)])
def test_minus_one_keeps_what_the_context_holds(gpt2: Tokenizer, max_tokens: int | None, kept: int) -> None:
    fields = {"prompt": list(range(20)), "truncate_prompt_tokens": -1, "max_tokens": max_tokens}
    assert completion_request_prompts(fields, gpt2, 8) == [list(range(20 - kept, 20))]
    with pytest.raises(PromptError, match="not known here"):
        completion_request_prompts(fields, gpt2)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"truncate_prompt_tokens": -2}, id="less than -1"),
        pytest.param({"truncate_prompt_tokens": "5"}, id="text"),
        pytest.param({"truncate_prompt_tokens": True}, id="a boolean"),
        pytest.param({"truncation_side": "middle"}, id="an unknown side"),
        pytest.param({"add_special_tokens": 1}, id="special tokens: a number"),
        pytest.param({"suffix": "x"}, id="suffix"),
        pytest.param({"prompt_embeds": "x"}, id="prompt_embeds"),
    ],
)
def test_a_completion_that_cannot_be_read_is_refused(gpt2: Tokenizer, fields: dict[str, Any]) -> None:
    with pytest.raises(PromptError):
        completion_request_prompts({"prompt": "hi", **fields}, gpt2)


# --- whatever is sent ---------------------------------------------------------------------------------------

CHAT_FIELDS = (
    "tools", "tool_choice", "reasoning_effort", "chat_template_kwargs", "documents", "add_generation_prompt",
    "continue_final_message", "add_special_tokens", "truncate_prompt_tokens", "truncation_side", "chat_template",
    "kv_transfer_params", "max_tokens", "max_completion_tokens", "echo", "n",
)  # fmt: skip
NAMES = (
    "role", "content", "tool_calls", "id", "function", "type", "name", "arguments", "text", "reasoning",
    "tool_call_id", "tools", "parameters", "strict",
)  # fmt: skip
WORDS = ("user", "assistant", "tool", "developer", "system", "function", "text", "refusal")
SCALARS = st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats(allow_nan=False) | st.text(max_size=5)
JSON = st.recursive(
    SCALARS | st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), inner, max_size=4)
    ),
)
MESSAGE = st.dictionaries(st.sampled_from(NAMES), JSON, max_size=5)
FIELDS = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=3) | JSON}, optional=dict.fromkeys(CHAT_FIELDS, JSON)
)
PROMPT = st.fixed_dictionaries(
    {"prompt": JSON},
    optional=dict.fromkeys(("add_special_tokens", "truncate_prompt_tokens", "truncation_side", "suffix"), JSON),
)


def chat(fields: dict[str, Any], tokenizer: Tokenizer) -> list[list[int]]:
    """Nothing for a chat that is refused; any other exception is a fault."""
    try:
        return [chat_request_prompt(fields, tokenizer, MAX_MODEL_LEN)]
    except PromptError:
        return []


@given(fields=FIELDS)
def test_any_chat_is_read_or_refused(recorded_model: Tokenizer, fields: dict[str, Any]) -> None:
    assert all(isinstance(token, int) for prompt in chat(fields, recorded_model) for token in prompt)


@given(fields=PROMPT)
def test_any_completion_is_read_or_refused(recorded_model: Tokenizer, fields: dict[str, Any]) -> None:
    with contextlib.suppress(PromptError):
        prompts = completion_request_prompts(fields, recorded_model, MAX_MODEL_LEN)
        assert all(isinstance(token, int) for prompt in prompts for token in prompt)


ODD: list[Any] = [[], {}, 5, -7, 0.5, "x", "", True, [[]], [{}], ["x"], {"x": []}, {"function": {}}, 10**30]


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_an_odd_value_anywhere_is_read_or_refused(recorded_model: Tokenizer, odd: Any) -> None:
    plain = {"messages": [USER, {"role": "assistant", "content": "so"}]}
    bodies: list[dict[str, Any]] = [{**plain, name: odd} for name in CHAT_FIELDS]
    bodies += [{"messages": [{**USER, name: odd}]} for name in ("role", "content", "name", "tools", "task")]
    for name in ("tool_calls", "reasoning", "reasoning_content", "refusal"):
        bodies.append({"messages": [{"role": "assistant", "content": "", name: odd}]})
    bodies += [
        {"messages": [{"role": "tool", "content": "x", "tool_call_id": odd}]},
        {"messages": [{"role": "user", "content": [{"type": odd, "text": odd}]}]},
        {**plain, "tools": [{"type": odd, "function": odd, "defer_loading": odd}]},
        {**plain, "tools": [{"function": {"name": odd, "description": odd, "parameters": odd, "strict": odd}}]},
        {**plain, "chat_template_kwargs": {"tools": odd, "documents": odd, "chat_template": odd}},
    ]
    for body in bodies:
        assert all(isinstance(token, int) for prompt in chat(body, recorded_model) for token in prompt)
