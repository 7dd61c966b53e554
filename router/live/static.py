"""The files of the page, served from memory with headers that let a browser run nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePath

from fastapi import Request, Response

INDEX = "index.html"
SECURITY = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
"""Headers of every file: no inline script or style, no text that becomes markup (Trusted Types), nothing from
elsewhere, no frame around the page."""
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
"""By suffix, written down because the tables of operating systems differ. Other files are no part of the page."""


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file."""

    body: bytes
    media_type: str
    etag: str


def load_page() -> dict[str, PageFile]:
    """The files of the page, by name: some hundred kilobytes, part of the package."""
    page = {}
    for each in (files("router.live") / "page").iterdir():
        media_type = _TYPES.get(PurePath(each.name).suffix)
        if media_type is not None:
            body = each.read_bytes()
            page[each.name] = PageFile(body, media_type, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
    return page


def answer(file: PageFile, request: Request) -> Response:
    """The file, or 304 if the browser has it. It asks each time: after an update of the router it gets the new one."""
    headers = {**SECURITY, "etag": file.etag, "cache-control": "no-cache"}
    known = request.headers.get("if-none-match", "")
    if file.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(file.body, headers={**headers, "content-type": file.media_type})
