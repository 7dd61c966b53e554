"""Answers from a causal language model on the CPU: one thread takes turns over all answers, a token each.

The engine asks for a token when its step ends; one that the model has not made yet makes the sequence skip that
step. So the text is the model's, and the times are the emulated GPU's unless the CPU is slower.

`CausalLMGenerator` knows no torch (`torch_model` beside it does): anything that makes one token at a time will do.
"""

from __future__ import annotations

import logging
import math
import queue
import random
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvcache.tokens.tokenizer import Tokenizer
from runtime.logs import event
from worker.emulator.generators.base import AnswerRequest, GeneratorError, TokenLogprob

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SamplingMetadata:
    """How one token is chosen."""

    temperature: float
    rng: random.Random
    allowed: Sequence[int] = ()
    """The only tokens that may be chosen; () = all."""
    banned: Collection[int] = ()
    """Tokens that may not be chosen."""
    top_k: int = 0
    """Choose among so many of the likeliest; 0 or less = all."""
    logprobs: int | None = None
    """Say how likely the token is, and name so many of the likeliest; None = do not."""
    prompt_logprobs: int | None = None
    """The same for each of the tokens read."""
    logprob_token_ids: Sequence[int] = ()
    """Say how likely these are, too."""


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """What came of it."""

    token: int
    past: Any
    """Includes the tokens read."""
    logprobs: Sequence[TokenLogprob] = ()
    prompt_logprobs: Sequence[Sequence[TokenLogprob]] = ()
    """One entry for each token read but the first."""


class StepModel(Protocol):
    """A model that makes one token at a time."""

    window: int
    """Tokens it can look at."""

    def step(self, tokens: Sequence[int], past: Any, sampling: SamplingMetadata) -> SamplerOutput:
        """The token after `tokens`, which follow `past` (None = nothing). Called from one thread only."""


class ModelAnswer:
    """One answer in the making. The model's thread appends, the event loop reads."""

    def __init__(self, request: AnswerRequest, rng: random.Random, window: int) -> None:
        self.request = request
        self.rng = rng
        # Room for the answer, but never at the price of more than half the context.
        self.unseen: Sequence[int] = list(request.prompt[-max(window - request.max_tokens, window // 2) :])
        """Tokens the model has still to read."""
        self.past: Any = None
        self.length = 0
        """Tokens in `past`."""
        self.tokens: list[int] = []
        self.token_logprobs: list[Sequence[TokenLogprob]] = []
        """Of each token, where the request asks for them."""
        self.prompt_token_logprobs: Sequence[Sequence[TokenLogprob]] = ()
        self.closed = False

    def token(self, index: int) -> int | None:
        tokens = self.tokens
        return tokens[index] if index < len(tokens) else None

    def logprobs(self, index: int) -> Sequence[TokenLogprob]:
        return (
            self.token_logprobs[index]
            if index < len(self.token_logprobs)
            else (TokenLogprob(self.tokens[index], -math.inf, 1),)
        )

    def prompt_logprobs(self) -> Sequence[Sequence[TokenLogprob] | None]:
        """Of what the model has not read (a beginning that its window has no room for), nothing is known."""
        known = self.prompt_token_logprobs
        return [*([None] * (len(self.request.prompt) - len(known))), *known]

    def close(self) -> None:
        self.closed = True


class CausalLMGenerator:
    """A `Generator` over one model. `eos` ends answers; `seed` and the request decide every token."""

    def __init__(self, model: StepModel, eos: int | None, seed: int) -> None:
        self._model = model
        self._eos = eos
        self._seed = seed
        self._turns: queue.SimpleQueue[ModelAnswer | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="generate", daemon=True)
        self._thread.start()

    def answer(self, request: AnswerRequest) -> ModelAnswer:
        rng = random.Random(f"{self._seed}/{request.seed}/{request.choice}")
        answer = ModelAnswer(request, rng, self._model.window)
        self._turns.put(answer)
        return answer

    def close(self) -> None:
        """Stop the thread after the token it is making."""
        self._turns.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (answer := self._turns.get()) is not None:
            if answer.closed:
                continue
            try:
                token = self._step(answer)
            except Exception:  # whatever a model raises must end this answer only, or its request would wait for ever
                logger.exception("generation_failed")
                token = None
            if token is None:
                self._give_up(answer)
                continue
            answer.tokens.append(token)
            ended = token == self._eos and not answer.request.ignore_eos
            if not ended and len(answer.tokens) < answer.request.max_tokens:
                self._turns.put(answer)

    def _step(self, answer: ModelAnswer) -> int:
        request, window = answer.request, self._model.window
        if answer.length + len(answer.unseen) > window:  # begin again with the newer half of what it can look at
            text = [*request.prompt, *answer.tokens]
            answer.unseen, answer.past, answer.length = text[-(window // 2) :], None, 0
        made = len(answer.tokens)
        if request.forced_tokens is not None and made <= len(request.forced_tokens):
            forced = request.forced_tokens[made] if made < len(request.forced_tokens) else self._eos
            allowed: Sequence[int] = request.allowed if forced is None else (forced,)
        else:
            allowed = request.allowed
        banned = request.banned
        if (
            self._eos is not None
            and (request.ignore_eos or made < request.min_tokens)
            and request.forced_tokens is None
        ):
            banned |= {self._eos}
        output = self._model.step(
            answer.unseen,
            answer.past,
            SamplingMetadata(
                request.temperature,
                answer.rng,
                allowed,
                banned,
                request.top_k,
                request.logprobs,
                None if made or answer.past is not None else request.prompt_logprobs,
                request.logprob_token_ids,
            ),
        )
        if request.logprobs is not None:
            answer.token_logprobs.append(output.logprobs)
        if output.prompt_logprobs:
            answer.prompt_token_logprobs = output.prompt_logprobs
        answer.past = output.past
        answer.length += len(answer.unseen)
        answer.unseen = [output.token]
        return output.token

    def _give_up(self, answer: ModelAnswer) -> None:
        """End the answer: with its end-of-sequence token, repeated where the request ignores that."""
        missing = answer.request.max_tokens - len(answer.tokens)
        answer.tokens.extend([self._eos or 0] * missing)
        event(logger, logging.ERROR, "answer_given_up", tokens=len(answer.tokens) - missing)


def load_causal_lm(name: str, tokenizer: Tokenizer, seed: int) -> CausalLMGenerator:
    """The model called `name` ("gpt2", a folder, a Hugging Face id). Raises `GeneratorError`."""
    try:
        from worker.emulator.generators.torch_model import TorchModel  # hundreds of megabytes, for those who ask for it
    except ModuleNotFoundError as error:
        raise GeneratorError(
            f"--generator {name} needs the Python package {error.name}: pip install 'kvcluster[gpt2]'"
        ) from None
    return CausalLMGenerator(TorchModel(name, tokenizer.vocab_size), tokenizer.eos_token_id, seed)
