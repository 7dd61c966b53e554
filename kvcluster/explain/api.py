"""Reading from the API server that a kubeconfig names."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
import orjson
import yaml
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration

REQUEST_TIMEOUT = 10.0
DEFAULT_KUBECONFIG = "~/.kube/config"


class NoClusterError(ValueError):
    """The kubeconfig names no cluster to talk to; the message says what to do."""


class ReadError(RuntimeError):
    """The API server did not give what was asked for. `status` is 0 when it could not be asked at all."""

    def __init__(self, status: int, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.details = details or {}


@dataclass(frozen=True, slots=True)
class Api:
    """A connection to one API server."""

    client: ApiClient
    server: str
    namespace: str
    """The context's, where none is asked for."""
    timeout: float = REQUEST_TIMEOUT

    async def body(self, path: str, query: Mapping[str, str] | None = None) -> bytes:
        """The body of the answer to a GET. Raises `ReadError`."""
        target = f"{path}?{urlencode(query)}" if query else path
        try:
            async with asyncio.timeout(self.timeout):
                request = await self.client.param_serialize("GET", target, auth_settings=["BearerToken"])
                answer = await self.client.call_api(*request, _request_timeout=self.timeout)
                content: bytes = await answer.read()  # type: ignore[no-untyped-call]
        except TimeoutError:
            raise ReadError(0, f"{self.server} did not answer within {self.timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ReadError(0, f"{self.server} cannot be reached: {error}") from None
        if not 200 <= answer.status < 300:
            raise _refusal(answer.status, content)
        return content

    async def get(self, path: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The object an answer holds. Raises `ReadError`."""
        content = parsed(await self.body(path, query))
        if content is None:
            raise ReadError(0, f"{self.server}{path} answered something that is no JSON object")
        return content


def parsed(body: bytes) -> dict[str, Any] | None:
    """The JSON object in a body; None when there is none."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return content if type(content) is dict else None


def _refusal(status: int, body: bytes) -> ReadError:
    content = parsed(body) or {}
    details = content.get("details")
    text = content.get("message") or body.decode(errors="replace").strip()[:200] or "no reason is given"
    return ReadError(status, f"{status}: {text}", details if type(details) is dict else None)


def segment(name: str) -> str:
    """A name as a part of a path."""
    return quote(name, safe=":")


@asynccontextmanager
async def connected(kubeconfig: Path | None, context: str | None) -> AsyncIterator[Api]:
    """A connection to the server that the kubeconfig's context (default: its current one) names.

    Raises `NoClusterError`.
    """
    files = str(kubeconfig) if kubeconfig is not None else os.environ.get("KUBECONFIG") or DEFAULT_KUBECONFIG
    namespace = _namespace(files, given=kubeconfig is not None, context=context)
    settings = Configuration()
    try:
        await config.load_kube_config(  # type: ignore[no-untyped-call]
            files, context=context, client_configuration=settings, persist_config=False
        )
    except (config.ConfigException, OSError) as error:
        raise NoClusterError(f"the cluster that {files} names cannot be used: {error}") from None
    async with ApiClient(configuration=settings) as client:
        yield Api(client, str(settings.host), namespace)


def _namespace(files: str, *, given: bool, context: str | None) -> str:
    if not any(Path(file).expanduser().exists() for file in files.split(os.pathsep) if file):
        where = f"{files} does not exist" if given else f"there is no {files}"
        raise NoClusterError(
            f"no cluster to talk to: {where}; name a kubeconfig with --kubeconfig or $KUBECONFIG "
            "(kvcluster up runs a manifest without a cluster)"
        )
    try:
        contexts, current = config.list_kube_config_contexts(files)  # type: ignore[no-untyped-call]
    except (config.ConfigException, yaml.YAMLError, OSError, AttributeError, TypeError, ValueError) as error:
        # The client takes a kubeconfig apart without looking: one of another shape ends in any of these.
        raise NoClusterError(f"no cluster to talk to: {files} names none that can be used ({error})") from None
    if context is not None:
        named = {str(item["name"]): item for item in contexts}
        if context not in named:
            raise NoClusterError(f"{files} has no context {context!r}; it has: {', '.join(named) or 'none'}")
        current = named[context]
    return str((current.get("context") or {}).get("namespace") or "default")
