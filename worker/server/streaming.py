"""Running a generation for a client, and its server-sent events: one write for each time that something is new."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from kvcache.errors import SSE_DONE, ApiError, engine_dead, sse_error
from kvcache.keys import CacheScope
from worker.runner import EngineDeadError
from worker.server.generation import Choice, Generation
from worker.server.http import Exchange
from worker.server.service import Service
from worker.server.submission import Prompt, check, start


class Chunks(Protocol):
    """How one endpoint words its chunks."""

    def first(self, choices: Sequence[Choice]) -> bytes:
        """Chunks before the first token."""

    def token(self, choice: Choice) -> bytes:
        """What is new of a choice."""

    def last(self, choices: Sequence[Choice]) -> bytes:
        """Chunks after the last token."""


@asynccontextmanager
async def generated(
    exchange: Exchange,
    service: Service,
    prompts: Sequence[Prompt],
    scope: CacheScope,
    answer_id: str,
    *,
    streaming: bool,
    interval: int | None = None,
) -> AsyncIterator[Generation | None]:
    """The choices of a request, running; None when a stream was refused, and answered so.

    vLLM submits a streaming request after it has sent the stream's head, so what only its engine refuses is an event.
    Raises `ApiError` otherwise, and `EngineDeadError`.
    """
    try:
        check(service, prompts)
    except ApiError as error:
        if not streaming:
            raise
        await exchange.open_stream()
        await exchange.close_stream(sse_error(error.body()) + SSE_DONE)
        yield None
        return
    with Generation(service.runner, streaming=streaming, interval=interval or 1) as generation:
        start(service, generation, prompts, scope, streaming=streaming)
        service.running[answer_id] = generation
        try:
            yield generation
        finally:
            if service.running.get(answer_id) is generation:
                del service.running[answer_id]


async def stream(exchange: Exchange, generation: Generation, chunks: Chunks) -> None:
    """Send the head at once, as vLLM does, then each token as it comes.

    A client that reads slowly gets several tokens in one chunk. A dying engine ends the stream with an error event.
    """
    await exchange.open_stream()
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
            await exchange.write(data)
    except EngineDeadError:
        await exchange.close_stream(sse_error(engine_dead().body()) + SSE_DONE)
        return
    await exchange.close_stream(data + chunks.last(generation.choices) + SSE_DONE)
