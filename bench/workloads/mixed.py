"""The workload that a file describes: its parts, each with arrivals of its own, merged by time.

Prompts are token ids, so their lengths are exact with every tokenizer; those of built-in parts are what these send.
Sessions begin before the start, so that the rate is steady from the start; their turns before it are not sent.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush, merge
from itertools import accumulate, islice
from pathlib import Path
from random import Random

from bench.workloads.arrivals import Arrivals
from bench.workloads.base import TimedRequest, TokenIds, Workload, WorkloadSpec, completion, token_ids
from bench.workloads.distributions import mean, tokens
from bench.workloads.file import BuiltInPart, Part, Prefix, Sessions, load_file

LONGEST_SESSIONS = 500
"""Sessions that are drawn to find how long they last."""


@dataclass(frozen=True, slots=True)
class _Source:
    """What a part needs to generate its requests."""

    part: Part
    seed: int
    rate: float
    """Requests a second."""
    arrivals: Arrivals
    context: int | None
    """Most tokens of a prompt and its answer."""

    @property
    def name(self) -> str:
        return f"{self.part.name} {self.seed}"


def _chosen(prefixes: Sequence[Prefix]) -> Callable[[Random, str], TokenIds]:
    """A function that draws one prefix of each pool; `name` tells the pools of parts apart."""
    weights = [list(accumulate((rank + 1) ** -prefix.zipf for rank in range(prefix.pool))) for prefix in prefixes]

    def choose(random: Random, name: str) -> TokenIds:
        ids: TokenIds = array("I")
        for level, (prefix, cumulative) in enumerate(zip(prefixes, weights, strict=True)):
            (which,) = random.choices(range(prefix.pool), cum_weights=cumulative)
            ids += token_ids(f"file {name} prefix {level} {which}", prefix.tokens)
        return ids

    return choose


def _single(source: _Source) -> Iterator[TimedRequest]:
    """Requests that belong to no session. One that does not fit the context is sent nevertheless, and refused."""
    part, random = source.part, Random(f"file {source.name}")
    choose = _chosen(part.prefixes)
    for number, at in enumerate(source.arrivals.times(random, source.rate)):
        own = token_ids(f"file {source.name} {number}", tokens(part.prompt.draw, random))
        yield completion(0, at, choose(random, source.name) + own, tokens(part.output.draw, random))


def _turns(source: _Source, sessions: Sessions, prefix: TokenIds, number: int, at: float) -> Iterator[TimedRequest]:
    """The requests of one session, until the context is full."""
    part, random = source.part, Random(f"file {source.name} session {number}")
    history = prefix
    for turn in range(tokens(sessions.turns.draw, random)):
        name = f"file {source.name} {number} {turn}"
        prompt = history + token_ids(name, tokens(part.prompt.draw, random))
        answer = tokens(part.output.draw, random)
        if turn and source.context is not None and len(prompt) + answer > source.context:
            return
        yield completion(0, at, prompt, answer)
        history = prompt + token_ids(f"{name} answer", answer)
        at += sessions.pause.draw(random)


def _in_sessions(source: _Source, sessions: Sessions) -> Iterator[TimedRequest]:
    """The requests of all sessions by their arrival."""
    random, choose = Random(f"file {source.name}"), _chosen(source.part.prefixes)
    turns = mean(lambda drawn: tokens(sessions.turns.draw, drawn), f"{source.part.name} turns")
    pauses = Random(f"file {source.part.name} pauses")
    lasts = max(
        sum(sessions.pause.draw(pauses) for _ in range(tokens(sessions.turns.draw, pauses)))
        for _ in range(LONGEST_SESSIONS)
    )
    starts = enumerate(source.arrivals.times(random, source.rate / turns, -lasts))
    number, start = next(starts)
    due: list[tuple[float, int, TimedRequest, Iterator[TimedRequest]]] = []
    while True:
        while not due or due[0][0] >= start:
            coming = _turns(source, sessions, choose(random, source.name), number, start)
            first = next(coming)
            heappush(due, (first.at, number, first, coming))
            number, start = next(starts)
        at, which, request, coming = heappop(due)
        if at >= 0:
            yield request
        following = next(coming, None)
        if following is not None:
            heappush(due, (following.at, which, following, coming))


def from_file(spec: WorkloadSpec, build: Callable[[WorkloadSpec], Workload]) -> Workload:
    """The workload of the file `spec.name`; `build` makes a built-in part. Raises `WorkloadError`."""
    file = load_file(Path(spec.name))
    count, rate = spec.limit or file.requests, spec.rate or file.rate
    arrivals = spec.arrivals or file.arrivals.arrivals()
    total = sum(part.weight for part in file.parts)

    def source(part: Part | BuiltInPart) -> Iterator[TimedRequest]:
        share = part.weight / total * rate
        if isinstance(part, BuiltInPart):
            # Agents come when their last turn is over: no process of ours decides it.
            process = None if part.workload == "agents" else arrivals
            own = replace(spec, name=part.workload, limit=count, rate=share, arrivals=process)
            return build(own).requests()
        made = _Source(part, spec.seed, share, arrivals, spec.context)
        return _single(made) if part.sessions is None else _in_sessions(made, part.sessions)

    def requests() -> Iterator[TimedRequest]:
        mixed = merge(*map(source, file.parts), key=lambda request: request.at)
        for index, request in enumerate(islice(mixed, count)):
            yield replace(request, index=index)

    described = file.model_dump(mode="json", exclude_unset=True)
    config = {"rate": rate, "arrivals": str(arrivals), "file": described}
    return Workload(file.name or Path(spec.name).stem, spec.seed, count, config, requests)
