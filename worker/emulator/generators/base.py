"""What a generator is asked for, and what it answers with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class TokenLogprob(NamedTuple):
    """One token at one place of a text."""

    token: int
    logprob: float
    """Natural logarithm of its probability there."""
    rank: int
    """1 for the likeliest token."""


@dataclass(frozen=True, slots=True)
class AnswerRequest:
    """One answer to generate. `choice` tells apart the answers to one prompt; `seed` is the request's, if any."""

    prompt: Sequence[int]
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    temperature: float = 1.0
    seed: int | None = None
    choice: int = 0
    top_k: int = 0
    """Only so many of the likeliest tokens are chosen from; 0 or less = all."""
    forced_tokens: Sequence[int] | None = None
    """Tokens that the answer must consist of, its end of sequence not among them; None = any."""
    allowed: Sequence[int] = ()
    """The only tokens that may be chosen; () = all."""
    banned: frozenset[int] = frozenset()
    """Tokens that may not be chosen."""
    logprobs: int | None = None
    """How many of the likeliest tokens `Answer.logprobs` names; None = it will not be asked."""
    logprob_token_ids: Sequence[int] = ()
    """Tokens that it names instead."""
    prompt_logprobs: int | None = None
    """The same for `Answer.prompt_logprobs`."""


class GeneratorError(ValueError):
    """A generator cannot be loaded; the message says what to do."""


class Answer(Protocol):
    """Tokens of one answer: what the engine takes as a `TokenSource`, and can be given up."""

    def token(self, index: int) -> int | None:
        """Id of the `index`-th token; None while it is not ready. Called with 0, 1, 2, ..."""

    def logprobs(self, index: int) -> Sequence[TokenLogprob]:
        """The `index`-th token, made already, then as many of the likeliest ones as were asked for, best first, without
        repeating it."""

    def prompt_logprobs(self) -> Sequence[Sequence[TokenLogprob] | None]:
        """The same for each token of the prompt; None for the first, which follows nothing."""

    def close(self) -> None:
        """No more tokens are wanted. Idempotent."""


class Generator(Protocol):
    """A source of answers."""

    def answer(self, request: AnswerRequest) -> Answer: ...

    def close(self) -> None:
        """Release what the generator holds (threads, a model)."""
