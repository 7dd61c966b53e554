"""Asks the other routers of the same KVCluster for their reports, while somebody looks at the live document."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Protocol

import aiohttp

from router.live.document import DocumentError, RouterLive, RouterPhase
from router.live.history import STEPS, Step
from router.live.report import Report, decode_report
from runtime.http.hosts import PROGRAM_HEADERS
from runtime.http.tokens import token_headers

MAX_ROUTERS = 64
"""Routers that are asked at most."""
FRESH = 0.9
"""Seconds for which answers are used again: however many look, each router is asked about once a second."""
ADDRESSES_FRESH = 10.0
"""Seconds for which the list of routers is used again."""
ADDRESSES_DOUBTED = 2.0
"""The same while one of them does not answer: it may be gone."""
TIMEOUT = 1.0
"""Seconds for a router to answer."""
MAX_BYTES = 4 * 2**20
"""Of a report: some ten thousand workers. Decoding so much takes 0.2 s, in which Pydantic holds the interpreter's lock:
in a thread it would hold up the event loop as long."""


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where another router can be asked."""

    url: str
    """Base URL of its management port."""
    name: str = ""
    """Its pod's name, if it is known."""
    leaving: bool = False
    """It terminates: that it does not answer is no news."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What other routers answered."""

    reports: tuple[Report, ...] = ()
    unreachable: tuple[RouterLive, ...] = ()
    """Those that gave no report, with the reason in words."""


class AddressesUnknown(RuntimeError):
    """The list of routers cannot be read. The message says why."""


class RouterList(Protocol):
    """Knows which routers there are."""

    async def addresses(self) -> Sequence[PeerAddress]:
        """The routers, this one possibly among them. Raises `AddressesUnknown`."""

    async def close(self) -> None:
        """Release what it holds."""


class StaticRouters:
    """The routers whose management ports have these base URLs."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._addresses = [PeerAddress(url) for url in urls]

    async def addresses(self) -> Sequence[PeerAddress]:
        return self._addresses

    async def close(self) -> None:
        """There is nothing to release."""


@dataclass(slots=True)
class _Peer:
    """What is kept of a router between two answers: its history comes in pieces."""

    name: str = ""
    instance: str = ""
    steps: tuple[Step, ...] = ()


@dataclass(slots=True)
class PeerReports:
    """`instance` and `bounds` are those of this router's own reports, `clock` is any that never goes back. `token`
    gives what lets this router in at the others, empty where nothing is asked for."""

    routers: RouterList
    session: aiohttp.ClientSession
    _: KW_ONLY
    instance: str
    bounds: tuple[tuple[float, ...], tuple[float, ...]]
    clock: Callable[[], float]
    token: Callable[[], str] = lambda: ""
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    _known: list[PeerAddress] = field(default_factory=list, init=False)
    _known_at: float | None = field(default=None, init=False)
    _answers: Answers = field(default=Answers(), init=False)
    _answered_at: float | None = field(default=None, init=False)
    _peers: dict[str, _Peer] = field(default_factory=dict, init=False)

    async def answers(self) -> Answers:
        """What each of the other routers knows. Takes seconds at most, and never raises."""
        async with self._lock:
            if self._answered_at is None or self.clock() - self._answered_at > FRESH:
                self._answers = await self._ask_all()
                self._answered_at = self.clock()
            return self._answers

    async def _ask_all(self) -> Answers:
        problems: list[RouterLive] = []
        fresh = ADDRESSES_DOUBTED if self._answers.unreachable else ADDRESSES_FRESH
        if self._known_at is None or self.clock() - self._known_at > fresh:
            try:
                self._known = sorted(await self.routers.addresses(), key=lambda peer: (peer.name, peer.url))
                self._known_at = self.clock()
            except AddressesUnknown as error:
                problems.append(_unreachable(PeerAddress("", "other routers"), str(error)))
        asked = self._known[:MAX_ROUTERS]
        if left := len(self._known) - len(asked):
            problems.append(
                _unreachable(PeerAddress("", f"{left} more routers"), f"no more than {MAX_ROUTERS} are asked")
            )
        self._peers = {peer.url: self._peers.get(peer.url) or _Peer() for peer in asked}
        answers = await asyncio.gather(*map(self._ask, asked))
        by_instance: dict[str, Report] = {}  # a router that has several addresses counts once
        for answer in answers:
            for report in answer.reports:
                by_instance.setdefault(report.instance, report)
        unreachable = (router for answer in answers for router in answer.unreachable)
        return Answers(tuple(by_instance.values()), (*unreachable, *problems))

    async def _ask(self, peer: PeerAddress) -> Answers:
        """Nothing, if it is this router itself, or one that leaves and has nothing to say any more."""
        known = self._peers[peer.url]
        try:
            report = decode_report(await self._get(peer.url, known))
            if report.bounds != self.bounds:
                raise DocumentError("it measures times in other buckets than this router: is it of another version?")
        except TimeoutError:
            why = f"it did not answer within {TIMEOUT:g} s"
        except (aiohttp.ClientError, OSError) as error:
            why = f"it cannot be reached: {_in_words(error)}"
        except DocumentError as error:
            why = str(error)
        else:
            if report.instance == self.instance:
                return Answers()
            before = known.steps if known.instance == report.instance else ()
            known.name = report.routers[0].name if report.routers else ""
            known.instance, known.steps = report.instance, (*before, *report.steps)[-STEPS:]
            routers = tuple(replace(router, url=peer.url) for router in report.routers)
            return Answers((replace(report, routers=routers, steps=known.steps),))
        known.instance, known.steps = "", ()
        if peer.leaving:
            return Answers()
        return Answers(unreachable=(_unreachable(replace(peer, name=peer.name or known.name), why),))

    async def _get(self, url: str, known: _Peer) -> bytes:
        last = known.steps[-1].number if known.steps else 0
        async with (
            asyncio.timeout(TIMEOUT),
            self.session.get(
                f"{url}/live/report",
                params={"after": str(last)},
                headers={**PROGRAM_HEADERS, **token_headers(self.token())},
                allow_redirects=False,
            ) as answer,
        ):
            if answer.status == 404:
                raise DocumentError("it has no live report: is it of another version?")
            if answer.status == 401:
                raise DocumentError("it does not accept this router's management token")
            if answer.status != 200:
                raise DocumentError(f"it answers {answer.status}")
            body = bytearray()
            async for piece in answer.content.iter_any():
                body += piece
                if len(body) > MAX_BYTES:
                    raise DocumentError(f"its report takes more than {MAX_BYTES} bytes")
            return bytes(body)


def _in_words(error: Exception) -> str:
    number = getattr(error, "errno", None)
    return os.strerror(number) if isinstance(number, int) else str(error) or repr(error)


def _unreachable(peer: PeerAddress, why: str) -> RouterLive:
    return RouterLive(peer.name or peer.url, peer.url, RouterPhase.UNREACHABLE, reason=why)
