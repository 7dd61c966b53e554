"""The formats of request traces, each read line by line into the same rows. None of them is ever held in memory.

| format | a line | where it comes from |
| --- | --- | --- |
| `mooncake` | `{"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}`, and `"block_size": n` where a hash id does not stand for 512 tokens | Mooncake (Qin et al., FAST '25), and traces that KVCluster records |
| `burstgpt` | CSV with `Timestamp` (seconds), `Request tokens`, `Response tokens`, and in later releases `Session ID` | BurstGPT (Wang et al., KDD '25) |
| `azure` | CSV with `TIMESTAMP` (date and time), `ContextTokens`, `GeneratedTokens` | Azure's public LLM inference traces of 2023 and 2024 |
| `vllm-dataset` | `{"prompt": "...", "output_tokens": n}` | `vllm bench serve --dataset-name custom` |
| `vllm-result` | one object with `start_times`, `input_lens`, `output_lens` | `vllm bench serve --save-result --save-detailed` |

A file may be compressed by gzip. Requests that failed when they were recorded (no answer, or no prompt) are skipped.
"""  # noqa: E501 - a table

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson

from bench.workloads.base import WorkloadError

TOKENS_PER_HASH = 512
"""Of Mooncake's own traces."""
MAX_LINE = 64 * 2**20
"""Bytes. A result of vLLM is one line; other lines are far shorter."""
GZIP = b"\x1f\x8b"


class TraceError(WorkloadError):
    """A line of a trace is malformed. The message names the file, the line and what is wrong."""


