"""The sampling parameters of a request: vLLM's SamplingParams, with its bounds and its checks against the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvcache.errors import ApiError, parameter_error
from kvcache.tokens.tokenizer import Tokenizer
from worker.emulator.protocol.base import thinking_token_budget
from worker.emulator.protocol.chat import ChatCompletionRequest
from worker.emulator.protocol.completion import CompletionRequest
from worker.emulator.protocol.responses import ResponsesRequest
from worker.emulator.protocol.structured_outputs import (
    StructuredOutputsParams,
    check_structured,
    structured_outputs_of,
)
from worker.emulator.protocol.validation import InternalError

MAX_CHOICES = 16_384
"""vLLM's VLLM_MAX_N_SEQUENCES."""

MAX_LOGPROBS = 20
"""vLLM's --max-logprobs: log probabilities with each token."""

MAX_LOGPROB_TOKEN_IDS = 128
MAX_BAD_WORDS = 128
"""vLLM's VLLM_MAX_NUM_BAD_WORDS, after tokenising."""
GREEDY = 1e-5
"""Below this temperature the likeliest token is chosen."""


@dataclass(slots=True)
class Sampling:
    """Sampling parameters. The constructor checks them as vLLM does, in its order. Raises `ApiError`."""

    max_tokens: int
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    bad_words: Sequence[str] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: Sequence[int] | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    thinking_token_budget: int | None = None
    skip_special_tokens: bool = True
    include_stop: bool = False
    structured: StructuredOutputsParams | None = None
    extra: Mapping[str, Any] | None = None
    routed_experts_prompt_start: int = 0
    stream_interval: int | None = None
    beam: bool = False
    """Beam search, of which vLLM checks little and reports no cached tokens."""

    def __post_init__(self) -> None:
        if 0 < self.temperature < 0.01:
            self.temperature = 0.01
        if self.seed == -1:
            self.seed = None
        self.thinking_token_budget = thinking_token_budget(self.thinking_token_budget)
        check_choices(self.n, "beam_width" if self.beam else "n")
        if self.beam:
            return
        _check_integers(self.extra)
        self._check_penalties()
        self._check_sampling()
        self._check_length()
        if not all(self.stop):
            raise ApiError(400, "stop cannot contain an empty string.")
        if not all(self.bad_words):
            raise ApiError(
                400, f"bad_words cannot contain an empty string. Got bad_words={list(dict.fromkeys(self.bad_words))}"
            )
        if self.temperature < GREEDY:
            self.top_p, self.top_k, self.min_p = 1.0, 0, 0.0
            if self.n > 1:
                raise ApiError(400, f"n must be 1 when using greedy sampling, got {self.n}.")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always chosen."""
        return self.temperature < GREEDY

    def _check_penalties(self) -> None:
        if not -2.0 <= self.presence_penalty <= 2.0:
            raise ApiError(400, f"presence_penalty must be in [-2, 2], got {self.presence_penalty}.")
        if not -2.0 <= self.frequency_penalty <= 2.0:
            raise ApiError(400, f"frequency_penalty must be in [-2, 2], got {self.frequency_penalty}.")
        if not math.isfinite(self.repetition_penalty):
            raise ApiError(400, f"repetition_penalty must be a finite number, got {self.repetition_penalty}.")
        if self.repetition_penalty <= 0.0:
            raise ApiError(400, f"repetition_penalty must be greater than zero, got {self.repetition_penalty}.")

    def _check_sampling(self) -> None:
        temperature = self.temperature
        if not math.isfinite(temperature):
            raise parameter_error(
                f"temperature must be a finite number, got {temperature}.", "temperature", temperature
            )
        if temperature < 0.0:
            raise parameter_error(f"temperature must be non-negative, got {temperature}.", "temperature", temperature)
        if temperature > 2.0:
            raise parameter_error(f"temperature must be in [0, 2], got {temperature}.", "temperature", temperature)
        if not 0.0 < self.top_p <= 1.0:
            raise parameter_error(f"top_p must be in (0, 1], got {self.top_p}.", "top_p", self.top_p)
        if self.top_k < -1:
            raise ApiError(400, f"top_k must be 0 (disable), or at least 1, got {self.top_k}.")
        if not 0.0 <= self.min_p <= 1.0:
            raise ApiError(400, f"min_p must be in [0, 1], got {self.min_p}.")

    def _check_length(self) -> None:
        if self.max_tokens < 1:
            raise parameter_error(
                f"max_tokens must be at least 1, got {self.max_tokens}.", "max_tokens", self.max_tokens
            )
        if self.min_tokens < 0:
            raise ApiError(400, f"min_tokens must be greater than or equal to 0, got {self.min_tokens}.")
        if self.min_tokens > self.max_tokens:
            raise ApiError(
                400, f"min_tokens must be less than or equal to max_tokens={self.max_tokens}, got {self.min_tokens}."
            )

    def check_model(self, tokenizer: Tokenizer) -> None:
        """Raises `ApiError` for parameters that do not fit the vocabulary. vLLM finds out only when it submits the
        request, and a stream has begun by then."""
        if self.beam:
            return
        if not all(_fits(number) for number in (self.top_k, self.stream_interval or 0)):
            raise InternalError("")  # vLLM fails to send it to its engine
        vocabulary = tokenizer.vocab_size
        self._check_logprobs(vocabulary)
        if self.logit_bias:
            _check_ids(self.logit_bias, "logit_bias", vocabulary)
        _check_ids(self.stop_token_ids, "stop_token_ids", vocabulary)
        if self.allowed_token_ids is not None:
            allowed = list(self.allowed_token_ids)
            if not allowed:
                raise parameter_error("allowed_token_ids is not None and empty!", "allowed_token_ids", allowed)
            if outside := [token for token in allowed if not 0 <= token < vocabulary]:
                raise parameter_error("allowed_token_ids contains out-of-vocab token id!", "allowed_token_ids", outside)
        if self.structured is not None:
            check_structured(self.structured)
        if self.thinking_token_budget is not None:
            raise ApiError(
                400,
                "thinking_token_budget is set but reasoning_config is not configured. Please set --reasoning-parser "
                "and/or --reasoning-config to use thinking_token_budget.",
            )

    def check_prompt(self, prompt_tokens: int, tokenizer: Tokenizer) -> None:
        """Raises `ApiError` for parameters that do not fit the prompt, and for bad words without tokens."""
        if self.routed_experts_prompt_start > prompt_tokens:
            raise parameter_error(
                f"routed_experts_prompt_start must be between 0 and the prompt length ({prompt_tokens}), inclusive.",
                "routed_experts_prompt_start",
                self.routed_experts_prompt_start,
            )
        self.banned_words(tokenizer)

    def banned_words(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Token ids of each bad word, with and without a space before it. Raises `ApiError`."""
        words: list[list[int]] = []
        for word in dict.fromkeys(self.bad_words):
            plain = tokenizer.encode(word.lstrip(), add_special_tokens=False)
            if not plain:
                raise parameter_error(
                    "bad_words entries must tokenize to at least one token.", "bad_words", list(self.bad_words)
                )
            spaced = tokenizer.encode(f" {word.lstrip()}", add_special_tokens=False)
            words.append(plain)
            if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
                words.append(spaced)
            if len(words) > MAX_BAD_WORDS:
                raise parameter_error(
                    f"Too many bad words after tokenization: {len(words)}. The max number is {MAX_BAD_WORDS}.",
                    "bad_words",
                    list(self.bad_words),
                )
        return words

    def _check_logprobs(self, vocabulary: int) -> None:
        _check_most("sample", "logprobs", self.logprobs, vocabulary)
        if self.logprob_token_ids is not None:
            number = len(self.logprob_token_ids)
            if number > MAX_LOGPROB_TOKEN_IDS:
                raise parameter_error(
                    f"Requested logprob_token_ids of length {number}, which is greater than max allowed: "
                    f"{MAX_LOGPROB_TOKEN_IDS}",
                    "logprob_token_ids",
                    number,
                )
            _check_ids(self.logprob_token_ids, "logprob_token_ids", vocabulary)
        _check_most("prompt", "prompt_logprobs", self.prompt_logprobs, vocabulary)


