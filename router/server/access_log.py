"""The access log: one line for each request, written by a thread, so that no request waits for a slow disk or pipe.

A line says what happened to a request, never what it said: no text, no header but the request's id, no query. With
`blocks` it holds a digest of each block of the prompt (`Digests`), from which a trace can be made that simulations and
benchmarks replay.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

from kvcache.keys import PrefixKeys
from router.metrics import Metrics
from router.server.record import RequestRecord, stated
from runtime.logs import EventLogger, LogFormat, event_record, formatter

logger = EventLogger(__name__)

LOGGER = "router.access"
QUEUED_LINES = 4096
QUEUED_BYTES = 64 * 2**20
"""Of the token ids of prompts whose blocks are still to be digested."""
CLOSE_TIMEOUT = 2.0
"""Seconds that the last lines may take to be written."""


class Digests:
    """Short names for blocks and sessions that say nothing about what they name to whom does not know the salt.

    A block's key is a plain hash of a prompt up to the end of the block: who has the tokenizer could compute those of a
    guessed prompt and so learn that it was asked. With a random salt nobody can; with a given salt whoever has that.
    Equal prefixes have equal digests, which is what a trace is for.
    """

    def __init__(self, salt: bytes) -> None:
        self._salt = blake2b(salt, digest_size=32).digest()

    def name(self, key: bytes) -> str:
        """16 hexadecimal digits."""
        return blake2b(key, digest_size=8, key=self._salt).hexdigest()

    def blocks(self, keys: PrefixKeys) -> list[str]:
        """One name for each full block of a prompt: O(length of the prompt)."""
        return [self.name(key) for key in keys.all()]


def fields(record: RequestRecord, digests: Digests, wall: Callable[[], float] = time.time) -> dict[str, Any]:
    """What a line says of a request that is over. What is not known is left out. docs/router.md lists the fields."""
    route, usage, attempts = record.route, record.usage, record.attempts
    line: dict[str, Any] = {
        "at": round(wall() - (record.ended - record.arrived), 6),
        "request_id": stated(record.request_id.decode("latin-1")),
        "method": record.method,
        "path": stated(record.path),
        "status": record.status,
        "bytes": record.sent_bytes,
        "seconds": round(record.ended - record.arrived, 6),
    }
    if route is not None:
        prompt = route.prompt_tokens if route.prompt_tokens is not None or usage is None else usage.prompt
        line |= {
            "model": stated(route.model) if route.model is not None else None,
            "stream": route.streaming,
            "session": digests.name(route.session.key) if route.session is not None else None,
            "unread": route.unread.value if route.unread is not None else None,
            "prompt_tokens": prompt,
            "max_tokens": route.output_tokens,
            "tenant": digests.name(route.caller.tenant.encode()) if route.caller.tenant else None,
            "priority": route.caller.priority or None,
            "waited_seconds": round(record.waited, 6) if record.waited is not None else None,
        }
    if attempts:
        decision = attempts[-1].decision
        line |= {
            "worker": stated(decision.worker_id),
            "attempts": len(attempts),
            "failures": [attempt.cause.value for attempt in attempts if attempt.cause is not None],
            "ttft_seconds": _rounded(record.first_token_at, record.arrived),
            "cached_tokens": usage.cached if usage is not None else None,
            "output_tokens": usage.completion if usage is not None else None,
        }
        if route is not None and route.prompted:
            line |= {
                "reason": decision.reason.value,
                "matched_blocks": decision.matched_blocks,
                "prompt_blocks": decision.prompt_blocks,
                "predicted_ttft_seconds": round(decision.predicted_ttft, 6),
            }
    return {name: value for name, value in line.items() if value is not None and value != []}


def _rounded(at: float | None, since: float) -> float | None:
    return None if at is None else round(at - since, 6)


class _Line(NamedTuple):
    at: float
    """When the request was over, Unix seconds."""
    fields: dict[str, Any]
    keys: PrefixKeys | None
    """Of the prompt, to be digested."""
    size: int
    """Bytes that this holds of the prompt."""


class Output(Protocol):
    """Where lines go: a raw file, without a buffer.

    A buffer's lock would be held by a write that is stuck because nobody reads, and the interpreter takes the locks of
    its buffers, and of the handlers of `logging`, when it ends: the process would never end.
    """

    def write(self, data: bytes, /) -> int | None:
        """Write some of these bytes, or all. Returns how many. Raises `OSError`."""


class AccessLog:
    """Lines of requests on their way to `output`. `read` takes a record from the event loop and returns at once: a line
    that finds no room is dropped and counted, as is one that cannot be written. Everything else happens in a thread."""

    def __init__(
        self,
        output: Output,
        fmt: LogFormat,
        digests: Digests,
        metrics: Metrics,
        *,
        blocks: bool = False,
        block_size: int = 0,
        queued: int = QUEUED_LINES,
    ) -> None:
        self._digests = digests
        self._output = output
        self._formatter = formatter(fmt)
        self._metric = metrics.access_log_dropped
        self._counting = threading.Lock()
        self._failing = False
        self._blocks = blocks
        self._block_size = block_size
        self._queue: queue.Queue[_Line | None] = queue.Queue(queued)
        self._put_bytes = self._taken_bytes = 0  # each is written by one thread
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()

    def read(self, record: RequestRecord) -> None:
        """A request is over."""
        keys = record.route.keys if self._blocks and record.route is not None else None
        size = len(keys.packed) if keys is not None else 0
        if self._put_bytes - self._taken_bytes + size > QUEUED_BYTES:
            self._drop()
            return
        try:
            self._queue.put_nowait(_Line(time.time(), fields(record, self._digests), keys, size))
        except queue.Full:
            self._drop()
        else:
            self._put_bytes += size

    def close(self) -> None:
        """Write what is queued, for a while."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=CLOSE_TIMEOUT)
            self._thread.join(CLOSE_TIMEOUT)

    def _run(self) -> None:
        while (line := self._queue.get()) is not None:
            if line.keys is not None:
                line.fields.update(block_size=self._block_size, block_hashes=self._digests.blocks(line.keys))
            text = self._formatter.format(event_record(LOGGER, "request", line.fields, line.at))
            try:
                self._write(f"{text}\n".encode())
            except OSError as error:
                self._drop()
                if not self._failing:
                    logger.warning("access_log_failed", error=repr(error))
                self._failing = True
            else:
                self._failing = False
            self._taken_bytes += line.size

    def _write(self, data: bytes) -> None:
        while data:
            data = data[self._output.write(data) or 0 :]

    def _drop(self) -> None:
        with self._counting:  # both threads do it
            self._metric.value += 1
