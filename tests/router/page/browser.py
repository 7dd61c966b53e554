"""A real Chromium without a window, for tests of the page."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, async_playwright

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def binary() -> str | None:
    """Where Chromium is; None when it is not installed."""
    return shutil.which("chromium")


@asynccontextmanager
async def running() -> AsyncIterator[Browser]:
    """Chromium, from entering to leaving."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=binary(), args=list(FLAGS))
        try:
            yield browser
        finally:
            await browser.close()


class OpenPage:
    """The page, open in a tab of its own."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        """What the browser reported: exceptions, and what the page's security policy refused."""
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)

    async def text(self, selector: str) -> str:
        """What can be read there, in one line."""
        return " ".join((await self.page.locator(selector).inner_text()).split())

    async def texts(self, selector: str) -> list[str]:
        """The same, of each element that can be seen."""
        texts = await self.page.locator(selector).locator("visible=true").all_inner_texts()
        return [" ".join(each.split()) for each in texts]

    async def eventually(self, script: str, argument: Any = None) -> None:
        """Wait until this JavaScript is true."""
        await self.page.wait_for_function(script, arg=argument, polling=20)

    async def violations(self, *rules: str) -> list[str]:
        """What axe finds wrong: rule and element. `rules`: only these."""
        options = {"resultTypes": ["violations"], **({"runOnly": list(rules)} if rules else {})}
        found = (await Axe().run(self.page, options=options)).response["violations"]
        return [f"{each['id']}: {node['html'][:200]}" for each in found for node in each["nodes"]]
