"""Answers from a causal language model on the CPU. One thread generates a token for each answer in turn.

The engine asks for a token when its step ends. If the model has not generated it yet, the sequence skips that step. The
text is therefore the model's, and the times are the emulated GPU's unless the CPU is slower.

`CausalLMGenerator` does not depend on torch (`torch_model` does): it takes any `StepModel`.
"""

from __future__ import annotations

import math
import queue
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from kvcache.tokens.tokenizer import Tokenizer
from runtime.logs import EventLogger
from worker.emulator.generators.base import AnswerRequest, GeneratorError, TokenLogprob

logger = EventLogger(__name__)


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """The token chosen, and the model's state after the tokens passed to it."""

    token: int
    past: Any
    """The key-value cache, including the tokens passed."""
    logprobs: Sequence[TokenLogprob] = ()
    prompt_logprobs: Sequence[Sequence[TokenLogprob]] = ()
    """One entry for each token passed, except the first."""


class StepModel(Protocol):
    """A model that generates one token at a time."""

    window: int
    """Longest context, in tokens."""

    def step(self, tokens: Sequence[int], past: Any, request: AnswerRequest, rng: random.Random) -> SamplerOutput:
        """The token after `tokens`, which follow `past` (None: nothing), chosen as `request` says of the present token,
        with the log probabilities that it asks for. Called from one thread only."""


class ModelAnswer:
    """An answer that is being generated. The model's thread appends tokens, the event loop reads them."""

    def __init__(self, request: AnswerRequest, rng: random.Random, window: int) -> None:
        self.request = request
        self.rng = rng
        # Leaves room for the answer, but keeps at least half a window of the prompt.
        self.unseen: Sequence[int] = list(request.prompt[-max(window - request.max_tokens, window // 2) :])
        """Tokens that have not been passed to the model yet."""
        self.past: Any = None
        self.length = 0
        """Tokens in `past`."""
        self.tokens: list[int] = []
        self.token_logprobs: list[Sequence[TokenLogprob]] = []
        """Of each token, if the request asks for them."""
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
        """None for the beginning of a prompt that is longer than the model's window."""
        known = self.prompt_token_logprobs
        return [*([None] * (len(self.request.prompt) - len(known))), *known]

    def close(self) -> None:
        self.closed = True


class CausalLMGenerator:
    """A `Generator` with one model. `eos` ends answers. `seed` and the request determine every token."""

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
        """Stop the thread after its present token."""
        self._turns.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (answer := self._turns.get()) is not None:
            if answer.closed:
                continue
            try:
                token = self._step(answer)
            except Exception:  # an error of the model ends this answer only; its request must not wait for ever
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
        if answer.length + len(answer.unseen) > window:  # start anew with the last half window of the text
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
        scored = None if made or answer.past is not None else request.prompt_logprobs
        present = replace(request, allowed=allowed, banned=banned, prompt_logprobs=scored)
        output = self._model.step(answer.unseen, answer.past, present, answer.rng)
        if request.logprobs is not None:
            answer.token_logprobs.append(output.logprobs)
        if output.prompt_logprobs:
            answer.prompt_token_logprobs = output.prompt_logprobs
        answer.past = output.past
        answer.length += len(answer.unseen)
        answer.unseen = [output.token]
        return output.token

    def _give_up(self, answer: ModelAnswer) -> None:
        """End the answer with its end-of-sequence token, repeated up to `max_tokens` for requests that ignore it."""
        missing = answer.request.max_tokens - len(answer.tokens)
        answer.tokens.extend([self._eos or 0] * missing)
        logger.error("answer_given_up", tokens=len(answer.tokens) - missing)


def load_causal_lm(name: str, tokenizer: Tokenizer, seed: int) -> CausalLMGenerator:
    """The model called `name` ("gpt2", a folder, a Hugging Face id). Raises `GeneratorError`."""
    try:
        from worker.emulator.generators.torch_model import TorchModel  # torch takes hundreds of megabytes
    except ModuleNotFoundError as error:
        raise GeneratorError(
            f"--generator {name} needs the Python package {error.name}: pip install 'kvcluster[gpt2]'"
        ) from None
    return CausalLMGenerator(TorchModel(name, tokenizer.vocab_size), tokenizer.eos_token_id, seed)
