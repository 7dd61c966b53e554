"""Asks routers for their reports, at the addresses of their pods and never through the API server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

import aiohttp

from controller.objects.names import MANAGEMENT_PORT, Component, Object
from controller.reconcile.tokens import Secret, Tokens, TokensUnknownError
from controller.status import raw
from controller.status.observed import RouterReports
from controller.status.pods import component_of, management_secret
from controller.status.report import ReportError, RouterReport, parse_report
from runtime.http.tokens import token_headers

TIMEOUT = 1.5
"""Seconds for an answer."""
TRIES = 2
"""A router that does not answer is asked once more, so that one slow moment does not show in the status."""
MAX_BYTES = 1 << 20
CONCURRENCY = 32
"""Requests at the same time, over all clusters."""


class TokenRefusedError(ReportError):
    """The router wants another token."""


class ReportCollector:
    """`GET /status` at every router pod of a cluster, all at the same time, with the token that the pod asks for."""

    def __init__(self, session: aiohttp.ClientSession, tokens: Tokens) -> None:
        self._session = session
        self._tokens = tokens
        self._slots = asyncio.Semaphore(CONCURRENCY)

    async def collect(self, pods: Iterable[Object]) -> RouterReports:
        """The answers of the routers among these pods. Pods without an address or that terminate are not asked."""
        routers = [pod for pod in pods if _can_be_asked(pod)]
        reports: dict[str, RouterReport] = {}
        errors: dict[str, str] = {}

        async def one(pod: Object) -> None:
            name, url = raw.name(pod), address(pod)
            secret = pod["metadata"]["namespace"], management_secret(pod)
            for _ in range(TRIES):
                try:
                    reports[name] = await self._ask_with_token(url, secret)
                except ReportError as error:
                    errors[name] = str(error)
                else:
                    errors.pop(name, None)
                    return

        await asyncio.gather(*map(one, routers))
        return RouterReports(reports, errors)

    async def _ask_with_token(self, url: str, secret: Secret) -> RouterReport:
        """Ask with each token that may be right. Raises `ReportError`."""
        if not secret[1]:
            return await self._ask(url, "")
        tried: set[str] = set()
        try:
            for refused in (False, True):
                for token in await self._tokens.of(secret, refused=refused):
                    if token not in tried:
                        tried.add(token)
                        with contextlib.suppress(TokenRefusedError):
                            return await self._ask(url, token)
        except TokensUnknownError as error:
            raise ReportError(f"its management port asks for a token: {error}") from None
        raise TokenRefusedError(
            f"it accepts no token of Secret {secret[1]}: a change of the Secret takes a minute to reach it, else its "
            "log says (tokens_unusable) why it cannot use it"
        )

    async def _ask(self, url: str, token: str) -> RouterReport:
        """Raises `ReportError`."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT)
        try:
            async with (
                self._slots,
                self._session.get(
                    f"{url}/status", headers=token_headers(token), timeout=timeout, allow_redirects=False
                ) as response,
            ):
                if response.status == 401 and token:
                    raise TokenRefusedError("it answered 401")
                if response.status != 200:
                    raise ReportError(f"it answered {response.status}")
                return parse_report(await _read(response))
        except TimeoutError:
            raise ReportError(f"no answer within {TIMEOUT:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ReportError(str(error)) from None


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The whole body, in however many pieces it arrives. Raises `ReportError` for one that is too large."""
    pieces, size = [], 0
    async for piece in response.content.iter_any():
        size += len(piece)
        if size > MAX_BYTES:
            raise ReportError(f"its report takes more than {MAX_BYTES:,} bytes")
        pieces.append(piece)
    return b"".join(pieces)


def address(pod: Object) -> str:
    """Base URL of a router pod's management port."""
    ip = pod["status"]["podIP"]
    return f"http://[{ip}]:{MANAGEMENT_PORT}" if ":" in ip else f"http://{ip}:{MANAGEMENT_PORT}"


def _can_be_asked(pod: Object) -> bool:
    is_router = component_of(pod) == Component.ROUTER
    return is_router and not raw.is_terminating(pod) and bool(raw.text(pod, "status", "podIP"))
