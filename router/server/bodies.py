"""What a request's body says besides its prompt: the model, and whether it streams. Exact, or nothing is said.

A body that is too long to be parsed shows its fields at its ends, where clients write all but the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import chain, islice
from typing import Any, NamedTuple

import orjson

SCANNED = 65_536
"""Bytes at the beginning and at the end of a body that `scan` looks at."""
PARSED = 16_384
"""Bytes up to which `model_of` parses a body: 10 µs."""

_MODEL = re.compile(rb'"model"\s*:\s*("(?:[^"\\]|\\.){0,512}")')
_TRIED = 4
"""Fields of this name at each end that `scan` looks at: those of objects within the body count for nothing."""
_STREAM = re.compile(rb'"stream"\s*:\s*true\b')
_FORM_MODEL = re.compile(
    rb'\r\ncontent-disposition: *form-data; *name="?model"?\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,512})\r\n--',
    re.IGNORECASE,
)
"""The field `model` of a multipart form (RFC 7578)."""
_HUGE = re.compile(rb"\d{19}")


class Scanned(NamedTuple):
    """What the ends of a body show."""

    model: str | None
    streaming: bool


def parse(body: bytes, exact: frozenset[str] = frozenset()) -> dict[str, Any] | None:
    """The object in a JSON body, None if it is none. Whole numbers of more than 64 bits are read exactly only if it has
    one of the fields `exact`, which the parser that vLLM's server uses reads exactly at a tenth of the speed."""
    try:
        try:
            fields = orjson.loads(body)
            again = isinstance(fields, dict) and not exact.isdisjoint(fields) and _HUGE.search(body) is not None
        except orjson.JSONDecodeError:
            again = True
        if again:
            # vLLM's server reads with this module, which does not round whole numbers of more than 64 bits, and accepts
            # NaN, lone surrogates, a byte order mark, UTF-16 and UTF-32.
            fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def scan(body: bytes) -> Scanned:
    """The model and whether the answer is streamed, if the first or last bytes of a JSON body show them."""
    head, tail = body[:SCANNED], body[-SCANNED:]
    # What stands between a field of the body's object itself and the object's end, or beginning, is an object too.
    ends = (_field(b"{" + tail[found.start() :]) for found in [*_MODEL.finditer(tail)][: -_TRIED - 1 : -1])
    begins = (_field(head[: found.end()] + b"}") for found in islice(_MODEL.finditer(head), _TRIED))
    name = next((name for name in chain(ends, begins) if name is not None), None)
    return Scanned(name, any(_STREAM.search(part) is not None for part in (head, tail)))


def model_of(body: bytes) -> str | None:
    """The `model` of any API's request: a JSON object, or a form in parts. None if it states none."""
    if body.startswith(b"--"):
        found = _FORM_MODEL.search(body[:SCANNED]) or _FORM_MODEL.search(body[-SCANNED:])
        return found[1].decode(errors="replace") if found else None
    if len(body) > PARSED:
        return scan(body).model
    return None if (fields := parse(body)) is None else model(fields)


def model(fields: Mapping[str, Any]) -> str | None:
    """The `model` of a parsed body."""
    name = fields.get("model")
    return name if isinstance(name, str) else None


def _field(text: bytes) -> str | None:
    try:
        fields = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return model(fields) if isinstance(fields, dict) else None
