"""A real Chromium without a window, for tests of the page."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, ConsoleMessage, Error, Page, async_playwright

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
    """The page, open in a tab."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        """What the browser reported: exceptions, and what the page's security policy refused."""
        page.on("pageerror", self._raised)
        page.on("console", self._logged)

    def leave(self) -> None:
        """Listen no longer: the tab shows another page next."""
        self.page.remove_listener("pageerror", self._raised)
        self.page.remove_listener("console", self._logged)

    def _raised(self, error: Error) -> None:
        self.errors.append(str(error))

    def _logged(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    async def text(self, selector: str) -> str:
        """What can be read there, in one line."""
        return " ".join((await self.page.locator(selector).inner_text()).split())

    async def texts(self, selector: str) -> list[str]:
        """The same, of each element that can be seen."""
        texts = await self.page.locator(selector).locator("visible=true").all_inner_texts()
        return [" ".join(each.split()) for each in texts]

    async def names(self, selector: str) -> list[str]:
        """The names that are shown there in one line, however little room there is."""
        return [await each.get_attribute("title") or "" for each in await self.page.locator(selector).all()]

    async def eventually(self, script: str, argument: Any = None) -> None:
        """Wait until this JavaScript is true."""
        await self.page.wait_for_function(script, arg=argument, polling=20)

    async def violations(self, where: str) -> list[str]:
        """What axe finds wrong, rule and element: by all rules on the whole page, but by that of contrast, which takes
        by far the longest, only `where` the page looks as nowhere else, in light and dark."""
        results = [await Axe().run(self.page, options=_RULES)]
        for scheme in ("dark", "light"):
            await self.page.emulate_media(color_scheme=scheme)
            results.append(await Axe().run(self.page, context=where, options=_CONTRAST))
        return [
            f"{found['id']}: {node['html'][:200]}"
            for each in results
            for found in each.response["violations"]
            for node in found["nodes"]
        ]


_RULES = {"resultTypes": ["violations"], "rules": {"color-contrast": {"enabled": False}}}
_CONTRAST = {"resultTypes": ["violations"], "runOnly": ["color-contrast"]}
