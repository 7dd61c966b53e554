"""A real kube-apiserver with its etcd, as controller-runtime's envtest starts them, and what tests ask of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.kube.apiserver import FakeApiServer, Logged
from tests.processes import free_port

START_SECONDS = 90.0
ACCOUNT = "system:serviceaccount:"
_AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}


class _Process:
    """One of the binaries, which writes its output to a file of its own."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._command = command
        self.log = log
        self._running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as output:
            self._running = subprocess.Popen(self._command, stdout=output, stderr=subprocess.STDOUT)

    @property
    def ended(self) -> bool:
        return self._running is None or self._running.poll() is not None

    def stop(self) -> None:
        if self._running is None:
            return
        self._running.terminate()
        try:
            self._running.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._running.kill()
            self._running.wait()


class RealBackend:
    """A real API server. Users are impersonated by the administrator; service accounts have tokens of their own."""

    real = True

    def __init__(self, assets: Path, folder: Path, etcd_url: str, token: str, *, collects_garbage: bool) -> None:
        self._port = free_port()
        self.url = f"https://127.0.0.1:{self._port}"
        self.token = token
        self.collects_garbage = collects_garbage
        self._arguments = (assets, folder, etcd_url)
        self._audit = folder / f"audit-{self._port}.log"
        self._audit.touch()
        self._read = 0
        self._requests: dict[str, Logged] = {}
        policy = folder / "audit.yaml"
        policy.write_text(yaml.safe_dump(_AUDIT))
        key = folder / "service-accounts.key"
        command = [
            str(assets / "kube-apiserver"), f"--etcd-servers={etcd_url}", f"--cert-dir={folder / str(self._port)}",
            "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", f"--secure-port={self._port}",
            f"--token-auth-file={folder / 'tokens.csv'}", "--authorization-mode=RBAC",
            "--disable-admission-plugins=ServiceAccount",
            "--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}", "--service-cluster-ip-range=10.0.0.0/24",
            "--allow-privileged=true", f"--audit-policy-file={policy}", f"--audit-log-path={self._audit}",
        ]  # fmt: skip
        self._process = _Process(command, folder / f"kube-apiserver-{self._port}.log")

    @property
    def fake(self) -> FakeApiServer:
        raise LookupError("this is a real API server: no faults can be ordered")

    @property
    def requests(self) -> list[Logged]:
        """Every request that was answered so far (a watch: begun), from the server's audit log."""
        with self._audit.open("rb") as log:
            log.seek(self._read)
            for line in log:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                entry = json.loads(line)
                self._requests.setdefault(entry["auditID"], _logged(entry))
        return list(self._requests.values())

    def client(self, user: str = "admin") -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.token}", "User-Agent": "tests/1"}
        if user != "admin":
            headers["Impersonate-User"] = user
        # The certificate is one the server made for itself a moment ago, on this machine.
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=30, trust_env=False, verify=False)  # noqa: S501

    def kubeconfig(self, path: Path, user: str = "admin", namespace: str = "default") -> Path:
        login: dict[str, Any] = {"token": self.token, "as": user}
        if user == "admin":
            del login["as"]
        elif user.startswith(ACCOUNT):
            login = {"token": self._token_of(*user.removeprefix(ACCOUNT).split(":"))}
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "real",
            "clusters": [{"name": "real", "cluster": {"server": self.url, "insecure-skip-tls-verify": True}}],
            "users": [{"name": user, "user": login}],
            "contexts": [{"name": "real", "context": {"cluster": "real", "user": user, "namespace": namespace}}],
        }  # fmt: skip
        path.write_text(yaml.safe_dump(config))
        return path

    def _token_of(self, namespace: str, name: str) -> str:
        """A service account's token; the account is made where it is not there yet."""
        where = f"/api/v1/namespaces/{namespace}/serviceaccounts"
        with self._own() as client:
            client.post(where, json={"metadata": {"name": name}})
            answer = client.post(f"{where}/{name}/token", json={"spec": {"expirationSeconds": 3600}})
            answer.raise_for_status()
            return str(answer.json()["status"]["token"])

    def _own(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.Client(base_url=self.url, headers=headers, verify=False, trust_env=False)  # noqa: S501

    @contextlib.contextmanager
    def without_history(self) -> Iterator[RealBackend]:
        """A second API server on the same etcd: its watch cache begins where it starts."""
        later = RealBackend(*self._arguments, self.token, collects_garbage=self.collects_garbage)
        with later.serving():
            yield later

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Runs from entering to leaving."""
        try:
            self._start()
            yield
        finally:
            self._process.stop()

    async def start(self) -> None:
        """Serve again, as before, after `stop`."""
        await asyncio.to_thread(self._start)

    async def stop(self) -> None:
        """End in order; etcd keeps the objects."""
        await asyncio.to_thread(self._process.stop)

    def _start(self) -> None:
        self._process.start()
        deadline = time.monotonic() + START_SECONDS
        with self._own() as client:
            while time.monotonic() < deadline and not self._process.ended:
                with contextlib.suppress(httpx.HTTPError):
                    if client.get("/readyz").is_success and client.get("/api/v1/namespaces/default").is_success:
                        return
                time.sleep(0.2)  # a process that is starting sets no event
        raise RuntimeError(f"kube-apiserver did not become ready:\n{self._process.log.read_text()[-4000:]}")


def _logged(entry: dict[str, Any]) -> Logged:
    """An entry of the audit log as the fake server logs it."""
    place: dict[str, str] = entry.get("objectRef", {})
    user = entry.get("impersonatedUser") or entry["user"]
    return Logged(
        entry["verb"], place.get("apiGroup", ""), place.get("resource", ""), place.get("subresource", ""),
        place.get("namespace", ""), place.get("name", "") if place else entry["requestURI"].partition("?")[0],
        user.get("username", ""), entry.get("responseStatus", {}).get("code", 0),
    )  # fmt: skip


@contextlib.contextmanager
def real_api_server(assets: Path, folder: Path) -> Iterator[RealBackend]:
    """etcd and kube-apiserver, and a garbage collector where `kube-controller-manager` is. etcd ends last."""
    client_port, peer_port = free_port(), free_port()
    etcd_url, peer_url = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    token, manager = secrets.token_hex(16), assets / "kube-controller-manager"
    key = folder / "service-accounts.key"
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    (folder / "tokens.csv").write_text(f'{token},admin,admin,"system:masters"\n')
    etcd = [
        str(assets / "etcd"), f"--data-dir={folder / 'etcd'}", f"--listen-client-urls={etcd_url}",
        f"--advertise-client-urls={etcd_url}", f"--listen-peer-urls={peer_url}",
        f"--initial-advertise-peer-urls={peer_url}", f"--initial-cluster=default={peer_url}", "--unsafe-no-fsync",
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(_running(etcd, folder / "etcd.log"))
        backend = RealBackend(assets, folder, etcd_url, token, collects_garbage=manager.exists())
        stack.enter_context(backend.serving())
        if manager.exists():
            kubeconfig = backend.kubeconfig(folder / "controller-manager.kubeconfig")
            collector = [
                str(manager), f"--kubeconfig={kubeconfig}", "--controllers=garbage-collector-controller",
                "--leader-elect=false", f"--secure-port={free_port()}", "--bind-address=127.0.0.1",
                f"--cert-dir={folder / 'controller-manager'}",
            ]  # fmt: skip
            stack.enter_context(_running(collector, folder / "kube-controller-manager.log"))
        yield backend


@contextlib.contextmanager
def _running(command: list[str], log: Path) -> Iterator[None]:
    process = _Process(command, log)
    process.start()
    try:
        yield
    finally:
        process.stop()
