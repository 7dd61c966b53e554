"""The documents as a site: built strictly, complete, and with nothing from another host; what is generated is current.

Covered: every page is in the navigation and every link and anchor leads somewhere (mkdocs checks both), addresses in
pages, styles and scripts, diagrams with and without their script, pictures, the pages of strategies, the reference of
settings. Not covered: how the pages look, and links within the repository (tests/test_documents.py).
"""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from deploy.docs import hooks
from deploy.docs.pictures import FOLDER, PICTURES, WORKED
from deploy.docs.scripts import MERMAID, SCRIPTS
from router.core.decision import DecisionReason
from router.core.strategies import STRATEGIES
from tests.settings_page import PAGE, PROCESSES, page

ROOT = Path(__file__).parents[2]
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "object": "data"}
"""Elements that fetch what an attribute names. A link that a reader may follow is none of them."""
LOADING_RELS = {"stylesheet", "icon", "preload", "modulepreload", "prefetch", "preconnect", "dns-prefetch", "manifest"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return folder


class Loaded(HTMLParser):
    """The addresses that a page fetches by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag in LOADED:
            self.addresses.append(given.get(LOADED[tag], ""))
        if tag == "link" and LOADING_RELS & set(given.get("rel", "").split()):
            self.addresses.append(given.get("href", ""))


def foreign(address: str) -> bool:
    return re.match(r"[a-z]+://|//", address) is not None


@pytest.mark.process
def test_nothing_is_fetched_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 60
    for each in pages:
        parser = Loaded()
        parser.feed(each.read_text(encoding="utf-8"))
        assert parser.addresses
        assert not [address for address in parser.addresses if foreign(address)], each
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.findall(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", text), style
    for script in site.rglob("*.js"):
        if script.name not in {own.name for own in SCRIPTS}:
            assert "unpkg.com" not in script.read_text(encoding="utf-8"), script


@pytest.mark.process
def test_every_document_is_a_page(site: Path) -> None:
    for document in (ROOT / "docs").rglob("*.md"):
        inside = document.relative_to(ROOT / "docs").with_suffix(".html")
        assert (site / (inside.with_name("index.html") if document.name == "README.md" else inside)).is_file()
    for name in hooks.OUTSIDE.values():
        assert (site / name).with_suffix(".html").is_file()
    listed = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="concepts/index.html"' in listed


@pytest.mark.process
def test_a_diagram_is_drawn_by_the_sites_own_script_or_shown_as_text(site: Path) -> None:
    states = (site / "states.html").read_text(encoding="utf-8")
    if MERMAID.path.exists():
        assert f'<script src="{MERMAID.site_path}"' in states
        assert f'<script src="../{MERMAID.site_path}"' in (site / "concepts" / "view.html").read_text(encoding="utf-8")
    else:
        assert 'class="mermaid"' not in states
        assert "stateDiagram-v2" in states
    assert MERMAID.site_path not in (site / "index.html").read_text(encoding="utf-8")
    for script in SCRIPTS:
        content = (site / script.site_path).read_bytes()
        assert script.is_it(content) if script.path.exists() else not content


def test_every_strategy_has_a_page() -> None:
    """With its formula, its inputs, the reasons that it gives, and when it loses."""
    pages = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "strategies").glob("*.md")}
    table = pages.pop("index")
    assert pages.keys() == STRATEGIES.keys()
    for name, text in pages.items():
        assert re.findall(r"^#+ (.+)$", text, re.MULTILINE) == [name, "Formula", "Inputs", "When it loses"]
        assert f"[{name}]({name}.md)" in table
        reasons = re.findall(r"`(\w+)`", text.partition("Reasons: ")[2].partition(".")[0])
        assert reasons
        assert set(reasons) <= set(DecisionReason)


def test_every_decision_is_listed_by_its_title() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = re.findall(r"^- \[(.+)\]\((.+)\)$", (folder / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    decisions = [page for page in sorted(folder.glob("*.md")) if page.name != "index.md"]
    titles = [page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for page in decisions]
    assert listed == list(zip(titles, (page.name for page in decisions), strict=True))


def test_pictures_are_current() -> None:
    assert {picture.name for picture in FOLDER.glob("*.svg")} == set(PICTURES)
    for name, draw in PICTURES.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == draw(), "run: python -m deploy.docs.pictures"


def test_the_picture_of_the_cost_is_the_worked_example() -> None:
    text = (ROOT / "docs" / "routing.md").read_text(encoding="utf-8")
    rows = {
        row[0]: row[1:]
        for line in text.splitlines()
        if (row := re.split(r" *\| *", line.strip("| ")))[0] in ("w0", "w1", "w2")
    }
    for worker, _, costs in WORKED:
        _, queue, prefill, slowdown, _, _, popular, _ = rows[worker]
        assert (costs["queue"], costs["prefill"], costs["slowdown"]) == (float(queue), float(prefill), float(slowdown))
        assert sum(costs.values()) == pytest.approx(float(popular), abs=0.15)


def test_the_reference_of_settings_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.settings_page"


def test_every_setting_says_what_it_does() -> None:
    silent = [
        f"{title}: {name}"
        for title, settings, _ in PROCESSES
        for name, field in settings.model_fields.items()
        if not field.description
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("text", "uri", "shown"),
    [
        ("[x](../router.md#a)", "concepts/view.md", "[x](../router.md#a)"),
        ("[x](../../ARCHITECTURE.md)", "concepts/view.md", "[x](../architecture.md)"),
        ("[x](docs/router.md)", "architecture.md", "[x](router.md)"),
        ("[all](docs/decisions)", "architecture.md", "[all](decisions/index.md)"),
        ("[rag](../examples/rag.yaml)", "router.md", "rag (`examples/rag.yaml`)"),
        ("[x](https://example.org)", "router.md", "[x](https://example.org)"),
        ("[x](gone.md)", "router.md", "[x](gone.md)"),
        ("```\n[x](../examples/rag.yaml)\n```", "router.md", "```\n[x](../examples/rag.yaml)\n```"),
    ],
    ids=["page", "root", "from the root", "folder", "file", "elsewhere", "nothing", "code"],
)
def test_links(text: str, uri: str, shown: str) -> None:
    assert hooks.links_of_the_site(text, uri) == shown
