"""A client's connection under every order of segments, answers, time-outs and disconnects that hypothesis finds.

Covers: counts, deadlines, and that each answer is the right one, read by h11. Not covered: the bytes of single
answers (test_connection.py), sockets (test_server.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import h11
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from starlette.types import Receive, Scope, Send

from runtime.http.connection import MOST_UNWANTED, ServerConnection
from runtime.http.context import ServerContext, ServerEvent
from runtime.http.limits import HttpLimits
from runtime.http.request import ServerRequest
from runtime.http.server import AnswerAborted
from tests.virtual import FakeTransport, VirtualLoop

LIMITS = HttpLimits(
    max_header_bytes=500, max_headers=10, max_body_bytes=100, max_total_body_bytes=150, header_timeout=10,
    body_timeout=20, write_timeout=30, keep_alive=75, max_concurrent_requests=6,
)  # fmt: skip
BODY = b"a body of some length"


@dataclass
class Request:
    """One request as the client sends it; `fatal` ones are refused, and `last` ones are the last that are read.
    `unwanted` ones have no key: the app says so before their body has come."""

    number: int
    method: str
    head: bytes
    body: bytes
    expected: bytes
    """The body that the app must get."""
    last: bool = False
    fatal: bool = False
    unwanted: bool = False


KEYLESS = b"x-keyless: 1\r\n"


def make_keyless(kind: str, number: int) -> Request:
    line = b"POST /%d HTTP/1.1\r\nhost: h\r\n%s" % (number, KEYLESS)
    length = b"content-length: %d\r\n" % len(BODY)
    if kind == "keyless":
        return Request(number, "POST", line + length + b"\r\n", BODY, b"", unwanted=True)
    if kind == "keyless-close":
        head = line + b"connection: close\r\n" + length + b"\r\n"
        return Request(number, "POST", head, BODY, b"", last=True, unwanted=True)
    if kind == "keyless-chunked":
        head = line + b"transfer-encoding: chunked\r\n\r\n"
        return Request(number, "POST", head, b"5\r\nabcde\r\n0\r\n\r\n", b"", last=True, unwanted=True)
    if kind == "keyless-expect":  # such a client may send the body or not, and this one does
        head = line + b"expect: 100-continue\r\n" + length + b"\r\n"
        return Request(number, "POST", head, BODY, b"", last=True, unwanted=True)
    size = MOST_UNWANTED + 1
    head = line + b"content-length: %d\r\n\r\n" % size
    return Request(number, "POST", head, b"GET /x HTTP/1.1\r\n\r\n" * 9, b"", last=True, unwanted=True)


def make(kind: str, number: int) -> Request:
    if kind.startswith("keyless"):
        return make_keyless(kind, number)
    method = {"get": "GET", "head": "HEAD", "connect": "CONNECT"}.get(kind, "POST")
    line = f"{method} /{number} HTTP/1.1\r\nhost: h\r\n".encode()
    length = b"content-length: %d\r\n" % len(BODY)
    if kind in ("get", "head"):
        return Request(number, method, line + b"\r\n", b"", b"")
    if kind == "post":
        return Request(number, method, line + length + b"\r\n", BODY, BODY)
    if kind == "expect":
        return Request(number, method, line + b"expect: 100-continue\r\n" + length + b"\r\n", BODY, BODY)
    if kind == "chunked":
        body = b"5\r\n%s\r\n%x\r\n%s\r\n0\r\nx-trailer: 1\r\n\r\n" % (BODY[:5], len(BODY) - 5, BODY[5:])
        return Request(number, method, line + b"transfer-encoding: chunked\r\n\r\n", body, BODY)
    if kind == "upgrade":
        offer = b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
        return Request(number, method, line + offer + length + b"\r\n", BODY, BODY)
    if kind == "upgrade-close":
        offer = b"connection: upgrade, close\r\nupgrade: h2c\r\n"
        return Request(number, method, line + offer + length + b"\r\n", BODY, BODY, last=True)
    if kind == "close":
        return Request(number, method, line + b"connection: close\r\n" + length + b"\r\n", BODY, BODY, last=True)
    if kind == "1.0":
        return Request(number, method, b"POST /%d HTTP/1.0\r\n" % number + length + b"\r\n", BODY, BODY, last=True)
    if kind == "large":
        return Request(number, method, line + b"content-length: 101\r\n\r\n", b"x" * 101, b"", fatal=True)
    if kind == "large-chunk":
        return Request(
            number, method, line + b"transfer-encoding: chunked\r\n\r\n", b"70\r\n" + b"x" * 112, b"", fatal=True
        )
    if kind == "headers":
        return Request(
            number, method, line + b"".join(b"h%d: 1\r\n" % n for n in range(20)) + b"\r\n", b"", b"", fatal=True
        )
    if kind == "connect":
        return Request(number, method, b"CONNECT h:443 HTTP/1.1\r\nhost: h\r\n\r\n", b"", b"", fatal=True)
    return Request(number, method, b"\x16\x03\x01 garbage\r\n\r\n", b"", b"", fatal=True)


KINDS = ["get", "head", "post", "expect", "chunked", "upgrade", "keyless"] * 3 + [
    "upgrade-close", "close", "1.0", "large", "large-chunk", "headers", "connect", "garbage",
    "keyless-close", "keyless-chunked", "keyless-expect", "keyless-large",
]  # fmt: skip


def read_answers(data: bytes, methods: list[str]) -> Iterator[tuple[int, bytes, bytes, bool]]:
    """Status, `x-number`, body, and whether it says close, of each whole answer; h11 reads them as a client does."""
    for method in methods:
        if not data:
            return
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method=method, target="/", headers=[("host", "h")]))
        client.send(h11.EndOfMessage())
        client.receive_data(data)
        status, number, body, closes = 0, b"", b"", False
        while True:
            event = client.next_event()
            if event is h11.NEED_DATA or event is h11.PAUSED:
                return
            if isinstance(event, h11.Response):
                headers = dict(event.headers)
                status, number = event.status_code, headers.get(b"x-number", b"")
                closes = headers.get(b"connection") == b"close"
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                break
        yield status, number, body, closes
        data = client.trailing_data[0]


class ConnectionMachine(RuleBasedStateMachine):
    """One connection, its client, and an app that answers when the test says so."""

    handler = False
    """Requests are answered by a `Handler`, in the callbacks of the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.orders: asyncio.Queue[str] = asyncio.Queue()
        self.refusals: list[int] = []

    @initialize()
    def connect(self) -> None:
        self.shared = ServerContext(
            None if self.handler else self._app,
            LIMITS,
            cancel_on_disconnect=True,
            on_refusal=self.refusals.append,
            screen=self._screen,
            handler=self._handle if self.handler else None,
        )
        self.screened: list[int] = []
        self.connection = ServerConnection(self.shared, self.loop)
        self.transport = FakeTransport(self.loop, self.connection, {"sockname": ("::1", 1), "peername": ("::1", 2)})
        self.refusals.clear()
        self.sent: list[Request] = []
        self.wire = b""
        self.delivered = 0
        self.started: list[int] = []
        self.ended: list[tuple[int, str]] = []
        self.waiting_since = 0.0
        self.ended_at = inf
        """When it was first seen that the server says no more."""
        """Virtual time since when it is for the client to go on; what bounds that is one of the limits."""
        self.loop.run_until_complete(self._made())

    async def _made(self) -> None:
        self.connection.connection_made(self.transport)
        self.waiting_since = self.loop.time()

    def _screen(self, scope: Scope) -> bool:
        """Called once for each request, as soon as its headers are there."""
        request = self.sent[int(scope["path"][1:])]
        self.screened.append(request.number)
        assert (b"x-keyless", b"1") in scope["headers"] or not request.unwanted
        return not request.unwanted

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        number = int(scope["path"][1:])
        request = self.sent[number]
        assert scope["method"] == request.method
        assert not any(name == b"x-trailer" for name, _ in scope["headers"])
        message = await receive()
        assert (message["body"], message["more_body"]) == (request.expected, False)
        self.started.append(number)
        order = await self.orders.get()
        headers = [(b"x-number", b"%d" % number)]
        if order == "stream" and scope["http_version"] == "1.0":
            order = "whole"  # nothing tells a client of HTTP/1.0 that a stream was cut
        if order == "whole":
            headers.append((b"content-length", b"5"))
        if order != "fail":
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            if order != "whole":
                await send({"type": "http.response.body", "body": b"wh", "more_body": True})
                await self.orders.get()
                await send({"type": "http.response.body", "body": b"ol", "more_body": True})
        if order == "fail":
            raise ValueError("a bug")
        if order == "cut":
            raise AnswerAborted
        body = b"whole" if order == "whole" else b"e"
        await send({"type": "http.response.body", "body": body})
        self.ended.append((number, order))

    async def _handle(self, request: ServerRequest) -> None:
        await self._app(request.scope, request.receive, request.send)

    # --- what happens ---

    @precondition(lambda self: self.transport.lost)
    @rule()
    def connect_again(self) -> None:
        self._check_answers()
        self.connect()

    @precondition(lambda self: len(self.wire) < 2000 and not self.transport.lost)
    @rule(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))
    def send(self, kinds: list[str]) -> None:
        for kind in kinds:
            request = make(kind, len(self.sent))
            self.sent.append(request)
            self.wire += request.head + request.body

    @precondition(lambda self: self.wire and not self.transport.closing and not self.transport.paused)
    @rule(size=st.sampled_from([1, 5, 30, 60, 90, 10**6, 10**6, 10**6]))
    def deliver(self, size: int) -> None:
        data = self.wire[:size]
        before = self._position()
        if self.loop.call(lambda: self.transport.receive(data)):
            self.wire = self.wire[size:]
            self.delivered += len(data)
            position = self._position()
            if position != before or position[1] == "body" or self.transport.paused:
                self.waiting_since = self.loop.time()
        self.loop.settle()

    @precondition(lambda self: self._answering())
    @rule(order=st.sampled_from(["whole", "whole", "stream", "stream", "fail", "cut"]))
    def answer(self, order: str) -> None:
        paused = self.transport.paused
        self.orders.put_nowait(order)
        self.loop.settle()
        if paused or not self._answering():
            self.waiting_since = self.loop.time()

    @rule(seconds=st.sampled_from([0.5, 3, 9, 15, 50]))
    def wait(self, seconds: float) -> None:
        self.loop.advance(seconds)

    @precondition(lambda self: not self.transport.lost)
    @rule(what=st.sampled_from(["", "", "", "", "leave", "reset", "drain", "stop reading", "read again"]))
    def something_else(self, what: str) -> None:
        """What ends connections is rare, or few would live long enough to carry several requests."""
        if what == "leave":
            self.transport.lose(None)
        elif what == "reset":
            self.transport.lose(ConnectionResetError(104, "reset"))
        elif what == "drain":
            self.shared.advance(ServerEvent.DRAIN)
            self.connection.drain_requests()
        elif what == "stop reading" and self.connection.writable and not self.transport.closing:
            self.transport.unsent = 1
            self.connection.pause_writing()
        elif what == "read again" and not self.connection.writable:
            self.transport.unsent = 0
            self.connection.resume_writing()
        self.loop.settle()

    # --- what must hold ---

    def _answering(self) -> bool:
        return not self.transport.lost and bool(self.shared.tasks)

    def _position(self) -> tuple[int, str]:
        """Which request the next byte belongs to, and to which part of it."""
        at = self.delivered
        for request in self.sent:
            if at < len(request.head):
                return request.number, "head" if at else "start"
            at -= len(request.head)
            if at < len(request.body):
                return request.number, "body"
            at -= len(request.body)
        return len(self.sent), "start"

    @invariant()
    def counts_are_of_what_is_in_flight(self) -> None:
        shared = self.shared
        assert 0 <= shared.body_bytes <= LIMITS.max_total_body_bytes
        assert 0 <= shared.in_flight <= LIMITS.max_concurrent_requests
        if self.transport.lost:
            assert (shared.in_flight, shared.body_bytes, shared.connections) == (0, 0, set())
        elif not shared.tasks and self._position()[1] == "start" and not self.transport.closing:
            assert (shared.in_flight, shared.body_bytes) == (0, 0)

    @invariant()
    def it_is_read_unless_a_request_waits(self) -> None:
        if self.transport.paused and not self.transport.closing:
            assert self.shared.tasks
            assert self.shared.in_flight >= 2 or self.refusals

    @invariant()
    def nobody_keeps_it_waiting_for_ever(self) -> None:
        transport = self.transport
        number, part = self._position()
        if transport.lost or transport.paused or (part == "start" and self._answering()):
            return
        if transport.unsent:  # its client does not read: it has as long as that may take
            return
        if transport.ended:
            self.ended_at = min(self.ended_at, self.loop.time())
            assert transport.closing or self.loop.time() - self.ended_at <= 2.5
        if self._answering() and any(request.last for request in self.sent[:number]):
            return  # what comes behind a last request is not read
        limit = {"start": LIMITS.keep_alive, "head": LIMITS.header_timeout, "body": LIMITS.body_timeout}
        if self.loop.time() - self.waiting_since > limit[part] + 2.5:  # it lingers for 2 s
            assert transport.closing or (self.refusals and self._answering())

    @invariant()
    def nothing_is_kept_of_a_body_that_nobody_wants(self) -> None:
        number, part = self._position()
        if part == "body" and self.sent[number].unwanted:
            assert self.shared.body_bytes <= sum(len(request.expected) for request in self.sent[:number])
        assert self.screened == sorted(set(self.screened))

    @invariant()
    def a_client_without_a_key_is_not_asked_for_its_body(self) -> None:
        asked = self.transport.written.count(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert asked <= sum(b"expect" in request.head and not request.unwanted for request in self.sent)

    @invariant()
    def one_request_is_refused_at_most(self) -> None:
        assert len(self.refusals) <= 1

    def _check_answers(self) -> None:
        """What the client got is, in order, the answer to each request that was answered."""
        methods = [request.method for request in self.sent]
        answers = list(read_answers(self.transport.written, methods))
        for position, (status, number, body, _) in enumerate(answers):
            request = self.sent[position]
            if status == 200:
                assert int(number) == request.number
                assert body == (b"" if request.method == "HEAD" else b"whole")
            else:
                assert position == len(answers) - 1 or status == 500
        assert not any(closes for *_, closes in answers[:-1])
        whole = [int(number) for status, number, *_ in answers if status == 200]
        ended = [number for number, _ in self.ended]
        # The answer to HEAD looks whole once its head is out.
        assert ended == [number for number in whole if number in ended or self.sent[number].method != "HEAD"]
        assert self.started == sorted(self.started)
        for position, request in enumerate(self.sent):
            if request.last or request.fatal:
                assert all(number <= position for number in self.started), "read behind the end"
                break
        refused = [status for status, *_ in answers if status >= 400 and status != 500]
        assert len(refused) <= len(self.refusals)

    def teardown(self) -> None:
        try:
            self._check_answers()
        finally:
            self.transport.lose(None)
            self.loop.settle()
            self.loop.close()
        assert not self.shared.tasks
        assert (self.shared.in_flight, self.shared.body_bytes, self.shared.connections) == (0, 0, set())


class HandlerMachine(ConnectionMachine):
    """The same for a `Handler`."""

    handler = True


ConnectionMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
HandlerMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestConnection = ConnectionMachine.TestCase
TestConnectionOfAHandler = HandlerMachine.TestCase
