"""`kvcluster top` on a terminal: its keys, its size, and what it shows while the connection comes and goes.

The app runs in Textual's own terminal without a screen. Not covered: what the parts say (test_render.py), and how the
connection is kept (test_following.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest
from textual.pilot import Pilot

from kvcluster.top.app import TopApp, View
from kvcluster.top.sources import SourceError
from kvcluster.top.workers import Order
from router.live.document import Live
from runtime.backoff import Backoff
from tests.kvcluster.top.scripted import ScriptedSource, change, whole
from tests.router.live.sample import HOSTILE, live

DOCUMENT, LARGE = live(60), live(500)
NEVER_AGAIN = Backoff(1e6, 1e6)
"""A lost connection stays lost, however long the test takes."""


@dataclass
class Terminal:
    """A running app, and the switches of its source."""

    app: TopApp
    pilot: Pilot[None]
    update: asyncio.Event
    lose: asyncio.Event

    async def press(self, *keys: str) -> list[str]:
        await self.pilot.press(*keys)
        return await self.lines()

    async def lines(self) -> list[str]:
        await self.pilot.pause()
        return [strip.text.rstrip() for strip in self.app.screen._compositor.render_strips()]

    async def until(self, words: str) -> list[str]:
        async with asyncio.timeout(20):
            while words not in "\n".join(lines := await self.lines()):
                await self.pilot.pause(0.01)
        return lines


def later(document: Live) -> Live:
    return replace(document, at=document.at + 1, totals=replace(document.totals, requests=777_777))


@asynccontextmanager
async def terminal(document: Live = DOCUMENT, size: tuple[int, int] = (140, 45)) -> AsyncIterator[Terminal]:
    """The app once it shows the document. `update`, `lose`: the source goes on, and breaks off."""
    update, lose = asyncio.Event(), asyncio.Event()
    script = [
        whole(document),
        update.wait,
        change(document, later(document)),
        lose.wait,
        SourceError("the router\x1b[2J went"),
    ]
    app = TopApp(ScriptedSource([script]), Order(), NEVER_AGAIN)
    async with app.run_test(size=size) as pilot:
        found = Terminal(app, pilot, update, lose)
        await found.until("live, ")
        yield found


def rows(lines: list[str]) -> list[str]:
    """The first words of the rows of workers."""
    start = next(number for number, line in enumerate(lines) if line.startswith("worker"))
    return [line.split()[0] for line in lines[start + 1 :] if line.startswith(("rag-worker-", "<"))]


async def test_500_workers_scroll_and_the_selection_stays_with_its_worker() -> None:
    async with terminal(LARGE) as top:
        lines = await top.lines()
        assert rows(lines)[:2] == [HOSTILE, "rag-worker-0"]
        count = len(rows(lines))
        assert f"1-{count} of 500 workers" in "\n".join(lines)
        assert count > 25
        lines = await top.press("end")
        assert rows(lines)[-1] == "rag-worker-498"
        assert f"{501 - count}-500 of 500 workers" in "\n".join(lines)
        await top.press("home", "pagedown", "down", "up")
        selected = top.app.selected(top.app.rows())
        assert selected is not None
        top.update.set()
        await top.until("requests 777,777")
        assert top.app.selected(top.app.rows()) == selected
        assert "all about" not in "".join(lines)
        lines = await top.press("enter")
        assert any(selected.url in line for line in lines)
        assert top.app.view is View.WORKER
        assert rows(await top.press("escape"))


async def test_sorting() -> None:
    async with terminal() as top:
        lines = await top.press(">", ">")
        assert any("running▼" in line for line in lines)
        most = max(DOCUMENT.workers, key=lambda worker: worker.running or 0).running
        assert lines[lines.index(next(line for line in lines if "running▼" in line)) + 1].split()[2] == str(most)
        assert any("running▲" in line for line in await top.press("r"))
        assert any("state▲" in line for line in await top.press("<"))


async def test_filtering_while_words_are_typed() -> None:
    async with terminal() as top:
        lines = await top.press("slash", *"worker-4")
        found = [worker.worker_id for worker in Order(words="worker-4").shown(DOCUMENT.workers)]
        assert rows(lines) == found
        assert any("[only 'worker-4']" in line for line in lines)
        assert any(f"1-{len(found)} of {len(found)} workers of 60" in line for line in lines)
        assert any("contains 'worker-4q'" in line for line in await top.press("q"))
        await top.press("backspace", "enter", "exclamation_mark")
        assert any("only problems" in line for line in await top.lines())
        lines = await top.press("escape")
        assert any("of 60 workers" in line for line in lines)
        assert top.app.is_running, "q was a letter while words were typed"


async def test_a_pause_holds_the_screen() -> None:
    async with terminal() as top:
        await top.press("p")
        top.update.set()
        async with asyncio.timeout(20):
            while top.app.link.document != later(DOCUMENT):
                await top.pilot.pause(0.01)
        lines = await top.lines()
        assert "paused, " in lines[0]
        assert not any("777,777" in line for line in lines)
        assert any("777,777" in line for line in await top.press("p"))


async def test_a_lost_connection_is_said_and_the_last_document_stays() -> None:
    async with terminal() as top:
        top.update.set()
        top.lose.set()
        lines = await top.until("disconnected")
        assert "the router\\x1b[2J went" in lines[0]
        assert rows(lines)[0] == HOSTILE


async def test_other_views_and_the_end() -> None:
    async with terminal() as top:
        lines = await top.press("d")
        assert any(DOCUMENT.decisions[0].worker_id in line for line in lines)
        assert any("charge" in line for line in lines)
        assert any("unreachable" in line for line in await top.press("o"))
        assert any("the other way round" in line for line in await top.press("question_mark"))
        assert rows(await top.press("question_mark"))
        await top.press("q")
    assert not top.app.is_running


async def test_a_small_terminal_shows_workers_first() -> None:
    async with terminal(size=(44, 10)) as top:
        lines = await top.lines()
        assert len(rows(lines)) >= 3
        assert all(len(line) <= 44 for line in lines)
        await top.pilot.resize_terminal(140, 45)
        await top.until("TTFT p95")


async def test_nothing_yet() -> None:
    app = TopApp(ScriptedSource([]), Order(), NEVER_AGAIN)
    async with app.run_test(size=(80, 24)) as pilot:
        async with asyncio.timeout(20):
            while app.link.retry_at is None:
                await pilot.pause(0.01)
        await pilot.pause()
        line = app.screen._compositor.render_strips()[0].text
        assert "nothing to show yet; next attempt in" in line


async def test_no_colours_where_none_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with terminal() as top:
        styles = [part.style for strip in top.app.screen._compositor.render_strips() for part in strip if part.style]
        assert any(style.reverse for style in styles), "the selected worker is marked in another way"
        colours = {colour for style in styles for colour in (style.color, style.bgcolor) if colour is not None}
        assert all(colour.is_default for colour in colours)
