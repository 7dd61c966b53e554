"""The client and the engines of `bench.micro.request`, in a process of their own: one step at a time.

Each piece is sent when the router has passed on the one before, so that the router reads the same bytes in the same
steps in every run. Commands come on standard input, one a line; a line on standard output says that one is done.
"""

from __future__ import annotations

import selectors
import socket
import sys
from collections.abc import Iterator, Sequence

import orjson

ENGINES = 8
FIRST_EVENT = "first"
_MOST = 65_536


def chat(content: str, *, stream: bool = False) -> bytes:
    """A request for a chat of one message."""
    message = {"role": "user", "content": content}
    body = orjson.dumps({"model": "m", "max_tokens": 64, "stream": stream, "messages": [message]})
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"accept: */*\r\nuser-agent: bench\r\ncontent-length: %d\r\n\r\n"
    )
    return head % len(body) + body


SMALL = "Who wrote Faust, and when?"


def large(number: int) -> str:
    """4 KB of numbers, of which one in eight prompts shares the first half."""
    shared, own = number % ENGINES, number + 1000
    text = [" ".join(str(seed * 7919 + i * 104_729)[:6] for i in range(293)) for seed in (shared, own)]
    return " ".join(text)


def whole_answer() -> bytes:
    """An answer that is no stream."""
    usage = {"prompt_tokens": 20, "completion_tokens": 1, "total_tokens": 21}
    choice = {"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}
    answer = {"id": "chatcmpl-0", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    body = orjson.dumps({**answer, "usage": usage})
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM_END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def event(text: str) -> bytes:
    """An event with content, as a chunk."""
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
    fields = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}
    data = b"data: " + orjson.dumps(fields) + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


def stream_answer(events: int, *, paced: bool) -> list[bytes]:
    """The pieces of a stream. The first has the head and one event; the others one event each, or (not `paced`) all of
    them at once."""
    rest = [event(f"tok{number}") for number in range(events)]
    if not paced:
        rest = [b"".join(rest)] if rest else []
    return [STREAM_HEAD + event(FIRST_EVENT), *rest, STREAM_END]


class Peer:
    """One client connection to the router, and the engines."""

    def __init__(self, engines: Sequence[socket.socket]) -> None:
        self._selector = selectors.DefaultSelector()
        for engine in engines:
            self._selector.register(engine, selectors.EVENT_READ, True)
        self._client: socket.socket | None = None

    def connect(self, port: int) -> None:
        """Connect to the router."""
        self._client = socket.create_connection(("127.0.0.1", port))
        self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def exchange(self, request: bytes, answer: Sequence[bytes]) -> None:
        """Send a request, and answer it in these pieces. Raises `RuntimeError` when the client does not get them."""
        if self._client is None:
            raise RuntimeError("the client is not connected")
        self._client.sendall(request)
        engine = self._engine()
        for piece in answer:
            # What the client gets last of a piece: of one in chunks, the data of its last event.
            last = piece[: -len(b"\r\n0\r\n\r\n")] if piece is STREAM_END else piece.removesuffix(b"\r\n")
            last = last[-20:]
            engine.sendall(piece)
            got = b""
            while last not in got:
                if not (data := self._client.recv(_MOST)):
                    raise RuntimeError(f"the router closed the connection after {got[-300:]!r}")
                got += data
                if not got.startswith(b"HTTP/1.1 200") and got.startswith(b"HTTP/"):
                    raise RuntimeError(f"the router answered {got[:300]!r}")
        while answer[-1] is STREAM_END and not got.endswith(b"0\r\n\r\n"):
            got += self._client.recv(_MOST)

    def _engine(self) -> socket.socket:
        """The engine's connection on which a whole request has come."""
        held: dict[int, bytes] = {}
        while True:
            for key, _ in self._selector.select():
                sock = key.fileobj
                if not isinstance(sock, socket.socket):
                    continue
                if key.data:
                    accepted, _ = sock.accept()
                    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._selector.register(accepted, selectors.EVENT_READ, False)
                    continue
                data = sock.recv(_MOST)
                if not data:
                    self._selector.unregister(sock)
                    continue
                held[key.fd] = held.get(key.fd, b"") + data
                head, end, body = held[key.fd].partition(b"\r\n\r\n")
                if end and len(body) == int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]):
                    return sock


def exchanges(kind: str, first: int, count: int) -> Iterator[tuple[bytes, list[bytes]]]:
    """Requests of one kind with the pieces of their answers, numbered from `first` on."""
    name, _, events = kind.partition(":")
    for number in range(first, first + count):
        match name:
            case "small":
                yield chat(SMALL), [whole_answer()]
            case "large":
                yield chat(large(number)), [whole_answer()]
            case "paced" | "unpaced":
                yield chat(SMALL, stream=True), stream_answer(int(events), paced=name == "paced")
            case _:
                raise ValueError(f"unknown kind {kind!r}")


def main() -> None:
    engines = [socket.create_server(("127.0.0.1", 0)) for _ in range(ENGINES)]
    sys.stdout.buffer.write(b" ".join(b"%d" % engine.getsockname()[1] for engine in engines) + b"\n")
    sys.stdout.buffer.flush()
    peer = Peer(engines)
    for line in sys.stdin:
        command, *rest = line.split()
        if command == "connect":
            peer.connect(int(rest[0]))
        else:
            for request, answer in exchanges(command, *map(int, rest)):
                peer.exchange(request, answer)
        sys.stdout.buffer.write(b"done\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
