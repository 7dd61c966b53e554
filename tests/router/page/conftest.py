"""One tab of a browser for all tests of a module, and a router that answers what a test has made."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest_asyncio
from playwright.async_api import Page

from router.live.document import Live
from tests.router.page.browser import OpenPage, running
from tests.router.page.server import MadeRouter

Open = Callable[..., Awaitable[OpenPage]]
"""`await open_page(live, view="explain", width=390, dark=True)`: the page, showing this document."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tab() -> AsyncIterator[Page]:
    """One tab for all tests of a module: to open another takes longer than most of them."""
    async with running() as browser:
        context = await browser.new_context(reduced_motion="reduce", timezone_id="UTC")
        yield await context.new_page()


@pytest_asyncio.fixture(loop_scope="module")
async def made() -> AsyncIterator[MadeRouter]:
    router = MadeRouter()
    await router.start()
    yield router
    await router.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def open_page(tab: Page, made: MadeRouter) -> AsyncIterator[Open]:
    opened = OpenPage(tab)

    async def open_page(live: Live | None = None, *, view: str = "", width: int = 1440, dark: bool = False) -> OpenPage:
        if live is not None:
            made.live = live
        await tab.set_viewport_size({"width": width, "height": 900})
        await tab.emulate_media(color_scheme="dark" if dark else "light")
        await tab.goto(f"{made.url}#{view}")
        if made.live is not None:
            await tab.wait_for_selector("#content", state="visible")
        return opened

    yield open_page
    opened.leave()
    await tab.goto("about:blank")
