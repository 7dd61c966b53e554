"""One browser for all tests of a module, and a router that answers what a test has made."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest_asyncio
from playwright.async_api import Browser

from router.live.document import Live
from tests.router.page.browser import OpenPage, running
from tests.router.page.server import MadeRouter

Open = Callable[..., Awaitable[OpenPage]]
"""`await open_page(live, view="explain", width=390, dark=True)`: the page, showing this document."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with running() as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="module")
async def made() -> AsyncIterator[MadeRouter]:
    router = MadeRouter()
    await router.start()
    yield router
    await router.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def open_page(browser: Browser, made: MadeRouter) -> AsyncIterator[Open]:
    async with AsyncExitStack() as tabs:

        async def open_page(
            live: Live | None = None, *, view: str = "", width: int = 1440, dark: bool = False
        ) -> OpenPage:
            if live is not None:
                made.live = live
            context = await browser.new_context(
                viewport={"width": width, "height": 900},
                color_scheme="dark" if dark else "light",
                reduced_motion="reduce",
                timezone_id="UTC",
            )
            tabs.push_async_callback(context.close)
            opened = OpenPage(await context.new_page())
            await opened.page.goto(f"{made.url}#{view}")
            if made.live is not None:
                await opened.page.wait_for_selector("#content", state="visible")
            return opened

        yield open_page
