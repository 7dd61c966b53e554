"""The picker's gRPC server: real streams over loopback, their ends, health, TLS, and what is no ext_proc.

Not covered: what a gateway does with the answers (tests/envoy); the protocol of one stream (test_stream.py).
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from kvcache.tokens.tokenizer import Tokenizer
from router.core.flow import FlowPolicy
from router.metrics import Metrics
from router.metrics.picker import PickerMetrics
from router.picker.protocol import ProcessingRequest
from router.picker.server import SERVICE, PickerLimits, PickerServer
from router.server.admission import Admission
from runtime.tls import CertificateFiles, KeyPair, self_signed
from tests.processes import eventually
from tests.router.picker.messages import destination, request_body, request_headers
from tests.router.picker.responses import ProcessingResponse
from tests.router.picker.support import Bench

LIMITS = PickerLimits(request_seconds=30.0, answer_seconds=60.0, largest_body=1000, all_bodies=4000)


@asynccontextmanager
async def serving(
    bench: Bench, limits: PickerLimits = LIMITS, certificates: Any = None, path: Path | None = None
) -> AsyncIterator[PickerServer]:
    loop = asyncio.get_running_loop()
    server = PickerServer(bench.picker, PickerMetrics(CollectorRegistry()), limits, loop.time)
    server.listen("127.0.0.1", 0, certificates, path, 0)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0.5)


def process(channel: grpc.aio.Channel, raw: bool = False) -> Any:
    return channel.stream_stream(
        f"/{SERVICE}/Process",
        request_serializer=None if raw else ProcessingRequest.SerializeToString,
        response_deserializer=ProcessingResponse.FromString,
    )()


async def ask(channel: grpc.aio.Channel) -> Any:
    """The call of a request that is routed."""
    call = process(channel)
    await call.write(request_headers("GET", "/v1/models", end=True))
    assert destination(await call.read())
    return call


async def test_many_streams_end_in_every_way_and_nothing_is_held(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer)

    async def one(channel: grpc.aio.Channel, number: int) -> None:
        call = process(channel)
        await call.write(request_headers(end=number % 5 == 0))
        match number % 5:
            case 1:
                await call.write(request_body(b'{"prompt":"hi"', end=False))
                call.cancel()
            case 2:
                await call.done_writing()
                assert await call.read() is grpc.aio.EOF
            case 3:
                call.cancel()
            case 4:
                await call.write(request_body(b'{"prompt":"hi"}'))
                await call.read()
                while await call.read() is not grpc.aio.EOF:
                    pass
            case _:
                await call.read()
                call.cancel()

    async with serving(bench) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        await asyncio.gather(*(one(channel, number) for number in range(300)))
        await eventually(lambda: server.in_flight == 0, "every stream has ended")
        bench.now += 5.0
        for number in range(bench.workers):
            bench.report(number, 0)
        bench.sweep()
        assert (bench.in_flight(), len(bench.unobserved), server.budget.used) == ([0, 0, 0], 0, 0)


async def test_more_requests_than_may_be_read_are_refused_before_their_bodies_come(tokenizer: Tokenizer) -> None:
    limits = replace(LIMITS, reading=2)
    async with (
        serving(Bench(tokenizer), limits) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        held = [process(channel), process(channel)]
        for call in held:
            await call.write(request_headers())
        await eventually(lambda: server.in_flight == 2, "two requests are being read")
        more = process(channel)
        await more.write(request_headers())
        refused = (await more.read()).immediate_response
        assert refused.status.code == 503
        assert b"Too many requests are being read" in refused.body
        assert (await more.read(), await more.code()) == (grpc.aio.EOF, grpc.StatusCode.OK)
        for call in held:
            await call.write(request_body(b'{"prompt":"hi"}'))
            assert destination(await call.read()), "those that were there first are served"


async def test_garbage_has_a_clear_status_and_no_traceback(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(Bench(tokenizer)) as server:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            call = process(channel, raw=True)
            await call.write(b"\xff" * 100)
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            other = channel.unary_unary("/no.such.Service/Method")
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await other(b"")
            assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" + b"\0" * 1000)
        await writer.drain()
        await asyncio.wait_for(reader.read(), 20)
        writer.close()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            (await ask(channel)).cancel()
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("messages", "status"),
    [
        pytest.param([request_headers(), request_body(b"x" * 1001)], 413, id="a large body"),
        pytest.param([request_headers(x_large="x" * 65_536)], 431, id="large headers"),
        pytest.param([request_headers(), request_body(b"{")], 400, id="no JSON"),
    ],
)
async def test_what_is_too_large_or_unreadable(tokenizer: Tokenizer, messages: list[Any], status: int) -> None:
    async with (
        serving(Bench(tokenizer)) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        call = process(channel)
        for message in messages:
            await call.write(message)
        reply = await call.read()
        assert reply.immediate_response.status.code == status
        assert await call.code() is grpc.StatusCode.OK
        assert server.budget.used == 0


async def test_bodies_of_all_streams_are_bounded_together(tokenizer: Tokenizer) -> None:
    async with (
        serving(Bench(tokenizer)) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        calls = [process(channel) for _ in range(10)]
        for call in calls:
            await call.write(request_headers())
            await call.write(request_body(b"x" * 900, end=False))
        await eventually(lambda: server.in_flight == 4, "those beyond the bound are refused")
        assert server.budget.used == 4 * 900
        for call in calls:
            call.cancel()


async def test_what_comes_while_a_request_waits_for_its_turn_is_bounded_and_handed_back(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, workers=1, fallbacks=0)
    bench.picker.admission = admission = Admission(bench.fleet, FlowPolicy(), Metrics(CollectorRegistry()), bench.clock)
    await bench.ask({"prompt": "One two three " * 4000, "max_tokens": 4})
    async with (
        serving(bench) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        calls = [process(channel) for _ in range(2)]
        for call in calls:
            await call.write(request_headers())
            await call.write(request_body(b'{"prompt":"hi"}'))
        await eventually(lambda: admission.flow.waiting == 2, "both wait for their turn")
        for _ in range(2):
            await calls[0].write(request_body(b"x" * 600))
        assert await calls[0].code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await eventually(lambda: admission.flow.waiting == 1, "the first has left the queue")
        assert server.budget.used == len(b'{"prompt":"hi"}')
        calls[1].cancel()
        await eventually(lambda: server.budget.used == 0, "nothing is held")
        admission.close()


async def test_a_request_that_never_comes_is_given_up(tokenizer: Tokenizer) -> None:
    limits = replace(LIMITS, request_seconds=0.1)
    async with (
        serving(Bench(tokenizer), limits) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        started, silent = process(channel), process(channel)
        await started.write(request_headers())
        await silent.wait_for_connection()
        assert (await started.read()).immediate_response.status.code == 408
        assert await silent.read() is grpc.aio.EOF
        await eventually(lambda: server.in_flight == 0, "both have ended")


async def test_stopping_waits_for_requests_that_are_being_read(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, workers=1)
    async with serving(bench) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = process(channel)
        await call.write(request_headers())
        await eventually(lambda: server.in_flight == 1, "the stream is open")
        stopping = asyncio.create_task(server.stop(30.0))
        await call.write(request_body(b'{"prompt":"hi"}'))
        assert destination(await call.read())
        await stopping
        assert bench.in_flight() == [0]


async def test_health_answers_to_the_names_that_gateways_use(tokenizer: Tokenizer) -> None:
    serves, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    async with serving(Bench(tokenizer)) as server:

        async def status(port: int, name: str) -> int:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                request = health_pb2.HealthCheckRequest(service=name)
                found: int = (await health_pb2_grpc.HealthStub(channel).Check(request)).status
                return found

        for port in (server.port, server.health_port):
            for name in ("", "liveness", "readiness", SERVICE, "inference-extension"):
                assert await status(port, name) == serves
            with pytest.raises(grpc.aio.AioRpcError):
                await status(port, "another")
        await server.ready(ready=False)
        assert await status(server.health_port, SERVICE) == not_serving
        assert await status(server.health_port, "liveness") == serves


def write(folder: Path, pair: KeyPair) -> None:
    (folder / "tls.crt").write_bytes(pair.certificate)
    (folder / "tls.key").write_bytes(pair.key)


async def test_a_certificate_is_read_again_when_it_changes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first, second = self_signed("localhost"), self_signed("localhost")
    write(tmp_path, first)
    async with serving(Bench(tokenizer), certificates=CertificateFiles(tmp_path)) as server:

        async def reach(trusted: KeyPair) -> None:
            credentials = grpc.ssl_channel_credentials(trusted.certificate)
            options = [("grpc.ssl_target_name_override", "localhost")]
            async with grpc.aio.secure_channel(f"127.0.0.1:{server.port}", credentials, options) as channel:
                (await ask(channel)).cancel()

        await reach(first)
        write(tmp_path, second)
        await reach(second)
        (tmp_path / "tls.key").write_bytes(first.key)  # it does not match: the last good pair stays
        await reach(second)


async def test_a_unix_socket_that_was_left_behind_is_replaced(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "s"
    for _ in range(2):
        async with serving(Bench(tokenizer), path=path), grpc.aio.insecure_channel(f"unix:{path}") as channel:
            (await ask(channel)).cancel()
    shutil.rmtree(tmp_path)
