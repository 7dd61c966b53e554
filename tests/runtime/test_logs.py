"""Logs: one line for each event, whatever a value holds.

Covers: both formats, masking, records of libraries. Not covered: which events a process logs (its own tests do).
"""

from __future__ import annotations

import io
import json
import logging
import shlex
from collections.abc import Iterator
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.logs import EventLogger, LogFormat, LogLevelError, configure

LOGGER = EventLogger("room.part")


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Give the root logger back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []  # pytest's own would be closed
    yield
    root.handlers, root.level = handlers, level


def lines(fmt: LogFormat, **fields: object) -> list[str]:
    stream = io.StringIO()
    configure("info", fmt, stream)
    LOGGER.info("worker_left", **fields)
    return stream.getvalue().splitlines()


def test_a_line_in_key_value_form() -> None:
    (line,) = lines("kv", url="http://127.0.0.1:8001", why="no sign of life", seconds=2.00000001, blocks=924)
    stamp, rest = line.split(" ", 1)
    assert datetime.fromisoformat(stamp).tzinfo is not None
    assert rest == (
        'info room.part worker_left url=http://127.0.0.1:8001 why="no sign of life" seconds=2 blocks=924'
    )  # fmt: skip


def test_a_line_in_json() -> None:
    (line,) = lines("json", why="a\nb", blocks=924, level="not the line's")
    content = json.loads(line)
    assert datetime.fromisoformat(content.pop("ts")).tzinfo is not None
    assert content == {
        "level": "info",
        "logger": "room.part",
        "event": "worker_left",
        "why": "a\nb",
        "blocks": 924,
        "_level": "not the line's",
    }


@given(st.text())
def test_no_value_can_forge_a_line_or_a_field(value: str) -> None:
    (line,) = lines("kv", a=value, z=1)
    assert line.isprintable()
    head, rest = line.split(" a=", 1)
    assert head.endswith(" worker_left")
    shown, _, end = rest.rpartition(" z=")
    assert end == "1"
    assert shown == value or json.loads(shown) == value
    assert len(shlex.split(shown.replace("'", ""))) <= 1
    (line,) = lines("json", a=value)
    assert json.loads(line)["a"] == value


@pytest.mark.parametrize("fmt", ["kv", "json"])
def test_credentials_and_bodies_are_masked(fmt: LogFormat) -> None:
    (line,) = lines(fmt, authorization="Bearer secret", body=b"secret", prompt="secret", messages=["secret"])
    assert "secret" not in line
    assert line.count("[masked]") == 4


def test_a_librarys_record_and_its_traceback_are_one_line() -> None:
    stream = io.StringIO()
    configure("info", "kv", stream)
    try:
        raise RuntimeError("first\nsecond")
    except RuntimeError:
        logging.getLogger("library").exception("it\nfailed: %s", "x")
    (line,) = stream.getvalue().splitlines()
    assert r'error library "it\nfailed: x" traceback="Traceback' in line


def test_below_the_level_nothing_is_written() -> None:
    stream = io.StringIO()
    configure("warning", "kv", stream)
    LOGGER.info("quiet")
    assert stream.getvalue() == ""


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(LogLevelError, match="use one of: debug, info"):
        configure("loud")
