from __future__ import annotations

import argparse
import importlib.resources
import inspect
import json
from pathlib import Path

import pytest

from kvcache.chat.request import ChatOptions
from kvcache.tokens.tokenizer import Tokenizer, load_tokenizer

VLLM_DATA = Path(__file__).parents[1] / "data" / "vllm"
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


@pytest.fixture(scope="session")
def recorded_model(gpt2_json: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tokenizer of the model that the pairs in tests/data/vllm/chat_prompts.json were recorded with: GPT-2's
    vocabulary with ChatML's marks, and a template that shows whatever a request can set."""
    folder = tmp_path_factory.mktemp("recorded")
    content = json.loads(gpt2_json.read_text())
    end = content["added_tokens"][0]
    marks = [{**end, "id": 50257 + at, "content": mark} for at, mark in enumerate(("<|im_start|>", "<|im_end|>"))]
    content["added_tokens"] += marks
    (folder / "tokenizer.json").write_text(json.dumps(content))
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "chat_template.jinja").write_bytes((VLLM_DATA / "chat_template.jinja").read_bytes())
    return load_tokenizer(str(folder), ChatOptions(trust_request_chat_template=True))
