"""Which workers `kvcluster top` shows, in which order, and which of them fit.

Not covered: how rows look (test_render.py) and the keys (test_app.py).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcluster.top.workers import COLUMNS, NAMES, NoColumnError, Order, Window, by_name
from router.core.worker_state import WorkerPhase
from tests.router.live.sample import HOSTILE, live

WORKERS = live(60).workers


def named(order: Order) -> list[str]:
    return [row.worker_id for row in order.shown(WORKERS)]


def test_names_sort_by_their_numbers() -> None:
    assert named(Order())[:4] == [HOSTILE, "rag-worker-0", "rag-worker-1", "rag-worker-2"]
    assert named(Order(reverse=True))[0] == "rag-worker-58"


@given(st.sampled_from(range(len(COLUMNS))), st.booleans())
@settings(max_examples=2 * len(COLUMNS), deadline=None)
def test_every_column_sorts_all_workers_and_what_has_no_value_comes_last(column: int, reverse: bool) -> None:
    order = Order(column, reverse)
    rows = order.shown(WORKERS)
    assert sorted(row.url for row in rows) == sorted(row.url for row in WORKERS)
    values = [COLUMNS[column].value(row) for row in rows]
    known = [value for value in values if value is not None]
    assert values[: len(known)] == known
    assert known == sorted(known, reverse=order.descending)


def test_figures_begin_with_the_largest_and_names_with_the_first() -> None:
    assert by_name("running").descending
    assert not by_name("-running").descending
    assert not by_name("worker").descending
    assert by_name("hit_rate") == by_name("hit rate") == by_name("hit-rate") == Order(NAMES.index("hit rate"))


def test_a_column_that_does_not_exist() -> None:
    with pytest.raises(NoColumnError, match=r"--sort takes one of worker, state, .*, not 'colour'"):
        by_name("colour")


@pytest.mark.parametrize("words", ["WORKER-7", "silent", "unreachable", "10.0.2.8", "script"])
def test_words_are_found_in_every_text_of_a_worker(words: str) -> None:
    for row in (found := Order(words=words).shown(WORKERS)):
        texts = (row.worker_id, row.pod, row.url, row.state, row.problem or "")
        assert any(words.casefold() in text.casefold() for text in texts)
    assert 0 < len(found) < len(WORKERS)


def test_only_problems() -> None:
    found = Order(problems=True).shown(WORKERS)
    assert {row.url for row in found} == {row.url for row in WORKERS if row.problem is not None or not row.ready}
    waiting = replace(WORKERS[-1], ready=False, problem=None, state=WorkerPhase.STARTING)
    assert Order(problems=True).shown([waiting]) == [waiting]


@given(
    st.lists(st.tuples(st.integers(-(10**9), 10**9), st.integers(1, 600), st.integers(1, 60)), min_size=1, max_size=8)
)
@settings(max_examples=60, deadline=None)
def test_the_selected_row_is_always_in_the_window(moves: list[tuple[int, int, int]]) -> None:
    window = Window()
    for to, rows, height in moves:
        window = window.moved(to, rows, height)
        assert 0 <= window.first <= window.selected < window.first + height
        assert window.selected == max(0, min(to, rows - 1))
        assert window.first == 0 or window.first + height <= rows, "no line is left empty while there are rows"
