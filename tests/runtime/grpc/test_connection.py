"""gRPC's server side over HTTP/2: what a client's frames lead to, the windows, the bounds, what breaks the protocol.

Frames go to a connection without a socket. Not covered: real clients and TLS (tests/router/picker/test_server.py,
tests/envoy), which speak to the same code.
"""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hpack import Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.grpc.call import WINDOW, Call
from runtime.grpc.connection import FRAMES
from runtime.grpc.context import GrpcLimits
from runtime.grpc.frames import (
    ACK,
    DEFAULT_WINDOW,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    NUMBER,
    PREFACE,
    PREFIX,
    SETTING,
    ErrorCode,
    Kind,
    Status,
    frame,
    reset,
    window_update,
)
from runtime.grpc.headers import HeaderBlocks, Request
from tests.runtime.grpc.support import FIELDS, PATH, Peer, data, messages_in


def echo(call: Call, message: bytes) -> None:
    call.send([message])


def finish(call: Call, message: bytes) -> None:
    call.finish(messages=[message, message])


async def test_a_call_and_its_answer_in_one_write() -> None:
    peer = Peer(finish)
    peer.send(peer.headers(1) + data(1, b"one"))
    (_, _, _, beginning), (kind, _, _, content), (_, flags, _, trailers), (last, _, _, code) = peer.sent()
    assert peer.fields(beginning) == {":status": "200", "content-type": "application/grpc"}
    assert (kind, messages_in(content)) == (Kind.DATA, [b"one", b"one"])
    assert (flags, peer.fields(trailers)) == (5, {"grpc-status": "0"})
    assert (last, NUMBER.unpack(code)[0]) == (Kind.RST_STREAM, ErrorCode.NO_ERROR)  # the client had not ended its side
    peer.send(data(1, b"late") + window_update(1, 10) + reset(1, ErrorCode.CANCEL))  # it could not know
    peer.send(peer.headers(3) + data(3, b"two", end=True))
    assert [kind for kind, _, _, _ in peer.sent()] == [Kind.HEADERS, Kind.DATA, Kind.HEADERS, Kind.RST_STREAM]
    assert [each.messages for each in peer.handlers] == [[b"one"], [b"two"]]
    assert peer.nothing_is_held()


