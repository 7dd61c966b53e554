"""A router pod with Envoy as the operator renders it, with certificate and API keys: who gets in, a certificate that is
replaced, a router that is frozen, and the end.

Not covered: the node's part, such as users and probes (tests/kube/e2e/test_envoy_pods.py).
"""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from runtime.tls import self_signed
from tests.envoy.rendered import RenderedPod, publish, running
from tests.processes import eventually
from tests.router.fakes import fake_workers, good, good_after

pytestmark = pytest.mark.envoy

KEY = "sk-0123456789abcdef"
PAGE = "https://chat.example.com"
CERTIFICATES = "kvcluster-tls"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, for sockets."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def certificate() -> dict[str, bytes]:
    pair = self_signed("router")
    return {"tls.crt": pair.certificate, "tls.key": pair.key}


def keys() -> dict[str, bytes]:
    return {"keys.yaml": json.dumps({"keys": [{"key": KEY, "tenant": "a"}]}).encode()}


def unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@asynccontextmanager
async def client_of(pod: RenderedPod, scheme: str = "http", **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    url = f"{scheme}://127.0.0.1:{pod.ports[8000]}"
    async with httpx.AsyncClient(base_url=url, verify=unverified(), timeout=30, headers=headers, trust_env=False) as it:
        yield it


async def ask(client: httpx.AsyncClient, **headers: str) -> httpx.Response:
    return await client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2}, headers=headers)


async def served(pod: RenderedPod) -> str:
    """The certificate that a new connection is shown."""
    return await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", pod.ports[8000]))


async def ready(pod: RenderedPod, port: int = 9901) -> int:
    """What the readiness probe of the pod gets; at 9000: what the router itself says."""
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
            return (await client.get(f"http://127.0.0.1:{pod.ports[port]}/ready")).status_code
    except httpx.TransportError:
        return 0


async def test_only_callers_with_a_key_get_in_over_a_certificate_that_may_change(folder: Path) -> None:
    first, second = certificate(), certificate()
    secrets = {CERTIFICATES: first, "kvcluster-keys": keys()}
    router: dict[str, Any] = {
        "tls": {"secretRef": {"name": "cert"}},
        "auth": {"keysSecretRef": {"name": "keys", "key": "keys.yaml"}},
        "corsOrigins": [PAGE],
    }
    async with fake_workers(good, good) as workers:
        urls = [each.url for each in workers]
        async with running(folder, urls, secrets, **router) as pod, client_of(pod, "https") as client:
            known = {"authorization": f"Bearer {KEY}"}

            async def answers() -> bool:
                try:
                    return (await ask(client, **known)).status_code == 200
                except httpx.TransportError:
                    return False

            await eventually(answers, "the pod serves: " + pod.log("envoy"))

            async def is_ready() -> bool:
                return await ready(pod) == 200

            await eventually(is_ready, "the router says so")
            assert (await ask(client)).status_code == 401
            asked = {"origin": PAGE, "access-control-request-method": "POST"}
            preflight = await client.options("/v1/completions", headers=asked)
            assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, PAGE)
            assert (await served(pod)).encode().split() == first["tls.crt"].split()

            publish(folder / CERTIFICATES, second)

            async def rotated() -> bool:
                assert await answers(), "no request fails meanwhile"
                return (await served(pod)).encode().split() == second["tls.crt"].split()

            await eventually(rotated, "a new connection is shown the new certificate")

            before = sum(len(each.received) for each in workers)
            pod.processes["router"].send_signal(signal.SIGSTOP)
            refused = await ask(client, **known)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, 503)
            assert await ready(pod) >= 500, "nobody else can check keys"
            assert sum(len(each.received) for each in workers) == before
            pod.processes["router"].send_signal(signal.SIGCONT)
            await eventually(answers, "the router is asked again")


async def test_clients_need_a_certificate_where_there_are_authorities_for_them(folder: Path) -> None:
    authority = trustme.CA()
    context = unverified()
    authority.issue_cert(common_name="team-a").configure_cert(context)
    secrets = {CERTIFICATES: {**certificate(), "client-ca.crt": authority.cert_pem.bytes()}}
    tls = {"secretRef": {"name": "cert"}, "clientCASecretRef": {"name": "clients"}}
    async with (
        fake_workers(good) as workers,
        running(folder, [each.url for each in workers], secrets, tls=tls) as pod,
        client_of(pod, "https") as nobody,
        httpx.AsyncClient(base_url=nobody.base_url, verify=context, timeout=30, trust_env=False) as somebody,
    ):

        async def answers() -> bool:
            try:
                return (await ask(somebody)).status_code == 200
            except (httpx.TransportError, ssl.SSLError):
                return False

        await eventually(answers, "a client with a certificate gets in: " + pod.log("envoy"))
        with pytest.raises((httpx.TransportError, ssl.SSLError)):  # httpx leaves alerts that come late as they are
            await ask(nobody)
        assert len(workers[0].received) == 1


async def test_a_pod_whose_envoy_does_not_take_the_certificate_is_not_ready(folder: Path) -> None:
    """Python takes a key of this curve and Envoy none but P-256, P-384 and P-521: a rollout stops, as it should."""
    key = ec.generate_private_key(ec.SECP224R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "router")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    secrets = {CERTIFICATES: {"tls.crt": made.public_bytes(Encoding.PEM), "tls.key": pem}}
    tls = {"secretRef": {"name": "cert"}}
    async with fake_workers(good) as workers, running(folder, [each.url for each in workers], secrets, tls=tls) as pod:

        async def said() -> bool:
            return "envoy_without_certificate" in pod.log("router")

        await eventually(said, "the router says what is wrong: " + pod.log("router"))
        assert await ready(pod, 9000) == 503
        assert await ready(pod) != 200


async def test_nothing_is_lost_when_the_pod_ends_or_the_router_does_not_answer(folder: Path) -> None:
    release = asyncio.Event()
    async with (
        fake_workers(good, good_after(release)) as workers,
        running(folder, [each.url for each in workers]) as pod,
        client_of(pod) as client,
    ):

        async def is_ready() -> bool:
            return await ready(pod, 9000) == await ready(pod) == 200

        async def both_asked() -> bool:
            asked.append(asyncio.create_task(ask(client)))
            await asyncio.sleep(0.01)
            return all(each.received for each in workers)

        asked: list[asyncio.Task[httpx.Response]] = []
        await eventually(is_ready, "the pod is ready")
        await eventually(both_asked, "both workers have requests")
        pod.processes["router"].send_signal(signal.SIGSTOP)
        assert await ready(pod) == 200, "requests go on without it"
        pod.processes["router"].send_signal(signal.SIGCONT)
        await eventually(is_ready, "the router is ready")
        ending = asyncio.create_task(pod.stop())
        asked.append(asyncio.create_task(ask(client)))
        release.set()
        assert {(await each).status_code for each in asked} == {200}
        await ending
        assert pod.processes["router"].returncode == 0
