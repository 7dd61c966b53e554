"""`kvcluster dashboard`: connections to a local port reach a router pod through the API server.

The API server and the kubelet behind it are played here, by the protocol of kubelet's
`pkg/kubelet/cri/streaming/portforward/websocket.go` (subprotocol v4.channel.k8s.io): no test bed of ours has a kubelet
that forwards ports. Checked with `kubernetes.stream.portforward` of the official client, with kube-apiserver 1.36.2
in front of this kubelet, which asks for both rights, get and create, and beside a real kubelet 1.36.2 with containerd,
which answers 406 to a stream that asks for a media type. Not covered: what the page shows (tests/router/page).
"""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import yaml
from aiohttp import WSMsgType, web

from controller.objects.names import MANAGEMENT_PORT
from kvcluster.commands.dashboard import dashboard
from kvcluster.management_token import NoTokenError, pod_token
from kvcluster.options import TOKEN_VARIABLE
from kvcluster.portforward import ForwardError, PortForward
from runtime.kube.client import ApiServer
from runtime.kube.credentials import find_credentials
from runtime.kube.errors import KubeApiError
from tests.controller.status.support import pod
from tests.kvcluster.explain.support import LABELS, cluster


@dataclass
class Cluster:
    """An API server with one KVCluster, `rag` in namespace `ns`, and its router pods."""

    targets: dict[str, int] = field(default_factory=dict)
    """Local port that stands for the management port of each router pod."""
    secret: str = ""
    """Name of the Secret that the routers' pods mount."""
    token: str = ""
    """Token in that Secret; empty: the user may not read it."""
    refuses: int = 0
    """Status with which it answers whoever wants to forward a port."""
    forwarded: list[str] = field(default_factory=list)
    url: str = ""

    async def pods(self, request: web.Request) -> web.Response:
        items = []
        for name in self.targets:
            item = pod(name)
            item["metadata"]["labels"] |= LABELS | {"app.kubernetes.io/component": "router"}
            if self.secret:
                item["spec"] = {"volumes": [{"name": "kvcluster-management", "secret": {"secretName": self.secret}}]}
            items.append(item)
        return web.json_response({"kind": "PodList", "items": items})

    async def kvcluster(self, request: web.Request) -> web.Response:
        if request.match_info["name"] != "rag":
            return web.json_response({"message": "there is none"}, status=404)
        return web.json_response(cluster())

    async def read_secret(self, request: web.Request) -> web.Response:
        if request.match_info["name"] != self.secret:
            return web.json_response({"message": "there is none"}, status=404)
        if not self.token:
            return web.json_response({"message": "secrets is forbidden"}, status=403)
        data = {"token": base64.b64encode(self.token.encode()).decode()}
        return web.json_response({"kind": "Secret", "metadata": {"name": self.secret}, "data": data})

    async def clusters(self, request: web.Request) -> web.Response:
        return web.json_response({"items": [cluster()]})

    async def portforward(self, request: web.Request) -> web.StreamResponse:
        if self.refuses:
            return web.json_response({"message": "no"}, status=self.refuses)
        if request.headers.get("Accept", "*/*") != "*/*":
            return web.json_response({"message": "no stream has this media type"}, status=406)
        name, port = request.match_info["pod"], int(request.query["ports"])
        assert port == MANAGEMENT_PORT
        stream = web.WebSocketResponse(protocols=("v4.channel.k8s.io",))
        await stream.prepare(request)
        assert stream.ws_protocol == "v4.channel.k8s.io"
        self.forwarded.append(name)
        for channel in (b"\0", b"\1"):
            await stream.send_bytes(channel + port.to_bytes(2, "little"))
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.targets[name])
        except OSError as error:
            await stream.send_bytes(b"\1" + str(error).encode())
            return stream

        async def back() -> None:
            while data := await reader.read(4096):
                await stream.send_bytes(b"\0" + data)
            await stream.close()

        returning = asyncio.create_task(back())
        async for message in stream:
            assert message.type is WSMsgType.BINARY
            assert message.data[0] == 0
            writer.write(message.data[1:])
        returning.cancel()
        writer.close()
        return stream

    def kubeconfig(self, folder: Path) -> Path:
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": "ns"}}],
            "clusters": [{"name": "here", "cluster": {"server": self.url}}],
            "users": [{"name": "me", "user": {"token": "t"}}],
        }
        file = folder / "kubeconfig"
        file.write_text(yaml.safe_dump(content), "utf-8")
        return file