@given(st.lists(st.binary(max_size=40), max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=40)
async def test_however_it_is_cut_it_is_the_same_conversation(messages: list[bytes], rng: random.Random) -> None:
    """DATA frames cut messages anywhere, segments cut frames anywhere, padding and priorities are skipped."""
    peer = Peer(echo, greet=False)
    content = b"".join(PREFIX.pack(0, len(each)) + each for each in messages)
    block = peer.encoder.encode(FIELDS)
    cut = rng.randrange(len(block) + 1)
    padded = b"\x03" + b"\0\0\0\0\x10" + block[:cut] + b"\0\0\0"
    wire = PREFACE + peer.stated() + frame(Kind.HEADERS, 0x8 | 0x20, 1, padded)
    wire += frame(Kind.CONTINUATION, 0x4, 1, block[cut:]) + frame(99, 1, 1, b"what nobody knows")
    while content:
        size = rng.randrange(1, len(content) + 1)
        wire += frame(Kind.DATA, 0x8, 1, b"\x02" + content[:size] + b"\0\0")
        content = content[size:]
    wire += frame(Kind.DATA, 1, 1) if rng.random() < 0.5 else peer.headers(1, end=True, fields=[("a", "b")])
    while wire:
        size = rng.randrange(1, len(wire) + 1)
        peer.send(wire[:size])
        wire = wire[size:]
    (handler,) = peer.handlers
    assert (handler.messages, handler.ended) == (messages, 1)
    answered = b"".join(payload for kind, _, _, payload in peer.sent() if kind == Kind.DATA)
    assert messages_in(answered) == messages
    handler.call.finish(Status.OK)
    assert peer.nothing_is_held()
    assert handler.lost_calls == 0


_FRAMES = st.builds(
    frame,
    st.sampled_from([*Kind, 77]),
    st.sampled_from([0, 1, 4, 5, 8, 0x24, 0x2D]),
    st.sampled_from([0, 1, 2, 3, 5]),
    st.one_of(
        st.binary(max_size=12),
        st.just(Encoder().encode(FIELDS)),
        st.just(PREFIX.pack(0, 2) + b"hi"),
        st.sampled_from([NUMBER.pack(0), NUMBER.pack(2**31 - 1), bytes(8)]),
    ),
)


@given(st.lists(st.one_of(_FRAMES, st.binary(max_size=30)), max_size=12))
@settings(max_examples=150)
async def test_whatever_comes_nothing_raises_and_nothing_is_left(pieces: list[bytes]) -> None:
    peer = Peer(lambda call, data: finish(call, data) if len(data) > 3 else echo(call, data))
    for piece in pieces:
        peer.send(piece)
    peer.sent()  # frames are whole
    assert peer.nothing_is_held()
    assert all(handler.lost_calls <= 1 for handler in peer.handlers)


SETTINGS_BAD_WINDOW = b"\0\4\xff\xff\xff\xff"


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        pytest.param(frame(Kind.DATA, 0, 0, b"x"), ErrorCode.PROTOCOL_ERROR, id="data of the connection"),
        pytest.param(frame(Kind.DATA, 0, 7, b"x"), ErrorCode.PROTOCOL_ERROR, id="data of no stream"),
        pytest.param(frame(Kind.HEADERS, 4, 2), ErrorCode.PROTOCOL_ERROR, id="an even stream"),
        pytest.param(
            frame(Kind.HEADERS, 0, 1) + frame(Kind.PING, 0, 0, bytes(8)), ErrorCode.PROTOCOL_ERROR, id="a cut"
        ),
        pytest.param(frame(Kind.CONTINUATION, 4, 1), ErrorCode.PROTOCOL_ERROR, id="a continuation of nothing"),
        pytest.param(frame(Kind.HEADERS, 4, 1, b"\xff\xff\xff\xff"), ErrorCode.COMPRESSION_ERROR, id="no HPACK"),
        pytest.param(frame(Kind.HEADERS, 0xC, 1, b"\x09"), ErrorCode.PROTOCOL_ERROR, id="padding beyond the frame"),
        pytest.param(frame(Kind.WINDOW_UPDATE, 0, 0, NUMBER.pack(0)), ErrorCode.PROTOCOL_ERROR, id="an empty window"),
        pytest.param(
            frame(Kind.WINDOW_UPDATE, 0, 0, NUMBER.pack(2**31 - 1)), ErrorCode.FLOW_CONTROL_ERROR, id="a wide window"
        ),
        pytest.param(
            frame(Kind.SETTINGS, 0, 0, SETTINGS_BAD_WINDOW), ErrorCode.FLOW_CONTROL_ERROR, id="a setting too large"
        ),
        pytest.param(frame(Kind.SETTINGS, 0, 1), ErrorCode.PROTOCOL_ERROR, id="settings of a stream"),
        pytest.param(frame(Kind.SETTINGS, 0, 0, b"12345"), ErrorCode.FRAME_SIZE_ERROR, id="settings cut off"),
        pytest.param(frame(Kind.PING, 0, 0, b"1"), ErrorCode.FRAME_SIZE_ERROR, id="a short ping"),
        pytest.param(frame(Kind.RST_STREAM, 0, 9, bytes(4)), ErrorCode.PROTOCOL_ERROR, id="a reset of no stream"),
        pytest.param(frame(Kind.PUSH_PROMISE, 4, 1, bytes(4)), ErrorCode.PROTOCOL_ERROR, id="a push"),
        pytest.param(b"\xff\xff\xff" + bytes(6), ErrorCode.FRAME_SIZE_ERROR, id="a huge frame"),
        pytest.param(
            frame(Kind.HEADERS, 0, 1) + frame(Kind.CONTINUATION, 0, 1) * 600, ErrorCode.ENHANCE_YOUR_CALM, id="a flood"
        ),
    ],
)
async def test_what_breaks_the_protocol_ends_the_connection(wire: bytes, code: ErrorCode) -> None:
    peer = Peer()
    peer.send(wire)
    assert peer.goodbye() == code
    assert peer.transport.closed
    peer.send(peer.headers(1))
    assert not peer.handlers
    assert peer.nothing_is_held()


