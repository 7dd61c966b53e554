"""Probes: one question to a container, and the tally that turns answers into a verdict."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.kube.kubelet.endpoints import target_port

Spec = Mapping[str, Any]
Run = Callable[[list[str]], Awaitable[int]]
"""Runs a command in the container and gives its exit code."""


@dataclass(slots=True)
class Tally:
    """Verdict over consecutive answers: it changes after a threshold of equal ones."""

    success_threshold: int
    failure_threshold: int
    verdict: bool | None = None
    _run: int = 0
    _last: bool | None = None

    def add(self, success: bool) -> bool:
        """Whether this answer changed the verdict."""
        self._run = self._run + 1 if success == self._last else 1
        self._last = success
        enough = self._run >= (self.success_threshold if success else self.failure_threshold)
        if not enough or self.verdict == success:
            return False
        self.verdict = success
        return True


@dataclass(frozen=True, slots=True)
class Prober:
    """Asks one container."""

    session: aiohttp.ClientSession
    ip: str
    container: Spec
    run: Run

    async def ask(self, probe: Spec) -> str:
        """Empty when the container passes, else why it does not, as the kubelet says it."""
        timeout = probe.get("timeoutSeconds", 1)
        try:
            async with asyncio.timeout(timeout):
                return await self._answer(probe)
        except TimeoutError:
            return f"context deadline exceeded after {timeout} s"
        except (aiohttp.ClientError, OSError) as error:
            return str(error) or type(error).__name__

    async def _answer(self, probe: Spec) -> str:
        if "httpGet" in probe:
            return await self._http(probe["httpGet"])
        if "tcpSocket" in probe:
            _, writer = await asyncio.open_connection(self.ip, self._port(probe["tcpSocket"]["port"]))
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            return ""
        if "exec" in probe:
            code = await self.run(list(probe["exec"]["command"]))
            return f"command exited with {code}" if code else ""
        return f"the fake node knows no such probe: {sorted(probe)}"

    async def _http(self, get: Spec) -> str:
        """The request itself; a connection that fails is an answer too."""
        scheme, host = get.get("scheme", "HTTP").lower(), get.get("host") or self.ip
        url = f"{scheme}://{host}:{self._port(get['port'])}{get.get('path', '/')}"
        headers = {each["name"]: each["value"] for each in get.get("httpHeaders") or ()}
        headers.setdefault("User-Agent", "kube-probe/1.32")
        headers["Connection"] = "close"
        try:
            async with self.session.get(url, headers=headers, allow_redirects=False) as response:
                if 200 <= response.status < 400:
                    return ""
                return f"HTTP probe failed with statuscode: {response.status}"
        except aiohttp.ClientConnectorError as error:
            return f'Get "{url}": dial tcp {host}: connect: {error.strerror}'

    def _port(self, port: int | str) -> int:
        number = target_port(port, {"spec": {"containers": [self.container]}})
        if number is None:
            raise OSError(f"couldn't find port: {port}")
        return number
