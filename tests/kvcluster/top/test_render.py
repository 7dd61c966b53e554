"""The live document as text: figures, widths, words for what is wrong, and texts of others.

Covered: documents of up to 60 workers at widths from 30 to 300 columns; every state of workers and routers;
markup and escape sequences in every text; no colours where there is no terminal or NO_COLOR is set. Not covered: keys
(test_app.py).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
from rich.console import Console, RenderableType

from kvcluster.top.following import Link, ReaderState
from kvcluster.top.render import decisions, details, head, page, routers, status_line, workers
from kvcluster.top.words import bar, seconds, sparkline
from kvcluster.top.workers import Order, by_name
from router.live.document import Live, QueueLive
from tests.router.live.sample import live

TITLE = "http://router:9000"


def drawn(shown: RenderableType, width: int = 160, *, colours: bool = False) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=colours, color_system="standard" if colours else None).print(
        shown, highlight=False
    )
    return out.getvalue()


def link(document: Live | None, **changes: Any) -> Link:
    return replace(Link(ReaderState.FOLLOWING, document, 10.0), **changes)


def whole(document: Live, width: int = 160, order: Order | None = None) -> str:
    return drawn(page(TITLE, link(document), 10.5, order or Order(), width), width)


def test_every_figure_of_a_worker_is_shown() -> None:
    document = live(4)
    lines = whole(document, 200).splitlines()
    for worker in document.workers:
        (row,) = [line for line in lines if line.startswith(worker.worker_id + " ")]
        cells = row.split()
        assert cells[1] == worker.state
        assert cells[2:4] == [str(worker.running), str(worker.waiting)]
        for shown in (f"{worker.hit_rate:.1%}", f"{worker.cache_fill:.0%}", worker.trust, f"{worker.requests:,}"):
            assert shown in cells
    assert f"hit rate {document.totals.hit_rate:.1%}" in lines[1]
    assert "requests 120,431   errors 12" in lines[1]


def test_a_small_figure_is_not_shown_as_nothing() -> None:
    document = live(4)
    small = replace(document, totals=replace(document.totals, gpus_saved=0.004))
    assert "GPUs saved <0.1 " in whole(small, 200)


@pytest.mark.parametrize("width", [30, 60, 80, 140, 300])
@pytest.mark.parametrize("count", [0, 1, 30])
def test_no_line_is_wider_than_the_terminal(width: int, count: int) -> None:
    document = live(count)
    rows = Order().shown(document.workers)
    for shown in (workers(rows, Order(), width), head(document, width), decisions(document.decisions, 0.0, width)):
        assert max(map(len, drawn(shown, width).splitlines())) <= width
    text = drawn(workers(rows, Order(), width), 1_000)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width, "the table itself fits"


def test_the_narrower_the_terminal_the_fewer_columns_and_the_important_ones_stay() -> None:
    shown = [drawn(workers(live(60).workers, Order(), width), width).splitlines()[0].split() for width in (40, 80, 200)]
    assert shown[0][:2] == ["worker▲", "state"]
    assert {"running", "waiting"} <= set(shown[1])
    assert {"requests", "problem", "trust"} <= set(shown[2])


def test_a_very_long_name_hides_no_other_column() -> None:
    first, *others = live(4).workers
    rows = (replace(first, worker_id="x" * 10_000), *others)
    heading = drawn(workers(rows, Order(), 120), 120).splitlines()[0].split()
    assert {"state", "running", "waiting", "cache"} <= set(heading)


def test_what_waits_in_the_routers_is_a_line_of_the_head() -> None:
    document = live(4)
    line = next(line for line in whole(document, 200).splitlines() if line.startswith("waiting in the routers"))
    assert "standard 12 for up to 4.2 s, 2 until a worker is ready" in line
    assert "340 for up to 28 s, 41 turned away" in line
    assert "interactive" not in line
    idle = replace(document, queues=(QueueLive("standard", 0, 0, 0, None, 0),))
    assert "waiting in the routers nothing" in whole(idle)
    assert "waiting in the routers" not in whole(replace(document, queues=()))


def test_what_is_wrong_is_said_in_words() -> None:
    document = live(60)
    text = whole(document, 300)
    for worker in document.workers:
        assert (worker.problem or "") in text
    assert "router http://10.0.1.1:9000  unreachable: it did not answer within 2 s" in text


def test_of_many_routers_the_head_names_those_that_are_unwell() -> None:
    document = live(4, routers=12)
    text = drawn(head(document, 160))
    assert "unreachable" in text
    assert "11 of 12 routers serve and are ready" in text
    assert "rag-router-3" not in text
    assert len(drawn(routers(document.routers)).splitlines()) == 12


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (link(None, state=ReaderState.CONNECTING), "connecting, nothing to show yet"),
        (link(live(1)), "live, 2.5 s old"),
        (
            link(live(1), state=ReaderState.WAITING, problem="it is gone", retry_at=16.0),
            "disconnected, 2.5 s old; next attempt in 4 s: it is gone",
        ),
        (link(live(1), state=ReaderState.CONNECTING, problem="it is gone"), "connecting again, 2.5 s old"),
    ],
    ids=["first", "following", "lost", "again"],
)
def test_the_age_of_what_is_shown_and_the_state_of_the_connection(state: Link, said: str) -> None:
    assert drawn(status_line(TITLE, state, 12.5)).strip() == f"{TITLE}  {said}"


def test_a_pause_says_how_old_what_it_holds_is() -> None:
    line = drawn(status_line(TITLE, link(live(1), received=40.0), 41.0, paused_since=10.0)).strip()
    assert line == f"{TITLE}  paused, 31 s old"


def test_why_no_worker_is_shown() -> None:
    assert "the routers know no worker" in whole(live(0))
    assert "none of the 4 workers contains 'xyz'" in whole(live(4), order=Order(words="xyz"))
    assert "none of the 4 workers has a problem" in whole(live(4), order=Order(problems=True))


EVIL = "[red]a[/red]\x1b[2J\x9b31m\u202e\r\n\x07:smile: https://x"


def hostile(value: Any, name: str = "") -> Any:
    """Every text in a document made hostile, apart from the enums."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: hostile(getattr(value, each.name), each.name) for each in fields(value)})
    if isinstance(value, tuple):
        return tuple(hostile(each) for each in value)
    return EVIL if type(value) is str and name != "url" else value