@asynccontextmanager
async def a_cluster() -> AsyncIterator[Cluster]:
    made, app = Cluster(), web.Application()
    collection = "/apis/kvcluster.dev/v1alpha1/namespaces/ns/kvclusters"
    app.router.add_get("/api/v1/namespaces/ns/pods", made.pods)
    app.router.add_get("/api/v1/namespaces/ns/pods/{pod}/portforward", made.portforward)
    app.router.add_get("/api/v1/namespaces/ns/secrets/{name}", made.read_secret)
    app.router.add_get(collection, made.clusters)
    app.router.add_get(collection + "/{name}", made.kvcluster)
    runner = web.AppRunner(app, shutdown_timeout=0.01)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = site.name
    try:
        yield made
    finally:
        await runner.cleanup()


@asynccontextmanager
async def a_pod(text: str) -> AsyncIterator[int]:
    """A management port that answers with this text. Yields its number."""

    async def answer(request: web.BaseRequest) -> web.Response:
        return web.Response(text=text * int(request.query.get("times", "1")))

    runner = web.ServerRunner(web.Server(answer), shutdown_timeout=0.01)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield int(site.name.rpartition(":")[2])
    finally:
        await runner.cleanup()


@dataclass
class Forwarded:
    """A local port that is forwarded, and what was told of it."""

    url: str
    told: list[str]

    async def get(self, times: int = 1) -> str:
        async with httpx.AsyncClient(trust_env=False) as client:
            return (await client.get(self.url, params={"times": times})).text


@asynccontextmanager
async def forwarding(to: Cluster, folder: Path) -> AsyncIterator[Forwarded]:
    credentials = await find_credentials(to.kubeconfig(folder), pod=False)
    told: list[str] = []

    async def pods() -> list[str]:
        if not to.targets:
            raise ForwardError("there is no pod")
        return list(to.targets)

    async with ApiServer(credentials, "test") as api:
        forward = PortForward(api, "ns", MANAGEMENT_PORT, pods, on_pod=told.append, on_error=told.append)
        async with forward.listening("127.0.0.1", 0) as port:
            yield Forwarded(f"http://127.0.0.1:{port}/", told)


async def test_connections_reach_the_pod(tmp_path: Path) -> None:
    async with a_cluster() as made, a_pod("one ") as port, forwarding(made, tmp_path) as local:
        made.targets = {"rag-router-a": port}
        assert await local.get() == "one "
        assert await local.get(100_000) == "one " * 100_000
        assert local.told == ["rag-router-a"]


async def test_when_the_pod_is_gone_the_next_connection_goes_to_another_one(tmp_path: Path) -> None:
    async with a_cluster() as made, a_pod("one") as one, a_pod("two") as two, forwarding(made, tmp_path) as local:
        made.targets = {"rag-router-b": one}
        assert await local.get() == "one"
        made.targets = {"rag-router-a": two, "rag-router-b": one}
        assert await local.get() == "one", "as long as it is there, connections stay with one pod"
        made.targets = {"rag-router-a": two}
        assert await local.get() == "two"
        assert local.told == ["rag-router-b", "rag-router-a"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        pytest.param(lambda made: made.targets.clear(), "there is no pod", id="no pod"),
        pytest.param(lambda made: setattr(made, "refuses", 403), "pods/portforward in namespace ns", id="forbidden"),
        pytest.param(lambda made: setattr(made, "refuses", 500), "Internal Server Error", id="broken"),
        pytest.param(lambda made: made.targets.update({"rag-router-a": 1}), "could not connect", id="port closed"),
    ],
)
async def test_a_connection_that_cannot_be_forwarded_is_closed_and_says_why(
    tmp_path: Path, change: Callable[[Cluster], None], why: str
) -> None:
    async with a_cluster() as made, a_pod("one") as port, forwarding(made, tmp_path) as local:
        made.targets = {"rag-router-a": port}
        change(made)
        with pytest.raises(httpx.TransportError):
            await local.get()
        assert why in local.told[-1]


