"""`trace`: replay of a recorded trace, in any of the formats of `bench/workloads/trace_formats.py`.

Where the trace has hash ids, the tokens of each are a pure function of the id, so the requests of a replay share
exactly what the recorded ones shared, whatever the seed. Where it records only lengths, prompts are made of these
lengths, which share what `Sharing` says, by default nothing. They are sent as token ids; text is sent as the message of
a user.

The file is read twice, once to check and count its rows and once for each replay, and never held in memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

from bench.workloads.base import (
    Sharing,
    TimedRequest,
    TokenIds,
    Workload,
    WorkloadError,
    WorkloadSpec,
    chat,
    completion,
    token_ids,
)
from bench.workloads.trace_formats import TraceError, TraceFormat, TraceRow, read_rows, recognised


@dataclass(frozen=True, slots=True)
class _Survey:
    """What the first reading of a trace found."""

    count: int
    skipped: int
    start: float | None
    """Time of the first row, in seconds; None: the trace has no times."""
    lasts: float
    """Seconds from the first row to the last."""
    hashed: bool
    tokens_per_hash: int
    sessions: bool


def answered_rows(file: Path, form: TraceFormat, limit: int | None) -> Iterator[TraceRow]:
    """The first `limit` rows of requests that had not failed. Raises `TraceError` as `read_rows` does."""
    return islice((row for row in read_rows(file, form) if row is not None), limit)


def _survey(file: Path, form: TraceFormat, limit: int | None) -> _Survey:
    count = skipped = 0
    first: TraceRow | None = None
    before = 0.0
    for place, row in enumerate(read_rows(file, form), start=1):
        if row is None:
            skipped += 1
            continue
        if first is None:
            first = row
        elif row.at is not None and row.at < before:
            line = place + (form in (TraceFormat.BURSTGPT, TraceFormat.AZURE))
            raise TraceError(
                f"{file}, line {line}: its timestamp lies before that of the line above; sort the trace by time"
            )
        before = row.at or 0.0
        count += 1
        if count == limit:
            break
    if first is None:
        raise TraceError(f"{file} holds no requests" + (f" that were answered, of {skipped}" if skipped else ""))
    return _Survey(
        count=count,
        skipped=skipped,
        start=first.at,
        lasts=before - (first.at or 0.0),
        hashed=first.hash_ids is not None,
        tokens_per_hash=first.tokens_per_hash,
        sessions=bool(first.session),
    )


def _format(spec: WorkloadSpec, file: Path) -> TraceFormat:
    if spec.format is None:
        return recognised(file)
    try:
        return TraceFormat(spec.format)
    except ValueError:
        raise WorkloadError(f"unknown trace format {spec.format!r}; use one of: {', '.join(TraceFormat)}") from None


def hashed_prompt(row: TraceRow, hash_ids: Sequence[int], index: int) -> TokenIds:
    """The token ids of a prompt with hash ids; those behind the last id, if there are any, belong to this request."""
    ids: TokenIds = array("I")
    for hash_id in hash_ids:
        ids += token_ids(f"hash {hash_id}", min(row.tokens_per_hash, row.input_length - len(ids)))
    return ids + token_ids(f"trace tail {index}", row.input_length - len(ids)) if len(ids) < row.input_length else ids


def sized_prompt(row: TraceRow, index: int, seed: int, sharing: Sharing) -> TokenIds:
    """The token ids of a prompt of which only the length is known."""
    name = f"trace {seed} session {row.session}" if sharing.sessions and row.session else f"trace {seed} {index}"
    shared = min(sharing.prefix_tokens, row.input_length)
    which = Random(name).randrange(sharing.prefixes) if shared else 0
    return token_ids(f"trace {seed} prefix {which}", shared) + token_ids(name, row.input_length - shared)


def trace(spec: WorkloadSpec) -> Workload:
    """The replay of `spec.trace`. Raises `WorkloadError`."""
    if spec.trace is None:
        raise WorkloadError("the workload trace replays a file: name it with --trace FILE")
    file, form = spec.trace, _format(spec, spec.trace)
    found = _survey(file, form, spec.limit)
    if found.hashed and spec.sharing:
        raise WorkloadError(f"{file} records what its prompts share; leave the options about sharing out")
    if spec.sharing.sessions and not found.sessions:
        raise WorkloadError(f"{file} names no sessions; leave --share-sessions out")
    if found.start is None and spec.rate is None:
        raise WorkloadError(f"{file} records no times; give a --rate")
    if found.start is None and spec.time_scale is not None:
        raise WorkloadError(f"{file} records no times that --time-scale could scale; use --rate")
    generated = spec.arrivals is not None or found.start is None
    rate = spec.rate or (found.count / found.lasts * (spec.time_scale or 1.0) if found.lasts else 1.0)
    stretch = found.count / spec.rate / found.lasts if spec.rate and found.lasts else 1 / (spec.time_scale or 1.0)

    def requests() -> Iterator[TimedRequest]:
        times = spec.process.times(Random(f"trace {spec.seed}"), rate)
        for index, row in enumerate(answered_rows(file, form, spec.limit)):
            at = next(times) if generated else ((row.at or 0.0) - (found.start or 0.0)) * stretch
            if row.text is not None:
                yield chat(index, at, [{"role": "user", "content": row.text}], row.output_length)
            elif row.hash_ids is not None:
                yield completion(index, at, hashed_prompt(row, row.hash_ids, index), row.output_length)
            else:
                prompt = sized_prompt(row, index, spec.seed, spec.sharing)
                yield completion(index, at, prompt, row.output_length)

    config = {
        "trace": file.name,
        "format": form.value,
        "rate": spec.rate,
        "time_scale": spec.time_scale,
        "arrivals": str(spec.process) if generated else "recorded",
        "skipped": found.skipped,
        **({"tokens_per_hash": found.tokens_per_hash} if found.hashed else {}),
        **({"sharing": spec.sharing} if spec.sharing else {}),
    }
    return Workload("trace", spec.seed, found.count, config, requests)
