"""Running a generation for a client, and its server-sent events: one write for each time that something is new."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol

import orjson

from kvcache.errors import SSE_DONE, ApiError, engine_dead, sse_error
from kvcache.keys import CacheScope
from worker.asgi import HttpRequest
from worker.emulator.async_engine import EngineDeadError
from worker.emulator.protocol.base import StreamOptions
from worker.emulator.server.generation import Choice, Generation
from worker.emulator.server.service import Service
from worker.emulator.server.submission import Prompt, check, start


class ChunkFormatter(Protocol):
    """Writes the chunks of one endpoint's streams."""

    def first(self, choices: Sequence[Choice]) -> bytes:
        """Chunks before the first token."""

    def token(self, choice: Choice) -> bytes:
        """What is new of a choice."""

    def last(self, choices: Sequence[Choice]) -> bytes:
        """Chunks after the last token."""


class OpenAIChunks:
    """What the chunks of one stream of OpenAI's API share. It is formatted once, so that a token costs one join.

    `kind` is the chunks' `object`.
    """

    def __init__(
        self, service: Service, answer_id: str, created: int, kind: bytes, options: StreamOptions | None
    ) -> None:
        self.head = b'data: {"id":%s,"object":"%s","created":%d,"model":%s,"choices":[' % (
            orjson.dumps(answer_id),
            kind,
            created,
            orjson.dumps(service.model),
        )
        self.fingerprint = b',"system_fingerprint":' + orjson.dumps(service.fingerprint)
        self.usage = options is not None and bool(options.include_usage)
        """Whether a last chunk reports the usage."""
        self.continuous_usage = self.usage and options is not None and bool(options.continuous_usage_stats)
        """Whether every chunk reports the usage so far."""

    def usage_chunk(self, counts: Mapping[str, Any]) -> bytes:
        """The chunk after the last token that reports the usage."""
        return self.head + b'],"usage":' + orjson.dumps(counts) + self.fingerprint + b"}\n\n"


def event_of(error: ApiError) -> bytes:
    """How a stream of OpenAI's API ends with an error."""
    return sse_error(error.body()) + SSE_DONE


@contextmanager
def running(
    service: Service,
    prompts: Sequence[Prompt],
    scope: CacheScope,
    answer_id: str,
    *,
    streaming: bool,
    interval: int | None = None,
) -> Iterator[Generation]:
    """The choices of a request, running until the context is left. Raises `EngineDeadError`."""
    with Generation(service.engine, streaming=streaming, interval=interval or 1) as generation:
        start(service, generation, prompts, scope, streaming=streaming)
        service.running[answer_id] = generation
        try:
            yield generation
        finally:
            if service.running.get(answer_id) is generation:
                del service.running[answer_id]


@asynccontextmanager
async def generated(
    raw_request: HttpRequest,
    service: Service,
    prompts: Sequence[Prompt],
    scope: CacheScope,
    answer_id: str,
    *,
    streaming: bool,
    interval: int | None = None,
    failure: Callable[[ApiError], bytes] = event_of,
) -> AsyncIterator[Generation | None]:
    """The same once the engine has looked at the request; None when a stream was refused, and answered so.

    vLLM submits a streaming request after it has sent the stream's head, so what only its engine refuses is the
    stream's end: what `failure` makes of it. Raises `ApiError` otherwise.
    """
    try:
        check(service, prompts)
    except ApiError as error:
        if not streaming:
            raise
        await raw_request.open_stream()
        await raw_request.close_stream(failure(error))
        yield None
        return
    with running(service, prompts, scope, answer_id, streaming=streaming, interval=interval) as generation:
        yield generation


async def stream(
    raw_request: HttpRequest,
    generation: Generation,
    chunks: ChunkFormatter,
    *,
    opening: bytes = b"",
    done: bytes = SSE_DONE,
    failure: Callable[[ApiError], bytes] = event_of,
) -> None:
    """Send the head at once, as vLLM does, then each token as it comes.

    A client that reads slowly gets several tokens in one chunk. A dying engine ends the stream with an error event.
    `opening` is sent with the head, `done` follows the last chunk.
    """
    await raw_request.open_stream()
    if opening:
        await raw_request.write(opening)
    prefix = None
    try:
        while True:
            updates = await generation.updates()
            if prefix is None:
                prefix = chunks.first(generation.choices)
            data = prefix + b"".join([chunks.token(choice) for choice in updates])
            if generation.done:
                break
            prefix = b""
            await raw_request.write(data)
    except EngineDeadError:
        await raw_request.close_stream(failure(engine_dead()))
        return
    await raw_request.close_stream(data + chunks.last(generation.choices) + done)
