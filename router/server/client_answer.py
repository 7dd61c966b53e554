"""The answer to one client on its way out: what every part of the router that answers writes to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from router.server.record import RequestRecord
from runtime.http.context import Headers

Edit = Callable[[Headers], Headers]
"""Changes the headers of an answer."""


class AnswerWriter(Protocol):
    """The server's side of an answer: `runtime.http.request.ServerRequest`."""

    async def drain(self) -> None: ...

    def begin(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None: ...

    def write(self, data: bytes, *, last: bool = False) -> bool: ...


class ClientAnswer:
    """Writes an answer, its headers changed by the `edits` in their order, and notes in `record` what is sent.

    `begin` and `write` raise `OSError` when the client has left. They never wait: who has more to write than the client
    takes waits in `drain`.
    """

    __slots__ = ("_edits", "_record", "_writer")

    def __init__(self, writer: AnswerWriter, record: RequestRecord | None = None) -> None:
        self._writer = writer
        self._record = record
        self._edits: list[Edit] = []

    def edit(self, edit: Edit) -> None:
        """Change the headers in this way too."""
        self._edits.append(edit)

    async def drain(self) -> None:
        """Wait until the client takes what is written, or has left."""
        await self._writer.drain()

    def begin(self, status: int, headers: Headers) -> None:
        """Status and headers; once."""
        for edit in self._edits:
            headers = edit(headers)
        if self._record is not None:
            self._record.answer_status = status
        self._writer.begin(status, headers)

    def write(self, data: bytes, *, last: bool = False) -> bool:
        """A piece of the body. Returns whether the client takes more."""
        if self._record is not None:
            self._record.sent_bytes += len(data)
        return self._writer.write(data, last=last)

    def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """All of it."""
        self.begin(status, headers)
        self.write(body, last=True)
