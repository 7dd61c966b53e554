"""How many connections a gRPC server holds, and for how long without a call: on virtual time, and TLS over loopback.

Not covered: what one connection may hold (test_connection.py), why handshakes fail (tests/runtime/http/test_tls.py).
"""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime.grpc.call import Call
from runtime.grpc.context import GrpcLimits
from runtime.grpc.frames import ACK, PREFACE, ErrorCode, Kind, frame
from runtime.grpc.health import Health
from runtime.grpc.server import GrpcServer
from runtime.sockets import listen
from runtime.tls import SelfSigned
from tests.runtime.grpc.support import Peer, data, frames
from tests.virtual import CountingLoop, run


def answer(call: Call, message: bytes) -> None:
    if message == b"end":
        call.finish()


def greeted(peer: Peer, count: int) -> list[Peer]:
    """So many more clients of this one's server."""
    return [Peer(answer, beside=peer) for _ in range(count)]


def pings(peer: Peer) -> list[bytes]:
    return [payload for kind, flags, _, payload in peer.sent() if kind == Kind.PING and not flags]


def test_one_more_connection_takes_the_place_of_the_one_that_is_idle_for_longest() -> None:
    async def main(loop: CountingLoop) -> None:
        first = Peer(answer, GrpcLimits(connections=3))
        second, third = greeted(first, 2)
        first.send(first.headers(1) + data(1, b"stay"))
        second.send(second.headers(1) + data(1, b"end", end=True))  # idle again, and since later than the third
        second.sent()
        (fourth,) = greeted(first, 1)
        assert third.goodbye() == ErrorCode.NO_ERROR
        assert [each.transport.closed for each in (first, second, third, fourth)] == [False, False, True, False]
        assert len(first.context.connections) == 3
        third.connection.connection_lost(None)
        greeted(first, 1)
        assert second.transport.closed
        assert not first.transport.closed

    run(main)


def test_connections_that_say_nothing_keep_nobody_out() -> None:
    async def main(loop: CountingLoop) -> None:
        first = Peer(limits=GrpcLimits(connections=2))
        silent = [Peer(greet=False, beside=first) for _ in range(50)]
        assert first.transport.closed
        (last,) = greeted(first, 1)
        last.send(last.headers(1) + data(1, b"x"))
        assert not last.transport.closed
        assert [each.transport.closed for each in silent] == [True] * 49 + [False]
        assert len(first.context.connections) == 2

    run(main)


def test_when_all_connections_have_calls_one_more_is_refused_and_says_why() -> None:
    async def main(loop: CountingLoop) -> None:
        first = Peer(answer, GrpcLimits(connections=2))
        (second,) = greeted(first, 1)
        for peer in (first, second):
            peer.send(peer.headers(1) + data(1, b"stay"))
        refused = Peer(greet=False, beside=first)
        (begins, _, _, _), (kind, _, _, payload) = refused.sent()
        assert (begins, kind) == (Kind.SETTINGS, Kind.GOAWAY)
        assert payload.endswith(b"too many connections are open")
        assert refused.transport.closed
        refused.send(PREFACE + refused.headers(1))  # it may have sent it before it knew
        refused.connection.connection_lost(None)
        assert first.context.calls == 2
        first.send(data(1, b"end", end=True))
        (served,) = greeted(first, 1)
        assert first.transport.closed
        assert not served.transport.closed
        assert not second.transport.closed

    run(main)


def test_a_connection_without_a_call_is_asked_to_leave_and_loses_none_that_is_on_its_way() -> None:
    async def main(loop: CountingLoop) -> None:
        peer = Peer(answer, GrpcLimits(idle=300.0))
        peer.send(peer.headers(1) + data(1, b"stay"))
        await asyncio.sleep(1000)  # it has a call
        peer.sent()
        peer.send(data(1, b"end", end=True))
        await asyncio.sleep(299)
        assert pings(peer) == []
        await asyncio.sleep(2)
        (ping,) = pings(peer)
        peer.send(peer.headers(3) + data(3, b"stay"))  # sent before the GOAWAY was read
        peer.send(frame(Kind.PING, ACK, 0, ping))
        await asyncio.sleep(1000)
        assert not peer.transport.closed
        peer.send(data(3, b"end", end=True))
        await asyncio.sleep(0)
        assert peer.transport.closed
        assert peer.nothing_is_held()

    run(main)


def test_a_client_that_does_not_leave_is_cut_off() -> None:
    async def main(loop: CountingLoop) -> None:
        peer = Peer(answer, GrpcLimits(idle=300.0))
        await asyncio.sleep(450)
        (other,) = greeted(peer, 1)
        assert pings(peer)
        await asyncio.sleep(151)
        assert peer.transport.closed
        peer.connection.connection_lost(None)
        assert not other.transport.closed
        await asyncio.sleep(150)
        assert pings(other)
        other.connection.connection_lost(None)
        before = loop.iterations
        await asyncio.sleep(10_000)
        assert loop.iterations - before < 5  # nothing is left that wakes the loop

    run(main)


async def test_many_calls_on_one_connection_cost_no_timer_each() -> None:
    loop = asyncio.get_running_loop()
    peer = Peer(answer)
    before = len(loop._scheduled)  # type: ignore[attr-defined]  # asyncio's own list of timers
    for stream in range(1, 400, 2):
        peer.send(peer.headers(stream) + data(stream, b"end", end=True))
    assert len(loop._scheduled) == before  # type: ignore[attr-defined]
    assert peer.nothing_is_held()


@pytest.mark.parametrize("silent", [0, 12])
async def test_handshakes_that_say_nothing_make_room_for_others(silent: int) -> None:
    health, pair = Health(["x"]), SelfSigned("localhost")
    server = GrpcServer(health.methods(), GrpcLimits(handshake=600.0, handshakes=4))
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    await server.start(sock, pair)
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(silent)]
    credentials = grpc.ssl_channel_credentials(pair.current().certificate)
    name = [("grpc.ssl_target_name_override", "localhost")]
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, name) as channel:
        found = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="x"))
        assert found.status == health_pb2.HealthCheckResponse.SERVING
    for reader, _ in opened[: silent - 3]:
        assert await reader.read() == b""
    for _, writer in opened:
        writer.close()
    await server.stop(0)


async def test_a_client_without_tls_is_told_that_the_port_speaks_it() -> None:
    server = GrpcServer({})
    sock = listen("127.0.0.1", 0)
    await server.start(sock, SelfSigned())
    reader, writer = await asyncio.open_connection("127.0.0.1", sock.getsockname()[1])
    writer.write(PREFACE)
    kinds = {kind: payload for kind, _, _, payload in frames(await reader.read())}
    assert kinds[Kind.GOAWAY].endswith(b"this port speaks TLS only")
    writer.close()
    await server.stop(0)
