"""The live page of a real router with real workers, in a real Chromium: its figures equal sums over what clients were
answered, what it explains is what happens, and it finds its router again after a restart.

Not covered: states, sizes and accessibility of the page (tests/router/page), and times, which nobody can add up
(tests/router/live).
"""

from __future__ import annotations

import os
import signal

import httpx
import pytest

from tests.e2e.support import ClusterUnderTest, StartCluster
from tests.router.page.browser import OpenPage, binary, running

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(binary() is None, reason="Chromium is not installed (Debian: apt-get install chromium)"),
]

DOCUMENTS = [f"Document {number}. " + f"Fact {number}, and what follows from it. " * 15 for number in range(3)]


async def ask(cluster: ClusterUnderTest, prompt: str) -> httpx.Response:
    answer = await cluster.client.post(f"{cluster.url}/v1/completions", json={"prompt": prompt, "max_tokens": 2})
    assert answer.status_code == 200, answer.text
    return answer


async def test_the_page_of_a_running_cluster(start_cluster: StartCluster) -> None:
    async with start_cluster(workers=2) as cluster, running() as browser:
        opened = OpenPage(await browser.new_page(viewport={"width": 1440, "height": 900}))
        await opened.page.goto(f"{cluster.local.management_url}/")
        await opened.page.wait_for_selector("#content", state="visible")
        assert await opened.text("#health-title") == "2 workers ready for the first request"

        answers = [await ask(cluster, document) for _ in range(3) for document in DOCUMENTS]
        await figures_are_sums_over_answers(opened, answers)
        await decisions_are_those_of_the_answers(opened, answers)
        await an_explanation_comes_true(opened, cluster)
        await a_restart_is_survived(opened, cluster)
        assert [error for error in opened.errors if "ERR_" not in error] == []


async def figures_are_sums_over_answers(opened: OpenPage, answers: list[httpx.Response]) -> None:
    usages = [answer.json()["usage"] for answer in answers]
    prompt = sum(usage["prompt_tokens"] for usage in usages)
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    await opened.eventually("() => document.getElementById('totals').innerText.includes('\\n9\\n')")
    totals = await opened.text("#totals")
    assert f"Hit rate {cached / prompt * 100:.1f} % {cached:,} of {prompt:,} tokens cached" in totals
    assert "Workers ready 2 of 2 all matched by cache" in totals
    assert "Requests 9 no errors" in totals
    for name in {answer.headers["x-kvcluster-worker"] for answer in answers}:
        there = [
            usage for usage, answer in zip(usages, answers, strict=True) if name == answer.headers["x-kvcluster-worker"]
        ]
        share = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in there) / sum(
            usage["prompt_tokens"] for usage in there
        )
        await opened.page.get_by_role("button", name=name, exact=True).click()
        facts = await opened.text("#worker")
        assert f"Hit rate {share * 100:.1f} % of the prompt tokens sent there" in facts
        assert f"Requests {len(there)} " in facts
        await opened.page.keyboard.press("Escape")


async def decisions_are_those_of_the_answers(opened: OpenPage, answers: list[httpx.Response]) -> None:
    await opened.page.get_by_role("link", name="Decisions").click()
    shown = list(zip(await opened.names(".decision .to"), await opened.texts(".decision .match"), strict=True))
    told = [
        (headers["x-kvcluster-worker"], int(headers["x-kvcluster-matched-blocks"]))
        for headers in (answer.headers for answer in reversed(answers))
    ]
    assert [(worker, int(match.split()[0])) for worker, match in shown] == told


async def an_explanation_comes_true(opened: OpenPage, cluster: ClusterUnderTest) -> None:
    prompt = DOCUMENTS[0] + "And what is new?"
    await opened.page.get_by_role("link", name="Explain").click()
    await opened.page.get_by_label("Prompt", exact=True).fill(prompt)
    await opened.page.get_by_role("button", name="Explain").click()
    await opened.page.wait_for_selector(".verdict")
    answer = await ask(cluster, prompt)
    worker, matched = answer.headers["x-kvcluster-worker"], int(answer.headers["x-kvcluster-matched-blocks"])
    assert matched > 0
    assert f"It would go to {worker}" in await opened.text(".verdict")
    assert (await opened.texts("tbody tr"))[0].startswith(f"{worker} Chosen {matched} of ")
    assert (await opened.texts(".runs-legend li > span"))[0].startswith(f"Blocks 1 to {matched}: held by ")
    await opened.page.locator("summary").click()
    assert "".join(await opened.page.locator(".prompt span").all_text_contents()) == prompt


async def a_restart_is_survived(opened: OpenPage, cluster: ClusterUnderTest) -> None:
    await opened.page.get_by_role("link", name="Fleet", exact=True).click()
    before = cluster.local.router.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    await opened.page.wait_for_selector("#lost", state="visible")
    await opened.page.wait_for_selector("#lost", state="hidden")
    await opened.eventually("() => document.getElementById('health-title').innerText.includes('first request')")
    assert cluster.local.router.pid != before
