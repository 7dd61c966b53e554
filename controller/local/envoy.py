"""The Envoy that is a local cluster's data plane: its files, its process, its readiness and its end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from controller.api.model import KVCluster
from controller.data_plane import data_plane
from runtime.envoy.bootstrap import bootstrap, endpoints
from runtime.envoy.clusters import PICKER, WORKERS
from runtime.envoy.settings import Files, Tls
from runtime.envoy.tls import secrets
from runtime.envoy_admin import EnvoyAdmin

DRAIN_SECONDS = 1
"""For which Envoy still accepts connections after it was told to stop, and closes each after its answer."""
POLL = 0.05
API_KEYS, CERTIFICATE, CLIENT_CA = "ROUTER_API_KEYS_FILE", "ROUTER_TLS_CERT_PATH", "ROUTER_TLS_CLIENT_CA"
"""Variables of the router's environment that its data plane has to know of, too."""


@dataclass(frozen=True, slots=True)
class EnvoyParts:
    """An executable, and a folder that Envoy and the router have to themselves."""

    binary: str
    folder: str

    @property
    def files(self) -> Files:
        return Files(*(f"{self.folder}/{name}" for name in ("endpoints.json", "picker.sock", "admin.sock")))

    @property
    def config(self) -> str:
        return f"{self.folder}/envoy.json"


def router_flags(parts: EnvoyParts) -> dict[str, object]:
    """What the router is told, in place of a port for clients."""
    files = parts.files
    return {
        "mode": "picker",
        "picker-port": -1,
        "picker-health-port": -1,
        "picker-socket": files.picker,
        "envoy-endpoints": files.endpoints,
        "envoy-admin": files.admin,
    }


def envoy_flags(parts: EnvoyParts) -> tuple[str, ...]:
    """Envoy's command line: one thread, because the cores of this machine are the engines'."""
    return (
        *("--config-path", parts.config, "--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"),
        *("--drain-time-s", str(DRAIN_SECONDS), "--drain-strategy", "immediate"),
    )


def envoy_files(
    manifest: KVCluster, parts: EnvoyParts, port: int, host: str, workers: Sequence[str], env: Mapping[str, str]
) -> dict[str, str]:
    """The files that have to be there before Envoy starts, by path. `workers`: `ip:port`; `env`: the router's."""
    folder, authorities = env.get(CERTIFICATE), env.get(CLIENT_CA)
    tls = None
    if folder:
        ca = str(Path(authorities).absolute()) if authorities else None
        tls = Tls(str(Path(folder).absolute()), parts.folder, ca)
    plane = data_plane(manifest.spec, parts.files, port, address=host, tls=tls, asks_for_keys=bool(env.get(API_KEYS)))
    written = {parts.config: bootstrap(plane), parts.files.endpoints: endpoints(workers, 0)}
    if tls is not None:
        written |= {f"{tls.secrets}/{name}": content for name, content in secrets(tls).items()}
    return {path: json.dumps(content, indent=1) for path, content in written.items()}


class EnvoyControl:
    """How the supervisor asks Envoy. Must be created inside the event loop."""

    def __init__(self, parts: EnvoyParts, grace: float) -> None:
        self._admin = EnvoyAdmin(Path(parts.files.admin), time.monotonic)
        self._grace = grace

    async def ready(self) -> bool:
        return await self._admin.ready()

    async def drain(self) -> None:
        """No connection is accepted any more, and no request is in progress; or Envoy does not answer."""
        await self._admin.drain()
        await self._admin.idle(self._grace)

    async def knows(self, workers: int) -> None:
        """Return when Envoy asks the router, and so many workers have answered it."""
        while await self._admin.healthy(PICKER) < 1 or await self._admin.healthy(WORKERS) < workers:  # noqa: ASYNC110
            await asyncio.sleep(POLL)  # another process sets no event

    async def close(self) -> None:
        await self._admin.close()
