"""What a generator is asked for, and what it answers with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Ask:
    """One answer to generate. `choice` tells apart the answers to one prompt; `seed` is the request's, if any."""

    prompt: Sequence[int]
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    temperature: float = 1.0
    seed: int | None = None
    choice: int = 0


class GeneratorError(ValueError):
    """A generator cannot be loaded; the message says what to do."""


class Answer(Protocol):
    """Tokens of one answer: what the engine takes as a `TokenSource`, and can be given up."""

    def token(self, index: int) -> int | None:
        """Id of the `index`-th token; None while it is not ready. Called with 0, 1, 2, ..."""

    def close(self) -> None:
        """No more tokens are wanted. Idempotent."""


class Generator(Protocol):
    """A source of answers."""

    def answer(self, ask: Ask) -> Answer: ...

    def close(self) -> None:
        """Release what the generator holds (threads, a model)."""
