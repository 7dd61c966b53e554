"""`kvcluster top`: the live document in a terminal, or as JSON for programs."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console

from kvcluster.options import LOCAL_ROUTER, management_headers, management_url, tls_context
from kvcluster.terminal import BAD_INPUT, FAILED, INTERRUPTED, OutputError, ReaderLeftError, complain, output, writing
from kvcluster.top.following import Link, ReaderState, follow
from kvcluster.top.render import page
from kvcluster.top.sources import Source, SourceError, UrlSource, document
from kvcluster.top.workers import Order, by_name
from router.live.document import encode
from runtime.kube.errors import KubeApiError, NoClusterError


@dataclass(frozen=True, slots=True)
class Target:
    """What is looked at: a router's management URL, or a KVCluster by name (`url` None)."""

    url: str | None
    name: str = ""
    namespace: str | None = None
    context: str | None = None
    kubeconfig: Path | None = None
    ca: Path | None = None
    """Authorities that have signed the URL's certificate."""


def target(
    text: str | None, namespace: str | None, context: str | None, kubeconfig: Path | None, ca: Path | None = None
) -> Target:
    """What the command line means: `text` with a colon is a URL, without one a name; None is local mode."""
    if text is None:
        return Target(LOCAL_ROUTER)
    if ":" in text:
        return Target(management_url(text), ca=ca)
    return Target(None, text, namespace, context, kubeconfig)


@asynccontextmanager
async def opened(of: Target) -> AsyncGenerator[Source]:
    """The source of the target's live document. Raises, for a name, what `in_cluster` raises."""
    if of.url is not None:
        verify = tls_context(of.ca)
        async with httpx.AsyncClient(trust_env=False, headers=management_headers(), verify=verify) as client:
            yield UrlSource(of.url, client)
        return
    from kvcluster.top.pods import in_cluster

    async with in_cluster(of.name, of.namespace, of.context, of.kubeconfig) as source:
        yield source


def top(of: Target, *, sort: str, once: bool, as_json: bool) -> int:
    """Runs the command; returns its exit code."""
    try:
        order = by_name(sort)
        return asyncio.run(_top(of, order, once=once, as_json=as_json))
    except (ValueError, LookupError) as error:  # an option, a name, or a KVCluster that does not exist
        complain(error)
        return BAD_INPUT
    except NoClusterError as error:
        complain(f"{error} (kvcluster up runs a manifest without a cluster)")
        return BAD_INPUT
    except (SourceError, KubeApiError, OutputError) as error:
        complain(error)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except ReaderLeftError:
        return 0


async def _top(of: Target, order: Order, *, once: bool, as_json: bool) -> int:
    console = output()
    interactive = console.is_terminal and not console.is_dumb_terminal and sys.stdin.isatty()
    async with opened(of) as source:
        if as_json:
            await print_json(source, once=once)
        elif once or not interactive:
            await _print_once(source, order, console)
        else:
            from kvcluster.top.app import TopApp

            await TopApp(source, order).run_async()
    return 0


async def _print_once(source: Source, order: Order, console: Console) -> None:
    now = asyncio.get_running_loop().time()
    found = Link(ReaderState.FOLLOWING, await document(source), now)
    with writing():
        console.print(page(source.title, found, now, order, console.width), highlight=False)


def _write(line: bytes) -> None:
    with writing():
        sys.stdout.write(line.decode() + "\n")


async def print_json(source: Source, *, once: bool, write: Callable[[bytes], object] = _write) -> None:
    """A document on each line, whenever it changes. The first connection has to succeed; a lost one is reported.

    Raises `SourceError`, and what `write` raises.
    """
    if once:
        write(encode(await document(source)))
        return
    known = None
    async for link in follow(source):
        if link.state is ReaderState.WAITING:
            if known is None:
                raise SourceError(link.problem)
            complain(f"{link.problem}; connecting again")
        elif link.document is not known and link.document is not None:
            known = link.document
            write(encode(known))
