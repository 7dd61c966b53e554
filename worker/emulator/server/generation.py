"""The answers to one HTTP request. Each choice is one engine request, and all report to one waiting handler."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from kvcache.tokens.tokenizer import IncrementalDecoder
from worker.emulator.async_engine import AsyncEngine, EngineDeadError
from worker.emulator.engine.request import EngineRequest, Output
from worker.emulator.generators.base import Answer, TokenLogprob


class IncrementalDetokenizer:
    """Converts tokens to text. Text that may begin a stop string is held back, as in vLLM.

    A call searches the new text and at most the length of the longest stop string before it.
    """

    __slots__ = ("_decoder", "_held", "_include_stop", "_recent", "_stop", "_window", "stopped_by")

    def __init__(self, decoder: IncrementalDecoder, stop: tuple[str, ...] = (), include_stop: bool = False) -> None:
        self._decoder = decoder
        self._stop = stop
        self._include_stop = include_stop
        self._window = max(map(len, stop), default=1) - 1
        self._recent = ""
        """The last `_window` characters, in which a stop string may begin that ends later."""
        self._held = 0
        """How many of these have not been returned."""
        self.stopped_by: str | None = None
        """The stop string that ended the text."""

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """The text that this token adds. Sets `stopped_by` if a stop string is complete and `may_stop`."""
        delta = self._decoder.push(token)
        if not self._stop:
            return delta
        before = len(self._recent)
        text = self._recent + delta
        unshown = before - self._held
        if may_stop and delta:
            for stop in self._stop:  # in the order of the request: the first one found ends the text
                at = text.find(stop, max(0, before + 1 - len(stop)))
                if at >= 0:
                    self.stopped_by = stop
                    self._recent, self._held = "", 0
                    return text[unshown : at + len(stop) if self._include_stop else at]
        self._recent = text[len(text) - min(self._window, len(text)) :]
        self._held = 0 if self._include_stop else len(self._recent)
        return text[unshown : len(text) - self._held]

    def finish(self) -> str:
        """The text that is still held back when the answer ends without a stop string."""
        held = self._recent[len(self._recent) - self._held :]
        self._recent, self._held = "", 0
        return held + self._decoder.flush()


class Choice:
    """One answer: an `OutputHandler` of the engine. `text` is None if the text is not needed before the end."""

    __slots__ = (
        "_engine", "_generation", "_new_text", "_new_tokens", "_request", "answer", "cached_tokens", "ended_by_token",
        "finish_reason", "index", "stop_reason", "text", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        generation: Generation,
        index: int,
        request: EngineRequest,
        answer: Answer,
        text: IncrementalDetokenizer | None,
        engine: AsyncEngine,
    ) -> None:
        self._generation = generation
        self._engine = engine
        self._request = request
        self.answer = answer
        self._new_text: list[str] = []
        self._new_tokens = 0
        self.index = index
        self.text = text
        self.tokens: list[int] = []
        self.cached_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.ended_by_token = False
        """Whether the last token ended the answer (end of sequence or a stop token). It is then no part of the text."""

    @property
    def prompt_tokens(self) -> int:
        return len(self._request.prompt)

    @property
    def prompt(self) -> Sequence[int]:
        return self._request.prompt

    def start(self) -> None:
        """Submit the request to the engine. Raises `EngineDeadError`."""
        self._engine.submit(self._request, self)

    def on_output(self, output: Output) -> None:
        token, finished = output.token, output.finish_reason
        self.tokens.append(token)
        self._new_tokens += 1
        self.cached_tokens = output.cached_tokens
        if finished == "stop":
            self.ended_by_token = True
            if token in self._request.stop_token_ids:
                self.stop_reason = token
        elif self.text is not None:
            may_stop = len(self.tokens) > self._request.min_tokens
            self._new_text.append(self.text.push(token, may_stop=may_stop))
            if self.text.stopped_by is not None:
                self.stop_reason = self.text.stopped_by
                if finished is None:
                    self._engine.abort(self._request.request_id, "stop")
                self._finish("stop")
                return
        if finished is not None:
            self._finish(finished)
        elif len(self.tokens) == 1 or self._new_tokens >= self._generation.interval:
            self._generation.notify(self)

    def on_abort(self) -> None:
        self._finish("abort")

    def on_engine_dead(self, error: EngineDeadError) -> None:
        self.answer.close()
        self._generation.fail(error)

    def logprobs(self, tokens: int) -> list[Sequence[TokenLogprob]]:
        """The log probabilities of the last `tokens` tokens."""
        first = len(self.tokens) - tokens
        return [self.answer.logprobs(first + index) for index in range(tokens)]

    def take(self) -> tuple[str, list[int]]:
        """Text and tokens since the last call."""
        text = "".join(self._new_text)
        tokens = self.tokens[len(self.tokens) - self._new_tokens :]
        self._new_text.clear()
        self._new_tokens = 0
        return text, tokens

    def release(self) -> None:
        """Abort the request if it runs: release the engine's blocks and the generator. Idempotent."""
        if self.finish_reason is None:
            self._engine.abort(self._request.request_id)
            self.answer.close()

    def _finish(self, reason: str) -> None:
        self.finish_reason = reason
        self._generation.last = self
        if self.text is not None and self.text.stopped_by is None:
            self._new_text.append(self.text.finish())
        self.answer.close()
        self._generation.notify(self)


