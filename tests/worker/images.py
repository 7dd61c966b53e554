"""Random chat requests with images: text around them, the same image again, several, with and without a uuid."""

from __future__ import annotations

import base64
import random
from typing import Any

PICTURES = [base64.b64encode(f"picture {number} ".encode() * 40).decode() for number in range(4)]


def image(picture: int, uuid: str | None = None) -> dict[str, Any]:
    """A part of a message's content."""
    part: dict[str, Any] = {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{PICTURES[picture]}"},
    }
    return part if uuid is None else {**part, "uuid": uuid}


def image_request(rng: random.Random, model: str = "tiny-llama", *, named: bool = False) -> dict[str, Any]:
    """The body of a chat request: one to three user messages, most of them with images. `named`: all have a uuid."""
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": "You describe pictures for people who cannot see them. " * 4})
    for turn in range(rng.randint(1, 3)):
        parts: list[dict[str, Any]] = []
        for _ in range(rng.choice([0, 1, 1, 2])):
            picture = rng.randrange(2 if turn == 0 else len(PICTURES))
            name = f"cat-{picture}"
            parts.append(image(picture, name if named else rng.choice([None, None, name])))
        text = {"type": "text", "text": f"What is the colour of thing {rng.randrange(2)}? " * rng.choice([1, 8])}
        parts.insert(rng.randint(0, len(parts)), text)
        messages.append({"role": "user", "content": parts if len(parts) > 1 else text["text"]})
        messages.append({"role": "assistant", "content": f"It is blue, as in turn {turn}. " * 3})
    if rng.random() < 0.9:
        messages.pop()
    return {
        "model": model,
        "messages": messages,
        "max_tokens": rng.randint(1, 30),
        "cache_salt": rng.choice([None, "s"]),
    }
