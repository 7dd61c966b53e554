"""What turns text into token ids underneath a `Tokenizer`: one narrow interface, and its two implementations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import orjson
import tiktoken
from tokenizers import Tokenizer as RustTokenizer

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CUT_SAFE_PATTERNS = frozenset(
    {
        _WORDS + r"\p{N}{1,3}" + _REST,  # Llama 3, cl100k_base
        _WORDS + r"\p{N}" + _REST,  # Qwen 2, 2.5 and 3
    }
)
"""Expressions for which the cuts of `kvcache.tokens.encoding_cache` are exact, beside GPT-2's (`use_regex`)."""


END_OF_TEXT = "<|endoftext|>"

_GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
"""GPT-2's expression with possessive quantifiers: the same pieces, found without backtracking."""


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded, or cannot take what it was given; the message says which and what to do."""


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


def _token_bytes(tokens: Iterable[str]) -> list[bytes]:
    """The bytes of tokens that are written in GPT-2's alphabet."""
    separator = "\n"  # no character of the alphabet
    to_latin_1 = {ord(character): chr(byte) for character, byte in byte_alphabet().items()}
    to_latin_1[ord(separator)] = "\u0100"
    # All at once: one translation of 50,000 tokens takes a third of the time of as many.
    return [token.encode("latin-1") for token in separator.join(tokens).translate(to_latin_1).split("\u0100")]


class Backend(Protocol):
    """A tokenizer as `kvcache.tokens.tokenizer.Tokenizer` uses it."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def longest_token(self) -> int:
        """Characters of the longest token, as the vocabulary writes it: no token stands for more of a text."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    @property
    def affixes(self) -> tuple[list[int], list[int]] | None:
        """What `add_special_tokens` puts before and after the text's own tokens, when text may also be cut where
        `kvcache.tokens.encoding_cache` cuts without a change of any token; None otherwise."""

    @property
    def byte_level(self) -> bool:
        """Each token stands for fixed bytes of UTF-8, written in GPT-2's byte alphabet."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...

    def token_str(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it; None when no token has this id."""


class FastBackend:
    """A Hugging Face `tokenizers` tokenizer."""

    def __init__(self, tokenizer: RustTokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.longest_token = max(map(len, tokenizer.get_vocab()), default=1)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.byte_level = _kind(_state(tokenizer.decoder)) == "ByteLevel"
        cut_safe = (
            type(tokenizer.model).__name__ == "BPE"
            and tokenizer.model.dropout is None
            and _state(tokenizer.normalizer) in (None, {"type": "NFC"})
            and _cuts_words(_state(tokenizer.pre_tokenizer))
            and not any(_reaches_across(token) for token in added.values())
        )
        self.affixes = _affixes(_state(tokenizer.post_processor)) if cut_safe else None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            # A batch of one: unlike `encode` it lets other threads run meanwhile, and it takes a quarter less time.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):  # what the Rust side says to a string that is no valid Unicode
            raise TokenizerError("the text holds half of a surrogate pair, which no tokenizer accepts") from None
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        try:
            text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError):
            raise TokenizerError("token ids must be whole numbers of 0 or more") from None
        return text

    def token_str(self, token_id: int) -> str | None:
        try:
            token: str | None = self._tokenizer.id_to_token(token_id)
        except OverflowError:
            return None
        return token


def _state(component: Any) -> Any:
    """The JSON form of a tokenizer's component, None for no component."""
    return None if component is None else json.loads(component.__getstate__())


def _kind(state: Any) -> str | None:
    return None if state is None else state["type"]


def _cuts_words(pre_tokenizer: Any) -> bool:
    """Whether text is first split in a way that makes the cuts exact: see `kvcache.tokens.encoding_cache`."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}:
            return True
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
            ],
        }:
            return pattern in CUT_SAFE_PATTERNS
        case _:
            return False


def _affixes(post_processor: Any) -> tuple[list[int], list[int]] | None:
    """Ids put before and after a text's own tokens; None for a post-processor that may do anything else."""
    match post_processor:
        case None | {"type": "ByteLevel"}:  # ByteLevel corrects offsets only
            return [], []
        case {"type": "TemplateProcessing", "single": template, "special_tokens": special}:
            places = [at for at, piece in enumerate(template) if "Sequence" in piece]
            if len(places) != 1:
                return None
            return _special(template[: places[0]], special), _special(template[places[0] + 1 :], special)
        case {"type": "Sequence", "processors": [{"type": "ByteLevel"}, {"type": "TemplateProcessing"} as template]}:
            return _affixes(template)
        case _:
            return None


def _special(pieces: list[Any], special: Any) -> list[int]:
    return [token_id for piece in pieces for token_id in special[piece["SpecialToken"]["id"]]["ids"]]


def _reaches_across(token: Any) -> bool:
    """Whether an added token may match across a cut, or look at what lies behind one."""
    spaced = any(character.isspace() for character in token.content)
    return spaced or token.lstrip or token.rstrip or token.single_word


class BundledBackend:
    """The bundled GPT-2 vocabulary on tiktoken, which encodes about four times as fast as `tokenizers`: byte-level BPE
    of 50,257 tokens, of which `<|endoftext|>` is the only special one.

    tiktoken merges by rank alone. It serves vocabularies whose ids are the order of their merges, as GPT-2's are, and
    no others; tokenizers from folders and hubs therefore use `FastBackend`.
    """

    byte_level = True
    affixes: tuple[list[int], list[int]] | None = ([], [])

    def __init__(self, vocabulary: Path) -> None:
        ids: dict[str, int] = orjson.loads(vocabulary.read_bytes())
        self.end_of_text = ids.pop(END_OF_TEXT)
        self._tokens = [*ids, END_OF_TEXT]
        self._encoding = tiktoken.Encoding(
            vocabulary.parent.name,
            pat_str=_GPT2_SPLIT,
            mergeable_ranks=dict(zip(_token_bytes(ids), ids.values(), strict=True)),
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