class Generation:
    """All choices of one HTTP request. Leaving the context aborts those that still run."""

    def __init__(self, *, streaming: bool, interval: int = 1) -> None:
        self.interval = interval
        """Tokens of a choice in one chunk. Its first and its last token are not delayed."""
        self.last: Choice | None = None
        """The choice that finished last."""
        self._streaming = streaming
        self.choices: list[Choice] = []
        self._changed: dict[Choice, None] = {}  # in the order of their changes
        self._open = 0
        self._error: EngineDeadError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for choice in self.choices:
            choice.release()

    def add(
        self, request: EngineRequest, answer: Answer, text: IncrementalDetokenizer | None, engine: AsyncEngine
    ) -> None:
        """Add a choice and start it at this engine. Raises `EngineDeadError`."""
        choice = Choice(self, len(self.choices), request, answer, text, engine)
        self.choices.append(choice)
        self._open += 1
        choice.start()

    def abort(self) -> None:
        """Abort the choices that still run. Their finish reason is then "abort"."""
        for choice in self.choices:
            if choice.finish_reason is None:
                choice.release()
                choice.on_abort()

    @property
    def done(self) -> bool:
        """Whether every choice has finished and `updates` has returned it."""
        return self._open == 0

    async def updates(self) -> list[Choice]:
        """The choices that have changed, at least one; [] once all have finished and been returned.

        Raises `EngineDeadError`.
        """
        while not self._changed:
            if self._error is not None:
                raise self._error
            if not self._open:
                return []
            await self._wait()
        taken = list(self._changed)
        self._changed.clear()
        self._open -= sum(choice.finish_reason is not None for choice in taken)
        return taken

    async def finished(self) -> None:
        """Wait for the end of every choice. Raises `EngineDeadError`."""
        while await self.updates():
            pass

    def notify(self, choice: Choice) -> None:
        """Called by a choice that has changed. Without streaming only the end of a choice counts."""
        if self._streaming or choice.finish_reason is not None:
            self._changed[choice] = None
            self._wake()

    def fail(self, error: EngineDeadError) -> None:
        """Called by a choice whose engine is dead."""
        self._error = error
        self._wake()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def totals(choices: Sequence[Choice], n: int) -> tuple[int, int]:
    """(prompt, completion) tokens. A prompt counts once for its `n` choices."""
    return sum(choice.prompt_tokens for choice in choices[::n]), sum(len(choice.tokens) for choice in choices)


def usage(prompt: int, completion: int) -> dict[str, Any]:
    """The usage object, with its fields in vLLM's order."""
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}


def created_cache_tokens(choice: Choice, block_size: int) -> int:
    """Prompt tokens that were added to the cache: those in full blocks that were not cached."""
    return choice.prompt_tokens // block_size * block_size - choice.cached_tokens
