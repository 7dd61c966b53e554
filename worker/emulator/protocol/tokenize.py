"""The bodies of POST /tokenize and POST /detokenize."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, model_validator

from worker.emulator.protocol.base import INT64_MAX, DeferredModel, UnionMember
from worker.emulator.protocol.chat import ToolParam, check_generation_prompt, prompt_fields
from worker.emulator.protocol.messages import ChatMessage


class TokenizeCompletionRequest(UnionMember):
    """Text to tokenise."""

    model_config = ConfigDict(defer_build=True)

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


_PROMPT_FIELDS = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "chat_template",
    "chat_template_kwargs",
)


class TokenizeChatRequest(UnionMember):
    """A conversation to render and tokenise."""

    model_config = ConfigDict(defer_build=True)

    model: str | None = None
    messages: list[ChatMessage]
    add_generation_prompt: bool = True
    return_token_strs: bool | None = False
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, dict[str, Any]] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    tools: list[ToolParam] | None = None

    def prompt_fields(self) -> dict[str, Any]:
        """The fields that determine the prompt, as `kvcache.chat.request` reads them."""
        return prompt_fields(self, _PROMPT_FIELDS)

    @model_validator(mode="before")
    @classmethod
    def _check(cls, data: Any) -> Any:
        if isinstance(data, dict):
            check_generation_prompt(data)
        return data


TOKENIZE_REQUEST: TypeAdapter[TokenizeCompletionRequest | TokenizeChatRequest] = TypeAdapter(
    TokenizeCompletionRequest | TokenizeChatRequest, config=ConfigDict(defer_build=True)
)


class DetokenizeRequest(DeferredModel):
    """Token ids to convert to text."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, le=INT64_MAX)]]
