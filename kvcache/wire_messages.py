"""Chat messages of the OpenAI API, by role. The names are OpenAI's and vLLM's: they appear in error messages."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, Required

from pydantic import ValidatorFunctionWrapHandler, WrapValidator
from typing_extensions import TypedDict  # pydantic takes the one in `typing` from Python 3.12 on only

Content = str | list[dict[str, Any] | str]


class ChatCompletionDeveloperMessageParam(TypedDict, total=False):
    content: Required[Content]
    role: Required[Literal["developer"]]


class ChatCompletionSystemMessageParam(TypedDict, total=False):
    content: Required[Content]
    role: Required[Literal["system"]]


class ChatCompletionUserMessageParam(TypedDict, total=False):
    content: Required[Content]
    role: Required[Literal["user"]]


class ChatCompletionAssistantMessageParam(TypedDict, total=False):
    role: Required[Literal["assistant"]]
    content: Content | None


class ChatCompletionToolMessageParam(TypedDict, total=False):
    content: Required[Content]
    role: Required[Literal["tool"]]
    tool_call_id: Required[str]


class ChatCompletionFunctionMessageParam(TypedDict, total=False):
    content: Required[str | None]
    name: Required[str]
    role: Required[Literal["function"]]


class CustomChatCompletionMessageParam(TypedDict, total=False):
    """Any other role: what it means is the chat template's business."""

    role: Required[str]
    content: Content


class _Author(TypedDict):
    role: str
    name: NotRequired[str | None]


class Message(TypedDict):
    """OpenAI's harmony form."""

    author: _Author
    content: list[dict[str, Any]]


_PLAIN_ROLES = frozenset({"system", "user", "assistant", "developer"})


def _keep(message: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Validate, but keep the message as it came: a chat template may use fields that no type names, and the router
    renders the message unvalidated. The plainest messages need no look at eight types."""
    if (
        type(message) is dict
        and type(role := message.get("role")) is str
        and role in _PLAIN_ROLES
        and type(message.get("content")) is str
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
