"""Tokenizers from elsewhere.

Covers: a folder, a folder that only transformers understands, a Hugging Face id (of a hub on loopback), and the
errors of each. Not covered: huggingface.co itself.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvcache.chat.request import ChatOptions, ChatRequestError
from kvcache.tokens.tokenizer import IncrementalDecoder, Tokenizer, TokenizerError, load_tokenizer

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "f"}}


WORDS = ["▁", "a", "b", "▁a", "▁b", "ab", "▁ab", ".", "é", "中"]
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
SENTENCEPIECE = {
    "version": "1.0",
    "added_tokens": [{"id": at, "content": token, **SPECIAL} for at, token in enumerate(TOKENS[:3])],
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
    "model": {
        "type": "BPE",
        "vocab": {token: at for at, token in enumerate(TOKENS)},
        "merges": ["▁ a", "▁ b", "a b", "▁a b"],
        "unk_token": "<unk>",
        "byte_fallback": True,
    },
}
"""Llama 2's form: `▁` for a space, bytes for what the vocabulary lacks, the first space dropped."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a tokenizer that is loaded in a moment."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(SENTENCEPIECE))
    return tmp_path


@pytest.fixture
def gpt2_folder(gpt2_json: Path, tmp_path: Path) -> Path:
    shutil.copy(gpt2_json, tmp_path)
    return tmp_path


def configure(folder: Path, **config: Any) -> Tokenizer:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(str(folder))


def test_a_folder_gives_the_ids_of_its_tokenizer_json(gpt2_folder: Path, gpt2: Tokenizer, source_code: str) -> None:
    tokenizer = load_tokenizer(str(gpt2_folder))
    assert tokenizer.encode(source_code) == gpt2.encode(source_code)  # although the file asks for truncation
    assert tokenizer.eos_token_id is None
    assert tokenizer.name == str(gpt2_folder)


@pytest.mark.parametrize(
    "eos",
    [
        pytest.param("</s>", id="text"),
        pytest.param({"content": "</s>", "lstrip": False}, id="an object"),
    ],
)
def test_the_end_token_comes_from_the_config(folder: Path, eos: object) -> None:
    assert configure(folder, eos_token=eos).eos_token_id == 2


def test_without_a_chat_template_there_is_no_chat(folder: Path) -> None:
    with pytest.raises(ChatRequestError, match="has no chat template"):
        configure(folder).render_chat(CHAT)


