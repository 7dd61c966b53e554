"""The cache of encodings.

Covers: that it is equal to plain encoding whatever the text, that it is bounded and used, and which tokenizers get
none. Not covered: how much faster it is (bench/micro).
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.tokens.encoding_cache import CHUNK_CHARS, EncodingCache, chunks
from kvcache.tokens.tokenizer import Tokenizer, load_tokenizer

spaced = st.sampled_from("a b\n7 é\t.,_'中\u00a0\u0301\x1c")
text = st.text(alphabet=st.one_of(spaced, spaced, st.characters(exclude_categories=("Cs",))), max_size=400)
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def variant(gpt2_json: Path, folder: Path, **changes: Any) -> Tokenizer:
    """GPT-2's tokenizer with parts of its tokenizer.json replaced."""
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(gpt2_json.read_text()) | changes))
    return load_tokenizer(str(folder))


@given(text, st.integers(1, 50))
def test_chunks_are_the_text_and_start_at_a_break_after_a_letter_or_digit(content: str, size: int) -> None:
    pieces = list(chunks(content, size))
    assert "".join(pieces) == content
    for before, after in itertools.pairwise(pieces):
        assert len(before) >= size
        assert before[-1].isalnum()
        assert after[0] in " \n"


@given(text, text, text, st.integers(1, 50))
def test_a_common_beginning_is_cut_alike(beginning: str, one: str, other: str, size: int) -> None:
    first, second = list(chunks(beginning + one, size)), list(chunks(beginning + other, size))
    covered = 0
    for left, right in zip(first[:-1], second[:-1], strict=False):
        if covered + max(len(left), len(right)) >= len(beginning):
            break
        assert left == right
        covered += len(left)


@given(text, st.integers(1, 50))
def test_cutting_changes_no_token(gpt2: Tokenizer, content: str, size: int) -> None:
    cut = [token_id for piece in chunks(content, size) for token_id in gpt2.encode(piece)]
    assert cut == gpt2.encode(content)


@pytest.fixture(scope="module")
def llama_3(gpt2_json: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The way Llama 3 splits text and starts it, over GPT-2's vocabulary."""
    split = {"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": False}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    start = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [50256], "tokens": ["<|endoftext|>"]}},
    }
    return variant(
        gpt2_json,
        tmp_path_factory.mktemp("llama-3"),
        normalizer={"type": "NFC"},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, bytes_only]},
        post_processor={"type": "Sequence", "processors": [bytes_only, template]},
    )


@given(text, st.integers(1, 50))
def test_cutting_changes_no_token_of_llama_3s_pieces(llama_3: Tokenizer, content: str, size: int) -> None:
    def plain(piece: str) -> list[int]:
        return llama_3.encode(piece, add_special_tokens=False)

    assert [token_id for piece in chunks(content, size) for token_id in plain(piece)] == plain(content)


def test_the_start_token_stays_at_the_start(llama_3: Tokenizer, source_code: str) -> None:
    assert llama_3.cache is not None
    ids = llama_3.encode(source_code)
    assert ids == llama_3.encode(source_code)
    assert ids[0] == 50256
    assert ids.count(50256) == 1
    assert ids[1:] == llama_3.encode(source_code, add_special_tokens=False)


def test_a_cached_encoding_is_the_plain_one(gpt2: Tokenizer, source_code: str) -> None:
    plain = gpt2.cache._encode(source_code) if gpt2.cache else []
    tokenizer = load_tokenizer("gpt2")
    for _ in range(2):
        assert tokenizer.encode(source_code) == plain
    assert tokenizer.cache is not None
    assert tokenizer.cache.hit_chars > 0.99 * len(source_code)


def test_only_what_follows_a_known_beginning_is_tokenised() -> None:
    seen: list[str] = []

    def encode(piece: str) -> list[int]:
        seen.append(piece)
        return [ord(character) for character in piece]

    cache = EncodingCache(encode)
    beginning = "word " * 2000
    cache.encode(beginning + "one question")
    seen.clear()
    other = beginning + "another question"
    assert cache.encode(other) == [ord(character) for character in other]
    assert sum(map(len, seen)) <= CHUNK_CHARS + len("word another question")


def test_the_cache_stays_within_its_bound_and_forgets_the_oldest() -> None:
    encoded: list[str] = []

    def encode(piece: str) -> list[int]:
        encoded.append(piece)
        return [1] * len(piece)

    limit = 40_000
    cache = EncodingCache(encode, limit)
    texts = [f"{number} " * 400 for number in range(1000, 1050)]
    for one in texts:
        cache.encode(one)
        assert cache.bytes <= limit
    assert cache.bytes > limit / 2
    encoded.clear()
    cache.encode(texts[-1])
    assert len(encoded) == 1  # the rest only
    encoded.clear()
    cache.encode(texts[0])
    assert len(encoded) > 1


def test_text_without_a_cut_neither_fails_nor_fills_the_cache() -> None:
    cache = EncodingCache(lambda piece: [1] * len(piece), 10_000)
    assert len(cache.encode("x" * 100_000)) == 100_000
    assert len(cache.encode("x" * 100_000 + " y" * 1000)) == 102_000
    assert cache.bytes <= 10_000


SPACED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"added_tokens": [{"id": 50256, "content": "<|end of text|>", **SPACED}]}, id="an added token with spaces"
        ),
        pytest.param(
            {"added_tokens": [{"id": 50256, "content": "<|endoftext|>", **SPACED, "lstrip": True}]}, id="lstrip"
        ),
        pytest.param(
            {"added_tokens": [{"id": 50256, "content": "<|endoftext|>", **SPACED, "rstrip": True}]}, id="rstrip"
        ),
        pytest.param(
            {"added_tokens": [{"id": 50256, "content": "<|endoftext|>", **SPACED, "single_word": True}]},
            id="single_word",
        ),
        pytest.param({"normalizer": {"type": "NFKC"}}, id="NFKC"),
        pytest.param({"normalizer": {"type": "Lowercase"}}, id="lower case"),
        pytest.param({"pre_tokenizer": None}, id="no pre-tokenizer"),
        pytest.param(
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
            id="a prefix space",
        ),
        pytest.param(
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                }
            },
            id="no expression",
        ),
        pytest.param(
            {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}},
            id="Metaspace",
        ),
        pytest.param(
            {
                "post_processor": {"type": "RobertaProcessing", "sep": ["a", 64], "cls": ["b", 65]}
                | {"trim_offsets": True, "add_prefix_space": False}
            },
            id="Roberta",
        ),
    ],
)
def test_a_tokenizer_that_cutting_might_change_is_not_cached(
    gpt2_json: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert variant(gpt2_json, tmp_path, **changes).cache is None
