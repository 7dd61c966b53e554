"""Prompts with images: which tokens stand for an image, and what identifies it.

vLLM puts a placeholder into the text of a chat for each image; its model's processor replaces that by the tokens that
stand for the image (576 times the placeholder for LLaVA 1.5), whose number may depend on the image. An image is
identified by the `uuid` that the request gives it, else by a hash of the decoded picture
(`vllm/multimodal/processing/inputs.py`). What an engine does here is its `ImageRule`; where it is not known, a prompt
is known up to its first image.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvcache.keys import Image

IMAGE_PART = "image_url"


@dataclass(frozen=True, slots=True)
class ImageRule:
    """How an engine reads images."""

    token: int
    """The token id of the placeholder, and of each token that stands for an image."""
    tokens: int
    """How many stand for one image, whichever it is."""
    hashes_bytes: bool = False
    """An image without a `uuid` is identified by the SHA-256 of its bytes, as sent in a data URL. vLLM hashes the
    decoded picture instead, which is not done here."""


class ImageError(ValueError):
    """The placeholders of a prompt are not those of its images; the message says why."""


def is_image(part: object) -> bool:
    """Whether a part of a message's content is an image."""
    return isinstance(part, Mapping) and part.get("type") == IMAGE_PART


def image_parts(messages: object) -> Iterator[Mapping[str, Any]]:
    """The images of a chat request's messages, in their order."""
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if is_image(part):
                yield part


def identifier(part: Mapping[str, Any], rule: ImageRule) -> str | None:
    """What the engine identifies an image by; None: only the engine knows."""
    uuid = part.get("uuid")
    if uuid is not None:
        return uuid if isinstance(uuid, str) and uuid else None
    data = image_bytes(part) if rule.hashes_bytes else None
    return None if data is None else hashlib.sha256(data).hexdigest()


def image_bytes(part: Mapping[str, Any]) -> bytes | None:
    """The bytes of an image that is sent as a data URL in base 64; None for any other."""
    source = part.get(IMAGE_PART)
    url = source.get("url") if isinstance(source, Mapping) else None
    if not isinstance(url, str) or not url.startswith("data:"):
        return None
    head, comma, encoded = url.partition(",")
    if not comma or not head.endswith(";base64"):
        return None
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return None


def expanded(ids: Sequence[int], names: Sequence[str], rule: ImageRule) -> tuple[list[int], list[Image]]:
    """The tokens of a prompt whose placeholders are replaced by the tokens of its images, and where each image begins.
    Raises `ImageError` if there are not as many placeholders as images."""
    found = ids.count(rule.token)
    if found != len(names):
        raise ImageError(f"the prompt has {found} placeholders for {len(names)} images")
    tokens: list[int] = []
    images: list[Image] = []
    begin = 0
    for name in names:
        at = ids.index(rule.token, begin)
        tokens += ids[begin:at]
        images.append((len(tokens), name))
        tokens += [rule.token] * rule.tokens
        begin = at + 1
    return [*tokens, *ids[begin:]], images
