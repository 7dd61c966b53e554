"""From requests to token ids. The router and the worker must agree on every token, so both use this module."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from kvcache.chat import anthropic, responses
from kvcache.chat.messages import BY_TEMPLATE
from kvcache.chat.request import ChatRequestError
from kvcache.images import ImageError, ImageRule, expanded, identifier, image_parts
from kvcache.keys import DEFAULT_SCOPE, CacheScope, Image
from kvcache.tokens.tokenizer import Tokenizer, TokenizerError


class PromptError(ValueError):
    """A request's prompt cannot be used. `param` names the field, as in an API error's body; None where vLLM names
    none."""

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message)
        self.param = param


def completion_prompts(prompt: object, tokenizer: Tokenizer, *, add_special_tokens: bool = True) -> list[list[int]]:
    """Token ids of each prompt of a completion request: text, a list of texts, token ids, or a list of those.

    Raises `PromptError` with vLLM's words.
    """
    if prompt is None or prompt == "":
        raise PromptError(
            "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)", param="prompt"
        )
    if isinstance(prompt, str):
        return [_from_text(prompt, tokenizer, add_special_tokens)]
    if not isinstance(prompt, list):
        raise PromptError(
            f"prompt must be text, a list of texts, token ids or a list of those, not {type(prompt).__name__}",
            param="prompt",
        )
    if not prompt:
        raise PromptError("You must pass at least one prompt", param=None)
    if isinstance(prompt[0], int):
        return [_from_ids(prompt, tokenizer)]
    return [
        _from_text(one, tokenizer, add_special_tokens) if isinstance(one, str) else _from_ids(one, tokenizer)
        for one in prompt
    ]


def completion_request_prompts(
    fields: Mapping[str, Any], tokenizer: Tokenizer, max_model_len: int | None = None
) -> list[list[int]]:
    """Token ids of each prompt of a completion request's JSON body, cut as `truncate_prompt_tokens` says.

    `max_model_len` is what -1 refers to. Raises `PromptError`, also for fields that change the prompt in ways that are
    the engine's alone (`suffix`, `prompt_embeds`).
    """
    for name in ("suffix", "prompt_embeds"):
        if fields.get(name) is not None:
            raise PromptError(f"{name} is not read here", param=name)
    cut = Truncation.of(fields, max_model_len, output_tokens=fields.get("max_tokens", 16))
    special = _flag(fields, "add_special_tokens", True)
    prompts = completion_prompts(fields.get("prompt"), tokenizer, add_special_tokens=special)
    if cut is None:
        return prompts
    texts = fields["prompt"] if isinstance(fields["prompt"], list) else [fields["prompt"]]
    return [
        _cut_text(texts[at], ids, cut, tokenizer) if special and isinstance(texts[at], str) else cut.apply(ids)
        for at, ids in enumerate(prompts)
    ]


def chat_request_prompt(fields: Mapping[str, Any], tokenizer: Tokenizer, max_model_len: int | None = None) -> list[int]:
    """Token ids of the prompt of a chat request's JSON body. Raises `PromptError`."""
    output_tokens = fields.get("max_completion_tokens")
    if output_tokens is None:
        output_tokens = fields.get("max_tokens")
    cut = Truncation.of(fields, max_model_len, output_tokens=output_tokens)
    special = _flag(fields, "add_special_tokens", False)  # the template writes the special tokens itself
    try:
        text = tokenizer.render_chat(fields)
        ids = tokenizer.encode(text, add_special_tokens=special)
        if cut is None:
            return ids
        return _cut_text(text, ids, cut, tokenizer) if special else cut.apply(ids)
    except ChatRequestError as error:
        raise PromptError(str(error), param=error.param) from None
    except TokenizerError as error:
        raise PromptError(str(error), param="messages") from None


@dataclass(frozen=True, slots=True)
class ImagePrompt:
    """A prompt with images, or its beginning."""

    tokens: list[int]
    images: list[Image]
    length: int
    """Tokens of the whole prompt; where these are only the tokens before the first image, at least so many."""


MARK = "\ue000"
"""Stands for an image where its placeholder is not known. A character for private use, which text seldom has."""


def image_request_prompt(fields: Mapping[str, Any], tokenizer: Tokenizer, rule: ImageRule | None) -> ImagePrompt:
    """What is known of the prompt of a chat request with images: all of it if the engine's rule is known and its images
    can be identified here, else what comes before the first image. Raises `PromptError`."""
    for name in ("truncate_prompt_tokens", "add_special_tokens"):
        if fields.get(name):
            raise PromptError(f"{name} is not read for a prompt with images", param=name)
    try:
        if rule is not None:
            names = [identifier(part, rule) for part in image_parts(fields.get("messages"))]
            known = [name for name in names if name is not None]
            if len(known) == len(names):
                text = tokenizer.chat.render(fields, _placeholder(fields, tokenizer, rule))
                with suppress(ImageError):  # the text may have a placeholder of its own
                    tokens, images = expanded(tokenizer.encode(text, add_special_tokens=False), known, rule)
                    return ImagePrompt(tokens, images, len(tokens))
        return _before_images(fields, tokenizer)
    except ChatRequestError as error:
        raise PromptError(str(error), param=error.param) from None
    except TokenizerError as error:
        raise PromptError(str(error), param="messages") from None


def _placeholder(fields: Mapping[str, Any], tokenizer: Tokenizer, rule: ImageRule) -> str:
    """The template's own placeholder if it writes one, else the text of the rule's token."""
    try:
        tokenizer.chat.render(fields, BY_TEMPLATE)
    except ChatRequestError:
        return tokenizer.token_str(rule.token)
    return BY_TEMPLATE


