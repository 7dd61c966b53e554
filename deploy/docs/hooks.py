"""What mkdocs does beyond its own: pages from outside docs/, lists of pages, and scripts from no other host.

- ARCHITECTURE.md, CONTRIBUTING.md and CHANGELOG.md are pages of the site, too.
- A link from a page to another file of the repository becomes that file's path: the site does not contain it.
- Mermaid draws diagrams in the reader's browser, from a copy that `deploy.docs.scripts` has fetched; without one a
  diagram is shown as its text.
- The theme's script names another host for what it would fetch if this copy were missing: that address is taken out.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from deploy.docs.scripts import MERMAID, SCRIPTS

ROOT = Path(__file__).parents[2]
OUTSIDE = {"ARCHITECTURE.md": "architecture.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Documents of the repository's root, and the page that each becomes."""
LISTED = {"decisions": "Decisions", "runbooks": "Runbooks"}
"""Folders whose pages are listed by themselves."""

_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]\[]*(?:\[[^\]]*\][^\]\[]*)*)\]\((?P<target>[^)\s]+)\)")
_FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages from outside docs/."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add to the navigation the pages of the folders that are listed, those from outside docs/, and at its end those
    that it does not name."""
    folder, nav = Path(config.docs_dir), config.nav or []
    for name, title in LISTED.items():
        # The page about all of them comes first, whichever of its two names it has.
        pages = sorted((folder / name).glob("*.md"), key=lambda page: (page.stem not in ("index", "README"), page.name))
        if pages:
            _section(nav, title, [f"{name}/{page.name}" for page in pages])
    project = next(iter(nav[-1].values()))
    project.extend(OUTSIDE.values())
    known = set(_paths(nav))
    found = (each.relative_to(folder).as_posix() for each in folder.rglob("*.md"))
    project.extend(sorted(page for page in found if page not in known))
    return config


def _paths(nav: list[Any]) -> Iterator[str]:
    """Every page that the navigation names."""
    for entry in nav:
        for content in entry.values() if isinstance(entry, dict) else [entry]:
            if isinstance(content, str):
                yield content
            else:
                yield from _paths(content)


def _section(nav: list[Any], title: str, pages: list[str]) -> None:
    """Replace the entry of this title by its pages, wherever it is; without such an entry nothing lists them."""
    for entry in nav:
        for name, content in entry.items() if isinstance(entry, dict) else ():
            if name == title:
                entry[name] = pages
            elif isinstance(content, list):
                _section(content, title, pages)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the site, and diagrams as text if they cannot be drawn."""
    text = links_of_the_site(markdown, page.file.src_uri)
    return text if MERMAID.path.exists() else text.replace("```mermaid", "```text")


def links_of_the_site(markdown: str, uri: str) -> str:
    """The text of the page at `uri` with links that lead where its links lead in the repository."""
    source = next((root for root, name in OUTSIDE.items() if name == uri), f"docs/{uri}")

    def link(found: re.Match[str]) -> str:
        target, _, anchor = found["target"].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in OUTSIDE or path.startswith("docs/"):
            inside = OUTSIDE.get(path) or path.removeprefix("docs/")
            if (ROOT / path).is_dir():
                readme = "README.md" if (ROOT / path / "README.md").exists() else "index.md"
                inside = f"{inside.rstrip('/')}/{readme}"
            relative = posixpath.relpath(inside, posixpath.dirname(uri) or ".")
            return f"[{found['text']}]({relative}{'#' + anchor if anchor else ''})"
        return f"{found['text']} (`{path}`)" if (ROOT / path).exists() else found[0]

    parts = _FENCE.split(markdown)
    for place in range(0, len(parts), 2):
        parts[place] = _LINK.sub(link, parts[place])
    return "".join(parts)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """The diagrams' script, on pages with diagrams."""
    if 'class="mermaid"' not in output:
        return output
    depth = page.url.count("/")
    return output.replace("</head>", f'<script src="{"../" * depth}{MERMAID.site_path}"></script></head>', 1)


def on_post_build(config: MkDocsConfig) -> None:
    """Add the scripts, and take other hosts out of the theme's."""
    site = Path(config.site_dir)
    for script in site.glob("assets/javascripts/*.js"):
        text = script.read_text(encoding="utf-8")
        if "https://unpkg.com/" in text:
            script.write_text(text.replace("https://unpkg.com/", ""), encoding="utf-8")
    for own in SCRIPTS:
        # Pages refer to the one for searching in any case.
        (site / own.site_path).write_bytes(own.path.read_bytes() if own.path.exists() else b"")
