"""Makes the prompt tokens of a request, within the bounds of the context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvcache.chat.request import ChatRequestError
from kvcache.errors import ApiError, parameter_error
from kvcache.images import ImageRule, identifier, image_parts, is_image
from kvcache.prompts import ImagePrompt, PromptError, chat_request_prompt, image_request_prompt
from kvcache.tokens.tokenizer import Tokenizer, TokenizerError
from worker.emulator.protocol.validation import sanitized

UNTRUSTED_TEMPLATE = (
    "Chat template is passed with request, but --trust-request-chat-template is not set. Refused request with "
    "untrusted chat template."
)
_NOT_UNICODE = "TextEncodeInput must be Union[TextInputSequence, Tuple[InputSequence, InputSequence]]"


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of a prompt. The constructor checks them against one another. Raises `ApiError`."""

    max_model_len: int
    output: int | None = None
    """Output tokens that the request asks for, in the field `output_name`."""
    output_name: str = "max_tokens"
    truncate: int | None = None
    """Number of prompt tokens to keep; -1: as many as fit."""
    side: Literal["left", "right"] | None = None
    """The side that is cut off: left (the default) or right."""

    def __post_init__(self) -> None:
        if self.output is not None and self.output > self.max_model_len:
            raise parameter_error(
                f"{self.output_name}={self.output} cannot be greater than max_model_len={self.max_model_len}. Please "
                "request fewer output tokens.",
                self.output_name,
                self.output,
            )
        if self.truncate is not None and self.truncate > self.max_model_len:
            raise parameter_error(
                f"truncate_prompt_tokens={self.truncate} cannot be greater than max_model_len = {self.max_model_len}. "
                "Please request a smaller truncation size.",
                "truncate_prompt_tokens",
                self.truncate,
            )

    def text(self, text: str, tokenizer: Tokenizer) -> str:
        """The text, cut to what can fit if the prompt is to be truncated. Raises `ApiError` for a text that is too
        long."""
        if len(text) <= self.max_model_len:
            return text
        most = self.max_model_len * tokenizer.longest_token
        if len(text) <= most:
            return text
        if self.truncate is None:
            raise parameter_error(
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains "
                f"{len(text)} characters (more than {most} characters, which is the upper bound for "
                f"{self.max_model_len} input tokens). Please reduce the length of the input prompt.",
                "input_text",
                len(text),
            )
        if self.side is None:
            return text
        return text[-most:] if self.side == "left" else text[:most]

    def tokens(self, tokens: list[int], *, from_text: bool) -> list[int]:
        """The prompt tokens, after truncation. Raises `ApiError` if they exceed the context.

        vLLM stops tokenising text one token past the limit, so its message has no higher count.
        """
        keep = self.truncate
        if keep == -1:
            keep = self.max_model_len - (1 if self.output else 0)
        if keep is not None and keep < len(tokens):
            return tokens[:keep] if self.side == "right" else tokens[len(tokens) - keep :]
        if len(tokens) > self.max_model_len:
            counted = min(len(tokens), self.max_model_len + 1) if from_text else len(tokens)
            least = "at least " if counted == self.max_model_len + 1 else ""
            raise parameter_error(
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains "
                f"{least}{counted} input tokens, which exceeds this limit even without any output tokens. Please "
                "reduce the length of the input prompt.",
                "input_tokens",
                counted,
            )
        return tokens

    def room(self, prompt_tokens: int) -> int:
        """Tokens that an answer may have. vLLM reduces a larger number to what the context leaves."""
        left = self.max_model_len - prompt_tokens
        return left if self.output is None else min(left, self.output)


def completion_prompts(
    prompt: Any, bounds: Bounds, tokenizer: Tokenizer, *, add_special_tokens: bool = True
) -> list[list[int]]:
    """Token ids of each prompt of a completion request. Raises `ApiError`.

    Empty prompts and unknown token ids are not checked here, because in vLLM the engine refuses them.
    """
    if not prompt:
        raise ApiError(400, "You must pass at least one prompt")
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    found = []
    for one in prompts:
        if isinstance(one, str):
            ids = encode(bounds.text(one, tokenizer), tokenizer, add_special_tokens=add_special_tokens)
            found.append(bounds.tokens(ids, from_text=True))
        else:
            found.append(bounds.tokens(one, from_text=False))
    return found


