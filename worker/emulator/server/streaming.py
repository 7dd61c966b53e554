"""Runs a generation for a client and streams it as server-sent events, with one write for each change."""

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
from worker.emulator.protocol.chat import ChatCompletionRequest
from worker.emulator.protocol.completion import CompletionRequest
from worker.emulator.server.generation import Choice, Generation
from worker.emulator.server.service import Service, named_rank
from worker.emulator.server.submission import Prompt, check, scored, start


class ChunkFormatter(Protocol):
    """Writes the chunks of one endpoint's streams."""

    def first(self, choices: Sequence[Choice]) -> bytes:
        """Chunks before the first token."""

    def token(self, choice: Choice) -> bytes:
        """The chunk with what is new of a choice."""

    def last(self, choices: Sequence[Choice]) -> bytes:
        """Chunks after the last token."""


class OpenAIChunks:
    """The common parts of the chunks of one OpenAI stream, formatted once, so that a token costs one join.

    `kind` is the chunks' `object`.
    """

    def __init__(
        self,
        service: Service,
        model: str,
        answer_id: str,
        created: int,
        kind: bytes,
        options: StreamOptions | None,
    ) -> None:
        self.head = b'data: {"id":%s,"object":"%s","created":%d,"model":%s,"choices":[' % (
            orjson.dumps(answer_id),
            kind,
            created,
            orjson.dumps(model),
        )
        self.fingerprint = b',"system_fingerprint":' + orjson.dumps(service.fingerprint)
        self.usage = options is not None and bool(options.include_usage)
        """Whether a last chunk reports the usage."""
        self.continuous_usage = self.usage and options is not None and bool(options.continuous_usage_stats)
        """Whether every chunk reports the usage so far."""

    def usage_chunk(self, counts: Mapping[str, Any]) -> bytes:
        """The chunk after the last token that reports the usage."""
        return self.head + b'],"usage":' + orjson.dumps(counts) + self.fingerprint + b"}\n\n"


def error_end(error: ApiError) -> bytes:
    """The end of an OpenAI stream that has failed."""
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
    rank: int | None = None,
) -> Iterator[Generation]:
    """Runs the choices of a request until the context is left. Raises `EngineDeadError`."""
    with Generation(streaming=streaming, interval=interval or 1) as generation:
        start(service, generation, prompts, scope, streaming=streaming, rank=rank)
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
    rank: int | None = None,
    failure: Callable[[ApiError], bytes] = error_end,
) -> AsyncIterator[Generation | None]:
    """Runs the choices of a request that passes the engine's checks. None for a refused stream, which is answered here.

    vLLM submits a streaming request after it has sent the head of the stream. A request that only its engine refuses
    therefore ends the stream, with what `failure` makes of the error. Raises `ApiError` for a request without a stream.
    """
    try:
        check(service, prompts, rank)
    except ApiError as error:
        if not streaming:
            raise
        await raw_request.open_stream()
        await raw_request.close_stream(failure(error))
        yield None
        return
    with running(service, prompts, scope, answer_id, streaming=streaming, interval=interval, rank=rank) as generation:
        yield generation


class OpenAIAnswer(Protocol):
    """The answer to a chat or completion request, in the format of its endpoint."""

    answer_id: str

    def whole(self, generation: Generation) -> dict[str, Any]:
        """The whole answer, for a request that does not stream."""

    def formatter(self) -> ChunkFormatter:
        """Writes the chunks of a stream."""


async def respond(
    raw_request: HttpRequest,
    service: Service,
    request: ChatCompletionRequest | CompletionRequest,
    prompts: Sequence[Prompt],
    answer: OpenAIAnswer,
) -> None:
    """Generate the answer to a chat or completion request, and send it whole or as a stream. Raises `ApiError`."""
    async with generated(
        raw_request,
        service,
        prompts,
        service.scope(request.model, request.cache_salt),
        answer.answer_id,
        streaming=bool(request.stream),
        interval=request.stream_interval,
        rank=named_rank(raw_request),
    ) as generation:
        if generation is None:
            return
        if request.stream:
            await stream(raw_request, generation, answer.formatter())
            return
        await generation.finished()
        await raw_request.json(200, await service.offload(scored(prompts), lambda: answer.whole(generation)))


async def stream(
    raw_request: HttpRequest,
    generation: Generation,
    chunks: ChunkFormatter,
    *,
    opening: bytes = b"",
    done: bytes = SSE_DONE,
    failure: Callable[[ApiError], bytes] = error_end,
) -> None:
    """Send the head at once, as vLLM does, then each token as it is generated.

    A client that reads slowly gets several tokens in one chunk. If the engine dies, the stream ends with an error
    event. `opening` is sent after the head, `done` after the last chunk.
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