async def test_the_rights_are_checked_before_the_page_is_opened(tmp_path: Path) -> None:
    async with a_cluster() as made:
        credentials = await find_credentials(made.kubeconfig(tmp_path), pod=False)
        made.targets, made.refuses = {"rag-router-a": 1}, 404

        async def pods() -> list[str]:
            return list(made.targets)

        async with ApiServer(credentials, "test") as api:
            with pytest.raises(KubeApiError, match="Not Found"):
                await PortForward(api, "ns", MANAGEMENT_PORT, pods).check()


async def test_the_token_is_read_with_the_users_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_cluster() as made:
        credentials = await find_credentials(made.kubeconfig(tmp_path), pod=False)
        made.secret, made.token = "rag-router-management", "a-token-of-the-secret"
        async with ApiServer(credentials, "test") as api:
            assert await pod_token(api, "ns", "") == ""
            assert await pod_token(api, "ns", made.secret) == made.token
            made.token = "short"
            with pytest.raises(NoTokenError, match="Secret rag-router-management in namespace ns cannot be used"):
                await pod_token(api, "ns", made.secret)
            made.token = ""
            with pytest.raises(NoTokenError, match="it takes the right to get secrets in namespace ns, or set KVC"):
                await pod_token(api, "ns", made.secret)
            with pytest.raises(NoTokenError, match="namespace ns has none of that name"):
                await pod_token(api, "ns", "other")
            monkeypatch.setenv(TOKEN_VARIABLE, "a-token-i-was-given")
            assert await pod_token(api, "ns", made.secret) == "a-token-i-was-given"


@pytest.mark.process
async def test_the_command_prints_the_address_until_it_is_interrupted(tmp_path: Path) -> None:
    async with a_cluster() as made, a_pod("the page") as port:
        made.targets, made.secret, made.token = {"rag-router-a": port}, "rag-router-management", "a-token+/with#signs"
        options = ("--no-open", "--kubeconfig", str(made.kubeconfig(tmp_path)))
        command = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "kvcluster", "dashboard", "rag", *options),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "COLUMNS": "80"},
        )
        assert command.stdout is not None
        assert await command.stdout.readline() == b"connected to pod rag-router-a\n"
        line = (await command.stdout.readline()).decode()
        assert line.startswith("rag in namespace ns: http://127.0.0.1:")
        assert "/#token=a-token%2B%2Fwith%23signs " in line
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(line.split()[4])).text == "the page"
        command.send_signal(signal.SIGINT)
        assert await command.wait() == 0


@pytest.mark.parametrize(
    ("name", "code", "why"),
    [
        pytest.param("other", 2, "no KVCluster other in namespace ns", id="no such KVCluster"),
        pytest.param("Rag!", 2, "'Rag!' is no name", id="no name"),
        pytest.param("rag", 1, "no router pod of it runs: kubectl kvcluster explain rag -n ns says why", id="no pod"),
    ],
)
async def test_the_command_says_why_there_is_no_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, code: int, why: str
) -> None:
    async with a_cluster() as made:
        where = {"namespace": None, "context": None, "kubeconfig": made.kubeconfig(tmp_path)}
        assert await asyncio.to_thread(dashboard, name, **where, port=0, browser=False) == code
        assert why in capsys.readouterr().err
