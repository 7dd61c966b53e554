"""The ledger of a router's own requests on one worker: exact counts, and the prefill that is still to be done.

Not covered: the requests of other routers (test_estimates.py).
"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from router.core.ledger import Entry, Ledger

STEP = st.floats(0, 2, allow_nan=False)
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["open", "first_token", "close", "look"]), st.integers(0, 20), STEP, st.booleans()),
    max_size=60,
)


@given(OPERATIONS)
def test_counts_are_exact_whatever_happens_in_whatever_order(operations: list[tuple[str, int, float, bool]]) -> None:
    ledger, entries, now = Ledger(), list[Entry](), 0.0
    open_entries: set[int] = set()
    for name, number, step, streaming in operations:
        now += step
        if name == "open":
            entries.append(ledger.open(step, number, streaming, now))
            open_entries.add(len(entries) - 1)
        elif name == "look":
            assert ledger.remaining(now) >= 0
        elif entries:
            number %= len(entries)
            if name == "first_token" and number in open_entries:
                ledger.first_token(entries[number], now)
            elif name == "close":
                ledger.close(entries[number], now)
                open_entries.discard(number)
        assert ledger.in_flight == len(open_entries)
        assert ledger.blocks == sum(entries[number].blocks for number in open_entries)
    for entry in entries:
        ledger.close(entry, now)
    assert (ledger.in_flight, ledger.blocks, ledger.remaining(now)) == (0, 0, 0.0)


def test_the_queue_is_the_predicted_prefill_ahead_less_what_has_passed() -> None:
    ledger = Ledger()
    first = ledger.open(0.3, 1, True, 10.0)
    ledger.open(0.2, 1, True, 10.0)
    assert ledger.remaining(10.0) == pytest.approx(0.5)
    assert ledger.remaining(10.1) == pytest.approx(0.4)
    ledger.first_token(first, 10.25)
    assert ledger.remaining(10.25) == pytest.approx(0.2), "the next one started when the first was answered"
    assert ledger.remaining(10.3) == pytest.approx(0.15)


def test_a_stall_makes_a_worker_look_worse_with_time_never_free() -> None:
    ledger = Ledger()
    ledger.open(0.1, 1, True, 0.0)
    assert ledger.remaining(0.1) == pytest.approx(0.0)
    assert ledger.remaining(0.6) == pytest.approx(0.5)


def test_a_request_that_does_not_stream_is_past_its_prefill_when_its_time_is_over() -> None:
    ledger = Ledger()
    ledger.open(0.1, 1, False, 0.0)
    ledger.open(0.2, 1, False, 0.0)
    assert ledger.remaining(0.1) == pytest.approx(0.2)
    assert not ledger.decoding or ledger.in_flight == 2
    assert ledger.remaining(0.15) == pytest.approx(0.15)
    assert ledger.decoding
    assert ledger.remaining(5.0) == 0.0
    assert ledger.in_flight == 2


def test_a_request_that_leaves_from_the_middle_of_the_queue_takes_only_its_own_time() -> None:
    ledger = Ledger()
    ledger.open(0.3, 1, True, 0.0)
    middle = ledger.open(0.2, 1, True, 0.0)
    ledger.open(0.1, 1, True, 0.0)
    ledger.close(middle, 0.1)
    ledger.close(middle, 0.1)
    assert ledger.remaining(0.1) == pytest.approx(0.3)
    assert ledger.in_flight == 2


def test_a_first_byte_after_the_release_changes_nothing() -> None:
    ledger = Ledger()
    entry = ledger.open(0.3, 1, True, 0.0)
    ledger.close(entry, 0.1)
    ledger.first_token(entry, 0.2)
    assert ledger.remaining(0.2) == 0.0
