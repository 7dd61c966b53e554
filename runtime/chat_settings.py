"""Settings that say how the engine renders chats: the same flags, by the same names, as vLLM's command line has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from kvcache.chat.request import ChatOptions
from kvcache.tokens.backend import TokenizerError
from runtime.settings import ProcessSettings


class ChatSettings(ProcessSettings):
    """For the processes that read chat requests."""

    chat_template: Path | None = Field(
        None, description="file with the chat template that the engine was given (vLLM: --chat-template)"
    )
    chat_template_content_format: Literal["auto", "string", "openai"] = Field(
        "auto", description="how the engine hands content to the template (vLLM: the same flag)"
    )
    default_chat_template_kwargs: str = Field(
        "{}", description="JSON object of variables that the engine gives to every template (vLLM: the same flag)"
    )
    exclude_tools_when_tool_choice_none: bool = Field(
        False, description="the engine leaves tools out when tool_choice is none (vLLM: the same flag)"
    )
    trust_request_chat_template: bool = Field(
        False, description="render templates that requests bring along, as the engine does (vLLM: the same flag)"
    )

    @field_validator("default_chat_template_kwargs")
    @classmethod
    def _json_object(cls, value: str) -> str:
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise ValueError('a JSON object is needed, such as {"enable_thinking": false}')
        return value

    def chat_options(self) -> ChatOptions:
        """Reads the template's file. Raises `TokenizerError` when it cannot be read."""
        template = None
        if self.chat_template is not None:
            try:
                template = self.chat_template.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise TokenizerError(f"the chat template cannot be read: {error}") from None
        return ChatOptions(
            chat_template=template,
            chat_template_content_format=self.chat_template_content_format,
            default_chat_template_kwargs=json.loads(self.default_chat_template_kwargs),
            exclude_tools_when_tool_choice_none=self.exclude_tools_when_tool_choice_none,
            trust_request_chat_template=self.trust_request_chat_template,
        )
