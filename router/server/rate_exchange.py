"""Routers tell one another what they have let through of each API key's rates: `GET /internal/rates`, once a second."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field

import aiohttp
import orjson
from fastapi import FastAPI, Response
from pydantic import TypeAdapter, ValidationError

from router.core.shared_rates import Limiters, RateReport, SharedRates, key_name, report
from router.live.peers import ADDRESSES_FRESH, MAX_ROUTERS, TIMEOUT, AddressesUnknown, PeerAddress, RouterList
from router.server.key_file import KeyFile
from runtime.http.hosts import PROGRAM_HEADERS
from runtime.http.tokens import token_headers
from runtime.logs import EventLogger

logger = EventLogger(__name__)

INTERVAL = 1.0
"""Seconds between two questions to each router."""
FRESH = 0.5 * INTERVAL
"""Seconds for which an answer is given again: looking through all keys costs the same for any number of routers."""
PATH = "/internal/rates"
MAX_BYTES = 4 * 2**20
"""Of an answer: some thirty thousand keys that are in use."""
_REPORT = TypeAdapter(RateReport)


class PeerSilentError(Exception):
    """Another router does not say what it has let through. The message says why."""


@dataclass(slots=True)
class RateExchange:
    """Asks the other routers, and answers them. Without `keys` there is nothing to tell, nor to ask for.

    `instance` identifies this process, `clock` is that of the rates. `token` gives what lets this router in at the
    others, empty where nothing is asked for.
    """

    keys: KeyFile | None
    routers: RouterList
    session: aiohttp.ClientSession
    _: KW_ONLY
    instance: str
    clock: Callable[[], float]
    token: Callable[[], str] = lambda: ""
    _shared: SharedRates = field(default_factory=SharedRates, init=False)
    _addresses: Sequence[PeerAddress] = field(default=(), init=False)
    _addresses_at: float | None = field(default=None, init=False)
    _silent: frozenset[str] = field(default=frozenset(), init=False)
    """URLs of the routers that did not answer last."""
    _instances: dict[str, str] = field(default_factory=dict, init=False)
    """Which process answered last, by URL."""
    _named: Limiters = field(default_factory=dict, init=False)
    _named_of: object = field(default=None, init=False)
    """The keys that `_named` was made of."""
    _said: bytes = field(default=b"", init=False)
    _said_at: float | None = field(default=None, init=False)

    def add_to(self, app: FastAPI) -> None:
        """Serve `PATH`."""
        app.add_api_route(PATH, self.answer, methods=["GET"])

    async def answer(self, known: str = "") -> Response:
        """What this router has let through; `known`: the process that who asks expects here."""
        now = self.clock()
        if known != self.instance:
            said = report(self.instance, self._limiters(), now, known=False)
            return Response(orjson.dumps(said), media_type="application/json")
        if self._said_at is None or now - self._said_at > FRESH:
            self._said, self._said_at = orjson.dumps(report(self.instance, self._limiters(), now, known=True)), now
        return Response(self._said, media_type="application/json")

    def peers(self) -> int:
        """How many other routers' use is counted here."""
        return self._shared.known()

    async def run(self) -> None:
        """Ask again and again, until cancelled. Nothing is asked while no key has a rate."""
        while True:
            await asyncio.sleep(INTERVAL)
            if self._limiters():
                await self.exchange()

    async def exchange(self) -> None:
        """Ask every other router once. Takes seconds at most, and never raises."""
        now = self.clock()
        if self._addresses_at is None or now - self._addresses_at > ADDRESSES_FRESH:
            self._addresses_at = now
            try:
                self._addresses = (await self.routers.addresses())[:MAX_ROUTERS]
                urls = {peer.url for peer in self._addresses}
                self._instances = {url: name for url, name in self._instances.items() if url in urls}
            except AddressesUnknown as error:
                logger.warning("rates_not_shared", why=str(error))
        silent = await asyncio.gather(*map(self._ask, self._addresses))
        self._silent = frozenset(filter(None, silent))
        self._shared.forget(self.clock())

    async def _ask(self, peer: PeerAddress) -> str:
        """Ask one router. Returns its URL if it does not answer."""
        try:
            instance = self._instances.get(peer.url, "")
            said = await self._get(peer.url, instance if self._shared.knows(instance, self.clock()) else "")
        except PeerSilentError as error:
            if peer.url not in self._silent and not peer.leaving:
                logger.warning("rates_not_shared", router=peer.name or peer.url, why=str(error))
            return peer.url
        self._instances[peer.url] = said.instance
        if said.instance != self.instance:
            self._shared.learn(said, self._limiters(), self.clock())
        return ""

    async def _get(self, url: str, known: str) -> RateReport:
        headers = {**PROGRAM_HEADERS, **token_headers(self.token())}
        try:
            async with (
                asyncio.timeout(TIMEOUT),
                self.session.get(url + PATH, params={"known": known}, headers=headers, allow_redirects=False) as answer,
            ):
                if answer.status != 200:
                    raise PeerSilentError(f"it answers {answer.status}")
                body = bytearray()
                async for piece in answer.content.iter_any():
                    body += piece
                    if len(body) > MAX_BYTES:
                        raise PeerSilentError(f"its answer takes more than {MAX_BYTES} bytes")
            return _REPORT.validate_json(bytes(body))
        except TimeoutError:
            raise PeerSilentError(f"it did not answer within {TIMEOUT:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise PeerSilentError(f"it cannot be reached: {error}") from None
        except ValidationError:
            raise PeerSilentError("its answer is none: is it of another version?") from None

    def _limiters(self) -> Limiters:
        keys = self.keys.keys if self.keys is not None else {}
        if keys is not self._named_of:  # the file has changed
            self._named_of = keys
            self._named = {
                key_name(digest): limiter
                for digest, (_, limiter) in keys.items()
                if limiter.requests is not None or limiter.tokens is not None
            }
        return self._named
