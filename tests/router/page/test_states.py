"""Each state of the page says what is the matter and what to do, in light and dark, on a desktop and a phone, without a
violation that axe finds; and a text that others wrote is never markup.

Not covered: figures of a real router (test_real_router), and what pixels look like.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.async_api import Error

from router.live.document import Live
from tests.router.page import documents
from tests.router.page.browser import binary
from tests.router.page.conftest import Open
from tests.router.page.explanations import explanation
from tests.router.page.server import MadeRouter

pytestmark = [
    pytest.mark.process,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(binary() is None, reason="Chromium is not installed (Debian: apt-get install chromium)"),
]


@pytest.mark.parametrize(
    ("make", "title", "advice"),
    [
        pytest.param(documents.empty, "No workers yet", "kvcluster up examples/rag.yaml", id="empty"),
        pytest.param(
            lambda: documents.empty("kubernetes", "the API server does not answer"),
            "No workers yet",
            "Discovery says: the API server does not answer",
            id="discovery failed",
        ),
        pytest.param(documents.starting, "4 workers starting", "kubectl kvcluster explain NAME", id="starting"),
        pytest.param(documents.unused, "4 workers ready for the first request", "curl http", id="no request yet"),
        pytest.param(
            lambda: documents.fleet(10, len(documents.TROUBLES)),
            "3 of 10 workers ready",
            "1 unreachable, 1 ejected, 1 agent, 1 on trial, 1 paused, 1 not matched",
            id="degraded",
        ),
        pytest.param(documents.down, "No worker takes requests", "Clients get 503 until one is back", id="down"),
        pytest.param(
            documents.several_routers,
            "Serving, with problems",
            "router cannot be reached: rag-router-7c9f-zz11p",
            id="several routers",
        ),
    ],
)
async def test_a_state_says_what_to_do(open_page: Open, make: Callable[[], Live], title: str, advice: str) -> None:
    opened = await open_page(make())
    assert await opened.text("#health-title") == title
    assert advice in await opened.text("#health")
    assert await opened.violations("#health, #routers-section") == []
    assert opened.errors == []


@pytest.mark.parametrize(
    ("make", "said", "standard"),
    [
        pytest.param(
            documents.queueing,
            "1,517 requests wait for room on a worker",
            "standard 37 4.20 s 0",
            id="workers are busy",
        ),
        pytest.param(
            lambda: documents.queueing(1, held=1),
            "41 requests wait for a worker to become ready",
            "standard 1 4.20 s 0",
            id="no worker is ready",
        ),
        pytest.param(
            lambda: documents.queueing(2, held=1),
            "82 requests wait for room on a worker, 41 of them for one to become ready",
            "standard 2 4.20 s 0",
            id="both",
        ),
        pytest.param(
            lambda: documents.queueing(0), "Nothing waits: workers have room", "standard 0 – 0", id="there is room"
        ),
    ],
)
async def test_what_waits_in_the_routers_is_shown_class_by_class(
    open_page: Open, make: Callable[[], Live], said: str, standard: str
) -> None:
    opened = await open_page(make(), width=390)
    assert await opened.text("#queues-aside") == said
    rows = await opened.texts("#queues tr")
    assert [row.split()[0] for row in rows] == ["interactive", "standard", "batch"]
    assert rows[1] == standard
    wide = await opened.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390, "the page scrolls sideways on a phone"
    assert await opened.violations("#queues-section") == []
    assert opened.errors == []


async def test_queues_come_change_and_go(open_page: Open, made: MadeRouter) -> None:
    opened = await open_page(documents.fleet(4))
    assert not await opened.page.locator("#queues-section").is_visible(), "no router holds requests back"
    made.live = documents.queueing(3)
    await opened.eventually("() => document.getElementById('queues-aside').textContent.startsWith('123 requests')")
    made.live = documents.queueing(0)
    await opened.eventually("() => document.getElementById('queues-aside').textContent.startsWith('Nothing waits')")
    made.live = documents.fleet(4)
    await opened.eventually("() => document.getElementById('queues-section').hidden")


@pytest.mark.parametrize(("workers", "density"), [(4, "full"), (60, "compact"), (500, "dense")])
async def test_a_fleet_of_any_size_is_readable(open_page: Open, workers: int, density: str) -> None:
    opened = await open_page(documents.fleet(workers, 2), width=390, dark=True)
    assert await opened.page.locator(f"[data-group=serving] .tiles.{density} > .tile").count() == workers - 2
    assert await opened.page.locator("[data-group=attention] .tiles.full > .tile").count() == 2
    assert await opened.text("[data-group=attention] .tile:first-child .tile-problem") == "It refuses connections"
    wide = await opened.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390, "the page scrolls sideways on a phone"
    assert opened.errors == []


@pytest.mark.parametrize("density", ["full", "compact", "dense"])
async def test_every_density_is_accessible(open_page: Open, density: str) -> None:
    opened = await open_page(documents.fleet(9, 8, decisions=1), width=390)
    await opened.page.get_by_label("Tiles").select_option(density)
    assert await opened.page.locator(f".tiles.{density} > .tile").count() == 9
    assert await opened.violations("#groups") == []


async def test_every_view_is_accessible(open_page: Open, made: MadeRouter) -> None:
    made.explanation = explanation()
    made.explanation["blocks"]["texts"] = ["a block", "another"]
    opened = await open_page(documents.fleet(2, 1, decisions=2))
    page = opened.page

    assert await opened.violations(".summary, .charts-section") == []
    await page.get_by_role("button", name="rag-worker-1", exact=True).click()
    assert await opened.violations("dialog") == []
    await page.keyboard.press("Escape")
    await page.get_by_role("link", name="Decisions").click()
    assert await opened.violations("#decisions-section") == []
    await page.get_by_role("link", name="Explain").click()
    await page.get_by_label("Prompt", exact=True).fill("Hello")
    await page.keyboard.press("Control+Enter")
    await page.wait_for_selector(".verdict")
    await page.locator("summary").click()
    assert await opened.violations("#explain-section") == []
    await made.stop()
    await page.wait_for_selector("#lost", state="visible")
    await page.get_by_role("link", name="Fleet", exact=True).click()
    assert await opened.violations("#lost") == []
    assert all("ERR_" in error for error in opened.errors), "the connection that broke is the only error"


async def test_a_text_of_others_is_never_markup(open_page: Open, made: MadeRouter) -> None:
    opened = await open_page(documents.hostile())
    assert (await opened.names(".tile-name button"))[0].startswith(documents.SCRIPT)
    assert documents.SCRIPT in (await opened.texts(".decision"))[0]
    assert documents.SCRIPT in (await opened.texts(".router"))[0]
    await opened.page.locator(".tile-name button").first.click()
    assert documents.SCRIPT in await opened.text("#worker")
    await opened.page.keyboard.press("Escape")

    made.explanation = explanation(worker_id=documents.SCRIPT, reason=documents.SCRIPT, unread=documents.SCRIPT)
    made.explanation["candidates"][0] |= {"worker_id": documents.SCRIPT, "why_not_matching": documents.SCRIPT}
    made.explanation["blocks"] |= {"texts": [documents.SCRIPT]}
    made.explanation["blocks"]["runs"][0] |= {"workers": [documents.SCRIPT]}
    made.explanation["left_out"][0] |= {"worker": documents.SCRIPT, "why": documents.SCRIPT, "state": documents.SCRIPT}
    await opened.page.get_by_role("link", name="Explain").click()
    await opened.page.get_by_label("Prompt", exact=True).fill(documents.SCRIPT)
    await opened.page.get_by_role("button", name="Explain").click()
    await opened.page.wait_for_selector(".verdict")
    assert documents.SCRIPT in await opened.text(".verdict")
    assert made.asked[0][1]["prompt"] == documents.SCRIPT

    assert await opened.page.locator("main script, main img, dialog script, dialog img").count() == 0
    assert "owned" not in await opened.page.title()
    assert opened.errors == []


async def test_the_policy_of_the_page_forbids_markup_and_scripts(open_page: Open) -> None:
    opened = await open_page(documents.fleet(1))
    for attack in (
        "document.body.insertAdjacentHTML('beforeend', '<b>markup</b>')",
        "setTimeout('document.title = \"owned\"')",
    ):
        with pytest.raises(Error, match=r"requires 'Trusted(HTML|Script)' assignment"):
            await opened.page.evaluate(f"() => {{ {attack} }}")
    await opened.page.evaluate(
        "() => { const s = document.createElement('style'); s.append('body { color: red }'); document.body.append(s) }"
    )
    assert any("style-src" in error for error in opened.errors)
