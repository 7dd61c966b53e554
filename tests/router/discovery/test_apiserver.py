"""The connection to the API server, over real sockets: questions, credentials, failures."""

from __future__ import annotations

import asyncio
import datetime
import logging
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from kubernetes.aio.config import incluster_config

from router.discovery import apiserver
from router.discovery.apiserver import find_api_server
from router.discovery.discovered import DiscoveredWorkers
from router.discovery.kubernetes import KubernetesDiscovery
from router.discovery.listwatch import ApiFailure, Policy
from runtime.backoff import Backoff
from runtime.settings import SettingsError
from tests.router.conftest import until
from tests.router.discovery.scripted import ScriptedApi
from tests.router.discovery.slices import bookmark, endpoint, endpoint_slice, status

pytestmark = pytest.mark.process

QUICK = Policy(retry=Backoff(0.002, 0.01), settled=0.02)
ONE = endpoint_slice("a", endpoint("10.0.0.1", "w-1"))
TWO = endpoint_slice("b", endpoint("10.0.0.2", "w-2"))
URLS = ["http://10.0.0.1:8100", "http://10.0.0.2:8100"]


@dataclass
class Followed:
    """An API server and a discovery that follows it."""

    api: ScriptedApi
    discovery: KubernetesDiscovery
    told: list[DiscoveredWorkers] = field(default_factory=list)

    async def knows(self, *urls: str) -> None:
        await until(lambda: bool(self.told) and list(self.told[-1]) == list(urls))

    async def watches(self, count: int = 1) -> None:
        await until(lambda: len(self.api.feeds) == count)

    async def failed(self, cause: str) -> None:
        await until(lambda: self.discovery.status().failures.get(cause, 0) > 0)


@asynccontextmanager
async def following(tmp_path: Path, *slices: object, policy: Policy = QUICK) -> AsyncIterator[Followed]:
    api = ScriptedApi()
    for made in slices:
        await api.put(made)  # type: ignore[arg-type]
    await api.start()
    connection = await find_api_server("workers", None, api.kubeconfig(tmp_path / "kubeconfig"))
    followed = Followed(api, KubernetesDiscovery(connection, policy=policy))

    async def follow() -> None:
        async for workers in followed.discovery.watch():
            followed.told.append(workers)

    task = asyncio.create_task(follow())
    try:
        yield followed
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await api.stop()


async def test_what_is_asked(tmp_path: Path) -> None:
    async with following(tmp_path, ONE) as followed:
        await followed.knows(*URLS[:1])
        await followed.watches()
        listed, watched = followed.api.questions
        path = "/apis/discovery.k8s.io/v1/namespaces/ns/endpointslices"
        assert listed == {"path": path, "labelSelector": "kubernetes.io/service-name=workers"}
        assert 10 <= int(watched.pop("timeoutSeconds")) <= 14
        assert watched == {**listed, "watch": "true", "allowWatchBookmarks": "true", "resourceVersion": "1"}
        assert followed.api.tokens == ["Bearer secret"] * 2


async def test_changes_are_followed(tmp_path: Path) -> None:
    async with following(tmp_path, ONE) as followed:
        await followed.watches()
        await followed.api.put(TWO)
        await followed.knows(*URLS)
        await followed.api.say(bookmark(2))
        await followed.api.delete("a")
        await followed.knows(*URLS[1:])
        assert len(followed.api.questions) == 2


async def test_a_watch_that_is_cut_is_resumed_without_a_list(tmp_path: Path) -> None:
    async with following(tmp_path, ONE) as followed:
        await followed.watches()
        await followed.api.put(TWO, told=False)
        followed.api.drop_feeds()
        await followed.knows(*URLS)
        assert followed.api.lists == 1
        assert followed.discovery.status().failures == {"cut": 1}


