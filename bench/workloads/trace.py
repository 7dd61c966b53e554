"""`trace`: replay of a recorded trace in Mooncake's JSONL form (Qin et al., FAST '25).

Each line is a request: `{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [...]}`. Each
hash id stands for 512 tokens, the last one of a request for the rest; equal ids at equal depth mean equal text. The
tokens of a hash id are a pure function of the id, so the requests of a replay share exactly what the recorded ones
shared, whatever the seed. Prompts are sent as token ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from bench.workloads.base import TimedRequest, Workload, WorkloadError, WorkloadSpec, completion, token_ids

TOKENS_PER_HASH = 512


class TraceError(WorkloadError):
    """A line of a trace is malformed. The message names the file, the line and what is wrong."""


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One recorded request."""

    at: float
    """Seconds."""
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def _whole(fields: dict[str, Any], name: str, least: int) -> int:
    value = fields.get(name)
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number of {least} or more, not {value!r:.60}")
    return value


def parse_row(line: bytes) -> TraceRow:
    """One line of a trace. Raises `ValueError`, which says what is wrong with it."""
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if type(fields) is not dict:
        raise ValueError(f"a row is an object, not {type(fields).__name__}")
    timestamp = _whole(fields, "timestamp", 0)
    input_length = _whole(fields, "input_length", 1)
    output_length = _whole(fields, "output_length", 1)
    hash_ids = fields.get("hash_ids")
    if type(hash_ids) is not list or not all(type(each) is int and each >= 0 for each in hash_ids):
        raise ValueError(f"hash_ids must be a list of whole numbers of 0 or more, not {hash_ids!r:.60}")
    needed = -(-input_length // TOKENS_PER_HASH)
    if len(hash_ids) != needed:
        raise ValueError(
            f"{input_length} input tokens take {needed} hash_ids of {TOKENS_PER_HASH} tokens, not {len(hash_ids)}"
        )
    return TraceRow(timestamp / 1000, input_length, output_length, tuple(hash_ids))


def read_trace(file: Path, limit: int | None = None) -> list[TraceRow]:
    """The first `limit` rows. Raises `TraceError` at the first bad one, and for a file that cannot be read."""
    rows: list[TraceRow] = []
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if len(rows) == limit:
                    break
                try:
                    row = parse_row(line)
                    if rows and row.at < rows[-1].at:
                        raise ValueError("its timestamp lies before that of the line above; sort the trace by time")
                except ValueError as error:
                    raise TraceError(f"{file}, line {number}: {error}") from None
                rows.append(row)
    except OSError as error:
        raise TraceError(f"cannot read the trace {file}: {error.strerror}") from error
    if not rows:
        raise TraceError(f"{file} holds no requests")
    return rows


def prompt(row: TraceRow) -> list[int]:
    """The token ids of a recorded prompt."""
    ids: list[int] = []
    for hash_id in row.hash_ids:
        ids += token_ids(f"hash {hash_id}", min(TOKENS_PER_HASH, row.input_length - len(ids)))
    return ids


def trace(spec: WorkloadSpec) -> Workload:
    """The replay of `spec.trace`; `spec.rate` stretches its arrivals to that mean. Raises `WorkloadError`."""
    if spec.trace is None:
        raise WorkloadError("the workload trace replays a file: name it with --trace FILE (Mooncake's JSONL form)")
    rows = read_trace(spec.trace, spec.limit)
    start, lasts = rows[0].at, rows[-1].at - rows[0].at
    stretch = len(rows) / spec.rate / lasts if spec.rate and lasts else 1.0

    def requests() -> Iterator[TimedRequest]:
        for index, row in enumerate(rows):
            yield completion(index, (row.at - start) * stretch, prompt(row), row.output_length)

    config = {"trace": spec.trace.name, "rate": spec.rate, "tokens_per_hash": TOKENS_PER_HASH}
    return Workload("trace", spec.seed, len(rows), config, requests)
