"""What people do on the page: look for a worker, read a chart, follow decisions, ask why a prompt would go somewhere;
and what the page does when its router goes away and comes back.

Not covered: states of the fleet and accessibility (test_states), figures of a real router (test_real_router).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from playwright.async_api import Page

from router.core.worker_state import WorkerPhase
from tests.processes import eventually
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


async def test_workers_are_found_by_name_and_state_and_sorted_by_figures(open_page: Open) -> None:
    opened = await open_page(documents.fleet(30, 3))
    page, live = opened.page, documents.fleet(30, 3)
    await page.get_by_label("Find workers").fill("WORKER-1")
    assert len(await opened.texts(".tile-name")) == 11
    assert await opened.text("#workers-aside") == "11 of 30"
    await page.get_by_label("State").select_option("Ejected")
    assert await opened.names(".tile-name button") == ["rag-worker-1"]
    await page.get_by_label("Find workers").fill("nobody")
    await page.get_by_role("button", name="Show all").click()
    await page.get_by_label("Sort by").select_option("cache")
    serving = [each for each in live.workers if each.problem is None]
    fullest = sorted(serving, key=lambda each: (-(each.cache_fill or 0), int(each.worker_id.rpartition("-")[2])))
    assert await opened.names("[data-group=serving] h4 button") == [each.worker_id for each in fullest]


async def test_only_what_changed_is_drawn(open_page: Open, made: MadeRouter) -> None:
    live = documents.fleet(100)
    opened = await open_page(live)
    await opened.page.evaluate(
        """() => {
            window.drawn = new Set();
            new MutationObserver((changes) => changes.forEach((change) => {
                const node = change.target.nodeType === Node.TEXT_NODE ? change.target.parentElement : change.target;
                window.drawn.add(node.closest(".tile")?.querySelector("button").title ?? "other");
            })).observe(
                document.getElementById("groups"),
                {subtree: true, childList: true, characterData: true, attributes: true},
            );
        }"""
    )
    changed = replace(live.workers[7], running=777)
    made.live = replace(live, at=live.at + 1, workers=(*live.workers[:7], changed, *live.workers[8:]))
    await opened.eventually("() => document.getElementById('groups').textContent.includes('777')")
    assert await opened.page.evaluate("() => [...window.drawn]") == [changed.worker_id]


async def test_a_worker_is_followed_in_a_dialog(open_page: Open, made: MadeRouter) -> None:
    live = documents.fleet(4)
    opened = await open_page(live)
    page = opened.page
    await page.get_by_role("button", name="rag-worker-2", exact=True).focus()
    await page.keyboard.press("Enter")
    assert "Serving" in await opened.text("#worker")
    lost = replace(live.workers[2], state=WorkerPhase.UNREACHABLE, ready=False, problem="it refuses connections")
    made.live = replace(live, workers=(*live.workers[:2], lost, live.workers[3]))
    await opened.eventually("() => document.getElementById('worker').innerText.includes('It refuses connections')")
    assert "Its log says more" in await opened.text("#worker")
    await page.get_by_role("button", name="Its decisions").click()
    await opened.eventually("() => location.hash === '#decisions'")
    assert set(await opened.names(".decision .to")) <= {"rag-worker-2"}


async def test_what_is_wrong_is_a_list_of_problems_that_leads_to_the_tiles(open_page: Open) -> None:
    live = documents.deployed(120, 10)
    opened = await open_page(live)
    page = opened.page
    problems = page.get_by_role("list", name="Needs attention: problems")
    assert not await problems.is_visible(), "full tiles say it themselves"
    await page.get_by_label("Tiles").select_option("dense")
    unreachable = [each.worker_id for each in live.workers if each.state is WorkerPhase.UNREACHABLE]
    assert len(unreachable) == 2
    first = problems.locator("> li").first
    assert " ".join((await first.inner_text()).split()).startswith(
        "2 unreachable It refuses connections Does its process or pod run? Its log says more."
    )
    names = [await each.get_attribute("title") for each in await first.get_by_role("button").all()]
    assert sorted(filter(None, names)) == sorted(unreachable)
    await page.get_by_role("button", name=unreachable[0], exact=True).first.focus()
    await page.keyboard.press("Enter")
    assert await page.locator(".tile[data-found] button").get_attribute("title") == unreachable[0]
    assert await page.evaluate("document.activeElement.closest('.tile')?.dataset.found") == ""
    await page.keyboard.press("Enter")
    assert "It refuses connections" in await opened.text("#worker"), "its tile has the focus"


async def test_many_workers_with_one_problem_are_named_on_demand(open_page: Open) -> None:
    live = documents.fleet(90)
    ill = tuple(
        replace(each, state=WorkerPhase.EJECTED, ready=False, problem=f"{n % 3} of its last 5 requests failed")
        for n, each in enumerate(live.workers)
    )
    opened = await open_page(replace(live, workers=ill))
    assert await opened.page.locator(".problems > li").count() == 1
    names = opened.page.locator(".problem-workers button")
    assert await names.count() == 4
    more = opened.page.get_by_role("button", name="and 86 more workers")
    await more.click()
    assert await names.count() == 90
    assert "the others alike" in await opened.text(".problem-words")


async def test_a_long_name_keeps_its_end(open_page: Open) -> None:
    live = documents.deployed(60, 0, decisions=3)
    opened = await open_page(live)
    shown = """(selector) => [...document.querySelectorAll(selector)].every((label) => {
        const [box, end] = [label.getBoundingClientRect(), label.querySelector(".name-end").getBoundingClientRect()];
        const whole = label.lastChild.scrollWidth <= Math.ceil(end.width);
        return whole && end.width > 0 && end.right <= box.right + 1 && label.title.endsWith(label.lastChild.innerText);
    })"""
    for density in ("full", "compact", "dense"):
        await opened.page.get_by_label("Tiles").select_option(density)
        assert await opened.page.evaluate(shown, ".tile .name-label")
    assert await opened.page.evaluate(shown, ".decision .name-label")
    name = live.workers[0].worker_id
    assert await opened.page.get_by_role("button", name=name, exact=True).count() == 1, "a screen reader has all of it"


async def test_a_small_figure_is_not_shown_as_nothing(open_page: Open) -> None:
    live = documents.fleet(2)
    opened = await open_page(replace(live, totals=replace(live.totals, gpus_saved=0.0004)))
    assert "GPUs saved <0.01" in await opened.text("#totals")


async def test_a_chart_is_read_with_the_arrow_keys_and_leaves_gaps(open_page: Open) -> None:
    live = documents.fleet(2)
    opened = await open_page(live)
    chart = opened.page.get_by_role("slider", name="Time to first token")
    assert await chart.locator("path.line-0").count() == 2, "one line on each side of the gap"
    await chart.focus()
    await opened.page.keyboard.press("ArrowLeft")
    p50, p95 = live.history.ttft_p50[-2], live.history.ttft_p95[-2]
    assert p50 is not None
    assert p95 is not None
    said = await chart.get_attribute("aria-valuetext")
    assert said == f"23:59:55: p50 {p50 * 1000:.0f}\u00a0ms, p95 {p95 * 1000:.0f}\u00a0ms"
    assert await opened.page.locator(".cursor-text").all_text_contents() == ["23:59:55"] * 6
    await opened.page.keyboard.press("Home")
    for _ in range(100):
        await opened.page.keyboard.press("ArrowRight")
    assert (await chart.get_attribute("aria-valuetext") or "").endswith("p50 no value, p95 no value")


async def test_decisions_are_filtered_and_paused(open_page: Open, made: MadeRouter) -> None:
    live = documents.fleet(4, decisions=40)
    opened = await open_page(live, view="decisions")
    page = opened.page
    assert len(await opened.texts(".decision")) == 40
    await page.get_by_label("Reason").select_option("no_match")
    assert len(await opened.texts(".decision")) == sum(each.reason == "no_match" for each in live.decisions)
    await page.get_by_label("Reason").select_option("")
    await page.get_by_label("Decisions for workers").fill("worker-3")
    assert len(await opened.texts(".decision")) == sum(each.worker_id == "rag-worker-3" for each in live.decisions)
    await page.get_by_label("Decisions for workers").fill("")

    await page.get_by_role("button", name="Pause").click()
    newest = replace(live.decisions[0], id="instance:100", at=live.at + 1, worker_id="the-newest")
    made.live = replace(live, decisions=(newest, *live.decisions))
    await opened.eventually("() => document.getElementById('decisions-aside').textContent.includes('1 newer decision')")
    assert "the-newest" not in await opened.text("#stream")
    await page.get_by_role("button", name="Resume").click()
    assert (await opened.names(".decision .to"))[0] == "the-newest"


async def test_a_prompt_is_explained(open_page: Open, made: MadeRouter) -> None:
    made.explanation = explanation()
    opened = await open_page(documents.fleet(4), view="explain")
    page = opened.page
    await page.get_by_label("Chat").check()
    await page.get_by_label("System message").fill("Be brief.")
    await page.get_by_label("User message").fill("Hello")
    await page.get_by_label("Tokens of the answer").fill("64")
    await page.get_by_role("button", name="Explain").click()
    await page.wait_for_selector(".verdict")
    path, body = made.asked[-1]
    assert path == "/v1/chat/completions"
    assert body == {
        "stream": True,
        "max_tokens": 64,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    }
    assert "It would go to rag-worker-0 Because another worker holds more of the prompt" in await opened.text(
        ".verdict"
    )
    assert await opened.texts(".runs-legend li > span") == [
        "Blocks 1 to 24: held by rag-worker-2, rag-worker-0 and rag-worker-1",
        "Blocks 25 to 40: held by rag-worker-0 and rag-worker-1",
        "Blocks 41 to 56: held by rag-worker-1",
        "Blocks 57 to 64: held by no worker, to be computed",
    ]
    rows = await opened.texts("tbody tr")
    assert rows[0].startswith("rag-worker-0 Chosen 40 of 64")
    assert rows[0].endswith("4.0 ms – 52 ms 3.0 ms −6.0 ms 53 ms 2")
    assert await page.locator("tbody tr:first-child .stack").get_attribute("aria-label") == (
        "queue 4.0\u00a0ms, prefill 52\u00a0ms, decode 3.0\u00a0ms, charge −6.0\u00a0ms"
    )
    assert "would go to rag-worker-0" in await opened.text("#announcer")
    await page.get_by_text("The prompt, block by block").first.click()
    shades = await page.locator(".prompt span").evaluate_all("spans => spans.map((span) => span.dataset.shade)")
    assert shades == ["1"] * 24 + ["2"] * 16 + ["3"] * 16 + ["none"] * 4
    assert "4 further blocks not shown" in await opened.text("details")


@pytest.mark.parametrize(
    ("body", "status", "answer", "said"),
    [
        pytest.param("{", 200, {}, "The body is no JSON", id="no JSON"),
        pytest.param("[]", 200, {}, "The body is no JSON object", id="no object"),
        pytest.param("{}", 503, {"error": {"message": "no worker is ready"}}, "no worker is ready", id="refused"),
        pytest.param("{}", 200, {}, "another answer than this page knows", id="another version"),
    ],
)
async def test_a_question_that_fails_says_why(
    open_page: Open, made: MadeRouter, body: str, status: int, answer: dict[str, object], said: str
) -> None:
    made.explanation, made.explain_status = answer, status
    opened = await open_page(documents.fleet(1), view="explain")
    await opened.page.get_by_label("JSON body").check()
    await opened.page.get_by_label("Body", exact=True).fill(body)
    await opened.page.get_by_role("button", name="Explain").click()
    await opened.page.wait_for_selector("#explain-result .notice")
    assert said in await opened.text("#explain-result")


async def test_the_page_reconnects_by_itself_and_says_how_old_its_data_are(open_page: Open, made: MadeRouter) -> None:
    live = documents.fleet(3)
    opened = await open_page(live)
    await made.stop()
    await opened.page.wait_for_selector("#lost", state="visible")
    assert await opened.text("#lost-title") == "The connection to the router is lost"
    assert "old. " in await opened.text("#lost-text")
    assert "rag-worker-1" in await opened.text("#groups"), "what was known is still shown"
    assert await opened.page.evaluate("document.body.hasAttribute('data-stale')")
    made.live = replace(live, workers=live.workers[:1], decisions=())
    await made.start()
    await opened.page.wait_for_selector("#lost", state="hidden")
    await opened.eventually("() => !document.getElementById('groups').innerText.includes('rag-worker-1')")
    assert len(await opened.texts(".decision")) == len(live.decisions), "those of before the restart stay"


async def test_hidden_tabs_leave_the_connections_to_the_one_that_is_seen(tab: Page, made: MadeRouter) -> None:
    assert tab.context.browser is not None
    made.live = documents.fleet(3)
    context = await tab.context.browser.new_context()
    await context.add_init_script("Object.defineProperty(document, 'hidden', {get: () => window.hiddenNow ?? true})")
    see = "(hidden) => { window.hiddenNow = hidden; document.dispatchEvent(new Event('visibilitychange')) }"
    asleep = "() => document.getElementById('connection').dataset.state === 'asleep'"
    try:
        tabs: list[Page] = []
        for _ in range(7):  # one more than Chromium opens connections to one origin
            for other in tabs[-1:]:
                await other.evaluate(see, True)
            tabs.append(await context.new_page())
            await tabs[-1].goto(made.url)
            await tabs[-1].wait_for_function(asleep)  # opened in the background
            await tabs[-1].evaluate(see, False)
            await tabs[-1].wait_for_selector("#content", state="visible")
        assert await tabs[0].evaluate(asleep)
        await tabs[-1].evaluate(see, True)
        made.live = documents.fleet(5)
        await tabs[0].evaluate(see, False)
        await tabs[0].wait_for_function("() => document.querySelectorAll('.tile').length === 5")
        assert not await tabs[0].locator("#lost").is_visible()
        assert await tabs[0].text_content("#announcer") == "", "to come back is no loss of the connection"
        await eventually(lambda: made.viewers == 1, "the router knows that the other tabs have left")
    finally:
        await context.close()


async def test_what_is_no_live_document_is_said(open_page: Open, made: MadeRouter) -> None:
    opened = await open_page(None)
    await opened.eventually("() => document.getElementById('lost-title').textContent === 'No live document here'")
    assert "there is no such endpoint" in await opened.text("#lost-text")
    made.live = documents.fleet(1)
    # It may have connected by itself in the meantime, and then the button is gone.
    await opened.page.evaluate("document.getElementById('retry').click()")
    await opened.page.wait_for_selector("#content", state="visible")


async def test_a_chosen_theme_is_remembered(open_page: Open) -> None:
    opened = await open_page(documents.fleet(1))
    theme = opened.page.get_by_role("button", name="Theme")
    await theme.click()
    await theme.click()
    await opened.page.reload()
    assert await opened.page.get_attribute("html", "data-theme") == "dark"
    await opened.page.wait_for_selector("#content", state="visible")
    assert await theme.inner_text() == "Theme: Dark"
