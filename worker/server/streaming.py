"""Server-sent events of a generation: one write for each time that something is new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvcache.errors import SSE_DONE, engine_dead, sse_error
from worker.runner import EngineDeadError
from worker.server.generation import Choice, Generation
from worker.server.http import Exchange


class Chunks(Protocol):
    """How one endpoint words its chunks."""

    def first(self, choices: Sequence[Choice]) -> bytes:
        """Chunks before the first token."""

    def token(self, choice: Choice, *, last: bool) -> bytes:
        """What is new of a choice. `last`: of all that report tokens."""

    def last(self, choices: Sequence[Choice]) -> bytes:
        """Chunks after the last token."""


async def stream(exchange: Exchange, generation: Generation, chunks: Chunks) -> None:
    """Send the head at once, as vLLM does, then each token as it comes.

    A client that reads slowly gets several tokens in one chunk. A dying engine ends the stream with an error event.
    """
    await exchange.open_stream()
    prefix = None
    try:
        while True:
            updates = await generation.updates()
            done = generation.done
            if prefix is None:
                prefix = chunks.first(generation.choices)
            data = prefix + b"".join([chunks.token(choice, last=done and choice is updates[-1]) for choice in updates])
            if done:
                break
            prefix = b""
            await exchange.write(data)
    except EngineDeadError:
        await exchange.close_stream(sse_error(engine_dead().body()) + SSE_DONE)
        return
    await exchange.close_stream(data + chunks.last(generation.choices) + SSE_DONE)
