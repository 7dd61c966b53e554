"""Where the API server is and who we are there.

Covers: which kubeconfig or service account is used, the namespace, that a token is read again, what is said of those
that cannot be used. Not covered: exec plugins, OIDC and other ways to a token, which are the official client's.
"""

from __future__ import annotations

import datetime
import shutil
import ssl
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from kubernetes.aio.config import incluster_config

from runtime.kube import credentials
from runtime.kube.client import ApiServer
from runtime.kube.credentials import find_credentials
from runtime.kube.errors import ApiFailureCause, KubeApiError, NoClusterError
from tests.router.discovery.scripted import ScriptedApi


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a kubeconfig, outside a pod."""
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("in_context", "used"),
    [pytest.param("a", "a", id="the context's"), pytest.param(None, "default", id="the default")],
)
async def test_the_namespace(nowhere: Path, in_context: str | None, used: str) -> None:
    path = ScriptedApi(port=1).kubeconfig(nowhere / "kubeconfig", in_context)
    assert (await find_credentials(path)).namespace == used


@pytest.mark.parametrize("where", ["variable", "home"])
async def test_the_kubeconfig_that_kubectl_would_use(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "variable":
        monkeypatch.setenv("KUBECONFIG", f"{nowhere}/none:{ScriptedApi(port=1).kubeconfig(nowhere / 'k')}")
    else:
        (nowhere / ".kube").mkdir()
        ScriptedApi(port=1).kubeconfig(nowhere / ".kube" / "config")
    assert (await find_credentials(None)).namespace == "ns"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param(None, "no kubeconfig", id="not there"),
        pytest.param("", "cannot be used", id="empty"),
        pytest.param("{", "cannot be used", id="no YAML"),
        pytest.param("[]", "cannot be used", id="a list"),
        pytest.param("current-context: x", "cannot be used", id="without contexts"),
        pytest.param(
            "{contexts: [], clusters: [], users: [], current-context: x}", "cannot be used", id="no such context"
        ),
    ],
)
async def test_a_kubeconfig_that_cannot_be_used_is_named(nowhere: Path, text: str | None, says: str) -> None:
    path = nowhere / "kubeconfig"
    if text is not None:
        path.write_text(text)
    with pytest.raises(NoClusterError, match=says) as raised:
        await find_credentials(path)
    assert str(path) in str(raised.value)


async def test_a_pod_without_a_service_account_is_told_what_to_change(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    with pytest.raises(NoClusterError, match="automountServiceAccountToken: true"):
        await find_credentials(None)


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
    monkeypatch.setattr(credentials, "NAMESPACE_FILE", nowhere / "namespace")
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
    found = await find_credentials(None)
    assert (found.namespace, found.in_pod) == ("pods-own", True)
    async with ApiServer(found, "a-test") as server:
        await server.request("GET", "/x")
        (pod / "token").write_text("second")
        await server.request("GET", "/x")
        now[0] += datetime.timedelta(minutes=1)
        await server.request("GET", "/x")
        assert api.tokens == ["bearer first", "bearer first", "bearer second"]
        (pod / "token").unlink()
        now[0] += datetime.timedelta(minutes=1)
        with pytest.raises(KubeApiError, match="token") as raised:
            await server.request("GET", "/x")
        assert raised.value.cause is ApiFailureCause.UNAUTHORIZED
    await api.stop()


async def test_a_pod_that_names_a_kubeconfig_uses_it(pod: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    assert (await find_credentials(None)).namespace == "pods-own"
    assert (await find_credentials(ScriptedApi(port=1).kubeconfig(pod / "k"))).namespace == "ns"


async def test_a_context_by_its_name(nowhere: Path) -> None:
    path = ScriptedApi(port=1).kubeconfig(nowhere / "k")
    assert (await find_credentials(path, context="x")).namespace == "ns"
    with pytest.raises(NoClusterError, match="has no context 'prod'; it has: x"):
        await find_credentials(path, context="prod")


async def test_where_no_service_account_is_wanted_the_kubeconfig_counts(
    pod: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    with pytest.raises(NoClusterError, match=r"there is no kubeconfig .* with --config-file"):
        await find_credentials(None, pod=False, flag="--config-file")
