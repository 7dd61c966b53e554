"""What the handlers of one worker share, and the way from a checked request to running choices."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from kvcache.errors import (
    ApiError,
    max_tokens_too_large,
    model_not_found,
    output_too_long,
    parameter_error,
    prompt_too_long,
)
from kvcache.keys import CacheScope
from kvcache.prompts import PromptError
from kvcache.tokenizer import IncrementalDecoder, Tokenizer
from kvcache.wire import ChatCompletionRequest, CompletionRequest
from worker.engine import EngineRequest
from worker.generators.base import Ask, Generator
from worker.metrics import EngineMetrics
from worker.runner import EngineRunner
from worker.server.generation import Choice, Generation
from worker.server.http import Exchange
from worker.server.text import AnswerText

VLLM_VERSION = "0.32.0"
"""The vLLM whose answers these are."""

LONG_TEXT = 16 * 1024
"""Texts of so many bytes are tokenised in a thread: shorter ones cost less than the way there and back."""

MAX_CHOICES = 16_384
"""Answers to one request: vLLM's bound on `n` (VLLM_MAX_N_SEQUENCES)."""

_Result = TypeVar("_Result")


@dataclass(slots=True)
class Service:
    """One worker, as its handlers see it."""

    model: str
    root: str
    """What `model` stands for: /v1/models names it."""
    tokenizer: Tokenizer
    generator: Generator
    runner: EngineRunner
    metrics: EngineMetrics
    block_size: int
    max_model_len: int
    prompt_tokens_details: bool = True
    request_id_headers: bool = False
    dev_mode: bool = False
    draining: bool = False
    """SIGTERM has come: what runs is finished, nothing new is taken."""
    started: int = field(default_factory=lambda: int(time.time()))
    in_progress: int = 0
    """Completion and chat requests under way."""
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while none is."""
    _ids: itertools.count[int] = field(default_factory=itertools.count)
    _tokenizing: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")
    )

    def __post_init__(self) -> None:
        self.idle.set()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """One request is under way."""
        self.in_progress += 1
        self.idle.clear()
        try:
            yield
        finally:
            self.in_progress -= 1
            if not self.in_progress:
                self.idle.set()

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint`: the version, and a digest of what else decides about answers."""
        facts = f"{self.model} {self.tokenizer.fingerprint} {self.max_model_len} {self.block_size}"
        return f"vllm-{VLLM_VERSION}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"

    def close(self) -> None:
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        self.generator.close()

    def check_model(self, asked: str | None) -> None:
        """Raises `ApiError` (404) for a model that is not served here; none named means this one."""
        if asked is not None and asked != self.model:
            raise model_not_found(asked, [self.model])

    async def tokenize(self, text_bytes: int, work: Callable[[], _Result]) -> _Result:
        """`work` done here, or in a thread when the text is long. Raises `ApiError` for its `PromptError`."""
        try:
            if text_bytes < LONG_TEXT:
                return work()
            return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)
        except PromptError as error:
            raise ApiError(400, str(error), param=error.param) from None

    def check_output_limit(self, asked: int | None) -> None:
        """Raises `ApiError` for more output than the model's context; before any tokenising."""
        if asked is not None and asked > self.max_model_len:
            raise max_tokens_too_large(asked, self.max_model_len)

    def output_limit(self, prompt_tokens: int, asked: int | None, *, text: bool) -> int:
        """Tokens the answer may have. Raises `ApiError` when prompt and answer do not fit the context."""
        if prompt_tokens > self.max_model_len:
            raise prompt_too_long(prompt_tokens, self.max_model_len, at_least=text)
        room = self.max_model_len - prompt_tokens
        limit = max(room, 1) if asked is None else asked
        if limit > room:
            raise output_too_long(prompt_tokens, limit, self.max_model_len)
        return limit

    def generation(self, request: CompletionRequest | ChatCompletionRequest) -> Generation:
        """An empty one: enter its context, then `start` it."""
        return Generation(self.runner, streaming=bool(request.stream))

    def start(
        self,
        generation: Generation,
        request: CompletionRequest | ChatCompletionRequest,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        scope: CacheScope,
    ) -> None:
        """Start `n` choices for each prompt. Raises `ApiError` and `EngineDeadError`."""
        self._check_counts(request, len(prompts), min(limits))
        stop = tuple(request.stop_strings)
        stop_token_ids = frozenset(request.stop_token_ids or ())
        temperature = 1.0 if request.temperature is None else request.temperature
        for prompt, limit in zip(prompts, limits, strict=True):
            self.metrics.asked(request.n, limit)
            for choice in range(request.n):
                answer = self.generator.answer(
                    Ask(prompt, limit, request.min_tokens, request.ignore_eos, temperature, request.seed, choice)
                )
                text = None
                if request.stream or stop:
                    decoder = IncrementalDecoder(self.tokenizer, skip_special_tokens=request.skip_special_tokens)
                    text = AnswerText(decoder, stop, request.include_stop_str_in_output)
                engine_request = EngineRequest(
                    request_id=str(next(self._ids)),
                    prompt=prompt,
                    max_tokens=limit,
                    source=answer,
                    scope=scope,
                    min_tokens=request.min_tokens,
                    ignore_eos=request.ignore_eos,
                    stop_token_ids=stop_token_ids,
                )
                generation.add(engine_request, answer, text)

    def text_of(self, choice: Choice, request: CompletionRequest | ChatCompletionRequest) -> str:
        """The whole text of a finished choice that nobody read before."""
        if choice.text is not None:
            return choice.take()[0]
        tokens = choice.tokens[:-1] if choice.ended_by_token else choice.tokens
        return self.tokenizer.decode(tokens, skip_special_tokens=request.skip_special_tokens)

    @staticmethod
    def _check_counts(request: CompletionRequest | ChatCompletionRequest, prompts: int, limit: int) -> None:
        if request.n * prompts > MAX_CHOICES:
            raise parameter_error(f"n must be at most {MAX_CHOICES // prompts}, got {request.n}.", "n", request.n)
        if request.min_tokens > limit:
            raise parameter_error(
                f"min_tokens must be less than or equal to max_tokens={limit}, got {request.min_tokens}.",
                "min_tokens",
                request.min_tokens,
            )


def request_id(exchange: Exchange, prefix: str, given: str | None) -> str:
    """`cmpl-...`: the suffix is the header X-Request-Id, else the body's `request_id`, else random."""
    return f"{prefix}-{exchange.header(b'x-request-id') or given or secrets.token_hex(8)}"
