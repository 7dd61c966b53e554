"""Probes: one question to a container, and the tally that turns answers into a verdict.

Played: probes by HTTP, as the product's pods have them, with the kubelet's words for what fails. Checked by
`test_pod_states.py` and `test_kubelet_failures.py`. Not played, and refused (`pod.py`): probes by TCP, gRPC or a
command, other hosts and headers, HTTPS.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.kube.kubelet.endpoints import target_port

Spec = Mapping[str, Any]


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

    async def ask(self, probe: Spec) -> str:
        """Empty when the container passes, else why it does not, as the kubelet says it."""
        timeout = probe.get("timeoutSeconds", 1)
        try:
            async with asyncio.timeout(timeout):
                return await self._http(probe["httpGet"])
        except TimeoutError:
            return f"context deadline exceeded after {timeout} s"
        except (aiohttp.ClientError, OSError) as error:
            return str(error) or type(error).__name__

    async def _http(self, get: Spec) -> str:
        """The request itself; a connection that fails is an answer too."""
        url = f"http://{self.ip}:{self._port(get['port'])}{get['path']}"
        headers = {"User-Agent": "kube-probe/1.35", "Connection": "close"}
        try:
            async with self.session.get(url, headers=headers, allow_redirects=False) as response:
                if 200 <= response.status < 400:
                    return ""
                return f"HTTP probe failed with statuscode: {response.status}"
        except aiohttp.ClientConnectorError as error:
            return f'Get "{url}": dial tcp {self.ip}: connect: {error.strerror}'

    def _port(self, port: int | str) -> int:
        number = target_port(port, {"spec": {"containers": [self.container]}})
        if number is None:
            raise OSError(f"couldn't find port: {port}")
        return number
