"""Decides where a gateway's request goes: what the data port does with a request, without sending it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from urllib.parse import unquote_to_bytes
from uuid import uuid4

from kvcache.errors import ApiError
from kvcache.paths import COMPUTED
from kvcache.ranks import RANK_HEADER, asked_rank
from router.core.decision import Decision, NoWorkerReady, RecentDecisions, RouteRequest, Unread
from router.core.errors import UnknownWorker
from router.core.flow import Restriction
from router.core.stored_responses import HolderGone, response_id
from router.picker.dispatched import Dispatched, Following
from router.picker.endpoints import endpoint_of, ineligible, listed, ranked
from router.picker.stream import Answer, PickRequest, Refusal
from router.server.admission import SHED_HEADER, Admission, Shed
from router.server.affinity import ANY_CALLERS, Callers, named_response, with_headers, with_request_id
from router.server.auth import CLIENT_ERROR, CREDENTIALS, Gate, RateExceeded, Unauthorized
from router.server.cors import is_preflight
from router.server.headers import find
from router.server.models import Models
from router.server.own_answers import response_not_found
from router.server.prompts import INVOCATIONS, PROMPTED, PROMPTLESS, PromptReader, promptless

_ADAPTER = b"x-amzn-sagemaker-adapter-identifier"
_RANK = RANK_HEADER.encode()


@dataclass(slots=True)
class Picker:
    """Reads, chooses and accounts, by the parts that the data port uses. `fallbacks`: how many workers an answer lists
    beside the chosen one, which the gateway tries if it cannot be reached."""

    following: Following
    prompts: PromptReader
    models: Models
    recent: RecentDecisions
    clock: Callable[[], float]
    fallbacks: int = 2
    callers: Callers = ANY_CALLERS
    """How requests say who sends them."""
    admission: Admission | None = None
    """Flow control."""
    gate: Gate | None = None
    """Whose requests are answered; None: everybody's."""

    def admit(self, request: PickRequest) -> None:
        """Ask a request whose headers have come for its API key. Raises `Refusal`."""
        if self.gate is None or is_preflight(request.method, request.headers):
            return
        metrics = self.following.metrics
        try:
            request.admitted = self.gate.admit(request.headers)
        except Unauthorized as error:
            metrics.unauthorized.labels(error.why.value).inc()
            raise Refusal(error.shaped(request.path), "unauthorized", error.headers) from None
        except RateExceeded as error:
            raise self._limited(error, request) from None

    def _limited(self, error: RateExceeded, request: PickRequest) -> Refusal:
        self.following.metrics.rate_limited.labels(error.limit.value).inc()
        return Refusal(error.shaped(request.path), "rate_limited", error.headers)

    def pick_at_once(self, request: PickRequest, arrived: float) -> tuple[Answer, Dispatched] | None:
        """Where the request goes; it counts as sent from now on. None if something has to be waited for, which
        `pick_later` does: most requests need no task. Raises `Refusal`."""
        path = _path(request)
        if request.method == "POST" and path in PROMPTED and request.whole:
            read = self.prompts.read_at_once(path, request.body, _adapter(path, request))
            if read is None:
                return None
            route = self._stated(read, request)
        else:
            route = _unprompted(path, request)
        return self._place(route, request, arrived)

    async def pick_later(self, request: PickRequest, arrived: float) -> tuple[Answer, Dispatched]:
        """What `pick_at_once` did not say: the prompt is read in a thread, or it is another request's turn first."""
        route, picked = request.route, None
        if route is None:
            path = _path(request)
            read = await self.prompts.read(path, request.body, _adapter(path, request))
            route = self._stated(read, request)
            picked = self._place(route, request, arrived)
        if picked is not None:
            return picked
        sent = False
        try:
            picked = self._send(route, await self._turn(route, request), request, arrived)
            sent = True
        finally:
            if not sent:
                self._give_back(request)
        return picked

    def _stated(self, route: RouteRequest, request: PickRequest) -> RouteRequest:
        """A request whose prompt has been read, with what its headers state."""
        if route.unread is Unread.UNREADABLE and not route.prompted:
            raise Refusal(ApiError(400, "The request's body is no JSON object."), "unreadable")
        metrics = self.following.metrics
        if route.prompt_tokens is not None:
            metrics.prompt_tokens.value += route.prompt_tokens
        elif route.unread is not None:
            metrics.prompts_unread.labels(route.unread.value).inc()
        return _ranked(with_headers(route, request.headers, self.callers), request)

    def _place(self, route: RouteRequest, request: PickRequest, arrived: float) -> tuple[Answer, Dispatched] | None:
        """Where the request goes; None if it has to wait for its turn, with `request.route` then."""
        if request.admitted is not None:
            route = request.admitted.route(route)
        if (error := self.models.refuse(route)) is not None:
            raise Refusal(error, "model")
        if request.admitted is not None:
            try:
                request.admitted.charge(route, len(request.body), self.clock())
            except RateExceeded as exceeded:
                raise self._limited(exceeded, request) from None
        admission = self.admission
        try:
            decision, excluded = self._choose(route, request.subset)
            if admission is not None and admission.must_wait(decision, route, self.clock(), excluded):
                request.route = route
                return None
            return self._send(route, decision, request, arrived)
        except Refusal:
            if admission is not None and request.subset is None and admission.must_hold(route):
                request.route = route
                return None
            self._give_back(request)
            raise

    def _give_back(self, request: PickRequest) -> None:
        """The request goes nowhere: its key has not to pay for it."""
        if request.admitted is not None:
            request.admitted.settle(CLIENT_ERROR, self.clock())

    async def _turn(self, route: RouteRequest, request: PickRequest) -> Decision:
        """The decision, once it is the request's turn."""
        if self.admission is None:
            raise RuntimeError("a request waits, and there is no flow control")

        def barred() -> frozenset[str]:
            return frozenset(ineligible(self.following.fleet.urls(), request.subset))

        try:
            return await self.admission.turn(route, len(request.body), Restriction(request.subset, barred))
        except Shed as shed:
            error = ApiError(shed.status, str(shed), type="rate_limit_error" if shed.status == 429 else None)
            headers = [(b"retry-after", b"%d" % ceil(shed.retry_after)), (SHED_HEADER, shed.reason.value.encode())]
            raise Refusal(error, "shed", headers) from shed
        except (NoWorkerReady, HolderGone) as error:
            raise _no_endpoint("The workers left while this request waited.", 1.0) from error

    def _send(
        self, route: RouteRequest, decision: Decision, request: PickRequest, arrived: float
    ) -> tuple[Answer, Dispatched]:
        """The request counts as sent from now on."""
        urls = ranked(decision, self.fallbacks)
        if self.fallbacks and len(decision.candidates) == 1:
            urls.extend(self._next(route, decision, request.subset))
        rank = decision.rank if route.rank is None else route.rank
        headers = [(_RANK, b"%d" % rank)] if rank is not None else []
        body = None
        if route.stores and request.whole:
            body = with_request_id(request.body, response_id(uuid4().hex, decision.url))
        admitted = request.admitted
        answer = Answer(listed(urls), headers, body, CREDENTIALS if self.gate is not None else ())
        try:
            dispatched = Dispatched(self.following, decision, route, urls, arrived, admitted)
        except UnknownWorker as error:
            raise _no_endpoint("The chosen worker has just left.", 1.0) from error
        if route.prompted:
            self._count(decision, dispatched.sent - arrived)
        return answer, dispatched

    def _choose(self, route: RouteRequest, subset: frozenset[str] | None) -> tuple[Decision, set[str]]:
        """The decision, and the URLs that it must not be about."""
        fleet = self.following.fleet
        excluded = ineligible(fleet.urls(), subset)
        try:
            return fleet.choose(route, self.clock(), excluded), excluded
        except HolderGone as error:
            if route.stored is None:
                raise
            raise Refusal(response_not_found(route.stored), "no_endpoint") from error
        except NoWorkerReady as error:
            of_subset = " of those that the gateway allows" if subset is not None else ""
            raise _no_endpoint(f"No worker{of_subset} is ready to serve this request.", error.retry_after) from error

    def _next(self, route: RouteRequest, decision: Decision, subset: frozenset[str] | None) -> list[str]:
        """The next best worker, where the decision has the figures of the chosen one only."""
        fleet = self.following.fleet
        taken = endpoint_of(decision.url)
        excluded = ineligible(fleet.urls(), subset)
        excluded.update(url for url in fleet.urls() if endpoint_of(url) == taken)
        if len(excluded) >= len(list(fleet.urls())):
            return []
        try:
            return [fleet.choose(route, self.clock(), excluded).url]
        except (NoWorkerReady, HolderGone):
            return []

    def _count(self, decision: Decision, seconds: float) -> None:
        metrics = self.following.metrics
        metrics.decision_seconds.observe(seconds)
        self.recent.note(decision, self.clock())
        metrics.decisions.counts[(decision.reason.value,)] += 1
        metrics.matched_blocks.observe(decision.matched_blocks)


def _no_endpoint(why: str, retry_after: float) -> Refusal:
    wait = b"%d" % max(1, ceil(retry_after))
    return Refusal(ApiError(503, f"{why} Try again later."), "no_endpoint", [(b"retry-after", wait)])


def _path(request: PickRequest) -> str:
    path = request.path
    return unquote_to_bytes(path).decode(errors="replace") if "%" in path else path


def _adapter(path: str, request: PickRequest) -> str | None:
    return find(request.headers, _ADAPTER).decode("latin-1") or None if path == INVOCATIONS else None


def _unprompted(path: str, request: PickRequest) -> RouteRequest:
    """A request without a prompt that is read."""
    route = PROMPTLESS
    if path not in COMPUTED and (stored := named_response(path)) is not None:
        route = replace(PROMPTLESS, stored=stored)
    elif request.method == "POST":
        route = promptless(request.body)
    return _ranked(route, request)


def _ranked(route: RouteRequest, request: PickRequest) -> RouteRequest:
    """With the rank that a header asks for."""
    named = find(request.headers, _RANK)
    return replace(route, rank=asked_rank(named.decode("latin-1"))) if named else route