_OF_THE_SAME_NAME = (
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("bad_words", "ignore_eos", "min_tokens", "allowed_token_ids", "thinking_token_budget", "skip_special_tokens"),
    *("routed_experts_prompt_start", "stream_interval"),
)
"""Sampling parameters that requests name as `Sampling` does. One that is None or missing has its default."""


def common_parameters(request: ChatCompletionRequest | CompletionRequest | ResponsesRequest) -> dict[str, Any]:
    """The sampling parameters that the requests of several endpoints state alike."""
    stop = request.stop
    return {name: value for name in _OF_THE_SAME_NAME if (value := getattr(request, name, None)) is not None} | {
        "stop": (stop,) if isinstance(stop, str) else tuple(stop or ()),
        "stop_token_ids": tuple(dict.fromkeys(request.stop_token_ids or ())),
        "include_stop": request.include_stop_str_in_output,
        "extra": request.vllm_xargs,
    }


def sampling_of(request: ChatCompletionRequest | CompletionRequest, max_tokens: int) -> Sampling:
    """The sampling parameters of a request, for answers of at most `max_tokens`. Raises `ApiError`."""
    return Sampling(
        max_tokens=1 if request.only_echo else max_tokens,
        n=request.choices,
        logprobs=None if request.logprob_token_ids else request.asked_logprobs,
        prompt_logprobs=request.asked_prompt_logprobs,
        logprob_token_ids=request.logprob_token_ids or None,
        logit_bias=None if request.use_beam_search else logit_bias(request.logit_bias),
        structured=structured_outputs_of(request.structured_outputs, request.response_format),
        beam=request.use_beam_search,
        **common_parameters(request),
    )


