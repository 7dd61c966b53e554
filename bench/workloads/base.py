"""What a workload is: timed requests that depend only on its parameters and its seed.

A workload knows no clock and no socket. It yields requests in the order of their arrival; the load generator sends them
when they are due, and the simulator submits them at that time of its virtual clock.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bench.workloads.arrivals import POISSON, Arrivals

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"

FIRST_TOKEN_ID = 512
TOKEN_IDS = 1 << 14
"""Prompts that are sent as token ids use FIRST_TOKEN_ID..FIRST_TOKEN_ID + TOKEN_IDS - 1. These are plain words in every
vocabulary of 32,000 tokens or more, not the special or byte-fallback tokens at its beginning."""


TokenIds: TypeAlias = "array[int]"
"""Token ids as uint32: a trace has millions of them, which would be an object each in a list."""


class WorkloadError(ValueError):
    """A workload cannot be built. The message says what is wrong and what is allowed."""


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """One request of a workload."""

    index: int
    """Position in the workload, from 0."""
    at: float
    """Arrival, emulated seconds after the start."""
    path: str
    """`COMPLETIONS`, `CHAT` or `MESSAGES`."""
    body: Mapping[str, Any]
    """The body without the streaming fields, which the sender adds, and without `model` unless it asks for an
    adapter. A prompt of token ids is an array (`TokenIds`)."""
    max_tokens: int
    """Tokens that are generated: every body sets `ignore_eos`, so that all runs generate the same number. The Messages
    API has no such field: there an engine may generate fewer."""
    prompt_tokens: int | None = None
    """Length of the prompt, if it consists of token ids."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """What the prompts of a trace share that records only lengths. By default they share nothing."""

    prefix_tokens: int = 0
    """Every prompt begins with so many tokens, or all of its own, of a prefix that others have, too."""
    prefixes: int = 1
    """How many different ones there are; each request has one of them, all with the same probability."""
    sessions: bool = False
    """The prompts of one session begin alike, each as far as it is long; only for traces that name sessions."""

    def __bool__(self) -> bool:
        return bool(self.prefix_tokens) or self.sessions


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """Which workload, and its parameters; None: the default of the workload."""

    name: str
    """Of a built-in workload, or the path of a YAML file."""
    seed: int = 0
    limit: int | None = None
    """How many requests."""
    rate: float | None = None
    """Mean arrivals an emulated second."""
    trace: Path | None = None
    """The file that `trace` replays."""
    context: int | None = None
    """Tokens of the longest request that the model takes; `agents` fills it."""
    api: str = "chat"
    """How `agents` is sent: `chat` or `messages`."""
    arrivals: Arrivals | None = None
    """The process of the arrivals; `trace` otherwise has those that were recorded."""
    time_scale: float | None = None
    """How many times as fast `trace` replays what was recorded."""
    format: str | None = None
    """The format of the trace; None: that which its content shows."""
    sharing: Sharing = Sharing()
    as_text: bool = False
    """Whether prompts of token ids are sent as text: a word for each id, which is one token of GPT-2's vocabulary."""

    @property
    def process(self) -> Arrivals:
        """The arrival process of a workload that generates its requests."""
        return self.arrivals or POISSON


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload, which can be run any number of times: every call of `requests` yields the same ones."""

    name: str
    seed: int
    count: int
    config: Mapping[str, Any]
    """The effective parameters, for the result file."""
    requests: Callable[[], Iterator[TimedRequest]]


def token_ids(name: str, count: int) -> TokenIds:
    """`count` token ids that are a pure function of `name`; fewer ids are the beginning of more."""
    words = np.frombuffer(hashlib.shake_128(name.encode()).digest(2 * count), "<u2")
    return array("I", ((words & (TOKEN_IDS - 1)) + FIRST_TOKEN_ID).astype(np.uint32).tobytes())


def completion(index: int, at: float, prompt: TokenIds, max_tokens: int) -> TimedRequest:
    """A request whose prompt is token ids."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
    return TimedRequest(index, at, COMPLETIONS, body, max_tokens, len(prompt))


def chat(index: int, at: float, messages: list[dict[str, str]], max_tokens: int) -> TimedRequest:
    """A request whose prompt is messages."""
    body = {"messages": messages, "max_tokens": max_tokens, "ignore_eos": True}
    return TimedRequest(index, at, CHAT, body, max_tokens)
