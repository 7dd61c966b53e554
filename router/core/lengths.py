"""How long answers are expected to be: what the router learns from those that it has seen."""

from __future__ import annotations

from typing import NamedTuple

REMEMBERED = 256
"""Kinds of requests whose lengths are remembered, the latest ones: the state is bounded."""
MEMORY = 20
"""Weight of the past in a mean, in answers."""


class AnswerKind(NamedTuple):
    """Requests whose answers are taken to be about as long as one another's."""

    model: str | None
    """A model or an adapter."""
    limit: int
    """Number of binary digits of the most tokens that the request allows; 0: it sets no limit."""


def kind_of(model: str | None, max_tokens: int | None) -> AnswerKind:
    """The kind of a request for this model with this limit."""
    return AnswerKind(model, max_tokens.bit_length() if max_tokens else 0)


class _Mean:
    __slots__ = ("count", "tokens")

    def __init__(self, tokens: float) -> None:
        self.tokens = tokens
        self.count = 1

    def add(self, tokens: float) -> None:
        self.count = min(self.count + 1, MEMORY)
        self.tokens += (tokens - self.tokens) / self.count


class AnswerLengths:
    """Means of the lengths of answers, one for each kind of request. O(1) an operation.

    Clients that allow 4,096 tokens and get 300 do not tell about clients that ask for exactly 512, so requests are kept
    apart by model and by the magnitude of their limit. The first answer of a kind counts as much as the mean of all.
    """

    __slots__ = ("_all", "_kinds")

    def __init__(self, tokens: float) -> None:
        """`tokens`: assumed until answers are observed."""
        self._all = _Mean(tokens)
        self._kinds: dict[AnswerKind, _Mean] = {}  # in the order of the last answer

    @property
    def mean(self) -> float:
        """Of all answers."""
        return self._all.tokens

    def expect(self, kind: AnswerKind, max_tokens: int | None, hint: int | None) -> float:
        """Expected tokens of the answer to a request of this kind: its `hint`, if it has one, else what such answers
        had so far; never more than `max_tokens`."""
        tokens = float(hint) if hint is not None else self._kinds.get(kind, self._all).tokens
        return tokens if max_tokens is None else min(tokens, max_tokens)

    def observe(self, kind: AnswerKind, tokens: int) -> None:
        """An answer to a request of this kind has this many tokens."""
        mean = self._kinds.pop(kind, None)
        if mean is None:
            mean = _Mean(self._all.tokens)
        self._kinds[kind] = mean
        mean.add(tokens)
        self._all.add(tokens)
        if len(self._kinds) > REMEMBERED:
            del self._kinds[next(iter(self._kinds))]
