"""Chat messages of the OpenAI API, by role. The names are OpenAI's and vLLM's: they appear in error messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Required

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from typing_extensions import TypedDict  # pydantic takes that of `typing` only from Python 3.12 on

from kvcache.errors import ApiError, parameter_error
from worker.emulator.protocol.validation import sanitized


class PromptCacheBreakpoint(TypedDict, total=False):
    mode: Required[Literal["explicit"]]
    ttl: Literal["30m", "12h"]


class ChatCompletionContentPartTextParam(TypedDict, total=False):
    text: Required[str]
    type: Required[Literal["text"]]
    prompt_cache_breakpoint: PromptCacheBreakpoint


class ImageURL(TypedDict, total=False):
    url: Required[str]
    detail: Literal["auto", "low", "high", "original"]


class ChatCompletionContentPartImageParam(TypedDict, total=False):
    image_url: Required[ImageURL]
    type: Required[Literal["image_url"]]
    prompt_cache_breakpoint: PromptCacheBreakpoint


class InputAudio(TypedDict, total=False):
    data: Required[str]
    format: Required[Literal["wav", "mp3"]]


class ChatCompletionContentPartInputAudioParam(TypedDict, total=False):
    input_audio: Required[InputAudio]
    type: Required[Literal["input_audio"]]
    prompt_cache_breakpoint: PromptCacheBreakpoint


class FileFile(TypedDict, total=False):
    file_data: str
    file_id: str
    filename: str


class File(TypedDict, total=False):
    file: Required[FileFile]
    type: Required[Literal["file"]]
    prompt_cache_breakpoint: PromptCacheBreakpoint


class ChatCompletionContentPartRefusalParam(TypedDict, total=False):
    refusal: Required[str]
    type: Required[Literal["refusal"]]


Part = (
    ChatCompletionContentPartTextParam
    | ChatCompletionContentPartImageParam
    | ChatCompletionContentPartInputAudioParam
    | File
)
AssistantPart = ChatCompletionContentPartTextParam | ChatCompletionContentPartRefusalParam


class Function(TypedDict, total=False):
    arguments: Required[str]
    name: Required[str]


class ChatCompletionMessageFunctionToolCallParam(TypedDict, total=False):
    id: Required[str]
    function: Required[Function]
    type: Required[Literal["function"]]


class Custom(TypedDict, total=False):
    input: Required[str]
    name: Required[str]


class ChatCompletionMessageCustomToolCallParam(TypedDict, total=False):
    id: Required[str]
    custom: Required[Custom]
    type: Required[Literal["custom"]]


ToolCall = ChatCompletionMessageFunctionToolCallParam | ChatCompletionMessageCustomToolCallParam


class ChatCompletionDeveloperMessageParam(TypedDict, total=False):
    content: Required[str | Iterable[ChatCompletionContentPartTextParam]]
    role: Required[Literal["developer"]]
    name: str


class ChatCompletionSystemMessageParam(TypedDict, total=False):
    content: Required[str | Iterable[ChatCompletionContentPartTextParam]]
    role: Required[Literal["system"]]
    name: str


class ChatCompletionUserMessageParam(TypedDict, total=False):
    content: Required[str | Iterable[Part]]
    role: Required[Literal["user"]]
    name: str


class Audio(TypedDict, total=False):
    id: Required[str]


class FunctionCall(TypedDict, total=False):
    arguments: Required[str]
    name: Required[str]


class ChatCompletionAssistantMessageParam(TypedDict, total=False):
    role: Required[Literal["assistant"]]
    audio: Audio | None
    content: str | Iterable[AssistantPart] | None
    function_call: FunctionCall | None
    name: str
    refusal: str | None
    tool_calls: Iterable[ToolCall]


class ChatCompletionToolMessageParam(TypedDict, total=False):
    content: Required[str | Iterable[ChatCompletionContentPartTextParam]]
    role: Required[Literal["tool"]]
    tool_call_id: Required[str]


class ChatCompletionFunctionMessageParam(TypedDict, total=False):
    content: Required[str | None]
    name: Required[str]
    role: Required[Literal["function"]]


class CustomChatCompletionMessageParam(TypedDict, total=False):
    """Any other role. Its meaning is up to the chat template."""

    role: Required[str]
    content: str | list[Any]
    name: str
    tool_call_id: str | None
    tool_calls: list[ChatCompletionMessageFunctionToolCallParam] | None
    reasoning: str | None
    tools: list[Any] | None
    task: str | None


class _Author(BaseModel):
    role: str
    name: str | None = None


class Message(BaseModel):
    """OpenAI's harmony form."""

    author: _Author
    content: list[dict[str, Any]] = Field(default_factory=list)
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None


