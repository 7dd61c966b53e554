"""Log probabilities in the formats of the APIs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kvcache.tokens.tokenizer import Tokenizer
from worker.emulator.generators.base import TokenLogprob

NO_LOGPROB = -9999.0
"""The log probability that is written for a probability of 0."""


class TokenTexts:
    """Writes tokens as text or, with `as_ids`, as numbers."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def text(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def shown(self, token: int) -> str:
        return f"token_id:{token}" if self._as_ids else self.text(token)


def completion_logprobs(
    tokens: Sequence[int], entries: Sequence[Sequence[TokenLogprob] | None], top: int, texts: TokenTexts, offset: int
) -> dict[str, Any]:
    """The `logprobs` of a completion's choice: `top` alternatives to each token (-1: all), with text offsets from
    `offset` on. An entry is None for a token without context."""
    shown = [texts.shown(token) for token in tokens]
    offsets = []
    for text in shown:
        offsets.append(offset)
        offset += len(text)
    return {
        "text_offset": offsets,
        "token_logprobs": [None if entry is None else _value(entry[0]) for entry in entries],
        "tokens": shown,
        "top_logprobs": [
            None
            if entry is None
            else {texts.shown(one.token): _value(one) for one in (entry if top < 0 else entry[: top + 1])}
            for entry in entries
        ],
    }


def chat_logprobs(entries: Sequence[Sequence[TokenLogprob]], top: int, texts: TokenTexts) -> dict[str, Any]:
    """The `logprobs` of a chat's choice: each token with the `top` likeliest tokens (-1: all)."""
    return {"content": list(_chat_entries(entries, top, texts))}


def _chat_entries(entries: Sequence[Sequence[TokenLogprob]], top: int, texts: TokenTexts) -> Iterator[dict[str, Any]]:
    for entry in entries:
        chosen = entry[0]
        yield {
            "token": texts.shown(chosen.token),
            "logprob": _value(chosen),
            "bytes": _bytes(texts.text(chosen.token)),
            "top_logprobs": [
                {
                    "token": (text := texts.shown(one.token)),
                    "logprob": _value(one),
                    "bytes": _bytes(text),
                }
                for one in (entry if top < 0 else entry[:top])
            ],
        }


def prompt_logprobs(entries: Sequence[Sequence[TokenLogprob] | None], texts: TokenTexts) -> list[dict[str, Any] | None]:
    """`prompt_logprobs`: for each token of the prompt, the log probabilities of it and its alternatives, by id."""
    return [
        None
        if entry is None
        else {
            str(one.token): {"logprob": _value(one), "rank": one.rank, "decoded_token": texts.text(one.token)}
            for one in entry
        }
        for entry in entries
    ]


def _value(one: TokenLogprob) -> float:
    return max(one.logprob, NO_LOGPROB)


def _bytes(text: str) -> list[int]:
    return list(text.encode(errors="replace"))
