"""Where tokenizers come from: the bundled vocabulary, a folder, or a Hugging Face id. See docs/tokenizers.md."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from kvcache.chat.request import ChatOptions, ChatRenderer
from kvcache.chat.template import DEFAULT_TEMPLATE, ChatTemplateError
from kvcache.tokens.backend import END_OF_TEXT, Backend, BundledBackend, FastBackend, TokenizerError

BUNDLED = "gpt2"
"""The vocabulary that ships with the package: it needs no network."""

_DATA = Path(__file__).parents[1] / "data" / "gpt2"
_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_TEMPLATE_FILE = "chat_template.jinja"
_TEMPLATE_FOLDER = "additional_chat_templates"
_DEFAULT = "default"
_FINGERPRINT_DIGITS = 32


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """The parts of a `kvcache.tokens.tokenizer.Tokenizer`."""

    backend: Backend
    fingerprint: str
    eos_token_id: int | None
    chat: ChatRenderer


def bundled(options: ChatOptions) -> TokenizerSource:
    """GPT-2's byte-level BPE: 50,257 tokens, `<|endoftext|>` (50256) ends a text."""
    vocabulary, merges = _DATA / "encoder.json", _DATA / "vocab.bpe"
    backend = _bundled_backend(vocabulary)
    templates = {_DEFAULT: DEFAULT_TEMPLATE}
    return TokenizerSource(
        backend=backend,
        fingerprint=fingerprint([vocabulary.read_bytes(), merges.read_bytes()], templates, options),
        eos_token_id=backend.end_of_text,
        chat=_renderer(templates, {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}, options, BUNDLED),
    )


@functools.cache
def _bundled_backend(vocabulary: Path) -> BundledBackend:
    """Read once: it never changes, and tokenizers that differ in their templates share it."""
    return BundledBackend(vocabulary)


def from_folder(folder: Path, options: ChatOptions) -> TokenizerSource:
    """A folder with `tokenizer.json` and, for chat and the end token, `tokenizer_config.json`."""
    file = folder / _TOKENIZER_FILE
    try:
        content = file.read_bytes()
        tokenizer = RustTokenizer.from_buffer(content)
    except OSError as error:
        raise TokenizerError(f"{file} cannot be read: {error}") from None
    except Exception as error:  # noqa: BLE001 (the Rust parser raises the bare class)
        raise TokenizerError(f"{file} is no tokenizer of the `tokenizers` library: {error}") from None
    config = _config(folder)
    special = _special_tokens(config)
    templates = _template_sources(folder, config)
    eos = special.get("eos_token")
    return TokenizerSource(
        backend=FastBackend(tokenizer),
        fingerprint=fingerprint([content], templates, options),
        eos_token_id=None if eos is None else tokenizer.token_to_id(eos),
        chat=_renderer(templates, special, options, folder),
    )


def from_hub(name: str, options: ChatOptions) -> TokenizerSource:
    """A Hugging Face id, downloaded or from the local cache: its `tokenizer.json`, else by transformers."""
    # Imported here because it takes 0.2 s and 20 MB, which the bundled vocabulary and folders do not need.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        found = Path(hf_hub_download(name, _TOKENIZER_FILE))
        for optional in (_CONFIG_FILE, _TEMPLATE_FILE):
            with suppress(EntryNotFoundError):  # off line, a file that is not in the cache counts as absent
                hf_hub_download(name, optional)
    except LocalEntryNotFoundError as error:  # neither in the cache nor can the hub be asked
        raise _unloadable(name, error) from None
    except EntryNotFoundError:
        return from_transformers(name, options)
    except (OSError, ValueError) as error:
        raise _unloadable(name, error) from None
    return from_folder(found.parent, options)


def from_transformers(name: str, options: ChatOptions) -> TokenizerSource:
    """Whatever `transformers.AutoTokenizer` makes of a folder or a Hugging Face id without `tokenizer.json`."""
    # Imported here because it takes 1 s and 250 MB.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise _unloadable(name, error) from None
    if not tokenizer.is_fast:
        raise TokenizerError(
            f"tokenizer {name!r} has no fast form: convert it once with transformers (`save_pretrained`) to a folder "
            f"that holds {_TOKENIZER_FILE}, and name that folder"
        )
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    template = tokenizer.chat_template
    templates = {_DEFAULT: template} if isinstance(template, str) else dict(template or {})
    backend: RustTokenizer = tokenizer.backend_tokenizer
    return TokenizerSource(
        backend=FastBackend(backend),
        fingerprint=fingerprint([backend.to_str().encode()], templates, options),
        eos_token_id=tokenizer.eos_token_id,
        chat=_renderer(templates, special, options, name),
    )


def load(name: str, options: ChatOptions) -> TokenizerSource:
    """The tokenizer called `name`. Raises `TokenizerError`."""
    if name == BUNDLED:
        return bundled(options)
    folder = Path(name)
    if (folder / _TOKENIZER_FILE).is_file():
        return from_folder(folder, options)
    return from_transformers(name, options) if folder.is_dir() else from_hub(name, options)


def fingerprint(parts: Iterable[bytes], templates: Mapping[str, str], options: ChatOptions) -> str:
    """32 hexadecimal digits of SHA-256 over all that decides which token ids a request becomes."""
    template = options.chat_template
    if template is None:
        template = templates.get(_DEFAULT, "")
        others = [f"{name} {source}".encode() for name, source in sorted(templates.items()) if name != _DEFAULT]
    else:
        others = []
    digest = hashlib.sha256()
    for part in (*parts, template.encode(), *others, *options.fingerprint_parts()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:_FINGERPRINT_DIGITS]


def _unloadable(name: str, error: Exception) -> TokenizerError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return TokenizerError(
        f"tokenizer {name!r} cannot be loaded: use {BUNDLED!r}, a folder that holds {_TOKENIZER_FILE}, or a Hugging "
        f"Face id that can be reached from here ({reason})"
    )


def _renderer(
    templates: Mapping[str, str], special: Mapping[str, str], options: ChatOptions, where: object
) -> ChatRenderer:
    try:
        return ChatRenderer(templates, special, options)
    except ChatTemplateError as error:
        raise TokenizerError(f"{where}: {error}") from None


def _config(folder: Path) -> dict[str, Any]:
    file = folder / _CONFIG_FILE
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise TokenizerError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise TokenizerError(f"{file} must hold an object, not {type(config).__name__}")
    return config


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens (bos_token, eos_token, ...): a string each, or an object with its `content`."""
    found = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found


def _template_sources(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name, the usual one as "default": from files of their own first, else the config's."""
    file = folder / _TEMPLATE_FILE
    if file.exists():
        others = {
            other.stem: other.read_text(encoding="utf-8") for other in (folder / _TEMPLATE_FOLDER).glob("*.jinja")
        }
        return {**others, _DEFAULT: file.read_text(encoding="utf-8")}
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        return {name: source for name, source in named.items() if isinstance(name, str) and isinstance(source, str)}
    return {_DEFAULT: template} if isinstance(template, str) else {}
