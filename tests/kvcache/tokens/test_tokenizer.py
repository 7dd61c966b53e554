"""The bundled GPT-2 tokenizer.

Covers: the ids of the real one, its text back, as a whole or token by token. Not covered: other vocabularies
(test_sources.py), chats (chat/).
"""

from __future__ import annotations

import importlib.resources
import itertools
import json
import sys

import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st

from kvcache.tokens.tokenizer import IncrementalDecoder, Tokenizer, TokenizerError, load_tokenizer

GPT2_FILES = importlib.resources.files("kvcache") / "data" / "gpt2"
PIECES = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")

tricky_text = st.text(
    alphabet=st.one_of(
        st.sampled_from("aZ09 \n\t\r'’.,_-\u00a0\u0085\u2028\u200d\u0301\x1c\x00"),
        st.sampled_from("éßñ中文字한글日本語🙂👩‍🚀ﬀⅣ²"),
        st.characters(exclude_categories=("Cs",)),
    ),
    max_size=200,
)
token_ids = st.lists(st.integers(0, 50256), max_size=60)


class ReferenceBpe:
    """GPT-2's published algorithm, written as plainly as it goes: regular expression, byte alphabet, merges by rank."""

    def __init__(self) -> None:
        self.vocabulary = json.loads((GPT2_FILES / "encoder.json").read_bytes())
        lines = (GPT2_FILES / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
        self.ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
        kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        others = [byte for byte in range(256) if byte not in kept]
        self.alphabet = {byte: chr(byte) for byte in kept} | {byte: chr(256 + at) for at, byte in enumerate(others)}

    def encode(self, text: str) -> list[int]:
        ids = []
        for part in regex.split(r"(<\|endoftext\|>)", text):
            merged = [part] if part == "<|endoftext|>" else [t for p in PIECES.findall(part) for t in self._merged(p)]
            ids += [self.vocabulary[token] for token in merged]
        return ids

    def _merged(self, piece: str) -> list[str]:
        word = [self.alphabet[byte] for byte in piece.encode()]
        while len(word) > 1:
            pairs = list(itertools.pairwise(word))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, sys.maxsize))
            if best not in self.ranks:
                break
            at = pairs.index(best)
            word[at : at + 2] = ["".join(best)]
        return word


@pytest.fixture(scope="module")
def reference() -> ReferenceBpe:
    return ReferenceBpe()


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        pytest.param("Hello world", [15496, 995], id="two words"),
        pytest.param(
            "The quick brown fox jumps over the lazy dog",
            [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290],
            id="a sentence",
        ),
        pytest.param("<|endoftext|>", [50256], id="the special token"),
        pytest.param("", [], id="empty"),
    ],
)
def test_known_ids(gpt2: Tokenizer, text: str, ids: list[int]) -> None:
    assert gpt2.encode(text) == ids


@given(tricky_text)
@example("it's we'll I'D  two   spaces\n\n\n tab\t end ")
def test_ids_are_those_of_the_published_algorithm(gpt2: Tokenizer, reference: ReferenceBpe, text: str) -> None:
    assert gpt2.encode(text) == reference.encode(text)


def test_ids_of_real_source_text(gpt2: Tokenizer, reference: ReferenceBpe, source_code: str) -> None:
    assert gpt2.encode(source_code[:20_000]) == reference.encode(source_code[:20_000])


def test_what_the_tokenizer_says_of_itself(gpt2: Tokenizer) -> None:
    assert (gpt2.name, gpt2.vocab_size, gpt2.eos_token_id) == ("gpt2", 50257, 50256)
    assert gpt2.special_ids == {50256}
    assert len(bytes.fromhex(gpt2.fingerprint)) == 16
    assert gpt2.fingerprint == load_tokenizer("gpt2").fingerprint


@given(tricky_text)
def test_text_comes_back(gpt2: Tokenizer, text: str) -> None:
    assert gpt2.decode(gpt2.encode(text)) == text


def test_special_tokens_are_left_out_of_text_unless_asked_for(gpt2: Tokenizer) -> None:
    assert gpt2.decode([15496, 50256, 995]) == "Hello world"
    assert gpt2.decode([15496, 50256, 995], skip_special_tokens=False) == "Hello<|endoftext|> world"


def test_tokens_as_the_vocabulary_writes_them(gpt2: Tokenizer) -> None:
    assert [gpt2.token_str(token_id) for token_id in (15496, 995, 50256)] == ["Hello", "Ġworld", "<|endoftext|>"]


@pytest.mark.parametrize("token_id", [50257, -1, 2**40])
def test_an_id_outside_the_vocabulary_has_no_token(gpt2: Tokenizer, token_id: int) -> None:
    with pytest.raises(TokenizerError, match="out of vocabulary"):
        gpt2.token_str(token_id)


def test_half_a_surrogate_pair_is_refused(gpt2: Tokenizer) -> None:
    for text in ("\ud83d", "word " * 1000 + "\ud83d"):
        with pytest.raises(TokenizerError, match="surrogate"):
            gpt2.encode(text)


def test_a_negative_id_is_refused(gpt2: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="0 or more"):
        gpt2.decode([-1])


@given(token_ids, st.booleans())
@example([50256, 15496, 50256], False)
def test_deltas_join_to_the_whole_text(gpt2: Tokenizer, ids: list[int], skip: bool) -> None:
    decoder = IncrementalDecoder(gpt2, skip_special_tokens=skip)
    deltas = [decoder.push(token_id) for token_id in ids] + [decoder.flush()]
    assert "".join(deltas) == gpt2.decode(ids, skip_special_tokens=skip)


@given(tricky_text)
def test_no_delta_holds_half_a_character(gpt2: Tokenizer, text: str) -> None:
    decoder = IncrementalDecoder(gpt2)
    shown = ""
    for token_id in gpt2.encode(text):
        shown += decoder.push(token_id)
        assert text.startswith(shown)
    assert decoder.flush() == ""
    assert shown == text


def test_an_unfinished_character_at_the_end_is_flushed(gpt2: Tokenizer) -> None:
    first_byte_of_a_globe = gpt2.encode("🌍")[0]
    decoder = IncrementalDecoder(gpt2)
    assert decoder.push(first_byte_of_a_globe) == ""
    assert decoder.flush() == "\ufffd"
