"""The connection to Kubernetes' API server: where it is, who we are, and the one question we have.

Credentials and TLS are the official client's; its models and generated calls are left aside (docs/decisions/009).
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import yaml
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.client.rest import RESTClientObject
from kubernetes.aio.config import ConfigException, list_kube_config_contexts, load_incluster_config, load_kube_config

from router.discovery.listwatch import ApiFailure, Cause, Watch, status_failure
from runtime.settings import SettingsError
from runtime.sockets import kept_alive

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
SLICES = "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
CONNECT_TIMEOUT = 5.0
ANSWER_TIMEOUT = 15.0
"""Seconds for a list, and for a watch to begin."""

_BROKEN = (aiohttp.ClientError, OSError)


class Stream:
    """An open watch."""

    def __init__(self, answer: aiohttp.ClientResponse, lasts: float) -> None:
        self._answer = answer
        self._until = asyncio.get_running_loop().time() + lasts

    async def next(self) -> object | None:
        """The next event; None at the end. Raises `ApiFailure`."""
        try:
            async with asyncio.timeout_at(self._until):
                line = await self._answer.content.readline()
        except TimeoutError:
            raise ApiFailure(Cause.SILENT, "the watch brought neither an event nor its end in time") from None
        except _BROKEN as error:
            raise ApiFailure(Cause.CUT, f"the watch broke off: {error!r:.200}") from None
        except ValueError as error:
            raise ApiFailure(Cause.MALFORMED, f"an event is too long: {error!r:.200}") from None
        return _json(line) if line else None

    def close(self) -> None:
        """Cut the connection."""
        self._answer.close()


class ApiServer:
    """Lists and watches the EndpointSlices of one Service. Made inside the event loop."""

    def __init__(self, configuration: Configuration, namespace: str, service: str) -> None:
        self.namespace = namespace
        self.service = service
        configuration.retries = None  # how long to wait is decided elsewhere
        self._client = ApiClient(configuration)
        self._client.rest_client = _KeptAlive(configuration)
        self._client.user_agent = "kvcluster-router"

    async def list(self) -> object:
        """The answer to a list. Raises `ApiFailure`."""
        answer = await self._get()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                return _json(await answer.read())
        except (*_BROKEN, TimeoutError) as error:
            raise ApiFailure(Cause.CONNECT, f"the API server's list broke off: {error!r:.200}") from None
        finally:
            answer.close()

    async def watch(self, watch: Watch, slack: float) -> Stream:
        """Open a watch. Raises `ApiFailure`."""
        answer = await self._get(
            watch="true",
            allowWatchBookmarks="true",
            resourceVersion=watch.version,
            timeoutSeconds=str(watch.seconds),
        )
        return Stream(answer, watch.seconds + slack)

    async def close(self) -> None:
        """Cut every connection."""
        await self._client.close()  # type: ignore[no-untyped-call]

    async def _get(self, **query: str) -> aiohttp.ClientResponse:
        selector = ("labelSelector", f"kubernetes.io/service-name={self.service}")
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                # Anew each time: a service account's token is replaced every hour.
                method, url, headers, _, _ = await self._client.param_serialize(
                    "GET",
                    SLICES,
                    path_params={"namespace": self.namespace},
                    query_params=[selector, *query.items()],
                    header_params={"Accept": "application/json"},
                    auth_settings=["BearerToken"],
                )
                rest = await self._client.call_api(method, url, headers, _request_timeout=timeout)
                answer: aiohttp.ClientResponse = rest.response
                if answer.status == 200:
                    return answer
                try:
                    raise await self._refusal(answer)
                finally:
                    answer.close()
        except ConfigException as error:
            raise ApiFailure(Cause.UNAUTHORIZED, f"the service account's token cannot be read: {error}") from None
        except (*_BROKEN, TimeoutError) as error:
            why = str(error) or f"no answer within {ANSWER_TIMEOUT:g} s"
            raise ApiFailure(Cause.CONNECT, f"the API server cannot be reached: {why:.300}") from None

    async def _refusal(self, answer: aiohttp.ClientResponse) -> ApiFailure:
        try:
            status = orjson.loads(await answer.read())
        except orjson.JSONDecodeError:
            status = None
        failure = status_failure(answer.status, answer.headers.get("Retry-After", ""), status)
        if failure.cause is Cause.FORBIDDEN:
            hint = f"grant list and watch on endpointslices (discovery.k8s.io) in namespace {self.namespace}"
            return ApiFailure(failure.cause, f"{failure}; {hint}")
        return failure


class _KeptAlive(RESTClientObject):
    """The official client's connection pool; the kernel finds out when the API server's machine is gone."""

    def _create_connector(self) -> aiohttp.TCPConnector:
        return aiohttp.TCPConnector(limit=self.maxsize, ssl=self.ssl_context, socket_factory=kept_alive)


def _json(data: bytes) -> object:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ApiFailure(Cause.MALFORMED, f"the API server sent what is no JSON: {error}") from None


async def find_api_server(service: str, namespace: str | None, kubeconfig: Path | None) -> ApiServer:
    """The API server that the settings, the pod or the user's kubeconfig name. Raises `SettingsError`."""
    configuration = Configuration()
    path = str(kubeconfig or os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config")
    pod_problem = ""
    if kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ:
        try:
            load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        except (ConfigException, OSError) as error:
            pod_problem = str(error)
        else:
            return ApiServer(configuration, namespace or _pod_namespace() or "default", service)
    if not _exists(path):
        if pod_problem:
            raise SettingsError(
                f"--kubernetes-service: this pod's service account cannot be used ({pod_problem}): give the pod a "
                "serviceAccountName and automountServiceAccountToken: true, or the router --kubernetes-kubeconfig"
            )
        remedy = "name one that works with kubectl by --kubernetes-kubeconfig or $KUBECONFIG"
        raise SettingsError(f"--kubernetes-service: this is no pod, and there is no kubeconfig {path}: {remedy}")
    try:
        await load_kube_config(  # type: ignore[no-untyped-call]
            config_file=path, client_configuration=configuration, persist_config=False
        )
        _, context = list_kube_config_contexts(config_file=path)  # type: ignore[no-untyped-call]
    except (ConfigException, OSError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise SettingsError(
            f"--kubernetes-service: the kubeconfig {path} cannot be used ({error}): does kubectl work with it?"
        ) from None
    return ApiServer(configuration, namespace or _context_namespace(context) or "default", service)


def _exists(paths: str) -> bool:
    return any(Path(path).is_file() for path in paths.split(os.pathsep))


def _pod_namespace() -> str:
    try:
        return NAMESPACE_FILE.read_text("utf-8").strip()
    except OSError:
        return ""


def _context_namespace(context: dict[str, Any]) -> str:
    return str(context.get("context", {}).get("namespace") or "")