def views(document: Live) -> Iterator[RenderableType]:
    yield page(EVIL, link(document), 10.5, by_name("problem"), 300)
    yield status_line(EVIL, link(document, state=ReaderState.WAITING, problem=EVIL), 10.5)
    yield details(document.workers[0])
    yield routers(document.routers)
    yield decisions(document.decisions, 0.0, 300)


def test_texts_of_others_are_text() -> None:
    """No markup, no emoji code, no link, and no byte that a terminal acts on."""
    for shown in views(hostile(live(13))):
        text = drawn(shown, 600)
        assert "[red]a[/red]\\x1b[2J\\x9b31m\\u202e\\r\\n\\x07:smile: https://x" in text
        assert all(each.isprintable() or each == "\n" for each in text)


def test_no_colours_where_none_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    document = live(60)
    assert "\x1b[" in drawn(page(TITLE, link(document), 10.5, Order(), 120), colours=True)
    assert "\x1b" not in whole(document)
    monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    Console(file=out, width=120, force_terminal=True).print(page(TITLE, link(document), 10.5, Order(), 120))
    colours = {"\x1b[32m", "\x1b[33m", "\x1b[31m", "\x1b[36m", "\x1b[1;31m"}
    assert not any(colour in out.getvalue() for colour in colours)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"), (0.0, "0 s"), (0.00734, "7.3 ms"), (0.0734, "73 ms"), (0.734, "0.73 s"), (7.34, "7.3 s"),
        (73.4, "73 s"), (734, "12 min"), (7_340, "2 h"), (734_000, "8 d"), (-0.05, "-50 ms"),
    ],
)  # fmt: skip
def test_durations(value: float | None, shown: str) -> None:
    assert seconds(value) == shown


def test_bars_and_lines() -> None:
    assert bar(0.5, 4) == "██  "
    assert bar(0.53, 4) == "██▏ "
    assert bar(7.0, 2) == "██"
    assert sparkline([0.0, 4.0, None, 8.0], 10) == "▁▅ █"
    assert sparkline([1.0] * 6, 3, top=2.0) == "▅▅▅"
    assert sparkline([1.0, 3.0, None, None], 2) == "█ "
    assert sparkline([], 5) == sparkline([1.0], 0) == ""
    assert sparkline([0.0, 0.0], 5) == "▁▁"
