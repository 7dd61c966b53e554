"""What settings have in common: those of every process, and those of every process that reads chat requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as SourceError

if TYPE_CHECKING:
    from kvcache.chat.request import ChatOptions


class SettingsError(ValueError):
    """A setting is missing, unknown or contradicts another; the message says which and what to do."""


class ProcessSettings(BaseSettings):
    """Kebab-case flags override environment variables, whose prefix and program name a subclass adds."""

    model_config = SettingsConfigDict(
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        extra="ignore",
        frozen=True,
        populate_by_name=True,
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe level to log")
    log_format: Literal["kv", "json"] = Field("kv", description="one key=value line or one JSON object per event")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment, behind what is passed; the files that pydantic would look through besides are not used."""
        return init_settings, env_settings

    @classmethod
    def load(cls, argv: Sequence[str]) -> Self:
        """Settings from the environment and `argv` (without the program's name). Raises `SettingsError`."""
        try:
            return cls(_cli_parse_args=list(argv))  # type: ignore[call-arg]
        except ValidationError as error:
            raise SettingsError("; ".join(_explain(detail) for detail in error.errors())) from None
        except SourceError as error:
            raise SettingsError(f"{error}: {error.__cause__}") from None


class ChatSettings(ProcessSettings):
    """How the engine renders chats: the same flags, by the same names, as vLLM's command line has."""

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
    anthropic_disabled_thinking_effort: Literal["auto", "none", "low", "medium", "high", "xhigh", "max"] = Field(
        "auto", description="what disabled thinking is rendered as in /v1/messages (vLLM: the same flag)"
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
        # Not above: the controller has settings too, and reads no chats.
        from kvcache.chat.request import ChatOptions
        from kvcache.tokens.backend import TokenizerError

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
            anthropic_disabled_thinking_effort=self.anthropic_disabled_thinking_effort,
            trust_request_chat_template=self.trust_request_chat_template,
        )


def split_list(value: Any) -> list[str]:
    """A flag that may be repeated, and whose values may hold several, separated by commas."""
    parts = [value] if isinstance(value, str) else value
    return [item.strip() for part in parts for item in str(part).split(",") if item.strip()]


def _explain(detail: Any) -> str:
    where = "--" + ".".join(part for part in detail["loc"] if isinstance(part, str)).replace("_", "-")
    return f"{where}: {detail['msg']}, not {detail['input']!r:.80}"
