"""Takes the picture of the live page that README.md shows: `python -m deploy.docs.screenshot`.

It runs a cluster of `examples/rag.yaml` on this machine with some minutes of traffic, opens the page in the system's
Chromium, and writes docs/images/live-page.png.
"""

from __future__ import annotations

import asyncio
import io
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from PIL import Image
from playwright.async_api import ViewportSize, async_playwright

from controller.api.load import load_manifest, override
from controller.local.cluster import LocalCluster, Options

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "docs" / "images" / "live-page.png"
SIZE: ViewportSize = {"width": 1280, "height": 800}
SPEED = 2.0
REQUESTS, RATE = 9000, 14.0
WATCHED = 150.0
"""Seconds of history that the picture shows."""
COLOURS = 128
"""The fewer, the smaller the file."""


@asynccontextmanager
async def busy_cluster() -> AsyncIterator[str]:
    """The management URL of a cluster under traffic."""
    manifest = override(load_manifest(str(ROOT / "examples" / "rag.yaml")), {("spec", "engine", "speed"): SPEED}, "rag")
    async with LocalCluster(manifest, Options()) as cluster:
        await cluster.wait_ready()
        command = (sys.executable, "-m", "kvcluster", "bench", cluster.url, "--workload", "rag", "--speed", str(SPEED))
        load = await asyncio.create_subprocess_exec(
            *command, "--limit", str(REQUESTS), "--rate", str(RATE), stdout=asyncio.subprocess.DEVNULL
        )
        try:
            yield cluster.management_url
        finally:
            load.kill()
            await load.wait()


async def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("install Chromium first")
    async with busy_cluster() as url, async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = await browser.new_page(viewport=SIZE, color_scheme="light")
        await page.goto(url)
        await asyncio.sleep(WATCHED)
        image = await page.screenshot()
        await browser.close()
    picture = Image.open(io.BytesIO(image)).convert("RGB").quantize(COLOURS)
    picture.save(TARGET, optimize=True)


if __name__ == "__main__":
    asyncio.run(main())
