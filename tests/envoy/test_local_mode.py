"""`kvcluster up --data-plane envoy` with a real Envoy, router and workers: requests, pages of other origins, an Envoy
that dies, one that cannot start, and an end that no request notices.

Not covered: what clients see when router and workers fail behind Envoy (test_data_plane, and `bench.faults` under
load), and the processes that a manifest asks for (tests/controller).
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from controller.api.load import validate_manifest
from controller.local.cluster import LocalCluster, StartError
from controller.local.desired_processes import Addresses, DesiredProcess, Role, desired_processes
from tests.kvcluster.test_up import up
from tests.processes import runs

pytestmark = [pytest.mark.envoy, pytest.mark.process]

ORIGIN = "https://chat.example.com"


async def test_envoy_serves_comes_back_and_is_drained(tmp_path: Path) -> None:
    spec = {"router": {"corsOrigins": [ORIGIN]}, "engine": {"speed": 5}}
    async with (
        up(tmp_path, "--json", "--data-plane=envoy", spec=spec) as command,
        httpx.AsyncClient(timeout=60) as client,
    ):
        first, ready = await command.event("process", name="small-envoy", state="ready"), await command.event("ready")
        url = f"{ready['url']}/v1/completions"

        async def ask(**fields: Any) -> httpx.Response:
            return await client.post(url, json={"prompt": "Hello", "max_tokens": 2, **fields})

        answer = await ask()
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-kvcluster-strategy"] == "cache_aware", "the router has decided"
        assert answer.headers["x-kvcluster-worker"].startswith("small-worker-")
        preflight = {"origin": ORIGIN, "access-control-request-method": "POST"}
        allowed = await client.options(url, headers=preflight)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, ORIGIN)

        os.kill(first["pid"], signal.SIGKILL)
        back = await command.event("process", name="small-envoy", state="ready")
        assert (back["restarts"], back["url"]) == (1, ready["url"])
        assert (await ask()).status_code == 200

        async with client.stream("POST", url, json={"prompt": "Hi", "max_tokens": 400, "stream": True}) as stream:
            events = stream.aiter_lines()
            assert (await anext(events)).startswith("data: ")
            command.process.send_signal(signal.SIGINT)
            lines = [line async for line in events]
        assert lines[-2:] == ["data: [DONE]", ""], "the stream that was in progress has ended well"
        await command.event("message", message="stopped")
        assert await command.process.wait() == 0
        assert not runs(back["pid"])
    assert "small-envoy.log" in [file.name for file in (tmp_path / "logs").iterdir()]


def spoiled(manifest: Any, addresses: Addresses) -> tuple[DesiredProcess, ...]:
    """Envoy alone, with a configuration that it does not know."""
    envoy = next(each for each in desired_processes(manifest, addresses) if each.role is Role.ENVOY)
    return (dataclasses.replace(envoy, files=dict.fromkeys(envoy.files, json.dumps({"bogus": 1}))),)


async def test_an_envoy_that_does_not_start_is_shown_with_its_own_words() -> None:
    head = {"apiVersion": "kvcluster.dev/v1alpha1", "kind": "KVCluster", "metadata": {"name": "demo"}}
    manifest = validate_manifest({**head, "spec": {"router": {"dataPlane": "envoy"}}})
    async with LocalCluster(manifest, desired=spoiled) as cluster:
        with pytest.raises(StartError, match=r"(?s)does not start: demo-envoy .*exited with code 1.*bogus"):
            await cluster.wait_ready()