class TraceFormat(StrEnum):
    """See above."""

    MOONCAKE = "mooncake"
    BURSTGPT = "burstgpt"
    AZURE = "azure"
    VLLM_DATASET = "vllm-dataset"
    VLLM_RESULT = "vllm-result"


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One recorded request."""

    at: float | None
    """Seconds, of whatever clock the trace has; None: the format records no times."""
    input_length: int
    """Tokens of the prompt; 0 where `text` is the prompt."""
    output_length: int
    hash_ids: tuple[int, ...] | None = None
    """Equal ids at equal depth mean equal text; None: the format says nothing about the text."""
    tokens_per_hash: int = TOKENS_PER_HASH
    session: str = ""
    text: str | None = None


# --- fields ---


def _whole(fields: Mapping[str, Any], name: str, least: int) -> int:
    value = fields.get(name)
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number of {least} or more, not {value!r:.60}")
    return value


def _number(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not (isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a number of 0 or more, not {value!r:.60}")
    return float(value)


def _column(fields: Mapping[str, str], name: str, least: int) -> int:
    """A whole number in a CSV file, which some tools write as `12.0`."""
    text = fields.get(name) or ""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (isfinite(value) and value >= least and value == int(value)):
        raise ValueError(f"{name} must be a whole number of {least} or more, not {text!r:.60}")
    return int(value)


def _object(line: bytes) -> dict[str, Any]:
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if type(fields) is not dict:
        raise ValueError(f"a row is an object, not {type(fields).__name__}")
    return fields


# --- rows ---


def mooncake_row(fields: Mapping[str, Any]) -> TraceRow:
    """A row with hash ids. Where it states its block size, ids for the full blocks of the prompt are enough."""
    at = _number(fields, "timestamp")
    input_length = _whole(fields, "input_length", 1)
    output_length = _whole(fields, "output_length", 1)
    hash_ids = fields.get("hash_ids")
    if type(hash_ids) is not list or not all(type(each) is int and each >= 0 for each in hash_ids):
        raise ValueError(f"hash_ids must be a list of whole numbers of 0 or more, not {hash_ids!r:.60}")
    stated = "block_size" in fields
    size = _whole(fields, "block_size", 1) if stated else TOKENS_PER_HASH
    needed = -(-input_length // size)
    if len(hash_ids) != needed and not (stated and len(hash_ids) == input_length // size):
        raise ValueError(f"{input_length} input tokens take {needed} hash_ids of {size} tokens, not {len(hash_ids)}")
    return TraceRow(at / 1000, input_length, output_length, tuple(hash_ids), size)


def burstgpt_row(fields: Mapping[str, str]) -> TraceRow | None:
    """A row of BurstGPT; None: the service failed, which it records as an answer of 0 tokens."""
    text = fields.get("Timestamp") or ""
    try:
        at = float(text)
    except ValueError:
        at = -1.0
    if not (isfinite(at) and at >= 0):
        raise ValueError(f"Timestamp must be a number of seconds, not {text!r:.60}")
    asked, answered = _column(fields, "Request tokens", 0), _column(fields, "Response tokens", 0)
    if not (asked and answered):
        return None
    return TraceRow(at, asked, answered, session=(fields.get("Session ID") or "").strip())


def azure_row(fields: Mapping[str, str]) -> TraceRow | None:
    """A row of Azure's traces; None: without prompt or answer. A time without a zone, as in 2023, is read as UTC."""
    text = (fields.get("TIMESTAMP") or "").strip()
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"TIMESTAMP must be a date and time such as 2023-11-16 18:15:46.68, not {text!r:.60}"
        ) from None
    asked, answered = _column(fields, "ContextTokens", 0), _column(fields, "GeneratedTokens", 0)
    if not (asked and answered):
        return None
    return TraceRow((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp(), asked, answered)


def vllm_dataset_row(fields: Mapping[str, Any]) -> TraceRow:
    """A row of a custom dataset of `vllm bench serve`, whose prompts are text and which has no times."""
    prompt = fields.get("prompt")
    if type(prompt) is not str or not prompt:
        raise ValueError(f"prompt must be a text that is not empty, not {prompt!r:.60}")
    return TraceRow(None, 0, _whole(fields, "output_tokens", 1), text=prompt)


def vllm_result_rows(fields: Mapping[str, Any]) -> Iterator[TraceRow | None]:
    """The requests of a detailed result of `vllm bench serve` in the order in which they began; None: one that failed.

    Its times, of a clock of vLLM's own, are those at which requests were sent, not those at which they were due.
    """
    columns = []
    for name in ("start_times", "input_lens", "output_lens"):
        column = fields.get(name)
        if type(column) is not list:
            raise ValueError(f"{name} is missing; run `vllm bench serve` with --save-result and --save-detailed")
        columns.append(column)
    times, asked, answered = columns
    if not len(times) == len(asked) == len(answered):
        raise ValueError(f"start_times, input_lens and output_lens differ: {[len(column) for column in columns]}")
    errors = fields.get("errors")
    failed = errors if type(errors) is list and len(errors) == len(times) else [""] * len(times)
    rows = []
    for position, (at, input_length, output_length) in enumerate(zip(times, asked, answered, strict=True)):
        row = {"start_times": at, "input_lens": input_length, "output_lens": output_length}
        try:
            rows.append((_number(row, "start_times"), _whole(row, "input_lens", 0), _whole(row, "output_lens", 0)))
        except ValueError as error:
            raise ValueError(f"request {position}: {error}") from None
    for (at, input_length, output_length), why in sorted(zip(rows, failed, strict=True), key=lambda pair: pair[0][0]):
        yield None if why or not (input_length and output_length) else TraceRow(at, input_length, output_length)


# --- files ---


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """The bytes of the file, decompressed if it is gzip's. Raises `TraceError` while it is read."""
    try:
        with file.open("rb") as plain:
            compressed = plain.read(2) == GZIP
            plain.seek(0)
            if not compressed:
                yield plain
                return
            with gzip.GzipFile(fileobj=plain) as unpacked:
                yield cast(BinaryIO, unpacked)
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise TraceError(f"cannot read the trace {file}: {reason}") from error


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    while line := stream.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise ValueError(f"it is longer than {MAX_LINE // 2**20} MiB")
        yield line


def _header(line: bytes) -> list[str]:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return []
    return [name.strip() for name in next(csv.reader([text]), [])]


def recognised(file: Path) -> TraceFormat:
    """The format that the first line shows. Raises `TraceError` if it shows none."""
    with opened(file) as stream:
        first = stream.readline(MAX_LINE)
    if not first.strip():
        raise TraceError(f"{file} holds no requests")
    if first.lstrip()[:1] == b"{":
        try:
            fields = orjson.loads(first)
        except orjson.JSONDecodeError as error:
            raise TraceError(f"{file}, line 1: it is not JSON: {error}") from None
        if "prompt" in fields:
            return TraceFormat.VLLM_DATASET
        if "input_lens" in fields or "request_throughput" in fields:
            return TraceFormat.VLLM_RESULT
        return TraceFormat.MOONCAKE
    names = _header(first)
    if {"ContextTokens", "GeneratedTokens"} <= set(names):
        return TraceFormat.AZURE
    if {"Request tokens", "Response tokens"} <= set(names):
        return TraceFormat.BURSTGPT
    raise TraceError(
        f"{file}, line 1: the format is not recognised by {first[:60].decode(errors='replace').strip()!r}; "
        f"name it with --format, one of: {', '.join(TraceFormat)}"
    )


_OBJECTS: Mapping[TraceFormat, Callable[[Mapping[str, Any]], TraceRow]] = {
    TraceFormat.MOONCAKE: mooncake_row,
    TraceFormat.VLLM_DATASET: vllm_dataset_row,
}
_TABLES: Mapping[TraceFormat, tuple[Callable[[Mapping[str, str]], TraceRow | None], tuple[str, ...]]] = {
    TraceFormat.BURSTGPT: (burstgpt_row, ("Timestamp", "Request tokens", "Response tokens")),
    TraceFormat.AZURE: (azure_row, ("TIMESTAMP", "ContextTokens", "GeneratedTokens")),
}


def read_rows(file: Path, form: TraceFormat) -> Iterator[TraceRow | None]:
    """Every row of the file in turn; None: a request that had failed. The file is open until the iterator is done.

    Raises `TraceError` at the first bad row, and for a file that cannot be read.
    """
    number = 1
    try:
        with opened(file) as stream:
            if form in _TABLES:
                read, columns = _TABLES[form]
                lines = _lines(stream)
                names = _header(next(lines, b""))
                missing = [name for name in columns if name not in names]
                if missing:
                    raise ValueError(f"the header has no column {' and no '.join(map(repr, missing))}")
                for number, line in enumerate(lines, start=2):  # noqa: B007 - for the error below
                    yield read(_cells(names, line))
            elif form is TraceFormat.VLLM_RESULT:
                for number, line in enumerate(_lines(stream), start=1):
                    if number > 1 and line.strip():
                        raise ValueError("it is the result of another run; keep one run in a file")
                    if number == 1:
                        yield from vllm_result_rows(_object(line))
            else:
                for number, line in enumerate(_lines(stream), start=1):  # noqa: B007 - for the error below
                    yield _OBJECTS[form](_object(line))
    except TraceError:
        raise
    except ValueError as error:
        raise TraceError(f"{file}, line {number}: {error}") from None


def _cells(names: list[str], line: bytes) -> dict[str, str]:
    """The cells of a line by the names of their columns. No format has line breaks within a cell."""
    try:
        cells = next(csv.reader([line.decode().rstrip("\r\n")]), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"it is not CSV: {error}") from None
    if len(cells) != len(names):
        raise ValueError(f"it has {len(cells)} columns, the header {len(names)}")
    return dict(zip(names, cells, strict=True))
