"""Following a live document: updates, lost connections, and what is no live document.

Covered: scripted streams on virtual time, a router in this process, and a router pod behind an API server's proxy. Not
covered: what is drawn (test_render.py, test_app.py), and how documents and updates are made (tests/router/live).
"""

from __future__ import annotations

import asyncio
import base64
import itertools
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from controller.api.crd import crd
from kvcache.tokens.tokenizer import load_tokenizer
from kvcluster.explain.gather import NotFoundError
from kvcluster.top.following import BACKOFF, Link, ReaderState, follow
from kvcluster.top.pods import in_cluster
from kvcluster.top.sources import SourceError, UrlSource, document, documents
from router.assembly import MANAGEMENT_LIMITS, Router
from router.discovery.sources import StaticDiscovery
from router.settings import Settings
from runtime.http.server import HttpServer
from runtime.sockets import listen
from tests.kube.apiserver import FakeApiServer
from tests.kube.kubelet.network import Loopback
from tests.kvcluster.explain.support import a_pod, cluster
from tests.kvcluster.top.scripted import ScriptedSource, change, whole
from tests.router.conftest import router_starter
from tests.router.fakes import fake_workers, good
from tests.router.live.sample import live
from tests.virtual import CountingLoop, run

FIRST = live(4)
SECOND = replace(FIRST, at=FIRST.at + 1, workers=live(5, seed=1).workers)


def followed(source: ScriptedSource, count: int, chance: float = 1.0) -> list[tuple[float, Link]]:
    """The first links, each with its time."""

    async def main(loop: CountingLoop) -> list[tuple[float, Link]]:
        found = []
        async with aclosing(follow(source, chance=lambda: chance)) as links:
            async for link in links:
                found.append((loop.time(), link))
                if len(found) == count:
                    return found
        raise AssertionError

    return run(main)


def test_a_document_is_kept_up_to_date() -> None:
    pieces = whole(FIRST) + b": keep-alive\n\n" + change(FIRST, SECOND) + b"event: other\ndata: x\n\n"
    cut = [pieces[at : at + 1000] for at in range(0, len(pieces), 1000)]
    links = [link for _, link in followed(ScriptedSource([cut]), 3)]
    assert [link.state for link in links] == [ReaderState.CONNECTING, ReaderState.FOLLOWING, ReaderState.FOLLOWING]
    assert [link.document for link in links] == [None, FIRST, SECOND]


def test_a_lost_connection_is_made_again_and_what_was_known_stays() -> None:
    source = ScriptedSource([[whole(FIRST), SourceError("it broke off")], [change(FIRST, SECOND), whole(SECOND)]])
    told = followed(source, 6)
    assert [link.state.name for _, link in told] == [
        "CONNECTING", "FOLLOWING", "WAITING", "CONNECTING", "FOLLOWING", "WAITING"
    ]  # fmt: skip
    lost, again = told[2][1], told[4][1]
    assert (lost.document, lost.problem, lost.retry_at) == (FIRST, "it broke off", BACKOFF.first)
    assert (again.document, again.problem) == (SECOND, ""), "an update without its document is passed over"
    assert told[5][1].problem == "the router ended the stream"


def test_attempts_become_rare_and_often_again_after_a_document() -> None:
    refused: list[SourceError] = [SourceError("no")]
    times = [at for at, link in followed(ScriptedSource([refused] * 8 + [[whole(FIRST)], refused]), 29)]
    waits = [round(b - a, 3) for a, b in itertools.pairwise(times) if b > a]
    assert waits[:8] == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0, 10.0]
    assert waits[8:10] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("piece", "said"),
    [
        (b'event: live\ndata: {"at": "now"}\n\n', "this is no live document"),
        (b"event: live\ndata: <html>\n\n", "is it a router of another version?"),
        (whole(FIRST) + b'event: update\ndata: {"at": 1, "workers": [{"url": "x"}]}\n\n', "update of a worker"),
        (b"event: live\ndata: " + b"x" * (65 << 20), "an event takes more than"),
    ],
    ids=["wrong field", "no JSON", "an update of nothing", "endless"],
)
def test_what_is_no_live_document_is_an_error_that_says_so(piece: bytes, said: str) -> None:
    lost = next(link for _, link in followed(ScriptedSource([[piece]]), 3) if link.problem)
    assert lost.state is ReaderState.WAITING
    assert said in lost.problem


# --- real routers ---