async def test_what_is_no_http2_is_told_so() -> None:
    peer = Peer(greet=False)
    peer.send(b"GET / HT")
    assert peer.transport.closed
    assert peer.goodbye() == ErrorCode.PROTOCOL_ERROR


@pytest.mark.parametrize("bound", ["stream", "connection", "reader"])
async def test_no_more_is_sent_than_the_client_takes(bound: str) -> None:
    """A long answer goes as its client makes room, in frames of the size that it allows, and its end goes last."""
    narrow = {"stream": 1000, "connection": 2**20, "reader": 2**20}[bound]
    peer = Peer(finish, settings={INITIAL_WINDOW_SIZE: narrow, MAX_FRAME_SIZE: 20_000})
    if bound == "stream":
        peer.send(window_update(0, 2**20))
    if bound == "reader":
        peer.send(window_update(0, 2**20))
        peer.connection.pause_writing()
    message = bytes(range(256)) * 200
    peer.send(peer.headers(1) + b"".join(data(1, message[:50_000] + bytes([i])) for i in range(1)))
    expected = message[:50_000] + b"\0"
    got, room, rounds = b"", min(narrow, DEFAULT_WINDOW) if bound != "reader" else 0, 0
    while True:
        sent = peer.sent()
        pieces = [payload for kind, _, _, payload in sent if kind == Kind.DATA]
        got += b"".join(pieces)
        assert len(got) <= room
        assert all(len(piece) <= 20_000 for piece in pieces)
        if sent and sent[-1][0] in (Kind.HEADERS, Kind.RST_STREAM) and len(got) == 2 * (len(expected) + 5):
            break
        rounds += 1
        assert rounds < 200
        if bound == "reader":
            room = 2**20
            peer.connection.resume_writing()
        else:
            room += 3000
            peer.send(window_update(1 if bound == "stream" else 0, 3000))
    assert messages_in(got) == [expected, expected]
    assert peer.context.held == 0
    assert peer.nothing_is_held()


async def test_a_window_that_is_made_smaller_is_kept_to() -> None:
    peer = Peer(settings={INITIAL_WINDOW_SIZE: 100})
    peer.send(peer.headers(1))
    (handler,) = peer.handlers
    handler.call.send([b"x" * 195])
    assert len(next(payload for kind, _, _, payload in peer.sent() if kind == Kind.DATA)) == 100
    peer.settings = {INITIAL_WINDOW_SIZE: 50}
    peer.send(peer.stated() + window_update(1, 49))
    assert [kind for kind, _, _, _ in peer.sent()] == [Kind.SETTINGS]
    peer.send(window_update(1, 101))
    assert [len(payload) for kind, _, _, payload in peer.sent() if kind == Kind.DATA] == [100]


async def test_a_client_that_keeps_to_its_windows_can_go_on_for_ever() -> None:
    peer = Peer()
    peer.send(peer.headers(1))
    room = {0: 2**24, 1: WINDOW}
    piece = data(1, b"x" * 60_000)
    for _ in range(600):
        peer.send(piece)
        for kind, _, stream, payload in peer.sent():
            assert kind == Kind.WINDOW_UPDATE
            room[stream] += NUMBER.unpack(payload)[0]
        room = {stream: left - 60_005 for stream, left in room.items()}
        assert min(room.values()) > 0
    assert len(peer.handlers[0].messages) == 600


async def test_a_paused_call_takes_one_window() -> None:
    peer = Peer()
    peer.send(peer.headers(1))
    call = peer.handlers[0].call
    call.pause()
    for _ in range(17):
        peer.send(data(1, b"x" * 60_000))
    assert not [each for each in peer.sent() if each[0] == Kind.WINDOW_UPDATE and each[2] == 1]
    call.resume()
    assert [each[2] for each in peer.sent()] == [1]
    call.pause()
    for _ in range(18):
        peer.send(data(1, b"x" * 60_000))
    assert (Kind.RST_STREAM, 0, 1, NUMBER.pack(ErrorCode.FLOW_CONTROL_ERROR)) in peer.sent()
    assert peer.handlers[0].lost_calls == 1


