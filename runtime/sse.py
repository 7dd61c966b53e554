"""Reading server-sent events of a bounded size."""

from __future__ import annotations

from dataclasses import dataclass


class EventTooLargeError(ValueError):
    """An event takes more bytes than a reader allows."""


@dataclass(frozen=True, slots=True)
class SseEvent:
    """One event: its `event` and `data` fields (data lines joined)."""

    name: str
    data: bytes


class SseReader:
    """Bytes in, whole events out. Raises `EventTooLargeError` rather than keeping more than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rest = b""

    def feed(self, piece: bytes) -> list[SseEvent]:
        """Events that are complete with `piece`, which need not end where an event ends."""
        *blocks, rest = (self._rest + piece).split(b"\n\n")
        if max(map(len, blocks), default=0) > self._limit or len(rest) > self._limit:
            raise EventTooLargeError(f"an event takes more than {self._limit} bytes")
        self._rest = rest
        return [event for block in blocks if (event := _parse(block)) is not None]


def _parse(block: bytes) -> SseEvent | None:
    name, data = "message", []
    for line in block.split(b"\n"):
        key, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if key == b"event":
            name = value.decode("utf-8", "replace")
        elif key == b"data":
            data.append(value)
    return SseEvent(name, b"\n".join(data)) if data or name != "message" else None