def response_sampling(request: ResponsesRequest, max_tokens: int) -> Sampling:
    """The same for a request of the Responses API, whose empty stop string means none. Raises `ApiError`."""
    return Sampling(
        max_tokens=max_tokens,
        logprobs=request.top_logprobs if request.wants_logprobs else None,
        logit_bias=logit_bias(request.logit_bias),
        structured=request.structured(),
        **common_parameters(request) | ({} if request.stop else {"stop": ()}),
    )


def logit_bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    """The bias of each token id, limited to -100 to 100. Raises `ApiError` for a key that is no id."""
    if given is None:
        return None
    bias, bad = {}, []
    for key, value in given.items():
        try:
            bias[int(key)] = min(100.0, max(-100.0, value))
        except ValueError:
            bad.append(key)
    if bad:
        raise parameter_error(
            f"logit_bias contains key(s) that cannot be converted to integer token IDs: {bad!r}", "logit_bias", bad
        )
    return bias


def check_choices(number: int, name: str) -> None:
    """Raises `ApiError` for a number of answers out of range."""
    if number < 1:
        raise ApiError(400, f"{name} must be at least 1, got {number}.")
    if number > MAX_CHOICES:
        raise ApiError(
            400,
            f"{name} must be at most {MAX_CHOICES}, got {number}. To increase this limit, set the "
            "VLLM_MAX_N_SEQUENCES environment variable.",
        )


def _fits(number: int) -> bool:
    """Whether MessagePack can represent the number."""
    return -(2**63) <= number < 2**64


def _check_integers(extra: Mapping[str, Any] | None) -> None:
    for value in extra.values() if extra else ():
        for entry in value if isinstance(value, list) else (value,):
            if isinstance(entry, int) and not _fits(entry):
                raise parameter_error("extra_args integers must be between -2**63 and 2**64 - 1.", "extra_args")


def _check_most(what: str, name: str, asked: int | None, vocabulary: int) -> None:
    number = vocabulary if asked == -1 else asked
    if number and number > MAX_LOGPROBS:
        raise parameter_error(
            f"Requested {what} logprobs of {number}, which is greater than max allowed: {MAX_LOGPROBS}", name, number
        )


def _check_ids(ids: Sequence[int] | Mapping[int, float], name: str, vocabulary: int) -> None:
    if outside := [token for token in ids if not 0 <= token < vocabulary]:
        raise parameter_error(
            f"token_id(s) {outside} in {name} contain out-of-vocab token ids. Vocabulary size: {vocabulary}",
            name,
            outside,
        )