def status_of(peer: Peer) -> str:
    blocks = [payload for kind, _, _, payload in peer.sent() if kind == Kind.HEADERS]
    return peer.fields(blocks[-1])["grpc-status"]


@pytest.mark.parametrize(
    ("wire", "status"),
    [
        pytest.param(lambda: frame(Kind.DATA, 0, 1, PREFIX.pack(0, 1001)), Status.RESOURCE_EXHAUSTED, id="large"),
        pytest.param(lambda: frame(Kind.DATA, 0, 1, PREFIX.pack(1, 1) + b"x"), Status.UNIMPLEMENTED, id="compressed"),
        pytest.param(
            lambda: frame(Kind.DATA, 0, 1, PREFIX.pack(0, 900) + bytes(300)) + frame(Kind.DATA, 0, 1, bytes(300)),
            Status.RESOURCE_EXHAUSTED,
            id="together with others'",
        ),
        pytest.param(lambda: data(1, b"boom"), Status.INTERNAL, id="a handler's error"),
    ],
)
async def test_a_call_beyond_the_bounds_ends_alone(wire: Callable[[], bytes], status: Status) -> None:
    def fail(call: Call, message: bytes) -> None:
        raise RuntimeError("a defect")

    peer = Peer(fail, GrpcLimits(message=1000, held=500))
    peer.send(peer.headers(1) + wire())
    assert status_of(peer) == str(int(status))
    assert peer.handlers[0].lost_calls == 1
    peer.send(peer.headers(3))
    assert len(peer.handlers) == 2
    assert peer.nothing_is_held()


async def test_calls_that_are_refused() -> None:
    peer = Peer(limits=GrpcLimits(calls=1))
    peer.send(peer.headers(1) + peer.headers(3))
    assert status_of(peer) == str(int(Status.RESOURCE_EXHAUSTED))
    others: list[tuple[list[tuple[str, str]], Any]] = [
        ([*FIELDS[:2], (":path", "/other"), *FIELDS[3:]], {"grpc-status": "12"}),
        ([*FIELDS[:5], ("content-type", "text/html")], {":status": "415"}),
        ([*FIELDS, ("Upper", "x")], None),
        ([*FIELDS, ("connection", "close")], None),
        ([*FIELDS[1:]], None),
        ([*FIELDS, (":path", PATH)], None),
    ]
    for number, (fields, answer) in enumerate(others):
        peer.send(peer.headers(5 + 2 * number, fields=fields))
        kind, _, _, payload = peer.sent()[0]
        if answer is None:
            assert (kind, payload) == (Kind.RST_STREAM, NUMBER.pack(ErrorCode.PROTOCOL_ERROR))
        else:
            assert answer.items() <= peer.fields(payload).items()
    assert len(peer.handlers) == 1


async def test_a_ping_is_answered() -> None:
    peer = Peer()
    peer.send(frame(Kind.PING, 0, 0, b"12345678"))
    assert peer.sent() == [(Kind.PING, ACK, 0, b"12345678")]


@pytest.mark.parametrize("asked", ["ping", "settings", "no method", "no gRPC", "no request", "finished"])
async def test_answers_to_a_client_that_does_not_read_are_bounded(asked: str) -> None:
    """Whatever makes the server write: what is held for the client has a bound, and then the connection ends."""
    peer = Peer(lambda call, message: call.finish(Status.INTERNAL, "x" * 200), GrpcLimits(unread=20_000))
    fields = {
        "no method": [*FIELDS[:2], (":path", "/other"), *FIELDS[3:]],
        "no gRPC": [*FIELDS[:5], ("content-type", "text/html")],
        "no request": FIELDS[1:],
    }.get(asked, FIELDS)
    peer.connection.pause_writing()
    for stream in range(1, 4000, 2):
        match asked:
            case "ping":
                wire = frame(Kind.PING, 0, 0, bytes(8))
            case "settings":
                wire = frame(Kind.SETTINGS, 0, 0) * 2
            case _:
                wire = peer.headers(stream, fields=fields) + (data(stream, b"x") if asked == "finished" else b"")
        peer.send(wire)
        if peer.transport.closed:
            break
    written = len(peer.transport.written)
    assert peer.goodbye() == ErrorCode.ENHANCE_YOUR_CALM
    assert 20_000 < written < 21_000
    assert peer.nothing_is_held()


