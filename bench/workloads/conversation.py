"""`chat`: conversations of several turns; the prompt of each turn contains the turns before it.

It is an open loop: a user's next turn comes after a think time, not after the answer, so a slow strategy does not
reduce the arrivals on which it is measured. For the same reason the assistant's turns in the history are seeded text
and not what the engine answered: a turn shares the whole prompt of the turn before it, but not the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import chain
from itertools import count as counter
from random import Random

from bench.workloads.base import TimedRequest, Workload, WorkloadSpec, chat

TURNS = 5
"""Mean turns of a conversation: after each turn the user leaves with probability 1 / TURNS."""
MAX_TURNS = 12
MEAN_TURNS = TURNS * (1 - (1 - 1 / TURNS) ** MAX_TURNS)
WARM_UP = 90.0
"""Conversations begin this many seconds before the start, so that the rate is steady from the start. Their turns before
the start are not sent."""
THINK_SECONDS = 4.0
"""Mean seconds between two turns of one conversation, exponentially distributed and in addition to `READ_SECONDS`."""
READ_SECONDS = 2.0
USER_WORDS = (10, 60)
ASSISTANT_WORDS = (40, 120)
MAX_TOKENS = (24, 96)
REQUESTS = 600
RATE = 12.0

SYSTEM = "You are a friendly assistant. Answer briefly, and ask back when a question can be read in two ways."
_WORD_LIST = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city name team minute idea body information back parent face level "
    "office door health person art war history party result change morning reason research girl guy moment air teacher "
    "force education make know take see come think look want give use find tell ask seem feel try leave call good new "
    "first last long great little own other old right big high different small large next early young important few"
)
WORDS = _WORD_LIST.split()
"""Each is one token of GPT-2's vocabulary with the space before it."""


def _say(random: Random, between: tuple[int, int]) -> str:
    return " ".join(random.choices(WORDS, k=random.randint(*between))).capitalize() + "."


def _session(number: int, seed: int, starts: float) -> Iterator[tuple[float, list[dict[str, str]], int]]:
    """(arrival, messages, max_tokens) of each turn of one conversation."""
    random = Random(f"chat {seed} session {number}")
    messages = [{"role": "system", "content": SYSTEM}]
    at = starts
    for _ in range(MAX_TURNS):
        messages = [*messages, {"role": "user", "content": _say(random, USER_WORDS)}]
        yield at, messages, random.randint(*MAX_TOKENS)
        if random.random() < 1 / TURNS:
            return
        messages = [*messages, {"role": "assistant", "content": _say(random, ASSISTANT_WORDS)}]
        at += READ_SECONDS + random.expovariate(1 / THINK_SECONDS)


def conversation(spec: WorkloadSpec) -> Workload:
    """The workload of these parameters."""
    count, rate = spec.limit or REQUESTS, spec.rate or RATE

    def requests() -> Iterator[TimedRequest]:
        random = Random(f"chat {spec.seed}")
        sessions = counter()
        starts = chain([-WARM_UP], spec.process.times(random, rate / MEAN_TURNS, -WARM_UP))
        next_start = next(starts)
        # (arrival, session number, messages, max_tokens, turns to come): session numbers break ties
        due: list[tuple[float, int, list[dict[str, str]], int, Iterator[tuple[float, list[dict[str, str]], int]]]] = []
        index = 0
        while index < count:
            while not due or due[0][0] >= next_start:
                number = next(sessions)
                turns = _session(number, spec.seed, next_start)
                at, messages, max_tokens = next(turns)
                heappush(due, (at, number, messages, max_tokens, turns))
                next_start = next(starts)
            at, number, messages, max_tokens, turns = heappop(due)
            if at >= 0:
                yield chat(index, at, messages, max_tokens)
                index += 1
            following = next(turns, None)
            if following is not None:
                heappush(due, (following[0], number, following[1], following[2], turns))

    config = {"rate": rate, "turns": TURNS, "think_seconds": READ_SECONDS + THINK_SECONDS}
    return Workload("chat", spec.seed, count, config, requests)
