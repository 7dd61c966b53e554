"""The part of the manifest that lists LoRA adapters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from controller.api.common import SpecModel

Rank = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]
"""Values that vLLM 0.32 takes for `--max-lora-rank`."""


class Adapter(SpecModel):
    """A LoRA adapter that every worker has loaded."""

    name: Annotated[str, Field(min_length=1, max_length=253)]
    """Name under which requests ask for it, as their `model`."""
    source: Annotated[str, Field(min_length=1, max_length=1024)]
    """A folder that the engine can read, or a Hugging Face id."""
    rank: Rank = 16
    """Its rank, or the next larger value. Workers are restarted when the largest rank of all adapters grows."""
