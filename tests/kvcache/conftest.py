from __future__ import annotations

import argparse
import importlib.resources
import inspect
import json
from pathlib import Path

import pytest

from kvcache.tokenizer import Tokenizer, load_tokenizer

GPT2_FILES = importlib.resources.files("kvcache") / "data" / "gpt2"


@pytest.fixture(scope="session")
def gpt2() -> Tokenizer:
    return load_tokenizer("gpt2")


@pytest.fixture(scope="session")
def source_code() -> str:
    """100 KB of real source text that is on every machine."""
    return inspect.getsource(argparse)


@pytest.fixture(scope="session")
def gpt2_json(gpt2: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's vocabulary as a `tokenizer.json`, written from the original two files."""
    merges = (GPT2_FILES / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": [{"id": 50256, "content": "<|endoftext|>", **end}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": json.loads((GPT2_FILES / "encoder.json").read_bytes()),
            "merges": [line for line in merges if line],
        },
    }
    file = tmp_path_factory.mktemp("gpt2") / "tokenizer.json"
    file.write_text(json.dumps(content))
    return file
