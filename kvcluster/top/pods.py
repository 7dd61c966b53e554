"""The live document of a KVCluster in Kubernetes.

Apart from the other sources, because the client library takes a second to load.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from controller.objects.names import MANAGEMENT_PORT
from kvcluster.explain.gather import check_names, find_cluster, router_pods
from kvcluster.management_token import NoTokenError, pod_headers
from kvcluster.top.sources import SILENCE, SourceError, refused
from runtime.kube.client import ApiServer
from runtime.kube.credentials import find_credentials
from runtime.kube.errors import KubeApiError


@asynccontextmanager
async def in_cluster(
    name: str, namespace: str | None, context: str | None, kubeconfig: Path | None
) -> AsyncGenerator[PodSource]:
    """The source of a KVCluster that exists.

    Raises `BadNameError`, `NoClusterError`, `NotFoundError` or `KubeApiError`.
    """
    check_names(name, namespace)
    credentials = await find_credentials(kubeconfig, context=context, pod=False)
    namespace = namespace or credentials.namespace
    async with ApiServer(credentials, "kvcluster-top") as api:
        await find_cluster(api, name, namespace)
        yield PodSource(api, name, namespace)


@dataclass(slots=True)
class PodSource:
    """A KVCluster in a cluster: one of its router pods, through the API server's proxy. A router shows the others too.

    Each time another pod is asked, so that one that does not answer is passed over.
    """

    api: ApiServer
    name: str
    namespace: str
    _tries: int = field(default=0, init=False)

    @property
    def title(self) -> str:
        """Name and namespace."""
        return f"{self.name} in namespace {self.namespace}"

    @asynccontextmanager
    async def open(self, path: str) -> AsyncGenerator[AsyncIterator[bytes]]:
        """See `Source`."""
        name = ""
        try:
            pods = await router_pods(self.api, self.name, self.namespace)
            if not pods:
                ask = f"kubectl kvcluster explain {self.name} -n {self.namespace}"
                raise SourceError(f"no router pod of {self.title} runs: {ask} says why")
            pod = pods[self._tries % len(pods)]
            self._tries += 1
            name = pod.name
            proxied = f"/api/v1/namespaces/{self.namespace}/pods/{name}:{MANAGEMENT_PORT}/proxy{path}"
            headers = await pod_headers(self.api, self.namespace, pod.secret)
            stream = await self.api.stream(proxied, silence=SILENCE, headers=headers)
            with contextlib.closing(stream):
                yield stream.pieces()
        except KubeApiError as error:
            if error.status == 404:
                raise SourceError(refused(f"router pod {name}", 404)) from None
            raise SourceError(f"{self.title} cannot be read: {error}") from None
        except NoTokenError as error:
            raise SourceError(f"{self.title} cannot be read: {error}") from None
