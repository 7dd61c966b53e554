"""What a router says of itself at `GET /status` on its management port."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson


class ReportError(ValueError):
    """A router gave no report; the message says why, or which field of it is wrong and how."""


@dataclass(frozen=True, slots=True)
class RecentDecision:
    """One decision a router took lately."""

    age_seconds: float
    worker_id: str
    reason: str
    matched_blocks: int = 0
    prompt_blocks: int | None = None
    """None where the prompt was not tokenised."""
    predicted_ttft_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class DiscoveryReport:
    """Where the router's list of workers comes from, and whether it is still told of changes."""

    source: str = ""
    """`kubernetes`, `static` or `file`."""
    healthy: bool = True
    age_seconds: float | None = None
    """Since the list was last known to be right."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class TokenizerReport:
    """Whether the router can read prompts: without its tokenizer it routes by load."""

    state: str = ""
    """`loading`, `loaded` or `failed`; empty from a router that does not say."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class RouterReport:
    """One router's word on itself, as of the moment it was asked. Counts are since its start."""

    strategy: str
    draining: bool
    workers_known: int
    workers_ready: int
    workers_matching: int
    """Workers whose cache prompts are matched against."""
    view_age_seconds: float | None = None
    """Age of the oldest view among ready workers; None without a view."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt tokens, those that the workers say came from their caches."""
    decisions: Mapping[str, int] = field(default_factory=dict)
    """Count of decisions by reason."""
    recent: tuple[RecentDecision, ...] = ()
    """The last decisions, newest first."""
    discovery: DiscoveryReport = field(default_factory=DiscoveryReport)
    tokenizer: TokenizerReport = field(default_factory=TokenizerReport)
    reuse_score: Mapping[str, float] = field(default_factory=dict)
    """By worker id: blocks reused there, decayed."""


def parse_report(body: bytes) -> RouterReport:
    """The report in an answer's body. Raises `ReportError`.

    What the status of a cluster rests on must be there with the right type; of the rest what is missing is empty, and
    fields of a newer router are passed over.
    """
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ReportError(f"it is not JSON: {error}") from None
    reader = _Reader(content, "")
    workers = reader.child("workers", required=True)
    return RouterReport(
        strategy=reader.text("strategy", required=True),
        draining=reader.flag("draining", default=False),
        workers_known=workers.count("known", required=True),
        workers_ready=workers.count("ready", required=True),
        workers_matching=workers.count("matching", required=True),
        view_age_seconds=reader.number("view_age_seconds"),
        prompt_tokens=reader.count("prompt_tokens"),
        cached_tokens=min(reader.count("cached_tokens"), reader.count("prompt_tokens")),
        decisions=reader.child("decisions").counts(),
        recent=tuple(_recent(item) for item in reader.children("recent")),
        discovery=_discovery(reader.child("discovery")),
        tokenizer=_tokenizer(reader.child("tokenizer")),
        reuse_score=reader.child("reuse_score").numbers(),
    )


def _recent(item: _Reader) -> RecentDecision:
    return RecentDecision(
        age_seconds=item.number("age_seconds") or 0.0,
        worker_id=item.text("worker_id", required=True),
        reason=item.text("reason", required=True),
        matched_blocks=item.count("matched_blocks"),
        prompt_blocks=item.optional_count("prompt_blocks"),
        predicted_ttft_seconds=item.number("predicted_ttft_seconds"),
    )


def _discovery(item: _Reader) -> DiscoveryReport:
    return DiscoveryReport(
        source=item.text("source"),
        healthy=item.flag("healthy", default=True),
        age_seconds=item.number("age_seconds"),
        error=item.text("error"),
    )


def _tokenizer(item: _Reader) -> TokenizerReport:
    return TokenizerReport(state=item.text("state"), error=item.text("error"))


class _Reader:
    """Reads the fields of one JSON object; a field of the wrong type is named with its path."""

    def __init__(self, content: Any, path: str) -> None:
        if type(content) is not dict:
            raise ReportError(f"{path or 'the report'} must be an object, not {_shown(content)}")
        self._content: dict[str, Any] = content
        self._path = path

    def _get(self, name: str, required: bool) -> Any:
        value = self._content.get(name)
        if value is None and required:
            raise ReportError(f"{self._named(name)} is missing")
        return value

    def _named(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def _wrong(self, name: str, expected: str) -> ReportError:
        return ReportError(f"{self._named(name)} must be {expected}, not {_shown(self._content[name])}")

    def child(self, name: str, *, required: bool = False) -> _Reader:
        value = self._get(name, required)
        return _Reader({} if value is None else value, self._named(name))

    def children(self, name: str) -> list[_Reader]:
        value = self._get(name, False)
        if value is None:
            return []
        if type(value) is not list:
            raise self._wrong(name, "a list")
        return [_Reader(item, f"{self._named(name)}[{index}]") for index, item in enumerate(value)]

    def counts(self) -> dict[str, int]:
        return {name: self.count(name) for name in self._content}

    def numbers(self) -> dict[str, float]:
        return {name: self.number(name) or 0.0 for name in self._content}

    def text(self, name: str, *, required: bool = False) -> str:
        value = self._get(name, required)
        if value is None:
            return ""
        if type(value) is not str:
            raise self._wrong(name, "a string")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        value = self._get(name, False)
        if value is None:
            return default
        if type(value) is not bool:
            raise self._wrong(name, "true or false")
        return value

    def number(self, name: str) -> float | None:
        value = self._get(name, False)
        if value is None:
            return None
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
            raise self._wrong(name, "a number of 0 or more")
        return float(value)

    def optional_count(self, name: str) -> int | None:
        return None if self._get(name, False) is None else self.count(name)

    def count(self, name: str, *, required: bool = False) -> int:
        value = self._get(name, required)
        if value is None:
            return 0
        # A count kept as a float (a Prometheus counter is one) is a count all the same.
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or value < 0:
            raise self._wrong(name, "a whole number of 0 or more")
        return value


def _shown(value: Any) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."
