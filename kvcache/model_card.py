"""A model as `/v1/models` lists it: vLLM's `ModelCard` (entrypoints/openai/models/protocol.py), which the emulated
worker and the router both answer with."""

from __future__ import annotations

import secrets
from typing import Any


def model_card(name: str, *, created: int, root: str, parent: str | None, max_model_len: int | None) -> dict[str, Any]:
    """`root` is what was loaded, `parent` an adapter's base model, `created` seconds since 1970."""
    permission = {
        "id": f"modelperm-{secrets.token_hex(8)}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "vllm",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
        "permission": [permission],
    }
