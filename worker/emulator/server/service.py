"""What the handlers of one worker share: its configuration, its engine and its state."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol, TypeVar

from kvcache.errors import ApiError, model_not_found
from kvcache.images import ImageRule
from kvcache.keys import CacheScope
from kvcache.prompts import PromptError, request_scope
from kvcache.ranks import RANK_HEADER, asked_rank
from kvcache.tokens.tokenizer import Tokenizer
from worker.asgi import HttpRequest
from worker.emulator.adapters import Adapters
from worker.emulator.data_parallel import DataParallelEngines
from worker.emulator.generators.base import Generator
from worker.emulator.protocol.base import random_id
from worker.emulator.protocol.sampling import MAX_CHOICES
from worker.emulator.protocol.validation import unsupported_media_type

VLLM_VERSION = "0.32.0"
"""The version of vLLM that the emulator imitates."""

LONG_TEXT = 16 * 1024
"""Bytes from which a text is tokenised in a thread. For shorter ones the switch costs more than the work."""

_RANK = RANK_HEADER.encode()

_Result = TypeVar("_Result")


class Abortable(Protocol):
    """The answers to a request in flight."""

    def abort(self) -> None: ...


class EmulatorState(Enum):
    """The state of the emulator's process. Whether its engine works is another question (`AsyncEngine.dead`)."""

    SERVING = auto()
    DRAINING = auto()
    """SIGTERM has come. New requests are still taken, but routers should prefer other workers."""
    CLOSING = auto()
    """New requests are refused; those in flight finish."""


class EmulatorEvent(Enum):
    """What moves the process towards its end."""

    DRAIN = auto()
    """SIGTERM, with a drain limit."""
    CLOSE = auto()
    """SIGTERM without a drain limit, the end of the draining, or a dead engine."""


EMULATOR_TRANSITIONS: Mapping[tuple[EmulatorState, EmulatorEvent], EmulatorState] = {
    (EmulatorState.SERVING, EmulatorEvent.DRAIN): EmulatorState.DRAINING,
    (EmulatorState.SERVING, EmulatorEvent.CLOSE): EmulatorState.CLOSING,
    (EmulatorState.DRAINING, EmulatorEvent.CLOSE): EmulatorState.CLOSING,
}


@dataclass(slots=True)
class Service:
    """One worker, as its handlers use it."""

    model: str
    root: str
    """`root` of the model in /v1/models."""
    names: tuple[str, ...]
    """All model names that requests may use, `model` first."""
    tokenizer: Tokenizer
    generator: Generator
    engines: DataParallelEngines
    adapters: Adapters
    block_size: int
    max_model_len: int
    images: ImageRule | None
    """How images are read; None: they are refused, as by a vLLM that serves a text model."""
    prompt_tokens_details: bool = True
    request_id_headers: bool = False
    dev_mode: bool = False
    runtime_lora: bool = False
    """Whether adapters may be loaded and unloaded by requests."""
    auto_tool_choice: bool = False
    """Whether requests with tools are accepted. The generator calls none of them."""
    trust_request_chat_template: bool = False
    store_responses: bool = False
    """Whether responses of /v1/responses are stored."""
    state: EmulatorState = EmulatorState.SERVING
    last_request: float = -math.inf
    """Arrival of the last completion or chat request, by `time.monotonic`."""
    started: int = field(default_factory=lambda: int(time.time()))
    in_progress: int = 0
    """Number of completion and chat requests in flight."""
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while no request is in flight."""
    running: dict[str, Abortable] = field(default_factory=dict)
    """Requests in flight by the id of their answer; of several with the same id, the newest."""
    _ids: itertools.count[int] = field(default_factory=itertools.count)
    _thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(max_workers=1, thread_name_prefix="offload")
    )

    def __post_init__(self) -> None:
        self.idle.set()

    def advance(self, event: EmulatorEvent) -> None:
        """The one place where the state changes. Raises `KeyError` for an event that the state does not allow."""
        self.state = EMULATOR_TRANSITIONS[self.state, event]

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts a request as in flight within the context."""
        self.in_progress += 1
        self.last_request = time.monotonic()
        self.idle.clear()
        try:
            yield
        finally:
            self.in_progress -= 1
            if not self.in_progress:
                self.idle.set()

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint`: the version, and a digest of the other settings that affect answers."""
        facts = f"{self.model} {self.tokenizer.fingerprint} {self.max_model_len} {self.block_size}"
        return f"vllm-{VLLM_VERSION}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self.generator.close()

    def check_model(self, asked: str | None) -> None:
        """Raises `ApiError` (404) for a model that is not served. A request without a model means this one."""
        if asked and asked not in self.names and asked not in self.adapters:
            raise model_not_found(asked, list(self.names))

    def answered_as(self, asked: str | None) -> str:
        """The model name in the answer to a request for `asked`: the adapter's, or the model's first."""
        return asked if asked is not None and asked in self.adapters else self.model

    def scope(self, asked: str | None, salt: str | None) -> CacheScope:
        """The cache scope of a request for the model or adapter `asked`: requests of different scopes share no blocks.
        Raises `ApiError`."""
        adapter = asked if asked is not None and asked in self.adapters else ""
        try:
            return request_scope({"cache_salt": salt}, adapter)
        except PromptError as error:
            raise ApiError(400, str(error), param=error.param) from None

    async def offload(self, size: int, work: Callable[[], _Result]) -> _Result:
        """Run `work` here, or in a thread if it takes as long as tokenising a long text of `size` bytes. Raises what
        `work` raises."""
        if size < LONG_TEXT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def check_choices(self, number: int) -> None:
        """Raises `ApiError` for too many answers to one request, over all of its prompts."""
        if number > MAX_CHOICES:
            raise ApiError(400, f"prompts times n must be at most {MAX_CHOICES}, got {number}.")

    def abort(self, ids: Sequence[str] | None) -> int:
        """Abort the requests with these ids, or all if None. Returns the number of ids, as vLLM does."""
        if ids is None:
            number = self.engines.active
            self.engines.abort_all()
            return number
        for answer_id in ids:
            if (running := self.running.get(answer_id)) is not None:
                running.abort()
        return len(ids)

    def next_id(self) -> str:
        """The id of the next engine request."""
        return str(next(self._ids))


async def json_body(raw_request: HttpRequest) -> bytes:
    """The whole body. Raises `ApiError` unless its content type is JSON: vLLM takes no other."""
    if raw_request.header(b"content-type").lower().partition(";")[0] != "application/json":
        raise unsupported_media_type()
    return await raw_request.body()


def named_rank(raw_request: HttpRequest) -> int | None:
    """The data-parallel rank that a request asks for, None if it does not. vLLM reads it for chat, completion and
    messages requests only."""
    return asked_rank(raw_request.header(_RANK))


def request_id(raw_request: HttpRequest, prefix: str, given: str | None) -> str:
    """The id of an answer: `prefix`, then the header X-Request-Id, or else the body's `request_id`, or random
    digits."""
    named = raw_request.header(b"x-request-id") or given
    return f"{prefix}-{random_id() if named is None else named}"
