"""A Kubernetes API server for tests: enough of it for kubectl, helm, kopf and the official client.

    api = FakeApiServer()
    await api.start()
    api.kubeconfig(path)
    ...
    await api.stop()

It runs on the test's event loop. Run kopf on another one (a thread's) or in a process: a kopf operator that stops
cancels every task of its loop, this server's too.

What is modelled, against what that was checked and what is refused says the docstring of each module, and in one place
docs/decisions/020-the-test-bed-models-what-tests-ask-for.md. Known to be otherwise than in Kubernetes, and not refused:

- endpoints may have loopback addresses, which pods of the fake node have;
- a watch from a version in the future waits for it as if it were now;
- an explicit zero that is not stored is left out before owners of fields are compared, and makes no conflict;
- there is no admission: no ServiceAccounts, quotas or policies (the node plays the first two), no webhooks.
"""

from __future__ import annotations

import asyncio
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx
import yaml
from uvicorn.server import ServerState

from tests.kube.apiserver import writes
from tests.kube.apiserver.app import App, listen, serve
from tests.kube.apiserver.cluster import Ask, Cluster
from tests.kube.apiserver.deletion import GarbageCollector
from tests.kube.apiserver.faults import Fault, Faults
from tests.kube.apiserver.normalization import plain_copy
from tests.kube.apiserver.request import Logged, token_of
from tests.kube.apiserver.schema import Definitions
from tests.kube.apiserver.store import Store

__all__ = ["FakeApiServer", "Fault", "Faults", "Logged"]


@lru_cache(maxsize=1)
def definitions() -> Definitions:
    """Read once a process: they are never changed."""
    return Definitions()


_FIRST: list[dict[str, Any]] = [
    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}},
    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kube-system"}},
]


class FakeApiServer:
    """An API server on a port of 127.0.0.1. Stopping keeps the objects; starting again is a restart.

    `bookmark_seconds` is how often watches get bookmarks.
    """

    def __init__(self, *, bookmark_seconds: float = 10.0) -> None:
        self._port = 0
        self.cluster = Cluster(definitions())
        self._app = App(self.cluster, bookmark_seconds)
        self._garbage = GarbageCollector(self.cluster, self._app.crashes.append)
        self._connections = ServerState()
        self._listener: asyncio.Server | None = None
        self._seeded = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def faults(self) -> Faults:
        return self._app.faults

    @property
    def requests(self) -> list[Logged]:
        """Every request answered so far, in order; `requests.clear()` begins anew."""
        return self._app.requests

    @property
    def store(self) -> Store:
        """The objects; read them, write through the API."""
        return self.cluster.store

    def compact(self) -> None:
        """Forget the history: watches from before now are answered with 410 Gone."""
        self.cluster.store.compact()

    async def start(self) -> None:
        """Serve from now on."""
        if not self._seeded:
            self._seeded = True
            self._seed()
        sock = listen("127.0.0.1", self._port)
        self._port = sock.getsockname()[1]
        self._app.client = httpx.AsyncClient(timeout=30, trust_env=False, verify=False)  # noqa: S501  pods speak plain HTTP
        self._listener = await serve(self._app, sock, self._connections)

    async def stop(self) -> None:
        """Drop every connection and the socket."""
        if self._listener is None:
            return
        self._listener.close()
        self._app.cut_watches()
        for connection in list(self._connections.connections):
            connection.transport.abort()
        tasks = list(self._connections.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._app.client is not None:
            await self._app.client.aclose()
        self._listener = self._app.client = None
        if self._app.crashes:
            raise ExceptionGroup("the fake API server failed", self._app.crashes)

    def _seed(self) -> None:
        """Create what every cluster has from the start."""
        for obj in _FIRST:
            resource = self.cluster.resource_of(obj["apiVersion"], obj["kind"])
            assert resource is not None
            writes.create(self.cluster, resource, "", plain_copy(obj), Ask(manager="kube-apiserver"))

    def token(self, user: str) -> str:
        """A bearer token of a user."""
        return token_of(user)

    def account_token(self, namespace: str, account: str) -> str:
        """A bearer token of a service account."""
        return self.token(f"system:serviceaccount:{namespace}:{account}")

    def kubeconfig(self, path: Path, user: str = "admin", namespace: str = "default") -> Path:
        """Write a kubeconfig for a user: `admin`, or `system:serviceaccount:<namespace>:<name>`, or any other name."""
        login = {"token": self.token(user)}
        if user != "admin":
            # For kubectl, which sends no token over plain HTTP: it is the administrator, and impersonates the user.
            login["as"] = user
        config: dict[str, Any] = {
            "apiVersion": "v1", "kind": "Config", "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
            "users": [{"name": user, "user": login}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": user, "namespace": namespace}}],
        }  # fmt: skip
        path.write_text(yaml.safe_dump(config))
        return path
