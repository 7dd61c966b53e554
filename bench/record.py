"""One record for each request of a run, whether it was sent to a live endpoint or played in a simulation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import orjson

HIT_SHARE = 0.5
"""A request counts as a hit if at least this share of its prompt was cached. One cached token is not enough: with a
system prompt that all requests share, every request would be a hit."""

CONTEXT_MESSAGES = ("maximum context length", "max_model_len")
"""One of these is in the refusal of a prompt that is too long, by vLLM and by engines that follow its words."""


class RecordError(ValueError):
    """A file of records cannot be read; the message names the file and what is wrong."""


class ErrorCause(StrEnum):
    """Why a request was not answered in full. Live runs and simulations share the causes, so they can be compared."""

    PROMPT_TOO_LONG = "prompt_too_long"
    """Refused: the prompt does not fit into the engine's context (HTTP 400)."""
    INVALID = "invalid"
    """Refused for another reason that lies in the request (any other HTTP 4xx)."""
    OVERLOADED = "overloaded"
    """Refused because the server has too much to do (HTTP 429)."""
    UNAVAILABLE = "unavailable"
    """There was no worker to send it to (HTTP 503)."""
    SERVER_ERROR = "server_error"
    """Any other status that is not 200."""
    CONNECTION = "connection"
    """The connection failed, before the answer or in it."""
    TIMEOUT = "timeout"
    """The answer was not complete in time."""
    BROKEN_STREAM = "broken_stream"
    """The answer began and did not end well: it was cut off, aborted, or an error event ended it."""
    EMPTY = "empty"
    """A complete answer without content."""


def cause_of_status(status: int, message: str) -> ErrorCause:
    """The cause of an answer with another status than 200. `message`: the error's own words; empty without any."""
    if status == 429:
        return ErrorCause.OVERLOADED
    if status == 503:
        return ErrorCause.UNAVAILABLE
    if not 400 <= status < 500:
        return ErrorCause.SERVER_ERROR
    too_long = any(words in message for words in CONTEXT_MESSAGES)
    return ErrorCause.PROMPT_TOO_LONG if too_long else ErrorCause.INVALID


@dataclass(frozen=True, slots=True)
class Record:
    """One request, as its sender observed it. Times are emulated seconds since the start of the run."""

    index: int
    """Position in the workload."""
    scheduled: float
    sent: float
    first_token: float | None = None
    """When the first data event with content arrived."""
    finished: float | None = None
    """When the stream ended."""
    worker: str = ""
    """Empty: the answer names none."""
    reason: str = ""
    """Why the router chose that worker."""
    matched_blocks: int | None = None
    """Blocks of the prompt that the router expected in that worker's cache."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    error: ErrorCause | None = None
    """None: the request was answered in full."""
    detail: str = ""
    """What went wrong, in a few words that can be counted; empty without an error."""

    @property
    def ttft(self) -> float | None:
        """Seconds from sending to the first token."""
        return None if self.first_token is None else self.first_token - self.sent

    @property
    def latency(self) -> float | None:
        """Seconds from sending to the end of the answer."""
        return None if self.finished is None else self.finished - self.sent

    @property
    def tpot(self) -> float | None:
        """Mean seconds between two tokens of the answer; None for fewer than two tokens."""
        if self.first_token is None or self.finished is None or not self.output_tokens or self.output_tokens < 2:
            return None
        return (self.finished - self.first_token) / (self.output_tokens - 1)

    @property
    def hit(self) -> bool | None:
        """Whether the cache held `HIT_SHARE` of the prompt; None: the server does not say."""
        if self.cached_tokens is None or not self.prompt_tokens:
            return None
        return self.cached_tokens >= HIT_SHARE * self.prompt_tokens


def write_records(file: Path, records: Iterable[Record]) -> None:
    """Write one line of JSON for each request."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as lines:
        for record in records:
            lines.write(orjson.dumps(asdict(record), option=orjson.OPT_APPEND_NEWLINE))


def _parsed(fields: dict[str, Any]) -> Record:
    error = fields.pop("error", None)
    return Record(**fields, error=None if error is None else ErrorCause(error))


def read_records(file: Path) -> list[Record]:
    """Inverse of `write_records`. Raises `RecordError`."""
    records = []
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    records.append(_parsed(orjson.loads(line)))
                except (orjson.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
                    raise RecordError(f"{file}, line {number}: not a record of a request: {error}") from None
    except OSError as error:
        raise RecordError(f"cannot read {file}: {error.strerror}") from error
    return records
