"""Reads requests off a connection's bytes: httptools' callbacks, and the limits on what they collect."""

from __future__ import annotations

from typing import Protocol
from urllib.parse import unquote

import httptools
from starlette.types import Scope

from runtime.http.context import Headers, ServerContext
from runtime.http.limits import Refusal

_ASGI = {"version": "3.0", "spec_version": "2.3"}
_VERSIONS = frozenset({"1.0", "1.1"})
_OF_BODY = frozenset({b"content-length", b"transfer-encoding", b"expect"})
"""Headers about the request's body."""
_OFFER = frozenset({b"connection", b"upgrade", b"http2-settings"})


class RequestEvents(Protocol):
    """What the connection is told. Each may raise nothing."""

    def request_begun(self) -> None:
        """The first byte of a request has come."""

    def head_complete(self, expects_continue: bool) -> None:
        """All its headers have come, and it is within the limits: it counts as in flight."""

    def turned_away(self, scope: Scope, rest: int | None, last: bool) -> bool:
        """All its headers have come, and its body is of no use: it counts as in flight. `rest`: bytes of the body that
        are still to come; None: nobody knows. Returns whether they are read past; if not, nothing more is read."""

    def request_complete(self, scope: Scope, body: bytes | bytearray, last: bool) -> None:
        """All of it has come; `last`: the client asks for no more on this connection."""


class _NothingMore(Exception):
    """Stops the parser."""


