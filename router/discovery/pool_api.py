"""What the router asks of an API server about an InferencePool: the pool, its pods, its objectives.

Imported only where Kubernetes is the source of workers or of priorities.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from router.discovery.kubernetes import ANSWER_TIMEOUT
from runtime.kube.client import ApiServer, parse_json
from runtime.kube.credentials import find_credentials
from runtime.kube.errors import ApiFailureCause, KubeApiError, NoClusterError
from runtime.kube.listwatch import Watch
from runtime.kube.reflector import EventStream
from runtime.settings import SettingsError

POOLS = "inference.networking.k8s.io/v1"


class Resource:
    """One collection of a namespace at an API server that somebody else owns. Implements `Collection`.

    `query` selects of it. `what` names the resource and its group where a right is missing.
    """

    def __init__(self, server: ApiServer, path: str, query: Mapping[str, str], what: str) -> None:
        self._server = server
        self._path = path
        self._query = query
        self._what = what

    async def list(self) -> object:
        """The answer to a list. Raises `KubeApiError`."""
        try:
            return parse_json(await self._server.request("GET", self._path, self._query))
        except KubeApiError as error:
            raise self._explained(error) from None

    async def watch(self, watch: Watch, slack: float) -> EventStream:
        """Open a watch that fails if it outlasts its time by `slack` seconds. Raises `KubeApiError`."""
        try:
            return await self._server.watch(self._path, watch, slack, self._query)
        except KubeApiError as error:
            raise self._explained(error) from None

    async def close(self) -> None:
        """Nothing: the connections are the owner's."""

    def _explained(self, error: KubeApiError) -> KubeApiError:
        if error.cause is ApiFailureCause.FORBIDDEN:
            return KubeApiError(error.status, error.reason, f"{error.message}; grant list and watch on {self._what}")
        if error.status == 404:
            return KubeApiError(404, error.reason, f"the API server has no {self._what}: install its CRD")
        return error


class PoolApi:
    """An InferencePool's namespace at an API server that this owns."""

    def __init__(self, server: ApiServer, namespace: str, pool: str) -> None:
        self.namespace = namespace
        self.pool = pool
        self._server = server

    def pools(self) -> Resource:
        """The pool itself, as a collection of one at most."""
        return self._resource(POOLS, "inferencepools", {"fieldSelector": f"metadata.name={self.pool}"})

    def pods(self, selector: str) -> Resource:
        """The pods with these labels."""
        return self._resource("v1", "pods", {"labelSelector": selector})

    def objectives(self, api: str) -> Resource:
        """The InferenceObjectives of one group."""
        return self._resource(api, "inferenceobjectives", {})

    def _resource(self, api: str, plural: str, query: Mapping[str, str]) -> Resource:
        base = f"/apis/{api}" if "/" in api else f"/api/{api}"
        group = api.rpartition("/")[0]
        what = f"{plural} ({group})" if group else plural
        path = f"{base}/namespaces/{self.namespace}/{plural}"
        return Resource(self._server, path, query, f"{what} in namespace {self.namespace}")

    async def close(self) -> None:
        """Cut every connection."""
        await self._server.close()


async def find_pool(
    pool: str, namespace: str | None, kubeconfig: Path | None, setting: str = "--inference-pool"
) -> PoolApi:
    """This pool at the API server that the kubeconfig, the pod or the user's own kubeconfig names; `namespace` None:
    that of the pod or of the kubeconfig's context. Raises `SettingsError` that names the `setting`. To be called
    inside the event loop."""
    try:
        credentials = await find_credentials(kubeconfig, flag="--kubernetes-kubeconfig")
    except NoClusterError as error:
        raise SettingsError(f"{setting}: {error}") from None
    server = ApiServer(credentials, "kvcluster-router", timeout=ANSWER_TIMEOUT)
    return PoolApi(server, namespace or credentials.namespace, pool)