_PLAIN_ROLES = frozenset({"system", "user", "assistant", "developer"})


def _keep(message: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Validate the message, but keep it as it came: a chat template may use fields that no type names, and the router
    renders messages unvalidated. The plainest messages skip the comparison with eight types."""
    if (
        type(message) is dict
        and type(role := message.get("role")) is str
        and role in _PLAIN_ROLES
        and type(message.get("content")) is str
        and len(message) == 2
    ):
        return message
    validate(message)
    return message


ChatMessage = Annotated[
    ChatCompletionDeveloperMessageParam
    | ChatCompletionSystemMessageParam
    | ChatCompletionUserMessageParam
    | ChatCompletionAssistantMessageParam
    | ChatCompletionToolMessageParam
    | ChatCompletionFunctionMessageParam
    | CustomChatCompletionMessageParam
    | Message,
    WrapValidator(_keep),
]

_LATER = ConfigDict(defer_build=True)
_TEXTS: TypeAdapter[Any] = TypeAdapter(Iterable[ChatCompletionContentPartTextParam], config=_LATER)
_PARTS: Mapping[str, TypeAdapter[Any]] = {
    "developer": _TEXTS,
    "system": _TEXTS,
    "user": TypeAdapter(Iterable[Part], config=_LATER),
    "assistant": TypeAdapter(Iterable[AssistantPart], config=_LATER),
    "tool": _TEXTS,
}
_TOOL_CALLS: TypeAdapter[Any] = TypeAdapter(Iterable[ToolCall], config=_LATER)


_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal", "thinking", "tool_reference"})
_MEDIA_PARTS = frozenset(
    {
        "audio_embeds", "audio_url", "image_embeds", "image_pil", "image_url", "input_audio", "input_image",
        "prompt_embeds", "video_embeds", "video_url",
    }
)  # fmt: skip


def check_parts(model: str, messages: Sequence[Any]) -> None:
    """Check the parts of each content of a chat request for `model`, which OpenAI's types leave unread until the prompt
    is rendered.

    Raises `ApiError`, with pydantic's message where vLLM passes it on.
    """
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        try:
            read_tool_calls([message])
            if not isinstance(content, list | dict):
                continue
            adapter = None if _fits_custom(content) else _PARTS.get(message.get("role", ""))
            for _ in () if adapter is None else adapter.validate_python(content):
                pass
        except ValidationError as error:
            raise ApiError(400, sanitized(str(error))) from None
        check_form(model, content)


def _fits_custom(content: list[Any] | dict[str, Any]) -> bool:
    """Whether pydantic takes a message for vLLM's own type instead of OpenAI's: then its parts are valid already."""
    parts = content if isinstance(content, list) else ()
    return any(isinstance(part, dict) for part in parts) and all(map(_is_custom_part, parts))


def _is_custom_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return isinstance(part, str)
    field = _CUSTOM_FIELDS.get(form) if isinstance(form := part.get("type"), str) else None
    return field is not None and isinstance(part.get(field), str)


_CUSTOM_FIELDS = {"text": "text", "refusal": "refusal", "thinking": "thinking", "tool_reference": "name"}


def check_form(model: str, content: Any) -> None:
    """Check that the parts of a content are text. Raises `ApiError`."""
    for part in content if isinstance(content, list | dict) else ():
        _check_part(part, model)


def _check_part(part: Any, model: str) -> None:
    kind = part.get("type", "text") if isinstance(part, dict) else "text"
    if kind in _MEDIA_PARTS:
        raise ApiError(400, f"{model} is not a multimodal model")
    if kind not in _TEXT_PARTS:
        supported = ", ".join(sorted(_TEXT_PARTS | _MEDIA_PARTS))
        raise parameter_error(
            f"Unsupported chat content part type: {kind!r}. Supported types: {supported}.", "type", kind
        )


def read_tool_calls(messages: Sequence[Any]) -> None:
    """Check each tool call of the assistant's messages, which are unread for the same reason. Raises pydantic's
    `ValidationError`."""
    for message in messages:
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        if calls and message.get("role") == "assistant":
            for _ in _TOOL_CALLS.validate_python(calls):
                pass


def normalise_messages(data: Mapping[str, Any]) -> None:
    """Bring messages into the form that later code reads: tool calls as lists, reasoning under one name."""
    messages = data.get("messages")
    if not isinstance(messages, list):
        return
    for message in messages:
        if not isinstance(message, dict):
            continue
        calls = message.get("tool_calls")
        if calls is not None and not isinstance(calls, list):
            message["tool_calls"] = list(calls)
        reasoning = message.pop("reasoning_content", None)
        if reasoning is not None and message.get("reasoning") is None:
            message["reasoning"] = reasoning
