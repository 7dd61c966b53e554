"""Answers from a causal language model on the CPU: one thread takes turns over all answers, a token each.

The engine asks for a token when its step ends; one that the model has not made yet makes the sequence skip that
step. So the text is the model's, and the times are the emulated GPU's unless the CPU is slower.

`TurnTaker` knows no torch (`worker.generators.torch_model` does): anything that makes one token at a time will do.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
from collections.abc import Sequence
from typing import Any, Protocol

from kvcache.logs import event
from kvcache.tokenizer import Tokenizer
from worker.generators.base import Ask, GeneratorError

logger = logging.getLogger(__name__)


class StepModel(Protocol):
    """A model that makes one token at a time."""

    window: int
    """Tokens it can look at."""

    def step(
        self, tokens: Sequence[int], past: Any, temperature: float, chance: random.Random, banned: int | None
    ) -> tuple[int, Any]:
        """The token after `tokens`, which follow `past` (None = nothing); and the past that includes them.

        `banned` may not be chosen. Called from one thread only.
        """


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
        self.closed = False

    def token(self, index: int) -> int | None:
        tokens = self.tokens
        return tokens[index] if index < len(tokens) else None

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
        banned = self._eos if ask.ignore_eos or len(answer.tokens) < ask.min_tokens else None
        token, answer.past = self._model.step(answer.unseen, answer.past, ask.temperature, answer.chance, banned)
        answer.length += len(answer.unseen)
        answer.unseen = [token]
        return token

    def _give_up(self, answer: ModelAnswer) -> None:
        """End the answer: with its end-of-sequence token, repeated where the request ignores that."""
        missing = answer.ask.max_tokens - len(answer.tokens)
        answer.tokens.extend([self._eos or 0] * missing)
        event(logger, logging.ERROR, "answer_given_up", tokens=len(answer.tokens) - missing)


def load_causal_lm(name: str, tokenizer: Tokenizer, seed: int) -> TurnTaker:
    """The model called `name` ("gpt2", a folder, a Hugging Face id). Raises `GeneratorError`."""
    try:
        from worker.generators.torch_model import TorchModel  # hundreds of megabytes, for those who ask for it
    except ModuleNotFoundError as error:
        raise GeneratorError(
            f"--generator {name} needs the Python package {error.name}: pip install 'kvcluster[gpt2]'"
        ) from None
    return TurnTaker(TorchModel(name, tokenizer.vocab_size), tokenizer.eos_token_id, seed)
