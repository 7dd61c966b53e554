"""Prompts of completion requests.

Covers: each form of vLLM's, the same tokens in each form, and vLLM's words for what is no prompt. Not covered:
chats (chat/test_request.py).
"""

from __future__ import annotations

from typing import Any

import pytest

from kvcache.keys import DEFAULT_SCOPE, CacheScope
from kvcache.prompts import PromptError, chat_prompt, completion_prompts, request_scope
from kvcache.tokens.tokenizer import Tokenizer

HELLO = [15496, 995]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        pytest.param("Hello world", [HELLO], id="text"),
        pytest.param(["Hello world", "Hello"], [HELLO, HELLO[:1]], id="texts"),
        pytest.param(HELLO, [HELLO], id="token ids"),
        pytest.param([HELLO, [0, 50256]], [HELLO, [0, 50256]], id="lists of token ids"),
    ],
)
def test_every_form_of_a_prompt(gpt2: Tokenizer, prompt: object, prompts: list[list[int]]) -> None:
    assert completion_prompts(prompt, gpt2) == prompts


@pytest.mark.parametrize(
    ("prompt", "says", "param"),
    [
        pytest.param(None, "Either prompt or prompt_embeds must be provided and non-empty.", "prompt", id="none"),
        pytest.param("", "Either prompt or prompt_embeds must be provided and non-empty.", "prompt", id="empty text"),
        pytest.param([], "You must pass at least one prompt", None, id="no prompt"),
        pytest.param([""], "prompt cannot be empty", None, id="an empty text"),
        pytest.param([[]], "prompt cannot be empty", None, id="no token"),
        pytest.param([50257], "Token id 50257 is out of vocabulary", None, id="out of vocabulary"),
        pytest.param([-1], "whole numbers of 0 or more", "prompt", id="negative"),
        pytest.param([1, "a"], "whole numbers of 0 or more", "prompt", id="text among ids"),
        pytest.param([1, 2.5], "whole numbers of 0 or more", "prompt", id="fraction"),
        pytest.param([2**70], "whole numbers of 0 or more", "prompt", id="too large"),
        pytest.param(["a", 5], "must be text or token ids, not int", "prompt", id="an id among texts"),
        pytest.param([{}], "must be text or token ids, not dict", "prompt", id="an object among prompts"),
        pytest.param(5, "not int", "prompt", id="a number"),
        pytest.param({}, "not dict", "prompt", id="an object"),
        pytest.param("\ud800", "surrogate", "prompt", id="half a surrogate pair"),
    ],
)
def test_what_is_no_prompt_is_refused(gpt2: Tokenizer, prompt: object, says: str, param: str | None) -> None:
    with pytest.raises(PromptError, match=says) as refused:
        completion_prompts(prompt, gpt2)
    assert refused.value.param == param


def test_a_chat_is_its_rendered_text(gpt2: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert gpt2.decode(chat_prompt(messages, gpt2)) == "<|user|>\nhi\n<|assistant|>\n"
    assert gpt2.decode(chat_prompt(messages, gpt2, add_generation_prompt=False)) == "<|user|>\nhi\n"


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param(None, id="none"),
        pytest.param([], id="no message"),
        pytest.param("hi", id="text"),
        pytest.param({}, id="an object"),
        pytest.param([5], id="a number"),
        pytest.param([{"role": "user", "content": 5}], id="content: a number"),
        pytest.param([{"content": "\ud800"}], id="half a surrogate pair"),
    ],
)
def test_what_is_no_chat_is_refused(gpt2: Tokenizer, messages: object) -> None:
    with pytest.raises(PromptError) as refused:
        chat_prompt(messages, gpt2)
    assert refused.value.param == "messages"


def test_half_a_surrogate_pair_in_a_chat_is_refused(gpt2: Tokenizer) -> None:
    with pytest.raises(PromptError, match="surrogate"):
        chat_prompt([{"role": "user", "content": "\ud800"}], gpt2)


def test_the_scope_is_salt_and_adapter() -> None:
    assert request_scope({}) == request_scope({"cache_salt": None}) == DEFAULT_SCOPE
    assert request_scope({"cache_salt": "s"}, adapter="a") == CacheScope("s", "a")


@pytest.mark.parametrize(
    "salt",
    [
        pytest.param("", id="empty"),
        pytest.param(5, id="a number"),
        pytest.param(["s"], id="a list"),
        pytest.param("\ud800", id="half a surrogate pair"),
    ],
)
def test_a_salt_that_is_none_is_refused(salt: Any) -> None:
    with pytest.raises(PromptError, match="cache_salt") as refused:
        request_scope({"cache_salt": salt})
    assert refused.value.param == "cache_salt"
