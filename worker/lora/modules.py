"""The values of `--lora-modules` and `--max-lora-rank`, as vLLM 0.32 reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of `--max-lora-rank`."""

FLAG = "--lora-modules"


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One value of `--lora-modules`."""

    name: str
    path: str
    base_model_name: str | None = None
    is_3d_lora_weight: bool = False


def parse_module(text: str) -> LoraModule:
    """`name=path`, or a JSON object with the fields of `LoraModule`. Raises `ValueError`."""
    if "=" in text and "," not in text and not text.startswith("{"):
        name, _, path = text.partition("=")
        return LoraModule(name, path)
    try:
        return LoraModule(**json.loads(text))
    except json.JSONDecodeError:
        raise ValueError(f"Invalid JSON format for --lora-modules: {text}") from None
    except TypeError as error:
        raise ValueError(f"Invalid fields for --lora-modules: {text} - {error}") from None


def split_modules(text: str) -> Iterator[str]:
    """The values in a text: `name=path` and JSON objects, separated by commas or white space. Raises `ValueError`."""
    decoder = json.JSONDecoder()
    rest = text.lstrip(", \t\n")
    while rest:
        if rest.startswith("{"):
            try:
                _, end = decoder.raw_decode(rest)
            except json.JSONDecodeError:
                raise ValueError(f"Invalid JSON format for --lora-modules: {rest}") from None
        else:
            end = next((at for at, letter in enumerate(rest) if letter in ", \t\n"), len(rest))
        yield rest[:end]
        rest = rest[end:].lstrip(", \t\n")


def repeat_flag(argv: Sequence[str]) -> list[str]:
    """The command line with `--lora-modules a=x b=y`, which vLLM takes, written as `--lora-modules=a=x
    --lora-modules=b=y`."""
    repeated: list[str] = []
    following = False
    for argument in argv:
        if argument.startswith("-"):
            following = argument in (FLAG, FLAG.replace("-", "_").replace("__", "--"))
            if following:
                continue
            repeated.append(argument)
        else:
            repeated.append(f"{FLAG}={argument}" if following else argument)
    return repeated
