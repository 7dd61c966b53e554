"""Structured logs: one line an event, the same fields in every process.

    2026-11-23T07:20:01.123Z info router.server worker_left url=http://127.0.0.1:8001 why="no sign of life for 2 s"

Whatever a value holds, it stays inside its field: line breaks, control characters and quotes are escaped, so a
header or a prompt can never forge a line. Bodies, prompts and credentials are not logged; a field that is
named like one is masked, should a caller slip.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partialmethod
from typing import Any, Literal, TextIO

LogFormat = Literal["kv", "json"]

LEVELS = ("debug", "info", "warning", "error", "critical")

MASKED_FIELDS = frozenset({"authorization", "api_key", "token", "cookie", "body", "prompt", "messages", "cache_salt"})
"""Field names whose values are never written."""

MASK = "[masked]"

_FIELDS = "kvcluster_fields"  # the attribute of a LogRecord that carries an event's fields
_BARE = re.compile(r"[A-Za-z0-9_.:/@%+,\-\[\]]+")  # needs no quotes; ASCII only, hence no look-alikes either


class LogLevelError(ValueError):
    """The level is not one of `LEVELS`."""


class EventLogger:
    """Writes events, each as one line with its name and fields, to the logger of this name."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)
        self.is_enabled_for = self._logger.isEnabledFor

    def log(self, level: int, name: str, /, **fields: Any) -> None:
        """Write an event. `level` is one of logging's (`logging.INFO`)."""
        if self.is_enabled_for(level):
            self._logger.log(level, name, extra={_FIELDS: fields})

    def exception(self, name: str, /, **fields: Any) -> None:
        """Write an event of an exception that is being handled, with its traceback."""
        self._logger.exception(name, extra={_FIELDS: fields})  # noqa: LOG004

    debug = partialmethod(log, logging.DEBUG)
    info = partialmethod(log, logging.INFO)
    warning = partialmethod(log, logging.WARNING)
    error = partialmethod(log, logging.ERROR)


def configure(level: str = "info", fmt: LogFormat = "kv", stream: TextIO | None = None) -> None:
    """Send the whole process's logs, those of libraries included, to `stream` (standard error by default).

    Replaces the root logger's handlers, so it can be called again. Raises `LogLevelError`.
    """
    if level not in LEVELS:
        raise LogLevelError(f"unknown log level {level!r}; use one of: {', '.join(LEVELS)}")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(formatter(fmt))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def formatter(fmt: LogFormat) -> logging.Formatter:
    """What writes records in this format."""
    return JsonFormatter() if fmt == "json" else KeyValueFormatter()


def event_record(logger: str, name: str, fields: Mapping[str, Any], at: float) -> logging.LogRecord:
    """The record of an event that happened at `at` (Unix seconds), for a handler of the caller's own."""
    record = logging.LogRecord(logger, logging.INFO, "", 0, name, None, None)
    record.created = at
    setattr(record, _FIELDS, fields)
    return record


def _timestamp(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord, formatter: logging.Formatter) -> dict[str, Any]:
    fields = {name: MASK if name in MASKED_FIELDS else value for name, value in getattr(record, _FIELDS, {}).items()}
    if record.exc_info:
        fields["traceback"] = formatter.formatException(record.exc_info)
    return fields


def _escaped(value: Any) -> str:
    """A value as one word, quoted where it holds anything but plain characters."""
    if isinstance(value, float):
        value = f"{value:.6g}"
    elif isinstance(value, list):
        value = ",".join(map(str, value))
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text)


class KeyValueFormatter(logging.Formatter):
    """`timestamp level logger event key=value ...`; the event of a library's record is its message, quoted."""

    def format(self, record: logging.LogRecord) -> str:
        words = [_timestamp(record), record.levelname.lower(), _escaped(record.name), _escaped(record.getMessage())]
        words += [f"{_escaped(name)}={_escaped(value)}" for name, value in _fields(record, self).items()]
        return " ".join(words)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts, level, logger, event, then the fields (one of the same name is prefixed `_`)."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        for name, value in _fields(record, self).items():
            line[f"_{name}" if name in line else name] = value
        return json.dumps(line, default=str)
