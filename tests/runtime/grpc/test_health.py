"""gRPC health: what is said of names, to those that ask once and to those that watch, and that nobody is kept.

Not covered: real clients (tests/router/picker/test_server.py).
"""

from __future__ import annotations

import pytest

from runtime.grpc.frames import Kind, Status
from runtime.grpc.health import SERVICE, Health, Serving
from tests.runtime.grpc.support import FIELDS, Peer, data, messages_in

WATCH = [*FIELDS[:2], (":path", f"/{SERVICE}/Watch"), *FIELDS[3:]]
NAMED = b"\x0a\x01a"


def watching(health: Health) -> Peer:
    peer = Peer()
    peer.context.methods = {path.encode(): method for path, method in health.methods().items()}
    return peer


def answers(peer: Peer) -> list[int]:
    content = b"".join(payload for kind, _, _, payload in peer.sent() if kind == Kind.DATA)
    return [message[1] for message in messages_in(content)]


async def test_a_change_is_told_to_those_that_watch_until_they_leave() -> None:
    health = Health(["a"])
    peer = watching(health)
    peer.send(peer.headers(1, fields=WATCH) + data(1, NAMED, end=True))
    assert answers(peer) == [Serving.SERVING]
    health.set("a", Serving.NOT_SERVING)
    assert answers(peer) == [Serving.NOT_SERVING]
    assert peer.nothing_is_held()
    health.set("a", Serving.SERVING)
    assert answers(peer) == []


@pytest.mark.parametrize("second", [NAMED, b"\xff"])
async def test_who_asks_for_more_than_one_name_watches_none(second: bytes) -> None:
    health = Health(["a"])
    peer = watching(health)
    peer.send(peer.headers(1, fields=WATCH) + data(1, NAMED, second))
    (trailers,) = [payload for kind, flags, _, payload in peer.sent() if kind == Kind.HEADERS and flags & 1]
    peer._decoder.decode(trailers)
    assert not peer.connection.calls
    assert not health.watched
    assert str(int(Status.INVALID_ARGUMENT)).encode() in trailers