async def test_a_client_that_reads_again_is_answered_on() -> None:
    peer = Peer(limits=GrpcLimits(unread=20_000))
    for _ in range(3):
        peer.connection.pause_writing()
        peer.send(frame(Kind.PING, 0, 0, bytes(8)) * 1000)
        peer.connection.resume_writing()
        assert len(peer.sent()) == 1000


async def test_a_connection_that_is_being_closed_is_cut_though_some_of_it_was_read() -> None:
    peer = Peer()
    peer.send(frame(Kind.PUSH_PROMISE, 4, 1, bytes(4)))
    peer.connection.pause_writing()
    peer.connection.resume_writing()
    assert peer.connection._timer is not None
    assert peer.nothing_is_held()


async def test_many_frames_that_come_at_once_let_others_have_their_turn() -> None:
    peer = Peer(finish)
    wire = b"".join(peer.headers(stream) + data(stream, b"x") for stream in range(1, 4 * FRAMES, 2))
    peer.connection.data_received(wire[:-3])
    turns = 1
    while peer.connection.resting:
        assert peer.transport.paused
        assert len(peer.handlers) <= turns * FRAMES / 2
        peer.connection.data_received(wire[-3:] if turns == 1 else b"")  # TLS may have had more in hand
        assert peer.connection.resting
        peer.connection.go_on()
        turns += 1
    assert turns == 4
    assert not peer.transport.paused
    assert [each.messages for each in peer.handlers] == [[b"x"]] * 2 * FRAMES
    assert peer.nothing_is_held()


