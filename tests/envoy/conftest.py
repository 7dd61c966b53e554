"""A router with an endpoint picker, behind a real Envoy."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvcache.tokens.tokenizer import Tokenizer, load_tokenizer
from router.picker.server import PickerServer
from tests.envoy.gateway import Gateway, Modes, running
from tests.router.conftest import RunningRouter, router_starter


@dataclass
class Behind:
    """A gateway and the router that it asks."""

    gateway: Gateway
    router: RunningRouter
    picker: PickerServer

    async def complete(self, prompt: Any = "a prompt", **fields: Any) -> Any:
        return await self.gateway.client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2, **fields})


StartGateway = Callable[..., AbstractAsyncContextManager[Behind]]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer("gpt2")


@pytest.fixture
def start_gateway(tokenizer: Tokenizer, tmp_path: Path) -> StartGateway:
    """`async with start_gateway(workers, Modes(), strategy="round_robin") as behind`."""

    @asynccontextmanager
    async def start(
        workers: Sequence[Any], modes: Modes | None = None, *, hosts: Sequence[str] = (), **settings: Any
    ) -> AsyncIterator[Behind]:
        chosen = {
            "mode": "both", "picker_host": "127.0.0.1", "picker_port": 0, "picker_health_port": 0, **settings,
        }  # fmt: skip
        async with router_starter(tokenizer)(workers, **chosen) as router:
            picker = router.router.picker_server()
            await picker.start()
            tls = chosen.get("picker_tls", True)
            socket = chosen.get("picker_socket")
            address = str(socket) if socket else f"127.0.0.1:{picker.port}"
            urls = [*hosts, *(worker.url for worker in workers)]
            try:
                async with running(address, urls, tmp_path, modes, tls=tls and not socket) as gateway:
                    yield Behind(gateway, router, picker)
            finally:
                await picker.stop(1.0)

    return start
