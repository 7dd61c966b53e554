"""The token that the management port of a router pod asks for, read from its Secret with the user's own rights."""

from __future__ import annotations

import os

from controller.status import raw
from kvcluster.options import TOKEN_VARIABLE
from runtime.http.hosts import PROGRAM_HEADERS
from runtime.http.tokens import TokenFileError, decoded, token_headers
from runtime.kube.client import ApiServer
from runtime.kube.errors import ApiFailureCause, KubeApiError


class NoTokenError(RuntimeError):
    """The token of a router cannot be had; the message says what to do."""


async def pod_token(api: ApiServer, namespace: str, secret: str) -> str:
    """The token to show at a router whose pod has this Secret; empty where it has none (`secret` empty). The one in the
    environment goes first. Raises `NoTokenError`, or `KubeApiError` where the API server does not answer."""
    given = os.environ.get(TOKEN_VARIABLE, "").strip()
    if given or not secret:
        return given
    otherwise = f"or set {TOKEN_VARIABLE} to a token that you were given"
    try:
        found = await api.request_object("GET", f"/api/v1/namespaces/{namespace}/secrets/{secret}")
    except KubeApiError as error:
        if error.cause is ApiFailureCause.FORBIDDEN:
            raise NoTokenError(
                f"the routers ask for a token: {error.message}: it takes the right to get secrets in namespace "
                f"{namespace}, {otherwise}"
            ) from None
        if error.status == 404:
            raise NoTokenError(
                f"the routers ask for a token of Secret {secret}, and namespace {namespace} has none of that name: "
                f"wait a minute for the operator to make it, {otherwise}"
            ) from None
        raise
    try:
        return decoded(raw.mapping(found, "data"))[0]
    except TokenFileError as error:
        raise NoTokenError(f"Secret {secret} in namespace {namespace} cannot be used: {error}; {otherwise}") from None


async def pod_headers(api: ApiServer, namespace: str, secret: str) -> dict[str, str]:
    """What a command sends to such a router: that it is a program, and the token. Raises what `pod_token` raises."""
    return {**PROGRAM_HEADERS, **token_headers(await pod_token(api, namespace, secret))}
