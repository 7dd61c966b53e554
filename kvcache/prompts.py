"""Requests to token ids: the router and the worker must agree on every token, so both do it here."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

from kvcache.chat import ChatTemplateError
from kvcache.keys import CacheScope
from kvcache.tokenizer import Tokenizer, TokenizerError


class PromptError(ValueError):
    """A request's prompt cannot be used. `param` names the field, as in an API error's body; None where vLLM names
    none."""

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message)
        self.param = param


def completion_prompts(prompt: object, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each prompt of a completion request: text, a list of texts, token ids, or a list of those.

    Raises `PromptError` with vLLM's words.
    """
    if prompt is None or prompt == "":
        raise PromptError(
            "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)", param="prompt"
        )
    if isinstance(prompt, str):
        return [_from_text(prompt, tokenizer)]
    if not isinstance(prompt, list):
        raise PromptError(
            f"prompt must be text, a list of texts, token ids or a list of those, not {type(prompt).__name__}",
            param="prompt",
        )
    if not prompt:
        raise PromptError("You must pass at least one prompt", param=None)
    if isinstance(prompt[0], int):
        return [_from_ids(prompt, tokenizer)]
    return [_from_text(one, tokenizer) if isinstance(one, str) else _from_ids(one, tokenizer) for one in prompt]


def chat_prompt(messages: object, tokenizer: Tokenizer, *, add_generation_prompt: bool = True) -> list[int]:
    """Token ids of a chat request's messages by the tokenizer's chat template. Raises `PromptError`."""
    if not isinstance(messages, list) or not messages:
        raise PromptError("messages must be a list of at least one message", param="messages")
    try:
        text = tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt)
        return tokenizer.encode(text, add_special_tokens=False)  # the template writes the special tokens itself
    except (ChatTemplateError, TokenizerError) as error:
        raise PromptError(str(error), param="messages") from None


def request_scope(body: Mapping[str, Any], adapter: str = "") -> CacheScope:
    """What separates this request's blocks from others with the same tokens: its `cache_salt`, and the name of
    the LoRA `adapter` that serves it. Raises `PromptError`."""
    salt = body.get("cache_salt")
    if salt is None:
        return CacheScope(adapter=adapter)
    if not isinstance(salt, str) or not salt:
        raise PromptError("Parameter 'cache_salt' must be a non-empty string if provided.", param="cache_salt")
    try:
        salt.encode()
    except UnicodeEncodeError:
        raise PromptError("Parameter 'cache_salt' must be valid Unicode.", param="cache_salt") from None
    return CacheScope(salt, adapter)


def _from_text(text: str, tokenizer: Tokenizer) -> list[int]:
    try:
        ids = tokenizer.encode(text)
    except TokenizerError as error:
        raise PromptError(str(error), param="prompt") from None
    if not ids:
        raise PromptError("The decoder prompt cannot be empty", param=None)
    return ids


def _from_ids(ids: object, tokenizer: Tokenizer) -> list[int]:
    if not isinstance(ids, list):
        raise PromptError(f"a prompt must be text or token ids, not {type(ids).__name__}", param="prompt")
    if not ids:
        raise PromptError("The decoder prompt cannot be empty", param=None)
    try:
        array("Q", ids)  # rejects what is no whole number of 0 or more, at the speed of C
    except (TypeError, OverflowError):
        raise PromptError("a prompt given as token ids must hold whole numbers of 0 or more", param="prompt") from None
    if (highest := max(ids)) >= tokenizer.vocab_size:
        raise PromptError(f"Token id {highest} is out of vocabulary", param=None)
    return ids
