"""A trace of hashed blocks from a router's access log: who shared which prefixes, when, and how long the answers were.

Input are the lines of the access log as objects (`--access-log json --access-log-blocks`, or the events of
`GET /requests/events?blocks=1`). Output is Mooncake's JSON lines, which `bench`, `compare`, `simulate` and `plan`
replay with `--trace`: `timestamp` (milliseconds since the first arrival), `input_length`, `output_length`, `hash_ids`
(one for each full block), and `block_size`, `session`.

Nothing of a text is in either. Digests and sessions are numbered anew from 0 in the order of arrival, so a trace does
not even hold the digests: who has it learns what was shared, when, and how long it was.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import orjson


class RecordingError(ValueError):
    """A line is none of an access log, or a trace cannot be written. The message says what to do."""


class LeftOut(StrEnum):
    """Why a request is not in the trace."""

    NOT_A_PROMPT = "no prompt"
    """A request for the list of models, say."""
    FAILED = "not answered"
    """It was refused, or its answer broke off: there is nothing to replay."""
    NO_USAGE = "its answer states no length"
    """The engine reports no usage: for a stream the client has to ask for it (`stream_options.include_usage`)."""


@dataclass(frozen=True, slots=True)
class _Row:
    """Where a row lies in the spool."""

    at: float
    offset: int
    size: int


@dataclass(slots=True)
class TraceRecorder:
    """Takes the requests in the order in which they end, and writes them in the order in which they came.

    Until `finish` they lie in a file beside the trace; in memory there is a number for each request and for each
    distinct block.
    """

    file: Path
    written: int = 0
    left_out: Counter[LeftOut] = field(default_factory=Counter)
    unread: int = 0
    """Requests in the trace whose blocks are not known: their prompts share nothing there."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """As the engines reported it, of the requests in the trace."""
    _spool: BinaryIO | None = None
    _rows: list[_Row] = field(default_factory=list)
    _ids: dict[str, int] = field(default_factory=dict)
    _sessions: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> Self:
        try:
            self._spool = self._part.open("w+b")
        except OSError as error:
            raise RecordingError(f"cannot write {self._part}: {error.strerror}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._spool is not None:
            self._spool.close()
        self._part.unlink(missing_ok=True)

    @property
    def _open_spool(self) -> BinaryIO:
        if self._spool is None:
            raise RecordingError("use the recorder as a context manager")
        return self._spool

    @property
    def _part(self) -> Path:
        return self.file.with_name(f"{self.file.name}.part")

    @property
    def hit_rate(self) -> float | None:
        """Cached over all prompt tokens, as the engines reported; None without a request."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None

    def add(self, line: Mapping[str, Any], place: str = "a router's event") -> bool:
        """A request is over. Returns whether it becomes part of the trace. Raises `RecordingError` for a line that no
        router writes, which names `place` and the field."""
        spool = self._open_spool
        try:
            reason = _why_not(line)
            if reason is not None:
                self.left_out[reason] += 1
                return False
            at, cached, row = _number(line, "at"), _count(line, "cached_tokens"), self._row(line)
        except _FieldError as error:
            raise RecordingError(f"{place}: not a request of an access log: {error}") from None
        data = orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
        self._rows.append(_Row(at, spool.tell(), len(data)))
        spool.write(data)
        self.written += 1
        self.prompt_tokens += row["input_length"]
        self.cached_tokens += cached
        return True

    def _row(self, line: Mapping[str, Any]) -> dict[str, Any]:
        length = _whole(line, "prompt_tokens")
        row: dict[str, Any] = {"input_length": length, "output_length": _whole(line, "output_tokens")}
        digests = line.get("block_hashes")
        if digests is None:
            self.unread += 1
        else:
            size = _whole(line, "block_size")
            if not isinstance(digests, list) or not all(isinstance(each, str) for each in digests):
                raise _FieldError("block_hashes is no list of digests")
            if length // size != len(digests):
                raise _FieldError(f"{len(digests)} block_hashes of {size} tokens for {length} prompt_tokens")
            ids = self._ids
            row["block_size"] = size
            row["hash_ids"] = [ids.setdefault(digest, len(ids)) for digest in digests]
        if line.get("session") is not None:
            row["session"] = self._sessions.setdefault(str(line["session"]), len(self._sessions))
        return row

    def finish(self) -> None:
        """Write the trace. Raises `RecordingError` if there is nothing to write or no block is known."""
        if not self._rows:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())
            raise RecordingError(f"no request was recorded{f' ({reasons})' if reasons else ''}; nothing is written")
        if self.unread == self.written:
            raise RecordingError(
                "no line names the blocks of its prompt: start the router with --access-log-blocks, or record from its "
                "URL; nothing is written"
            )
        rows = sorted(self._rows, key=lambda row: row.at)
        try:
            with self.file.open("wb") as out:
                for row in self._ordered(rows):
                    out.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        except OSError as error:
            raise RecordingError(f"cannot write {self.file}: {error.strerror}") from None

    def _ordered(self, rows: list[_Row]) -> Iterator[dict[str, Any]]:
        """The rows, with ids in the order of arrival. A prompt whose blocks are not known gets ids of its own."""
        start = rows[0].at
        block_size = next(row["block_size"] for row in map(self._read, rows) if "block_size" in row)
        renumbered, sessions = array("q", [-1]) * len(self._ids), array("q", [-1]) * len(self._sessions)
        blocks = named = 0
        for place in rows:
            row = self._read(place)
            ids = row.get("hash_ids")
            if ids is None:
                row["block_size"] = block_size
                count = row["input_length"] // block_size
                row["hash_ids"] = list(range(blocks, blocks + count))
                blocks += count
            else:
                for place_in_row, each in enumerate(ids):
                    if renumbered[each] < 0:
                        renumbered[each] = blocks
                        blocks += 1
                    ids[place_in_row] = renumbered[each]
            if "session" in row:
                if sessions[row["session"]] < 0:
                    sessions[row["session"]] = named
                    named += 1
                row["session"] = str(sessions[row["session"]])
            yield {"timestamp": round((place.at - start) * 1000, 3), **row}

    def _read(self, row: _Row) -> dict[str, Any]:
        spool = self._open_spool
        spool.seek(row.offset)
        read: dict[str, Any] = orjson.loads(spool.read(row.size))
        return read