def _before_images(fields: Mapping[str, Any], tokenizer: Tokenizer) -> ImagePrompt:
    """The tokens before the first image. The text around a mark in its place shows how far they go; where the template
    writes the placeholder itself, it may begin earlier."""
    marked = tokenizer.chat.render(fields, MARK)
    if marked.count(MARK) != sum(1 for _ in image_parts(fields.get("messages"))):
        raise PromptError("the place of the images is not known", param="messages")
    before = marked[: marked.index(MARK)]
    tokens = tokenizer.encode(before, add_special_tokens=False) if before else []
    whole = tokenizer.encode(marked, add_special_tokens=False)
    with suppress(ChatRequestError):
        written = tokenizer.chat.render(fields, BY_TEMPLATE)
        before = before[: _common_length(before, written)]
        tokens = tokenizer.encode(before, add_special_tokens=False) if before else []
        whole = tokenizer.encode(written, add_special_tokens=False)
        tokens = tokens[: _common_length(tokens, whole)]  # the last token may reach into what follows
    return ImagePrompt(tokens, [], max(len(whole), len(tokens) + 1))


def _common_length(one: Sequence[object], other: Sequence[object]) -> int:
    """Length of the longest prefix that two texts or prompts have in common."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def messages_chat_fields(fields: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The chat request that a body of Anthropic's Messages API stands for. Raises `PromptError`."""
    try:
        return anthropic.chat_fields(fields, tokenizer.chat)
    except ChatRequestError as error:
        raise PromptError(str(error), param=error.param) from None


def responses_chat_fields(fields: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The chat request that a body of OpenAI's Responses API stands for. Raises `PromptError`."""
    try:
        return responses.chat_fields(fields)
    except ChatRequestError as error:
        raise PromptError(str(error), param=error.param) from None


def chat_prompt(messages: object, tokenizer: Tokenizer, *, add_generation_prompt: bool = True) -> list[int]:
    """Token ids of a chat request that has nothing but messages. Raises `PromptError`."""
    return chat_request_prompt({"messages": messages, "add_generation_prompt": add_generation_prompt}, tokenizer)


@dataclass(frozen=True, slots=True)
class Truncation:
    """A request's `truncate_prompt_tokens`: how many tokens are kept, from which end they are cut."""

    keep: int
    left: bool
    """Keep the last ones: what vLLM does unless told otherwise."""
    stated: bool
    """The request names the side. vLLM then cuts special tokens like any other, else it leaves them whole."""

    @classmethod
    def of(cls, fields: Mapping[str, Any], max_model_len: int | None, output_tokens: object) -> Truncation | None:
        """None for a request that says nothing of it. -1 keeps what the context holds: all of it when nothing is to be
        generated, else all but one. Raises `PromptError`."""
        keep, side = fields.get("truncate_prompt_tokens"), fields.get("truncation_side")
        if side not in (None, "left", "right"):
            raise PromptError("truncation_side is 'left' or 'right'", param="truncation_side")
        if keep is None:
            return None
        if not isinstance(keep, int) or isinstance(keep, bool) or keep < -1:
            raise PromptError("truncate_prompt_tokens is a whole number of -1 or more", param="truncate_prompt_tokens")
        if keep == -1:
            if max_model_len is None:
                raise PromptError("the context's length is not known here", param="truncate_prompt_tokens")
            keep = max_model_len - 1 if output_tokens else max_model_len
        return cls(keep, side != "right", side is not None)

    def apply(self, ids: list[int]) -> list[int]:
        """The tokens that are kept."""
        if self.keep >= len(ids):
            return ids
        return ids[len(ids) - self.keep :] if self.left else ids[: self.keep]


def _cut_text(text: str, ids: list[int], cut: Truncation, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a text, cut between the special tokens that were put around it."""
    if cut.stated or cut.keep >= len(ids):
        return cut.apply(ids)
    plain = tokenizer.encode(text, add_special_tokens=False)
    added = len(ids) - len(plain)
    before = next((at for at in range(added + 1) if ids[at : at + len(plain)] == plain), None)
    if before is None or cut.keep < added:
        raise PromptError("the tokenizer puts more around a text than can be kept", param="truncate_prompt_tokens")
    kept = replace(cut, keep=cut.keep - added).apply(plain)
    return [*ids[:before], *kept, *ids[len(ids) - (added - before) :]]


def request_scope(body: Mapping[str, Any], adapter: str = "") -> CacheScope:
    """What separates this request's blocks from others with the same tokens: its `cache_salt`, and the name of
    the LoRA `adapter` that serves it. Raises `PromptError`."""
    salt = body.get("cache_salt")
    if salt is None:
        return CacheScope(adapter=adapter) if adapter else DEFAULT_SCOPE
    if not isinstance(salt, str) or not salt:
        raise PromptError("Parameter 'cache_salt' must be a non-empty string if provided.", param="cache_salt")
    try:
        salt.encode()
    except UnicodeEncodeError:
        raise PromptError("Parameter 'cache_salt' must be valid Unicode.", param="cache_salt") from None
    return CacheScope(salt, adapter)


def _from_text(text: str, tokenizer: Tokenizer, add_special_tokens: bool) -> list[int]:
    try:
        ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
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


def _flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise PromptError(f"{name} must be true or false, not {type(value).__name__}", param=name)
    return value
