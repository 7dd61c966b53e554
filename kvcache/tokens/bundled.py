"""The bundled GPT-2 vocabulary behind tiktoken, which encodes about four times as fast as `tokenizers`.

tiktoken merges by rank alone: it serves vocabularies whose ids are the order of their merges, as GPT-2's are, and
no other. So tokenizers from folders and hubs stay with `kvcache.tokens.backend.FastBackend`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tiktoken

from kvcache.tokens.backend import TokenizerError, byte_alphabet

END_OF_TEXT = "<|endoftext|>"

_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
"""GPT-2's expression with possessive quantifiers: the same pieces, found without backtracking."""


class BundledBackend:
    """GPT-2's byte-level BPE: 50,257 tokens, of which `<|endoftext|>` is the only special one."""

    byte_level = True
    affixes: tuple[list[int], list[int]] | None = ([], [])

    def __init__(self, vocabulary: Path) -> None:
        ids: dict[str, int] = json.loads(vocabulary.read_bytes())
        byte_of = byte_alphabet()
        self.end_of_text = ids.pop(END_OF_TEXT)
        self._tokens = [*ids, END_OF_TEXT]
        self._encoding = tiktoken.Encoding(
            vocabulary.parent.name,
            pat_str=_SPLIT,
            mergeable_ranks={bytes([byte_of[c] for c in token]): token_id for token, token_id in ids.items()},
            special_tokens={END_OF_TEXT: self.end_of_text},
            explicit_n_vocab=len(self._tokens),
        )
        self.vocab_size = len(self._tokens)
        self.longest_token = max(map(len, self._tokens))
        self.special_ids = frozenset({self.end_of_text})

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """GPT-2 adds no special tokens of its own; one that the text spells out is that token."""
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:  # tiktoken would quietly replace it
                raise TokenizerError("the text holds half of a surrogate pair, which no tokenizer accepts") from None
        return self._encoding.encode(text, allowed_special="all")

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        end = self.end_of_text if skip_special_tokens else self.vocab_size
        if min(ids, default=0) < 0:
            raise TokenizerError("token ids must be whole numbers of 0 or more")
        return self._encoding.decode([token_id for token_id in ids if token_id < self.vocab_size and token_id != end])

    def token_str(self, token_id: int) -> str | None:
        return self._tokens[token_id] if 0 <= token_id < self.vocab_size else None
