"""Sequence numbers: however batches are lost, replayed, repeated or restarted, the view is never wrong.

Not covered: sockets and timeouts (`test_agent.py`); the meaning of the events (`test_blocks.py`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.keys import BlockKey, block_keys
from tests.worker.agent.engine import CLEARED, packed, removed, stored
from tests.worker.agent.test_blocks import SIZE, Engine, Reader, draw_event, held
from worker.agent.core.follower import Follower, Reset, Update
from worker.agent.core.groups import EngineBlocks

A, B, C = (packed(stored([name], [name, name])) for name in (1, 2, 3))


def keys(*names: int) -> Counter[BlockKey]:
    return Counter(block_keys([name, name], SIZE)[0] for name in names)


@dataclass
class Driver:
    """Does what the agent's loop does; `buffer` is what the engine would replay, `holes` what gets lost of it."""

    follower: Follower = field(default_factory=lambda: Follower(EngineBlocks(SIZE), can_replay=True))
    buffer: list[tuple[int, bytes]] | None = field(default_factory=list)
    holes: set[int] = field(default_factory=set)
    reader: Reader = field(default_factory=Reader)
    resets: list[Reset] = field(default_factory=list)

    def connect(self) -> None:
        self.follower.begin()
        self.catch_up()
        self.publish()

    def live(self, seq: int, payload: bytes) -> None:
        while not self.follower.live(seq, payload):
            missing = self.follower.next
            self.catch_up()
            if self.follower.next == missing:
                assert self.follower.live(seq, payload, last_resort=True)
                break
        self.publish()

    def catch_up(self) -> None:
        while self.buffer is not None:
            start = self.follower.history_begin()
            for seq, payload in self.buffer:
                if seq in self.holes:
                    self.holes.discard(seq)
                elif seq >= start:
                    self.follower.history(seq, payload)
            if self.follower.history_end():
                return

    def publish(self) -> None:
        update = self.follower.take()
        if update.reset is not None:
            self.resets.append(update.reset)
            self.reader.keys = held(self.follower.blocks)
        else:
            self.reader.read(update.events)
        assert self.reader.keys == held(self.follower.blocks)


def test_joining_late_takes_the_history_from_the_beginning() -> None:
    driver = Driver(buffer=[(0, A), (1, B)])
    driver.connect()
    assert driver.reader.keys == keys(1, 2)
    assert driver.resets == [Reset.CONNECTED]
    assert driver.follower.complete
    driver.live(2, C)
    assert driver.reader.keys == keys(1, 2, 3)


def test_what_was_replayed_and_is_published_too_counts_once() -> None:
    driver = Driver(buffer=[(0, A), (1, B)])
    driver.connect()
    driver.live(0, A)
    driver.live(1, B)
    driver.live(2, C)
    assert driver.reader.keys == keys(1, 2, 3)
    assert driver.resets == [Reset.CONNECTED]


def test_a_gap_is_replayed_within_the_epoch() -> None:
    driver = Driver()
    driver.connect()
    driver.live(0, A)
    driver.buffer = [(0, A), (1, B), (2, C)]
    driver.live(2, C)
    assert driver.reader.keys == keys(1, 2, 3)
    assert driver.resets == [Reset.CONNECTED]
    assert driver.follower.gaps == 1


@pytest.mark.parametrize(
    "buffer",
    [
        pytest.param([(2, C)], id="one batch forgotten"),
        pytest.param([], id="all forgotten"),
        pytest.param(None, id="no answer"),
    ],
)
def test_a_gap_whose_history_is_lost_empties_the_view(buffer: list[tuple[int, bytes]] | None) -> None:
    driver = Driver()
    driver.connect()
    driver.live(0, A)
    driver.buffer = buffer
    driver.live(2, C)
    assert driver.reader.keys == keys(3)
    assert driver.resets == [Reset.CONNECTED, Reset.HISTORY_LOST]
    assert not driver.follower.complete
    driver.live(3, packed(CLEARED))
    assert driver.follower.complete


def test_an_answer_with_a_hole_is_asked_for_again() -> None:
    driver = Driver(buffer=[(0, A), (1, B), (2, C)], holes={1})
    driver.connect()
    assert driver.reader.keys == keys(1, 2, 3)
    assert driver.resets == [Reset.CONNECTED]


