"""POST /invocations: SageMaker's one endpoint for whatever a request turns out to be."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from kvcache.errors import ApiError
from worker.asgi import HttpRequest
from worker.emulator.protocol.chat import ChatCompletionRequest
from worker.emulator.protocol.completion import CompletionRequest
from worker.emulator.protocol.errors import InternalError
from worker.emulator.protocol.parsing import parse_json
from worker.emulator.server.chat import chat
from worker.emulator.server.completions import complete
from worker.emulator.server.service import Service

ADAPTER_HEADER = b"x-amzn-sagemaker-adapter-identifier"


async def invocations(raw_request: HttpRequest, service: Service) -> None:
    """Answer a chat or a completion request, the first that it fits. Raises `ApiError`."""
    raw = await raw_request.json_body()
    body = parse_json(raw) if raw else None
    if isinstance(body, dict):  # SageMaker names a LoRA adapter there; what the body says of the model is not read
        body["model"] = raw_request.header(ADAPTER_HEADER) or None
    if (request := _fitting(ChatCompletionRequest, body)) is not None:
        await chat(raw_request, service, request, len(raw))
    elif (completion := _fitting(CompletionRequest, body)) is not None:
        await complete(raw_request, service, completion, len(raw))
    else:
        names = [ChatCompletionRequest.__name__, CompletionRequest.__name__]
        raise ApiError(400, f"Cannot find suitable handler for request. Expected one of: {names}")


_Model = TypeVar("_Model", bound=BaseModel)


def _fitting(model: type[_Model], body: object) -> _Model | None:
    try:
        return model.model_validate(body)
    except ValidationError:
        return None
    except (TypeError, OverflowError) as error:
        raise ApiError(400, str(error)) from None
    except (AttributeError, KeyError) as error:
        raise InternalError(str(error)) from None
