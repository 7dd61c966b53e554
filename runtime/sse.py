"""Server-sent events (WHATWG HTML, 9.2): the one place that knows how a stream is cut into events and fields.

`SseReader` gives whole events. The functions work on bytes as they came, for the router, which passes an answer on
without taking it apart, and for the load generator, which looks into the first and the last events only. An event ends
with an empty line in LF or CRLF; one that ends in lone CRs, which no engine sends, is not seen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

EMPTY_LINE = re.compile(rb"\n\r?\n")
"""Ends an event (the first line break is that of the event's last line)."""


def complete_events(data: bytes) -> int:
    """How many bytes of `data` are whole events; each ends with an empty line."""
    if data.endswith(b"\n\n"):
        return len(data)
    plain, crlf = data.rfind(b"\n\n"), data.rfind(b"\n\r\n")
    return max(plain + 2 if plain >= 0 else 0, crlf + 3 if crlf >= 0 else 0)


def first_event(data: bytes, start: int) -> int:
    """Bytes of the event that begins at `start`, its empty line included; 0 while it is not complete."""
    plain, crlf = data.find(b"\n\n", start), data.find(b"\n\r\n", start)
    ends = [end for end in (plain + 2 if plain >= 0 else 0, crlf + 3 if crlf >= 0 else 0) if end]
    return min(ends) - start if ends else 0


def event_data(event: bytes) -> bytes:
    """The data lines of one event, joined; empty without any."""
    return b"\n".join([line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")])


def is_comment(event: bytes) -> bool:
    """Whether nothing in the event is a field."""
    return all(not line or line.startswith(b":") for line in event.splitlines())


class EventTooLargeError(ValueError):
    """An event takes more bytes than a reader allows."""


@dataclass(frozen=True, slots=True)
class SseEvent:
    """One event: its `event` field ("message" without one) and its data lines, joined."""

    name: str
    data: bytes


class SseReader:
    """Bytes in, whole events out. Raises `EventTooLargeError` rather than keeping more than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rest = b""

    def feed(self, piece: bytes) -> list[SseEvent]:
        """Events that are complete with `piece`, which need not end where an event ends."""
        data = self._rest + piece
        size = complete_events(data)
        blocks, rest = EMPTY_LINE.split(data[:size]), data[size:]
        if max(map(len, blocks)) > self._limit or len(rest) > self._limit:
            raise EventTooLargeError(f"an event takes more than {self._limit} bytes")
        self._rest = rest
        return [event for block in blocks if (event := _parse(block)) is not None]


def _parse(block: bytes) -> SseEvent | None:
    name = None
    for line in block.splitlines():
        if line.startswith(b"event:"):
            name = line[6:].removeprefix(b" ").decode("utf-8", "replace")
    data = event_data(block)
    return SseEvent(name or "message", data) if data or name else None