def test_a_beginning_that_is_lost_is_no_second_reset() -> None:
    driver = Driver(buffer=[(5, A), (6, B)])
    driver.connect()
    assert driver.reader.keys == keys(1, 2)
    assert driver.resets == [Reset.CONNECTED]
    assert not driver.follower.complete


def test_an_empty_history_means_that_nothing_was_published() -> None:
    driver = Driver()
    driver.connect()
    assert driver.follower.complete
    driver.live(0, A)
    assert driver.follower.complete
    assert driver.reader.keys == keys(1)
    silent = Driver(buffer=None)
    silent.connect()
    assert not silent.follower.complete, "nothing was answered, so nothing is known"
    driver = Driver()
    driver.connect()
    driver.live(5, B)
    assert not driver.follower.complete, "what came before is lost after all"
    assert driver.reader.keys == keys(2)


def test_going_backwards_is_a_restart() -> None:
    driver = Driver()
    driver.connect()
    driver.live(0, A)
    driver.live(1, B)
    driver.buffer = [(0, C)]
    driver.live(0, C)
    assert driver.reader.keys == keys(3)
    assert driver.resets == [Reset.CONNECTED, Reset.RESTARTED]
    assert driver.follower.complete


def test_a_restart_of_which_the_beginning_was_missed_is_replayed() -> None:
    driver = Driver()
    driver.connect()
    for seq, payload in enumerate([A, A, A]):
        driver.live(seq, payload)
    driver.buffer = [(0, B), (1, C)]
    driver.live(1, C)
    assert driver.reader.keys == keys(2, 3)


def test_without_replay_a_gap_empties_the_view() -> None:
    driver = Driver(Follower(EngineBlocks(SIZE), can_replay=False), buffer=None)
    driver.connect()
    driver.live(4, A)
    driver.live(5, B)
    assert driver.reader.keys == keys(1, 2)
    driver.live(9, C)
    assert driver.reader.keys == keys(3)
    assert driver.resets == [Reset.CONNECTED, Reset.HISTORY_LOST]
    assert driver.follower.gaps == 1


def test_a_batch_that_cannot_be_read_empties_the_view() -> None:
    driver = Driver()
    driver.connect()
    driver.live(0, A)
    driver.live(1, b"\xc1")
    assert driver.reader.keys == keys()
    assert driver.resets == [Reset.CONNECTED, Reset.UNREADABLE]
    driver.live(2, packed(removed(1), stored([2], [2, 2])))
    assert driver.reader.keys == keys(2)


def test_without_batches_there_is_nothing_to_publish() -> None:
    follower = Follower(EngineBlocks(SIZE), can_replay=True)
    follower.begin()
    assert follower.take() == Update((), Reset.CONNECTED)
    assert follower.take() == Update((), None)


@given(st.data())
def test_losses_in_any_order_never_leave_a_wrong_view(data: st.DataObject) -> None:
    """An engine that restarts now and then; its batches are lost on the way, its replays forget and have holes."""
    driver = Driver()
    engine, seq, lossless = Engine(), 0, True
    driver.connect()
    for _ in range(data.draw(st.integers(1, 25))):
        what = data.draw(st.sampled_from(["publish"] * 6 + ["lose"] * 3 + ["forget", "restart", "reconnect", "quiet"]))
        if what in ("publish", "lose"):
            payload = packed(*(draw_event(data, engine) for _ in range(data.draw(st.integers(1, 2)))))
            assert driver.buffer is not None
            driver.buffer.append((seq, payload))
            if what == "publish":
                # ZMQ drops what finds a full queue, so never the first of an answer.
                driver.holes = data.draw(st.sets(st.integers(0, seq), max_size=2)) - {driver.follower.next}
                driver.live(seq, payload)
                driver.holes.clear()
                assert driver.reader.keys <= engine.keys()
                assert driver.reader.keys == engine.keys() or not (lossless or driver.follower.complete)
            seq += 1
        elif what == "forget":
            driver.buffer, lossless = driver.buffer and driver.buffer[-1:], False
        elif what == "restart":  # seen by its connection, or by the next number
            engine, seq, driver.buffer, lossless = Engine(), 0, [], True
            driver.connect()
        elif what == "reconnect":
            driver.connect()
        else:
            driver.catch_up()
            driver.publish()
            assert driver.reader.keys <= engine.keys()
            assert driver.reader.keys == engine.keys() or not driver.follower.complete