class RequestReader:
    """The parser of one connection and the request that it is reading.

    `headers` and `held_bytes` (of its body) are those of the request being read. What bodies take is counted here as it
    arrives; whoever gets the request gives it back.
    """

    def __init__(self, events: RequestEvents, context: ServerContext, scope: Scope) -> None:
        self._events = events
        self._context = context
        self._limits = context.limits
        self._common_scope = {**scope, "type": "http", "asgi": _ASGI, "root_path": ""}
        self._parser = httptools.HttpRequestParser(self)
        self._refusal: Refusal | None = None
        self._declining = False
        """The head offers another protocol, and is read again without that."""
        self._progress = 0
        """Grows with every part of a request that is understood."""
        self._left = False
        """Nothing more is read."""
        self._expect()

    def _expect(self) -> None:
        self.headers: Headers = []
        self.held_bytes = 0
        self._url = b""
        self._scope: Scope | None = None
        self._header_bytes = self._unparsed = self._announced = 0
        self._body = b""
        self._grown: bytearray | None = None
        self._expects_continue = self._last = self._chunked = False
        self._unwanted = False
        """The body is read past."""

    def feed(self, data: bytes) -> None:
        """Read on. Raises `Refusal` for what cannot be served: nothing more can be read then."""
        progress, size = self._progress, len(data)
        try:
            while True:
                try:
                    self._parser.feed_data(data)
                    break
                except httptools.HttpParserUpgrade as offer:
                    data = self._without_offer() + data[offer.args[0] :]
        except httptools.HttpParserError:
            if self._left:
                return
            raise (self._refusal or Refusal(400, "Invalid HTTP request received.")) from None
        if progress != self._progress:
            self._unparsed = 0
            return
        # The parser keeps an unfinished header or trailer to itself, and passes over a chunk's extensions without a
        # word: what arrives and is no part of a body is counted here too.
        self._unparsed += size
        if self._unparsed > 2 * self._limits.max_header_bytes:
            raise self._headers_too_large()

    def close(self) -> None:
        """Let go of the parser, which refers to this reader, and of what it has read."""
        self._parser = None
        self._body, self._grown = b"", None

    def _without_offer(self) -> bytes:
        """The head that was read, for a new parser to read as plain HTTP/1.

        A request that offers another protocol (h2c, WebSocket) is served as if it did not (RFC 9110 7.8). The parser
        takes what follows such a head for the other protocol, and so would lose the body: Java's HTTP client offers h2c
        with every POST.
        """
        version = self._parser.get_http_version().encode()
        head = b"%s %s HTTP/%s\r\n" % (self._parser.get_method(), self._url, version)
        head += b"".join(b"%s: %s\r\n" % field for field in self.headers if field[0] not in _OFFER)
        if self._last:
            head += b"connection: close\r\n"
        self._parser = httptools.HttpRequestParser(self)
        return head + b"\r\n"

    # --- parser callbacks ---

    def on_message_begin(self) -> None:
        self._expect()
        if not self._declining:
            self._progress += 1
            self._events.request_begun()

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count_header(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        limits = self._limits
        if self._header_bytes > limits.max_header_bytes:
            raise self._refused(self._headers_too_large())
        if self._scope is not None:
            return  # a trailer: no header of the request
        if len(self.headers) >= limits.max_headers:
            message = f"The request has more than {limits.max_headers} headers."
            raise self._refused(Refusal(431, message, "RequestHeadersTooLarge"))
        name = name.lower()
        self.headers.append((name, value))
        if name not in _OF_BODY:
            return
        if name == b"content-length":
            self._announced = int(value)
        elif name == b"transfer-encoding":
            self._chunked = True
        elif value.lower() == b"100-continue":
            self._expects_continue = True

    def on_headers_complete(self) -> None:
        parser = self._parser
        method = parser.get_method().decode("ascii")
        version = parser.get_http_version()
        self._last = version == "1.0" or not parser.should_keep_alive()
        if version not in _VERSIONS:
            message = f"This server speaks HTTP/1.1, not HTTP/{version}."
            raise self._refused(Refusal(505, message, "HTTPVersionNotSupported"))
        if method == "CONNECT":
            raise self._refused(Refusal(501, "This server opens no tunnels.", "NotImplementedError"))
        self._declining = parser.should_upgrade()
        if self._declining:
            return
        context = self._context
        try:
            context.check_room()
        except Refusal as refusal:
            raise self._refused(refusal) from None
        url = self._url
        if url[:1] == b"/" and b"?" not in url and b"#" not in url:
            raw_path, query = url, b""
        else:
            parsed = httptools.parse_url(url)
            raw_path, query = parsed.path or b"/", parsed.query or b""
        path = raw_path.decode("ascii")
        self._scope = scope = {
            **self._common_scope,
            "http_version": version,
            "method": method,
            "path": unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": query,
            "headers": self.headers,
        }
        # HTTP/1.0 knows no interim answers: it would take one for the answer (RFC 9110 10.1.1).
        expects_continue = self._expects_continue and version == "1.1"
        if not context.screen(scope):
            self._turn_away(scope, expects_continue)
            return
        try:
            context.check_body(self._announced, self._announced)
        except Refusal as refusal:
            raise self._refused(refusal) from None
        context.in_flight += 1
        self._events.head_complete(expects_continue)

    def _turn_away(self, scope: Scope, expects_continue: bool) -> None:
        self._context.in_flight += 1
        # A client that waits for 100 (Continue) and gets another answer may send the body or not (RFC 9110 10.1.1).
        unsure = self._chunked or (expects_continue and self._announced > 0)
        rest = None if unsure else self._announced
        self._unwanted = self._events.turned_away(scope, rest, self._last)
        if not self._unwanted:
            self._left = True
            raise _NothingMore

    def on_body(self, body: bytes) -> None:
        self._progress += 1
        if self._unwanted:
            return
        size = len(body)
        try:
            self._context.check_body(self.held_bytes + size, size)
        except Refusal as refusal:
            raise self._refused(refusal) from None
        self.held_bytes += size
        self._context.body_bytes += size
        # A large body is kept in one piece that grows where it lies, never as pieces and as their sum.
        if self._grown is not None:
            self._grown += body
        elif self._body:
            self._grown = bytearray(self._body)
            self._grown += body
            self._body = b""
        else:
            self._body = body

    def on_message_complete(self) -> None:
        scope = self._scope
        if scope is None:
            return  # see _without_offer
        body = self._body if self._grown is None else self._grown
        self.held_bytes = 0
        self._body, self._grown = b"", None
        self._events.request_complete(scope, body, self._last)

    # --- limits ---

    def _refused(self, refusal: Refusal) -> Refusal:
        self._refusal = refusal
        return refusal

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > self._limits.max_header_bytes:
            raise self._refused(self._headers_too_large())

    def _headers_too_large(self) -> Refusal:
        message = f"The request's headers take more than {self._limits.max_header_bytes} bytes."
        return Refusal(431, message, "RequestHeadersTooLarge")