async def test_windows_of_many_calls_are_widened_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few bytes of a client cost no work for each of its calls."""
    flushed = 0
    flush = Call.flush

    def counted(call: Call) -> bool:
        nonlocal flushed
        flushed += 1
        return flush(call)

    monkeypatch.setattr(Call, "flush", counted)
    peer = Peer(echo, settings={INITIAL_WINDOW_SIZE: 0})
    calls = 100
    for number in range(calls):
        peer.send(peer.headers(2 * number + 1) + data(2 * number + 1, b"x" * 95))
    peer.sent()
    settings = b"".join(SETTING.pack(INITIAL_WINDOW_SIZE, size % 7 + 1) for size in range(100))
    peer.send(frame(Kind.SETTINGS, 0, 0, settings) * 50 + window_update(0, 1) * 100)
    assert flushed == calls
    flushed = 0
    peer.send(b"".join(window_update(2 * number + 1, 3) for number in range(calls)))
    assert flushed == calls
    widest = 99 % 7 + 1
    assert sum(len(each[3]) for each in peer.sent() if each[0] == Kind.DATA) == calls * (widest + 3)
    peer.send(frame(Kind.SETTINGS, 0, 0, SETTING.pack(INITIAL_WINDOW_SIZE, 200)))
    assert sum(len(each[3]) for each in peer.sent() if each[0] == Kind.DATA) == calls * (100 - widest - 3)
    assert peer.context.held == 0


async def test_tiny_pieces_of_messages_take_no_more_than_they_hold() -> None:
    peer = Peer()
    peer.send(peer.headers(1) + frame(Kind.DATA, 0, 1, PREFIX.pack(0, 20_000)))
    tracemalloc.start()
    try:
        for _ in range(40):
            peer.send((frame(Kind.DATA, 0x8, 1, b"\0") + frame(Kind.DATA, 0x8, 1, b"\0ab")) * 200)
            peer.sent()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peer.context.held == 16_005
    assert held < 60_000
    peer.send(frame(Kind.DATA, 0, 1, bytes(4000)))
    assert peer.handlers[0].messages == [b"ab" * 8000 + bytes(4000)]


async def test_the_first_pieces_of_many_messages_are_bounded_too() -> None:
    peer = Peer(limits=GrpcLimits(message=10_000, held=5000))
    for number in range(10):
        stream = 2 * number + 1
        peer.send(peer.headers(stream) + frame(Kind.DATA, 0, stream, PREFIX.pack(0, 9000) + bytes(900)))
    assert peer.context.held <= 5000
    assert len(peer.connection.calls) == 5


@pytest.mark.parametrize("whole", [True, False])
async def test_a_header_block_is_bounded_before_it_is_decoded(whole: bool) -> None:
    peer = Peer()
    block = peer.encoder.encode([*FIELDS, ("x", "y" * 20_000)], huffman=False)
    if whole:
        peer.send(frame(Kind.HEADERS, 4, 1, block))
    else:
        peer.send(frame(Kind.HEADERS, 0, 1, block[:10]) + frame(Kind.CONTINUATION, 4, 1, block[10:]))
    assert peer.goodbye() == ErrorCode.ENHANCE_YOUR_CALM


async def test_a_goodbye_says_nothing_of_memory() -> None:
    peer = Peer()
    peer.send(frame(Kind.HEADERS, 4, 1, b"\xff" * 9000))
    (payload,) = [payload for kind, _, _, payload in peer.sent() if kind == Kind.GOAWAY]
    assert payload[8:] == b"a header block that cannot be read"


async def test_an_answer_that_nobody_reads_is_given_up() -> None:
    peer = Peer(echo, GrpcLimits(held=10_000), {INITIAL_WINDOW_SIZE: 0})
    peer.send(peer.headers(1) + data(1, b"x" * 9000) + data(1, b"y" * 9000))
    await peer_turn()
    assert (Kind.RST_STREAM, 0, 1, NUMBER.pack(ErrorCode.ENHANCE_YOUR_CALM)) in peer.sent()
    assert peer.context.held == 0


async def peer_turn() -> None:
    """Let the loop do what it was asked to."""
    import asyncio

    await asyncio.sleep(0)


async def test_leaving_loses_no_call() -> None:
    """Calls are taken until the client has read that it should open no more."""
    peer = Peer(finish)
    peer.send(peer.headers(1))
    peer.connection.leave()
    (away, _, _, payload), (ping, _, _, opaque) = peer.sent()
    assert (away, payload[:4], ping) == (Kind.GOAWAY, NUMBER.pack(2**31 - 1), Kind.PING)
    peer.send(peer.headers(3) + frame(Kind.PING, ACK, 0, opaque))
    assert [each for each in peer.sent() if each[0] == Kind.GOAWAY] == [
        (Kind.GOAWAY, 0, 0, NUMBER.pack(3) + NUMBER.pack(0))
    ]
    peer.send(peer.headers(5))
    assert peer.sent() == [(Kind.RST_STREAM, 0, 5, NUMBER.pack(ErrorCode.REFUSED_STREAM))]
    peer.send(data(1, b"x") + data(3, b"y"))
    await peer_turn()
    assert peer.transport.closed
    assert [each.messages for each in peer.handlers] == [[b"x"], [b"y"]]


_NAMES = st.sampled_from(["te", "x-a", "x-b", "content-type"])
_LISTS = st.lists(st.tuples(_NAMES, st.sampled_from(["1", "22", "x" * 900])), max_size=4)


@given(st.lists(st.one_of(_LISTS, st.integers(0, 3).map(lambda n: [("x-a", str(n))])), max_size=25), st.data())
@settings(max_examples=60)
def test_what_is_remembered_of_header_blocks_is_what_they_mean(
    lists: list[list[tuple[str, str]]], drawn: st.DataObject
) -> None:
    encoder, blocks = Encoder(), HeaderBlocks(16_384)
    for each in lists:
        if drawn.draw(st.integers(0, 9)) == 0:
            encoder.header_table_size = drawn.draw(st.sampled_from([0, 100, 4096]))
        fields = [*FIELDS[:2], (":path", each[0][1] if each else "/"), *FIELDS[3:4], *each]
        expected = Request.of([(name.encode(), value.encode()) for name, value in fields])
        assert blocks.decoded(encoder.encode(fields)) == expected
