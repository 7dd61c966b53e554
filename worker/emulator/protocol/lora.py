"""Requests of /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM reads them."""

from __future__ import annotations

from pydantic import BaseModel


class LoadLoraAdapterRequest(BaseModel):
    """`lora_path` is a folder or a Hugging Face id."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    """Replace the adapter of this name, if it is loaded."""
    is_3d_lora_weight: bool = False


class UnloadLoraAdapterRequest(BaseModel):
    lora_name: str
    lora_int_id: int | None = None