async def test_an_event_cut_in_the_middle_is_taken_whole_the_next_time(tmp_path: Path) -> None:
    async with following(tmp_path, ONE) as followed:
        await followed.watches()
        await followed.api.put(TWO, told=False)
        await followed.api.say_bytes(b'{"type":"ADDED","object":{"meta')
        followed.api.drop_feeds()
        await followed.knows(*URLS)


async def test_a_position_that_is_no_longer_kept_lists_again(tmp_path: Path) -> None:
    async with following(tmp_path, ONE) as followed:
        await followed.watches()
        await followed.api.put(TWO, told=False)
        await followed.api.delete("a", told=False)
        followed.api.compacted = 3
        followed.api.drop_feeds()
        await followed.knows(*URLS[1:])
        assert followed.discovery.status().relists == {"expired": 1}


async def test_410_within_the_watch_lists_again(tmp_path: Path) -> None:
    async with following(tmp_path, ONE) as followed:
        await followed.watches()
        await followed.api.put(TWO, told=False)
        await followed.api.say({"type": "ERROR", "object": status(410, "Expired")})
        await followed.knows(*URLS)
        assert followed.discovery.status().relists == {"expired": 1}


async def test_an_api_server_that_restarts_is_found_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with following(tmp_path, ONE) as followed:
        await followed.watches()
        await followed.api.stop(reset=True)
        await followed.failed("connect")
        assert "cannot be reached" in followed.discovery.status().error
        assert list(followed.told[-1]) == URLS[:1]
        followed.api.feeds.clear()
        await followed.api.put(TWO)
        await followed.api.start()
        await followed.knows(*URLS)
        await until(lambda: "discovery_restored" in caplog.text)
        assert caplog.text.count("discovery_lost") == 1


@pytest.mark.parametrize(
    ("refusal", "cause", "says"),
    [
        ((401, status(401, "Unauthorized", "Unauthorized"), ""), "unauthorized", "401"),
        ((403, status(403, "Forbidden", "u cannot list"), ""), "forbidden", "grant list and watch"),
        ((429, status(429, "TooManyRequests", "too many"), ""), "throttled", "too many"),
        ((500, "no status", ""), "server_error", "500"),
        ((200, ["no list"], ""), "malformed", "no sense"),
        ((404, {"paths": []}, ""), "status", "404"),
    ],
    ids=["401", "403", "429", "500", "no-list", "404"],
)
async def test_refusals_are_named_and_repeated_until_they_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, refusal: tuple[int, object, str], cause: str, says: str
) -> None:
    async with following(tmp_path, ONE) as followed:
        await followed.watches()
        await followed.api.put(TWO, told=False)
        followed.api.refusals = [refusal] * 3
        followed.api.drop_feeds()
        await followed.knows(*URLS)
        assert followed.discovery.status().failures[cause] >= 1
        (lost,) = [record for record in caplog.records if record.getMessage() == "discovery_lost"]
        assert says in vars(lost)["kvcluster_fields"]["why"]


async def test_garbage_lists_again(tmp_path: Path) -> None:
    async with following(tmp_path, ONE) as followed:
        for garbage in (b"{\n", b"[]\n", b'{"type":"ADDED","object":{}}\n', b"\xff" * 100 + b"\n"):
            await followed.watches()
            await followed.api.say_bytes(garbage)
            followed.api.feeds.clear()
        await followed.watches()
        await followed.api.put(TWO)
        await followed.knows(*URLS)
        assert followed.discovery.status().failures == {"malformed": 4}


async def test_a_watch_that_outlasts_its_time_is_dropped(tmp_path: Path) -> None:
    policy = Policy(shortest_watch=0, longest_watch=0, slack=0.05, retry=Backoff(0.002, 0.01))
    async with following(tmp_path, ONE, policy=policy) as followed:
        await followed.failed("silent")
        assert list(followed.told[-1]) == URLS[:1]


