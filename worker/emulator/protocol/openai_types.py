"""The body of POST /v1/responses with OpenAI's own types of items and tools, as vLLM validates it.

The types are those of OpenAI's client library, as in vLLM, so a wrong item or tool is refused with vLLM's error. The
library takes 0.6 s to load, so only what needs it imports this module (`responses.is_plain`).
"""

from __future__ import annotations

from typing import Annotated, Any

from openai.types.responses import (
    ResponseFunctionToolCall,
    ResponseInputItemParam,
    ResponseOutputItem,
    ResponseOutputMessage,
    ResponseReasoningItem,
)
from openai.types.responses.response import ToolChoice
from openai.types.responses.tool import Tool
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from worker.emulator.protocol.base import random_id
from worker.emulator.protocol.responses import ResponsesRequest


def _with_detail(item: Any) -> Any:
    """An item whose images state a detail: the API's default is given before the types are checked."""
    content = item.get("content") if isinstance(item, dict) else None
    if not isinstance(content, list):
        return item
    return {**item, "content": [{"detail": "auto", **part} if _is_image(part) else part for part in content]}


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "input_image"


def _parsed(item: Any) -> Any:
    """Items that vLLM reads before the union of all types, because it would take them for another or miss a field that
    they may leave out. What does not fit is left to the union, which says why."""
    if not isinstance(item, dict):
        return item
    match item:
        case {"type": "function_call"}:
            return _fitting(ResponseFunctionToolCall, item, item)
        case {"type": "reasoning"}:
            whole = {"id": f"rs_{random_id()}", **item}
            return _fitting(ResponseReasoningItem, whole, whole)
        case {"type": "message", "role": "assistant", "content": [*parts]}:
            read = [_annotated(part) for part in parts]
            whole = {"id": f"msg_{random_id()}", "status": "completed", **item, "content": read}
            return _fitting(ResponseOutputMessage, whole, item)
        case _:
            return item


def _annotated(part: Any) -> Any:
    return {"annotations": [], **part} if isinstance(part, dict) and part.get("type") == "output_text" else part


def _fitting(form: type[BaseModel], fields: dict[str, Any], otherwise: Any) -> Any:
    try:
        return form(**fields)
    except ValidationError:
        return otherwise


class TypedResponsesRequest(ResponsesRequest):
    """Body of POST /v1/responses."""

    # The types of items keep what they do not name, too.
    model_config = ConfigDict(extra="allow", title=ResponsesRequest.__name__)

    input: str | list[Annotated[ResponseInputItemParam | ResponseOutputItem, BeforeValidator(_with_detail)]]
    tool_choice: ToolChoice = "auto"
    tools: list[Tool] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _parse_items(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        items = data.get("input")
        if items is None or isinstance(items, str | int | float):
            return data
        return {**data, "input": [_parsed(item) for item in items]}
