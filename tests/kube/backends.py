"""The API servers tests run against: the fake one always, a real kube-apiserver with etcd where there is one."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import httpx
import yaml

from tests.kube.apiserver import FakeApiServer

ASSETS = "KUBEBUILDER_ASSETS"
"""Environment variable: the folder with the binaries `etcd` and `kube-apiserver`, as envtest has it.

Where `kube-controller-manager` lies beside them, it collects garbage, which an API server alone does not.
"""


class Backend(Protocol):
    """What both offer. `fake` is the fake API server itself, for its faults and its log."""

    real: bool
    url: str
    token: str
    """The administrator's bearer token."""
    collects_garbage: bool
    """Whether what belongs to a deleted object is deleted."""

    @property
    def fake(self) -> FakeApiServer: ...

    def client(self, user: str = "admin") -> httpx.AsyncClient:
        """A client of the API for a user; close it."""
        ...

    def kubeconfig(self, path: Path, user: str = "admin", namespace: str = "default") -> Path:
        """Write a kubeconfig for a user."""
        ...

    def without_history(self) -> AbstractContextManager[Backend]:
        """The same objects on a server that knows nothing of what happened before."""
        ...


class FakeBackend:
    """The fake API server on the test's event loop."""

    real = False
    collects_garbage = True

    def __init__(self, api: FakeApiServer) -> None:
        self.fake = api
        self.url = api.url
        self.token = api.token("admin")

    def client(self, user: str = "admin") -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.fake.token(user)}", "User-Agent": "tests/1"}
        # Plain HTTP: there is nothing to verify, and reading the certificate authorities takes its time.
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=30, trust_env=False, verify=False)  # noqa: S501

    def kubeconfig(self, path: Path, user: str = "admin", namespace: str = "default") -> Path:
        return self.fake.kubeconfig(path, user, namespace)

    @contextlib.contextmanager
    def without_history(self) -> Iterator[FakeBackend]:
        self.fake.compact()
        yield self


class RealBackend:
    """A real API server. Users other than the administrator are impersonated by it."""

    real = True

    def __init__(
        self, url: str, token: str, another: Callable[[], AbstractContextManager[RealBackend]], *,
        collects_garbage: bool,
    ) -> None:  # fmt: skip
        self.url = url
        self.collects_garbage = collects_garbage
        self.token = token
        self._another = another

    @property
    def fake(self) -> FakeApiServer:
        raise LookupError("this is a real API server: it has no faults to order and keeps no log")

    def client(self, user: str = "admin") -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.token}", "User-Agent": "tests/1"}
        if user != "admin":
            headers["Impersonate-User"] = user
        # The certificate is one the server made for itself a moment ago, on this machine.
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=30, trust_env=False, verify=False)  # noqa: S501

    def kubeconfig(self, path: Path, user: str = "admin", namespace: str = "default") -> Path:
        login: dict[str, Any] = {"token": self.token, **({"as": user} if user != "admin" else {})}
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "real",
            "clusters": [{"name": "real", "cluster": {"server": self.url, "insecure-skip-tls-verify": True}}],
            "users": [{"name": user, "user": login}],
            "contexts": [{"name": "real", "context": {"cluster": "real", "user": user, "namespace": namespace}}],
        }  # fmt: skip
        path.write_text(yaml.safe_dump(config))
        return path

    def without_history(self) -> AbstractContextManager[RealBackend]:
        """A second API server on the same etcd: its watch cache begins where it starts."""
        return self._another()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def _process(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def real_api_server(assets: Path, folder: Path) -> Iterator[RealBackend]:
    """etcd and kube-apiserver, as envtest starts them. The API server ends before etcd does."""
    client_port, peer_port = _free_port(), _free_port()
    etcd_url, peer_url = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    manager = assets / "kube-controller-manager"
    key, tokens, token = folder / "service-accounts.key", folder / "tokens.csv", secrets.token_hex(16)
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    tokens.write_text(f'{token},admin,admin,"system:masters"\n')
    etcd = [
        str(assets / "etcd"), f"--data-dir={folder / 'etcd'}", f"--listen-client-urls={etcd_url}",
        f"--advertise-client-urls={etcd_url}", f"--listen-peer-urls={peer_url}",
        f"--initial-advertise-peer-urls={peer_url}", f"--initial-cluster=default={peer_url}", "--unsafe-no-fsync",
    ]  # fmt: skip

    @contextlib.contextmanager
    def serving() -> Iterator[RealBackend]:
        port = _free_port()
        server = [
            str(assets / "kube-apiserver"), f"--etcd-servers={etcd_url}", f"--cert-dir={folder / str(port)}",
            "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", f"--secure-port={port}",
            f"--token-auth-file={tokens}", "--authorization-mode=RBAC", "--disable-admission-plugins=ServiceAccount",
            "--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}", "--service-cluster-ip-range=10.0.0.0/24",
            "--allow-privileged=true",
        ]  # fmt: skip
        log = folder / f"kube-apiserver-{port}.log"
        with _process(server, log) as process:
            backend = RealBackend(f"https://127.0.0.1:{port}", token, serving, collects_garbage=manager.exists())
            _wait_until_ready(backend, process, token, log)
            yield backend

    with contextlib.ExitStack() as stack:
        stack.enter_context(_process(etcd, folder / "etcd.log"))
        backend = stack.enter_context(serving())
        if manager.exists():
            kubeconfig = backend.kubeconfig(folder / "controller-manager.kubeconfig")
            collector = [
                str(manager), f"--kubeconfig={kubeconfig}", "--controllers=garbage-collector-controller",
                "--leader-elect=false", f"--secure-port={_free_port()}", "--bind-address=127.0.0.1",
                f"--cert-dir={folder / 'controller-manager'}",
            ]  # fmt: skip
            stack.enter_context(_process(collector, folder / "kube-controller-manager.log"))
        yield backend


def _wait_until_ready(backend: RealBackend, process: subprocess.Popen[bytes], token: str, log: Path) -> None:
    deadline = time.monotonic() + 90
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=backend.url, headers=headers, verify=False, trust_env=False) as client:  # noqa: S501
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if client.get("/readyz").status_code == 200 and client.get("/api/v1/namespaces/default").is_success:
                    return
            time.sleep(0.2)  # a process that is starting sets no event
    raise RuntimeError(f"kube-apiserver did not become ready:\n{log.read_text()[-4000:]}")


def available() -> list[str]:
    """The names of the backends there are here."""
    return ["fake", *(["real"] if os.environ.get(ASSETS) else [])]