class _FieldError(ValueError):
    """A field of a line is missing or wrong. The message names it."""


def _field(line: Mapping[str, Any], name: str) -> Any:
    if name not in line:
        raise _FieldError(f"it has no field {name}")
    return line[name]


def _number(line: Mapping[str, Any], name: str) -> float:
    value = _field(line, name)
    if type(value) not in (int, float):
        raise _FieldError(f"{name} is {value!r:.40}, no number")
    return float(value)


def _whole(line: Mapping[str, Any], name: str) -> int:
    value = _field(line, name)
    if type(value) is not int or value < 1:
        raise _FieldError(f"{name} is {value!r:.40}, no whole number above 0")
    return value


def _count(line: Mapping[str, Any], name: str) -> int:
    """A whole number, 0 where there is none."""
    value = line.get(name) or 0
    if type(value) is not int or value < 0:
        raise _FieldError(f"{name} is {value!r:.40}, no count")
    return value


def _why_not(line: Mapping[str, Any]) -> LeftOut | None:
    """Why a request is left out; None: it is not."""
    if "prompt_blocks" not in line and "prompt_tokens" not in line:
        return LeftOut.NOT_A_PROMPT if _field(line, "status") == 200 else LeftOut.FAILED
    failures = line.get("failures") or []
    if not isinstance(failures, list):
        raise _FieldError("failures is no list")
    if _field(line, "status") != 200 or (failures and len(failures) >= _count(line, "attempts")):
        return LeftOut.FAILED
    return None if line.get("output_tokens") and line.get("prompt_tokens") else LeftOut.NO_USAGE


def access_log_lines(lines: BinaryIO, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The requests in an access log that was written as JSON, each with its place (the file `name` and its line); lines
    of other logs are passed over. Raises `RecordingError`, which names the place."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError:
            hint = (
                "; it looks like key=value: start the router with --access-log json" if b"event=request" in line else ""
            )
            raise RecordingError(f"{place}: it is not JSON{hint}") from None
        if isinstance(fields, dict) and fields.get("logger") == "router.access" and fields.get("event") == "request":
            yield place, fields
