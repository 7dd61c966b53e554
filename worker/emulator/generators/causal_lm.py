"""Answers from a causal language model on the CPU: one thread takes turns over all answers, a token each.

The engine asks for a token when its step ends; one that the model has not made yet makes the sequence skip that
step. So the text is the model's, and the times are the emulated GPU's unless the CPU is slower.

`TurnTaker` knows no torch (`torch_model` beside it does): anything that makes one token at a time will do.
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
from worker.emulator.generators.base import Ask, GeneratorError, Likely

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Draw:
    """How one token is chosen."""

    temperature: float
    chance: random.Random
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
    others: Sequence[int] = ()
    """Say how likely these are, too."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What came of it."""

    token: int
    past: Any
    """Includes the tokens read."""
    likely: Sequence[Likely] = ()
    prompt: Sequence[Sequence[Likely]] = ()
    """One entry for each token read but the first."""


class StepModel(Protocol):
    """A model that makes one token at a time."""

    window: int
    """Tokens it can look at."""

    def step(self, tokens: Sequence[int], past: Any, draw: Draw) -> Drawn:
        """The token after `tokens`, which follow `past` (None = nothing). Called from one thread only."""


class ModelAnswer:
    """One answer in the making. The model's thread appends, the event loop reads."""

    def __init__(self, ask: Ask, chance: random.Random, window: int) -> None:
        self.ask = ask
        self.chance = chance
        # Room for the answer, but never at the price of more than half the context.
        self.unseen: Sequence[int] = list(ask.prompt[-max(window - ask.max_tokens, window // 2) :])
        """Tokens the model has still to read."""
        self.past: Any = None
        self.length = 0
        """Tokens in `past`."""
        self.tokens: list[int] = []
        self.likelihoods: list[Sequence[Likely]] = []
        """Of each token, where the request asks for them."""
        self.prompt_likelihoods: Sequence[Sequence[Likely]] = ()
        self.closed = False

    def token(self, index: int) -> int | None:
        tokens = self.tokens
        return tokens[index] if index < len(tokens) else None

    def likely(self, index: int) -> Sequence[Likely]:
        return self.likelihoods[index] if index < len(self.likelihoods) else (Likely(self.tokens[index], -math.inf, 1),)

    def likely_prompt(self) -> Sequence[Sequence[Likely] | None]:
        """Of what the model has not read (a beginning that its window has no room for), nothing is known."""
        known = self.prompt_likelihoods
        return [*([None] * (len(self.ask.prompt) - len(known))), *known]

    def close(self) -> None:
        self.closed = True


class TurnTaker:
    """A `Generator` over one model. `eos` ends answers; `seed` and the ask decide every token."""

    def __init__(self, model: StepModel, eos: int | None, seed: int) -> None:
        self._model = model
        self._eos = eos
        self._seed = seed
        self._turns: queue.SimpleQueue[ModelAnswer | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="generate", daemon=True)
        self._thread.start()

    def answer(self, ask: Ask) -> ModelAnswer:
        chance = random.Random(f"{self._seed}/{ask.seed}/{ask.choice}")
        answer = ModelAnswer(ask, chance, self._model.window)
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
            ended = token == self._eos and not answer.ask.ignore_eos
            if not ended and len(answer.tokens) < answer.ask.max_tokens:
                self._turns.put(answer)

    def _step(self, answer: ModelAnswer) -> int:
        ask, window = answer.ask, self._model.window
        if answer.length + len(answer.unseen) > window:  # begin again with the newer half of what it can look at
            text = [*ask.prompt, *answer.tokens]
            answer.unseen, answer.past, answer.length = text[-(window // 2) :], None, 0
        made = len(answer.tokens)
        if ask.text is not None and made <= len(ask.text):
            forced = ask.text[made] if made < len(ask.text) else self._eos
            allowed: Sequence[int] = ask.allowed if forced is None else (forced,)
        else:
            allowed = ask.allowed
        banned = ask.banned
        if self._eos is not None and (ask.ignore_eos or made < ask.min_tokens) and ask.text is None:
            banned |= {self._eos}
        drawn = self._model.step(
            answer.unseen,
            answer.past,
            Draw(
                ask.temperature,
                answer.chance,
                allowed,
                banned,
                ask.top_k,
                ask.logprobs,
                None if made or answer.past is not None else ask.prompt_logprobs,
                ask.others,
            ),
        )
        if ask.logprobs is not None:
            answer.likelihoods.append(drawn.likely)
        if drawn.prompt:
            answer.prompt_likelihoods = drawn.prompt
        answer.past = drawn.past
        answer.length += len(answer.unseen)
        answer.unseen = [drawn.token]
        return drawn.token

    def _give_up(self, answer: ModelAnswer) -> None:
        """End the answer: with its end-of-sequence token, repeated where the request ignores that."""
        missing = answer.ask.max_tokens - len(answer.tokens)
        answer.tokens.extend([self._eos or 0] * missing)
        event(logger, logging.ERROR, "answer_given_up", tokens=len(answer.tokens) - missing)


def load_causal_lm(name: str, tokenizer: Tokenizer, seed: int) -> TurnTaker:
    """The model called `name` ("gpt2", a folder, a Hugging Face id). Raises `GeneratorError`."""
    try:
        from worker.emulator.generators.torch_model import TorchModel  # hundreds of megabytes, for those who ask for it
    except ModuleNotFoundError as error:
        raise GeneratorError(
            f"--generator {name} needs the Python package {error.name}: pip install 'kvcluster[gpt2]'"
        ) from None
    return TurnTaker(TorchModel(name, tokenizer.vocab_size), tokenizer.eos_token_id, seed)
