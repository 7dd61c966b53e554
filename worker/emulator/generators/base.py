"""The interface of generators: requests, answers and log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class TokenLogprob(NamedTuple):
    """One token at one position, with its probability there."""

    token: int
    logprob: float
    """Natural logarithm of the probability."""
    rank: int
    """1 for the likeliest token."""


@dataclass(frozen=True, slots=True)
class AnswerRequest:
    """One answer to generate. `choice` is its index among the answers to one prompt, `seed` the client's, if any."""

    prompt: Sequence[int]
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    temperature: float = 1.0
    seed: int | None = None
    choice: int = 0
    top_k: int = 0
    """Choose from this many of the likeliest tokens; 0 or less: from all."""
    forced_tokens: Sequence[int] | None = None
    """The tokens of the answer, without its end of sequence; None: any."""
    allowed: Sequence[int] = ()
    """The only tokens that may be chosen; empty: all may."""
    banned: frozenset[int] = frozenset()
    """Tokens that may not be chosen."""
    logprobs: int | None = None
    """How many of the likeliest tokens `Answer.logprobs` lists; None: it will not be called."""
    logprob_token_ids: Sequence[int] = ()
    """Tokens that it lists instead."""
    prompt_logprobs: int | None = None
    """The same for `Answer.prompt_logprobs`."""


class GeneratorError(ValueError):
    """The generator cannot be loaded; the message says what to do."""


class Answer(Protocol):
    """The tokens of one answer: a `TokenSource` of the engine that can be closed."""

    def token(self, index: int) -> int | None:
        """The id of token number `index`, or None while it is not ready. Called with 0, 1, 2, ..."""

    def logprobs(self, index: int) -> Sequence[TokenLogprob]:
        """Token number `index`, which was generated already, then as many of the likeliest tokens as were asked for,
        the best first, without that token."""

    def prompt_logprobs(self) -> Sequence[Sequence[TokenLogprob] | None]:
        """The same for each token of the prompt; None for the first, which has no context."""

    def close(self) -> None:
        """Stop generating. Idempotent."""


class Generator(Protocol):
    """Generates answers."""

    def answer(self, request: AnswerRequest) -> Answer: ...

    def close(self) -> None:
        """Release the generator's threads and model."""