def conversation(
    fields: Mapping[str, Any], bounds: Bounds, tokenizer: Tokenizer, check: Callable[[Sequence[Any]], None]
) -> list[int]:
    """Token ids of a chat request's fields, whose messages `check` checks first. Raises `ApiError`."""
    if (forwarded := _forwarded(fields, tokenizer)) is not None:
        return forwarded
    messages = fields.get("messages")
    if not messages:
        raise ApiError(400, "Cannot apply chat template to an empty conversation. Provide at least one message.")
    check(messages)
    try:
        text = bounds.text(tokenizer.render_chat(fields), tokenizer)
        special = fields.get("add_special_tokens", False)
        if special and bounds.truncate is not None:
            return chat_request_prompt(fields, tokenizer, bounds.max_model_len)
        return bounds.tokens(encode(text, tokenizer, add_special_tokens=special), from_text=True)
    except ChatRequestError as error:
        raise ApiError(400, sanitized(error.reason)) from None
    except PromptError as error:
        raise ApiError(400, sanitized(str(error))) from None


def image_conversation(
    fields: Mapping[str, Any],
    bounds: Bounds,
    tokenizer: Tokenizer,
    check: Callable[[Sequence[Any]], None],
    rule: ImageRule,
) -> ImagePrompt:
    """The prompt of a chat request with images. `check` checks what else its messages hold. Raises `ApiError`."""
    messages = fields["messages"]
    check([_without_images(message) for message in messages])
    for part in image_parts(messages):
        if identifier(part, rule) is None:
            raise ApiError(
                400, "An image is a data URL in base64, or has a uuid: the emulated worker fetches no others."
            )
    try:
        read = image_request_prompt(fields, tokenizer, rule)
    except PromptError as error:
        raise ApiError(400, sanitized(str(error))) from None
    if len(read.images) != sum(1 for _ in image_parts(messages)):
        raise ApiError(400, "The prompt has placeholders of images that it does not have.")
    bounds.tokens(read.tokens, from_text=True)
    return read


def _without_images(message: Any) -> Any:
    content = message.get("content") if isinstance(message, dict) else None
    if message.get("role") != "user" or not isinstance(content, list):
        return message
    return {**message, "content": [part for part in content if not is_image(part)]}


def _forwarded(fields: Mapping[str, Any], tokenizer: Tokenizer) -> list[int] | None:
    """Token ids of the prompt that another engine has sent along. They override the messages. Raises `ApiError`."""
    transfer = fields.get("kv_transfer_params")
    ids = transfer.get("prompt_token_ids") if isinstance(transfer, Mapping) else None
    if ids is None or fields.get("echo"):
        return None
    name = "kv_transfer_params.prompt_token_ids"
    if not isinstance(ids, list) or not ids or any(type(token) is not int or token < 0 for token in ids):
        raise parameter_error(
            "`kv_transfer_params['prompt_token_ids']` must be a non-empty list of non-negative integers.", name
        )
    if (highest := max(ids)) >= tokenizer.vocab_size:
        raise parameter_error(f"Token id {highest} is out of vocabulary", name)
    return ids


def encode(text: str, tokenizer: Tokenizer, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a text. Raises `ApiError`."""
    try:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except TokenizerError:
        raise ApiError(400, _NOT_UNICODE) from None


def check_prompt(tokens: Sequence[int], max_model_len: int, tokenizer: Tokenizer) -> None:
    """Raises `ApiError` for a prompt that the engine refuses."""
    if not tokens:
        raise ApiError(400, "The decoder prompt cannot be empty")
    if len(tokens) == max_model_len:
        raise ApiError(
            400,
            f"The decoder prompt (length {len(tokens)}) plus the number of requested output tokens (at least 1) is "
            f"longer than the maximum model length of {max_model_len}. Make sure that `max_model_len` is no smaller "
            "than the number of text tokens (prompt + requested output tokens).",
        )
    if (highest := max(tokens)) >= tokenizer.vocab_size:
        raise ApiError(400, f"Token id {highest} is out of vocabulary")


def check_multimodal(request: Any) -> None:
    """Raises `ApiError` for processor arguments, which vLLM takes only from trusted clients."""
    for name, what in (
        ("mm_processor_kwargs", "multimodal preprocessing"),
        ("media_io_kwargs", "multimodal media loading"),
    ):
        if getattr(request, name, None):
            raise parameter_error(
                f"Per-request {name} are disabled by default because they can change {what} resource usage. Start the "
                "server with --trust-request-mm-kwargs only when clients are trusted.",
                name,
            )


def check_template(request: Any) -> None:
    """Raises `ApiError` for a chat template in the request."""
    arguments = request.chat_template_kwargs
    if getattr(request, "chat_template", None) is not None or (
        arguments and arguments.get("chat_template") is not None
    ):
        raise ApiError(400, UNTRUSTED_TEMPLATE)