async def first(found: AsyncIterator[object], count: int) -> list[object]:
    async with asyncio.timeout(20), aclosing(found):  # type: ignore[type-var]
        return [await anext(found) for _ in range(count)]


async def test_a_routers_document() -> None:
    async with a_router() as (url, names), httpx.AsyncClient() as client:
        source = UrlSource(url, client)
        found = await document(source)
        assert [worker.url for worker in found.workers] == names
        (streamed,) = await first(documents(source), 1)
        assert isinstance(streamed, type(found))
        assert [worker.url for worker in streamed.workers] == names
        with pytest.raises(SourceError, match="it is no management port of a router"):
            await document(UrlSource(f"{url}/health", client))
        with pytest.raises(SourceError, match="cannot be read"):
            await document(UrlSource("http://127.0.0.1:1", client))


@asynccontextmanager
async def a_router() -> AsyncIterator[tuple[str, list[str]]]:
    async with fake_workers(good, good) as workers, router_starter(load_tokenizer("gpt2"))(workers) as router:
        yield str(router.management.base_url), sorted(worker.url for worker in workers)


TOKEN = "the-token-of-the-routers"
SECRET = {
    "apiVersion": "v1",
    "kind": "Secret",
    "metadata": {"name": "tokens", "namespace": "ns"},
    "data": {"token": base64.b64encode(TOKEN.encode()).decode()},
}


@asynccontextmanager
async def a_cluster(folder: Path) -> AsyncIterator[tuple[FakeApiServer, Path]]:
    """An API server with KVCluster `rag` in namespace `ns`, and two router pods, of which one does not answer. They ask
    for the token of Secret `tokens`."""
    tokens = folder / "tokens"
    tokens.write_text(TOKEN)
    router = Router(Settings(management_token_file=tokens), StaticDiscovery([]))
    with closing(Loopback()) as network:
        address, silent = network.pod(), network.pod()
        server = HttpServer(router.management_app(), listen(address, 9000), MANAGEMENT_LIMITS)
        router.start()
        await server.start()
        api = FakeApiServer()
        await api.start()
        try:
            async with httpx.AsyncClient(base_url=api.url, trust_env=False) as client:
                objects = [
                    ("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", crd()),
                    ("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ns"}}),
                    ("/api/v1/namespaces/ns/secrets", SECRET),
                    ("/apis/kvcluster.dev/v1alpha1/namespaces/ns/kvclusters", cluster()),
                ]
                for path, item in objects:
                    assert (await client.post(path, json=item)).status_code == 201
                for name, ip in (("rag-router-a", silent), ("rag-router-b", address)):
                    pod = {"apiVersion": "v1", "kind": "Pod", **a_pod(name, podIP=ip)}
                    pod["metadata"] |= {"namespace": "ns"}
                    volume = {"name": "kvcluster-management", "secret": {"secretName": "tokens"}}
                    container = {"name": "c", "image": "registry.example/kvcluster:9"}
                    pod["spec"] |= {"containers": [container], "volumes": [volume]}
                    made = (await client.post("/api/v1/namespaces/ns/pods", json=pod)).json()
                    status = f"/api/v1/namespaces/ns/pods/{name}/status"
                    assert (await client.put(status, json={**made, "status": pod["status"]})).status_code == 200
            yield api, api.kubeconfig(folder / "config", namespace="ns")
        finally:
            await api.stop()
            await server.stop(0)
            await router.close()


async def test_a_kvcluster_in_kubernetes(tmp_path: Path) -> None:
    """Through the pods' proxy, as it streams; a pod that does not answer is passed over."""
    async with a_cluster(tmp_path) as (api, config), in_cluster("rag", None, None, config) as source:
        assert source.title == "rag in namespace ns"
        links = await first(follow(source, chance=lambda: 0.0), 6)
        states = [link.state.name for link in links if isinstance(link, Link)]
        assert states == ["CONNECTING", "WAITING", "CONNECTING", "FOLLOWING", "FOLLOWING", "FOLLOWING"]
        assert isinstance(links[-1], Link)
        assert links[-1].document is not None
        assert links[-1].document.routers[0].reason == "no worker is known"
        asked = {(entry.verb, entry.resource, entry.subresource) for entry in api.requests if entry.user == "admin"}
        assert {each for each in asked if each[0] == "get" or each[1] == "pods"} >= {("get", "pods", "proxy")}
        with pytest.raises(NotFoundError, match="there are: rag"):
            async with in_cluster("other", None, None, config):
                raise AssertionError