@pytest.mark.parametrize(
    "template",
    [
        pytest.param("{{ bos_token }}{{ messages[0].content }}", id="one"),
        pytest.param(
            [
                {"name": "tool_use", "template": "no"},
                {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"},
            ],
            id="several",
        ),
    ],
)
def test_the_chat_template_comes_from_the_config(folder: Path, template: object) -> None:
    assert configure(folder, bos_token="<s>", chat_template=template).render_chat(CHAT) == "<s>hi"


def test_a_template_file_goes_before_the_config(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("from the file")
    assert configure(folder, chat_template="from the config").render_chat(CHAT) == "from the file"


def test_requests_with_tools_use_the_template_for_tools(folder: Path) -> None:
    templates = [{"name": "tool_use", "template": "with tools"}, {"name": "default", "template": "without"}]
    from_config = configure(folder, chat_template=templates)
    assert from_config.render_chat(CHAT) == "without"
    assert from_config.render_chat(CHAT | {"tools": [TOOL]}) == "with tools"
    (folder / "chat_template.jinja").write_text("without")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    from_files = configure(folder)
    assert from_files.render_chat(CHAT | {"tools": [TOOL]}) == "with tools"
    assert from_files.fingerprint == from_config.fingerprint


def test_the_engines_own_template_goes_before_the_tokenizers(folder: Path) -> None:
    configure(folder, chat_template=[{"name": "tool_use", "template": "no"}, {"name": "default", "template": "no"}])
    given = load_tokenizer(str(folder), ChatOptions(chat_template="given"))
    assert given.render_chat(CHAT) == given.render_chat(CHAT | {"tools": [TOOL]}) == "given"
    assert given.fingerprint == configure(folder, chat_template="given").fingerprint


def test_the_fingerprint_follows_the_engines_options(folder: Path) -> None:
    options = [
        ChatOptions(),
        ChatOptions(chat_template="x"),
        ChatOptions(chat_template_content_format="openai"),
        ChatOptions(default_chat_template_kwargs={"enable_thinking": False}),
        ChatOptions(exclude_tools_when_tool_choice_none=True),
        ChatOptions(anthropic_disabled_thinking_effort="low"),
    ]
    assert len({load_tokenizer(str(folder), option).fingerprint for option in options}) == len(options)
    trusting = load_tokenizer(str(folder), ChatOptions(trust_request_chat_template=True))
    assert trusting.fingerprint == load_tokenizer(str(folder)).fingerprint


def test_the_fingerprint_follows_all_that_changes_ids(gpt2_folder: Path, gpt2: Tokenizer) -> None:
    plain = configure(gpt2_folder)
    templated = configure(gpt2_folder, chat_template="x")
    content = json.loads((gpt2_folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 50257, "content": "<|more|>"})
    (gpt2_folder / "tokenizer.json").write_text(json.dumps(content))
    extended = configure(gpt2_folder)
    prints = {gpt2.fingerprint, plain.fingerprint, templated.fingerprint, extended.fingerprint}
    assert len(prints) == 4
    assert extended.fingerprint == load_tokenizer(str(gpt2_folder)).fingerprint


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", "{", "is no tokenizer"),
        ("tokenizer.json", '{"model": 5}', "is no tokenizer"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", "[]", "must hold an object"),
        ("chat_template.jinja", "{% if %}", "does not compile"),
    ],
)
def test_a_broken_folder_is_refused(folder: Path, file: str, content: str, says: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(TokenizerError, match=says):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["/no/such/folder", "not a name"])
def test_a_name_that_cannot_be_one_is_refused(name: str) -> None:
    with pytest.raises(TokenizerError, match="cannot be loaded: use 'gpt2'"):
        load_tokenizer(name)


# --- tokens that are not plain bytes ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tokenizer.json").write_text(json.dumps(SENTENCEPIECE))
    return load_tokenizer(str(folder))


@given(
    st.lists(st.one_of(st.integers(0, len(TOKENS) - 1), st.integers(259, len(TOKENS) - 1)), max_size=30), st.booleans()
)
@example([259, 262, 2, 259, 259, 262], True)
@example([3 + 0xC3, 3 + 0xA4, 3 + 0xE4, 260], True)
@example([3, 0, 3 + 0x80], True)  # what is skipped does not end a run of bytes
def test_deltas_of_any_tokenizer_join_to_the_whole_text(sentencepiece: Tokenizer, ids: list[int], skip: bool) -> None:
    decoder = IncrementalDecoder(sentencepiece, skip_special_tokens=skip)
    deltas = [decoder.push(token_id) for token_id in ids] + [decoder.flush()]
    assert "".join(deltas) == sentencepiece.decode(ids, skip_special_tokens=skip)


def test_deltas_of_words_come_at_once(sentencepiece: Tokenizer) -> None:
    decoder = IncrementalDecoder(sentencepiece)
    ids = [TOKENS.index(token) for token in ("▁ab", "▁a", "b", ".")]
    assert [decoder.push(token_id) for token_id in ids] == ["ab", " a", "b", "."]
    assert sentencepiece.cache is None


# --- by transformers and the hub ------------------------------------------------------------------------------

ASK = """
import sys, kvcache.tokens.tokenizer
tokenizer = kvcache.tokens.tokenizer.load_tokenizer(sys.argv[1])
print(tokenizer.encode("Hello world"), tokenizer.eos_token_id, tokenizer.fingerprint, "transformers" in sys.modules)
"""


def ask(name: str, home: Path) -> subprocess.CompletedProcess[str]:
    """What a process without network says of a tokenizer."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-W", "ignore", "-c", ASK, name]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.process
def test_a_folder_without_tokenizer_json_is_read_by_transformers(gpt2_json: Path, tmp_path: Path) -> None:
    model = json.loads(gpt2_json.read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *model["merges"]]))
    configuration = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(configuration))
    answer = ask(str(tmp_path), tmp_path)
    assert answer.stdout.startswith("[15496, 995] 50256 "), answer.stderr
    assert answer.stdout.strip().endswith("True")


@pytest.mark.process
def test_a_hub_id_is_read_like_the_folder_it_was_downloaded_to(gpt2_json: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--someone--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copy(gpt2_json, snapshot)
    (snapshot / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "chat_template": "x"}')
    answer = ask("someone/model", tmp_path)
    assert answer.stdout.split() == ["[15496,", "995]", "50256", load_tokenizer(str(snapshot)).fingerprint, "False"], (
        answer.stderr
    )


@pytest.mark.process
def test_a_hub_id_out_of_reach_is_refused_with_what_to_do(tmp_path: Path) -> None:
    answer = ask("someone/model", tmp_path)
    assert "tokenizer 'someone/model' cannot be loaded: use 'gpt2', a folder" in answer.stderr
