"""A worker with the vocabulary, chat template and sizes of the recorded vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

import kvcache
from kvcache.chat.request import ChatOptions
from kvcache.tokens.tokenizer import Tokenizer, load_tokenizer

GPT2 = Path(kvcache.__file__).parent / "data" / "gpt2"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """GPT-2's vocabulary with ChatML's marks, and Qwen2.5's chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe = RustTokenizer(models.BPE.from_file(str(GPT2 / "encoder.json"), str(GPT2 / "vocab.bpe")))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    bpe.save(str(folder / "tokenizer.json"))
    config = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    template = Path(__file__).parent / "chatml.jinja"
    (folder / "chat_template.jinja").write_text(template.read_text())
    return load_tokenizer(str(folder), ChatOptions(trust_request_chat_template=True))
