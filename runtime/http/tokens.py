"""Bearer tokens at a port inside a network: a file of them that is followed, and the check of each request."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from kvcache.errors import error_body
from runtime.logs import EventLogger

logger = EventLogger(__name__)

TOKEN_HEADER = "x-kvcluster-token"  # noqa: S105  its name, not its value
"""What our own programs send: the API server's proxy to pods keeps `Authorization` to itself."""
SHORTEST, MOST_BYTES, MOST_TOKENS = 16, 65_536, 64
FIRST = "token"
"""Of several files in a folder, or keys of a Secret, the one whose token is shown to others."""
_NAMES = (b"authorization", TOKEN_HEADER.encode())


class TokenFileError(ValueError):
    """The file of tokens cannot be used; the message says why, and holds none of them."""


def parse(data: bytes) -> tuple[str, ...]:
    """The tokens of a file: one a line; lines that are empty or begin with `#` are none. Raises `TokenFileError`."""
    if len(data) > MOST_BYTES:
        raise TokenFileError(f"it has more than {MOST_BYTES} bytes")
    lines = [line.strip() for line in data.decode("latin-1").splitlines()]
    tokens = tuple(line for line in lines if line and not line.startswith("#"))
    if not tokens:
        raise TokenFileError("it holds no token")
    if len(tokens) > MOST_TOKENS:
        raise TokenFileError(f"it holds more than {MOST_TOKENS} tokens")
    for number, token in enumerate(tokens, 1):
        if len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token:
            raise TokenFileError(f"token {number} must have {SHORTEST} characters or more, printable ASCII, no spaces")
    return tokens


def joined(files: Mapping[str, bytes]) -> bytes:
    """The files of a folder, or the keys of a Secret, as one file of tokens: `FIRST`, then the others by name."""
    return b"\n".join(files[name] for name in sorted(files, key=lambda name: (name != FIRST, name)))


def decoded(data: Mapping[str, object]) -> tuple[str, ...]:
    """The tokens in `data` of a Secret as the API server gives it, which is base64. Raises `TokenFileError`."""
    try:
        return parse(joined({key: base64.b64decode(str(value), validate=True) for key, value in data.items()}))
    except binascii.Error:
        raise TokenFileError("its data is no base64") from None


def token_headers(token: str) -> dict[str, str]:
    """The header by which our own programs show this token; none for an empty one."""
    return {TOKEN_HEADER: token} if token else {}


class TokenFile:
    """The tokens of a file, or of all files in a folder (a mounted Secret), each of which is let in. What cannot be
    used replaces nothing."""

    def __init__(self, path: Path) -> None:
        """Raises `TokenFileError`."""
        self._path = path
        self._data = self._read()
        self._adopt(self._data)
        self.problem = ""
        """Why the file as it is now cannot be used; empty: it is used."""

    @property
    def first(self) -> str:
        """The token that this process shows to others."""
        return self.tokens[0]

    def accepts(self, token: bytes) -> bool:
        """Whether it is one of those in the file, compared by digests in constant time."""
        digest, found = hashlib.sha256(token).digest(), False
        for each in self._digests:
            found |= hmac.compare_digest(each, digest)
        return found

    async def follow(self, interval: float = 1.0) -> None:
        """Read the file again and again; `interval` in seconds."""
        while True:
            await asyncio.sleep(interval)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        """Read the file now, and use it if it has changed."""
        try:
            data = self._read()
            if data != self._data or self.problem:
                self._adopt(data)
                self._data, self.problem = data, ""
                logger.info("tokens_loaded", path=str(self._path), tokens=len(self._digests))
        except TokenFileError as error:
            if str(error) != self.problem:
                self.problem = str(error)
                logger.error("tokens_unusable", path=str(self._path), why=self.problem)

    def _adopt(self, data: bytes) -> None:
        self.tokens = parse(data)
        self._digests = [hashlib.sha256(token.encode()).digest() for token in self.tokens]

    def _read(self) -> bytes:
        try:
            if not self._path.is_dir():
                return _content(self._path)
            # The kubelet swaps all files of a Secret at once, in a folder `..data` that these are links into.
            named = [path for path in self._path.iterdir() if not path.name.startswith(".")]
            return joined({path.name: _content(path) for path in named[: MOST_TOKENS + 1]})
        except OSError as error:
            raise TokenFileError(error.strerror or "it cannot be read") from None


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MOST_BYTES + 1)


@dataclass(frozen=True, slots=True)
class TokenRule:
    """Who is let in: requests that show a token, as `Authorization: Bearer TOKEN` or in `TOKEN_HEADER`, and those that
    read a path that is `open` or under one of `open_folders`."""

    tokens: TokenFile
    open: frozenset[str]
    open_folders: tuple[str, ...] = ()

    def admits(self, scope: Scope) -> bool:
        """Whether a request is let in, by its headers alone: nobody has to read the body of one that is not."""
        return self._is_open(scope) or self._is_shown(scope["headers"])

    def _is_open(self, scope: Scope) -> bool:
        path = scope["path"]
        return scope["method"] in ("GET", "HEAD") and (path in self.open or path.startswith(self.open_folders))

    def _is_shown(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        for name, value in headers:
            if name in _NAMES:
                scheme, _, token = value.rpartition(b" ")
                if (name != b"authorization" or scheme.strip().lower() == b"bearer") and self.tokens.accepts(token):
                    return True
        return False


@dataclass(frozen=True, slots=True)
class TokenCheck:
    """An ASGI application that passes on the requests that `rule` admits. Others get 401."""

    app: ASGIApp
    rule: TokenRule

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] == "http" and not self.rule.admits(scope):
            message = (
                "this port needs a token: send it as `Authorization: Bearer TOKEN`. In a browser, open the page with "
                "#token=TOKEN behind its address; for commands of kvcluster, set KVCLUSTER_MANAGEMENT_TOKEN"
            )
            body = orjson.dumps(error_body(message, "AuthenticationError", None, 401))
            headers = {"www-authenticate": "Bearer"}
            await Response(body, 401, headers, "application/json")(scope, receive, send)
            return
        await self.app(scope, receive, send)
