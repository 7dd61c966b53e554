"""Endpoints for those who operate an engine: its state, its sources of events, what a development server does.

What has no counterpart in an emulated engine (weights, expert parallelism, sleep) is answered as an idle vLLM answers
it where that needs no such thing, and is not served otherwise.
"""

from __future__ import annotations

import json
from typing import Any

from kvcache.errors import ApiError
from worker.asgi import HttpRequest
from worker.emulator.server.service import VLLM_VERSION, Service

_SCALE_OUT = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."


async def kv_event_sources(raw_request: HttpRequest, service: Service) -> None:
    """None: an emulated engine publishes its events over HTTP, at /cache/events."""
    await raw_request.json(200, {})


async def is_sleeping(raw_request: HttpRequest, service: Service) -> None:
    await raw_request.json(200, {"is_sleeping": False})


async def is_paused(raw_request: HttpRequest, service: Service) -> None:
    await raw_request.json(200, {"is_paused": False})


async def is_scaling(raw_request: HttpRequest, service: Service) -> None:
    await raw_request.json(200, {"is_scaling_elastic_ep": False})


async def weight_info(raw_request: HttpRequest, service: Service) -> None:
    await raw_request.json(200, {"weight_version": "default"})


async def world_size(raw_request: HttpRequest, service: Service) -> None:
    await raw_request.json(200, {"world_size": 1})


async def forget_nothing(raw_request: HttpRequest, service: Service) -> None:
    """Reset a cache that an emulated engine has not."""
    await raw_request.reply(200, b"")


async def scale_out_disabled(raw_request: HttpRequest, service: Service) -> None:
    raise ApiError(403, _SCALE_OUT, type="PermissionDeniedError")


async def server_info(raw_request: HttpRequest, service: Service) -> None:
    """The settings that decide about answers, as `vllm_config`; the environment is nobody's business."""
    facts: dict[str, Any] = {
        "model": service.root,
        "served_model_name": service.model,
        "max_model_len": service.max_model_len,
        "block_size": service.block_size,
        "version": VLLM_VERSION,
    }
    await raw_request.json(200, {"vllm_config": json.dumps(facts), "vllm_env": {}, "system_env": {}})


async def abort_requests(raw_request: HttpRequest, service: Service) -> None:
    """End requests by the ids that clients gave or got; all of them when none is named."""
    try:
        body = json.loads(await raw_request.body())
    except ValueError:
        raise ApiError(400, "Invalid JSON format", type="Bad Request") from None
    if not isinstance(body, dict):
        raise ApiError(400, "Request body must be a JSON object", type="Bad Request")
    named = body.get("request_ids")
    await raw_request.json(200, {"status": "aborted", "aborted": service.abort(named or None)})
