"""What the settings of every process have in common: one typed model, read from the environment and from flags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import SettingsError as SourceError


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
    def load(cls, argv: Sequence[str]) -> Self:
        """Settings from the environment and `argv` (without the program's name). Raises `SettingsError`."""
        try:
            return cls(_cli_parse_args=list(argv))  # type: ignore[call-arg]
        except ValidationError as error:
            raise SettingsError("; ".join(_explain(detail) for detail in error.errors())) from None
        except SourceError as error:
            raise SettingsError(str(error)) from None


def split_list(value: Any) -> list[str]:
    """A flag that may be repeated, and whose values may hold several, separated by commas."""
    parts = [value] if isinstance(value, str) else value
    return [item.strip() for part in parts for item in str(part).split(",") if item.strip()]


def _explain(detail: Any) -> str:
    where = "--" + "-".join(str(part) for part in detail["loc"][:1]).replace("_", "-")
    return f"{where}: {detail['msg']}, not {detail['input']!r:.80}"