# --- where the API server is ----------------------------------------------------------------------------


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a kubeconfig, outside a pod."""
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("in_context", "given", "used"), [("a", None, "a"), (None, None, "default"), ("a", "b", "b")])
async def test_the_namespace(nowhere: Path, in_context: str | None, given: str | None, used: str) -> None:
    path = ScriptedApi(port=1).kubeconfig(nowhere / "kubeconfig", in_context)
    assert (await find_api_server("s", given, path)).namespace == used


@pytest.mark.parametrize("where", ["variable", "home"])
async def test_the_kubeconfig_that_kubectl_would_use(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "variable":
        monkeypatch.setenv("KUBECONFIG", f"{nowhere}/none:{ScriptedApi(port=1).kubeconfig(nowhere / 'k')}")
    else:
        (nowhere / ".kube").mkdir()
        ScriptedApi(port=1).kubeconfig(nowhere / ".kube" / "config")
    assert (await find_api_server("s", None, None)).namespace == "ns"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no kubeconfig"),
        ("", "cannot be used"),
        ("{", "cannot be used"),
        ("[]", "cannot be used"),
        ("current-context: x", "cannot be used"),
        ("{contexts: [], clusters: [], users: [], current-context: x}", "cannot be used"),
    ],
)
async def test_a_kubeconfig_that_cannot_be_used_is_named(nowhere: Path, text: str | None, says: str) -> None:
    path = nowhere / "kubeconfig"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SettingsError, match=says) as raised:
        await find_api_server("s", None, path)
    assert str(path) in str(raised.value)


async def test_a_pod_without_a_service_account_is_told_what_to_change(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    with pytest.raises(SettingsError, match="automountServiceAccountToken: true"):
        await find_api_server("s", None, None)


@pytest.fixture
def pod(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a service account, in a pod whose API server has a certificate for 127.0.0.1."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to make a certificate")
    extensions = (
        "subjectAltName=IP:127.0.0.1",
        "basicConstraints=critical,CA:TRUE",
        "keyUsage=critical,digitalSignature,keyCertSign",
    )
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-subj", "/CN=api", "-days", "2", "-keyout", nowhere / "key.pem", "-out", nowhere / "ca.crt",
         *(word for extension in extensions for word in ("-addext", extension))],
        check=True, capture_output=True,
    )  # fmt: skip
    (nowhere / "token").write_text("first")
    (nowhere / "namespace").write_text("pods-own\n")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(nowhere / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(nowhere / "ca.crt"))
    monkeypatch.setattr(apiserver, "NAMESPACE_FILE", nowhere / "namespace")
    return nowhere


async def test_in_a_pod_the_service_account_is_used_and_its_token_read_again(
    pod: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [datetime.datetime(2026, 11, 24, 12)]  # noqa: DTZ001  as the client reads it
    clock = SimpleNamespace(now=lambda: now[0])
    monkeypatch.setattr(incluster_config, "datetime", SimpleNamespace(datetime=clock, timedelta=datetime.timedelta))
    api = ScriptedApi(tls=ssl.create_default_context(ssl.Purpose.CLIENT_AUTH))
    assert api.tls is not None
    api.tls.load_cert_chain(pod / "ca.crt", pod / "key.pem")
    await api.start()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.port))
    server = await find_api_server("workers", None, None)
    assert server.namespace == "pods-own"
    await server.list()
    (pod / "token").write_text("second")
    await server.list()
    now[0] += datetime.timedelta(minutes=1)
    await server.list()
    assert api.tokens == ["bearer first", "bearer first", "bearer second"]
    (pod / "token").unlink()
    now[0] += datetime.timedelta(minutes=1)
    with pytest.raises(ApiFailure, match="token"):
        await server.list()
    await server.close()
    await api.stop()


async def test_a_pod_that_names_a_kubeconfig_uses_it(pod: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    assert (await find_api_server("s", None, None)).namespace == "pods-own"
    assert (await find_api_server("s", None, ScriptedApi(port=1).kubeconfig(pod / "k"))).namespace == "ns"
