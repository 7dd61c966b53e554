"""Tokenizers, which turn the same request into the same token ids in the router and in the worker."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

from kvcache.chat.request import ChatOptions
from kvcache.tokens.backend import Backend, TokenizerError, byte_alphabet
from kvcache.tokens.encoding_cache import DEFAULT_CACHE_BYTES, EncodingCache
from kvcache.tokens.sources import TokenizerSource, load

__all__ = ["IncrementalDecoder", "Tokenizer", "TokenizerError", "TooManyTokensError", "load_tokenizer"]

REPLACEMENT = "\ufffd"


class TooManyTokensError(Exception):
    """A text has more tokens than a bounded tokenizer takes (`Tokenizer.bounded`)."""


class Tokenizer:
    """Text to token ids and back. `fingerprint` (32 hexadecimal digits) covers all that changes token ids."""

    def __init__(self, name: str, source: TokenizerSource, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.name = name
        self.fingerprint = source.fingerprint
        self.eos_token_id = source.eos_token_id
        self.vocab_size = source.backend.vocab_size
        self.longest_token = source.backend.longest_token
        """Characters of the longest token, as the vocabulary writes it."""
        self.special_ids = source.backend.special_ids
        self.byte_level = source.backend.byte_level
        """Each token stands for fixed bytes: see `kvcache.tokens.backend.Backend`."""
        self._backend: Backend = source.backend
        self.chat = source.chat
        """Renders chat requests by the chat template."""
        self.cache = EncodingCache(self._encode_plain, cache_bytes) if source.backend.affixes else None
        """None where cutting text might change a token."""
        self._limit: int | None = None
        self._checkpoint: Callable[[], None] | None = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Raises `TokenizerError` for text that is not valid Unicode."""
        if self._limit is not None and len(text) > self._limit * self.longest_token:
            raise TooManyTokensError
        if self.cache is None or self._backend.affixes is None:
            return self._backend.encode(text, add_special_tokens)
        ids = self.cache.encode(text, None if self._checkpoint is None else self._progress)
        if not add_special_tokens:
            return ids
        before, after = self._backend.affixes
        return [*before, *ids, *after]

    def bounded(self, limit: int | None, checkpoint: Callable[[], None]) -> Self:
        """This tokenizer, sharing its cache, for one prompt that may turn out too long or be given up.

        Its `encode` raises `TooManyTokensError` for a text that has more than `limit` tokens, as soon as that shows:
        by its length alone, since no token stands for more characters than the longest (vLLM applies the same bound
        before it tokenises), or between two chunks. `checkpoint` is called between chunks too; what it raises ends
        the work. Without a cache there are no chunks, and only the length is looked at beforehand.
        """
        bounded = object.__new__(type(self))  # copy.copy takes ten times as long, for every prompt
        bounded.__dict__.update(self.__dict__)
        bounded._limit, bounded._checkpoint = limit, checkpoint
        return bounded

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD. Raises `TokenizerError`."""
        return self._backend.decode(ids, skip_special_tokens)

    def token_str(self, token_id: int) -> str:
        """The token as the vocabulary writes it (`Ġwor` for " wor" in byte-level BPE). Raises `TokenizerError`."""
        token = self._backend.token_str(token_id)
        if token is None:
            raise TokenizerError(f"token id {token_id} is out of vocabulary")
        return token

    def render_chat(self, fields: Mapping[str, Any]) -> str:
        """Text of the prompt of a chat request's JSON body, by the chat template. Raises
        `kvcache.chat.request.ChatRequestError`."""
        return self.chat.render(fields)

    def _encode_plain(self, text: str) -> list[int]:
        return self._backend.encode(text, False)

    def _progress(self, tokens: int) -> None:
        if self._limit is not None and tokens > self._limit:
            raise TooManyTokensError
        if self._checkpoint is not None:
            self._checkpoint()


def load_tokenizer(name: str, chat: ChatOptions | None = None) -> Tokenizer:
    """The tokenizer called `name`, rendering chats by the options of the engine's command line; docs/tokenizers.md
    lists the forms. Raises `TokenizerError`."""
    return Tokenizer(name, load(name, chat or ChatOptions()))


class _Decoder(Protocol):
    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class IncrementalDecoder:
    """Text of a growing sequence, token by token: the deltas, joined, equal `decode` of all ids.

    A delta holds only whole characters: bytes of an unfinished one wait for the next token, or for `flush`.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        form = _ByteLevelDecoder if tokenizer.byte_level else _WindowDecoder
        self._decoder: _Decoder = form(tokenizer, skip_special_tokens)

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; "" while a character is unfinished."""
        return self._decoder.push(token_id)

    def flush(self) -> str:
        """What is still held back, at the end of the sequence."""
        return self._decoder.flush()


class _ByteLevelDecoder:
    """Every token is a run of bytes: an incremental UTF-8 decoder does the rest, O(1) a token."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._token_str = tokenizer.token_str
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._bytes.decode(_token_bytes(self._token_str(token_id)))

    def flush(self) -> str:
        return self._bytes.decode(b"", True)


class _WindowDecoder:
    """Any other tokenizer: decode the tokens since the last delta together with those of the delta before it, whose
    text is known, since how a token is written may depend on its neighbour."""

    _BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._known: list[int] = []
        self._new: list[int] = []

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._new.append(token_id)
        # A run of byte tokens is decoded as a whole (one bad byte spoils all of it), so it waits for its end.
        if self._BYTE_TOKEN.fullmatch(self._tokenizer.token_str(token_id)):
            return ""
        delta = self._delta()
        if not delta or delta.endswith(REPLACEMENT):
            return ""
        self._known, self._new = self._new, []
        return delta

    def flush(self) -> str:
        delta = self._delta()
        self._known, self._new = self._new, []
        return delta

    def _delta(self) -> str:
        known = self._tokenizer.decode(self._known, skip_special_tokens=self._skip)
        both = self._tokenizer.decode(self._known + self._new, skip_special_tokens=self._skip)
        return both[len(known) :]


_BYTE_OF = byte_alphabet()


def _token_bytes(token: str) -> bytes:
    """Bytes a token stands for; a token with a character outside the alphabet (an added one) stands for itself."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()
