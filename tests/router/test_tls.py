"""HTTPS at the router's data port: settings, metrics, and tenants that clients' certificates name.

Not covered: handshakes (tests/runtime/http/test_tls.py), files (tests/runtime/test_tls.py).
"""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
import trustme

from router.settings import Settings
from runtime.settings import SettingsError
from tests.router.conftest import RunningRouter, StartRouter, until
from tests.router.fakes import fake_workers, good

CA = trustme.CA()
BODY = {"prompt": "a prompt", "max_tokens": 2}


def write(folder: Path, certificate: trustme.LeafCert) -> None:
    certificate.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    certificate.private_key_pem.write_to_path(folder / "tls.key")


def secure_client(router: RunningRouter, certificate: trustme.LeafCert | None = None) -> httpx.AsyncClient:
    context = ssl.create_default_context()
    CA.configure_trust(context)
    if certificate is not None:
        certificate.configure_cert(context)
    return httpx.AsyncClient(base_url=f"https://localhost:{router.data.port}", verify=context, trust_env=False)


async def test_the_data_port_speaks_https_and_follows_its_certificate(
    start_router: StartRouter, tmp_path: Path
) -> None:
    write(tmp_path, CA.issue_cert("localhost"))
    async with fake_workers(good) as workers, start_router(workers, tls_cert_path=tmp_path) as router:
        async with secure_client(router) as client:
            assert (await client.post("/v1/completions", json=BODY)).status_code == 200
            refused = await router.client.post("/v1/completions", json=BODY)
            assert (refused.status_code, "https://" in refused.json()["error"]["message"]) == (400, True)
            before = router.metric("tls_certificate_expires_timestamp_seconds", port="data")
            write(tmp_path, trustme.CA().issue_cert("localhost", not_after=datetime.now(UTC) + timedelta(days=9)))
            await until(lambda: router.metric("tls_certificate_expires_timestamp_seconds", port="data") < before)
            assert (await client.post("/v1/completions", json=BODY)).status_code == 200  # on the open connection
        with pytest.raises(httpx.ConnectError):
            async with secure_client(router) as client:
                await client.post("/v1/completions", json=BODY)
        assert router.metric("tls_handshakes_total", version="TLSv1.3") == 1
        assert router.metric("tls_handshake_failures_total", reason="plain_http") == 1
        assert router.metric("requests_total", code="400") == 1
        assert (await router.management.get("/ready")).status_code == 200


async def test_a_clients_certificate_names_its_tenant_whatever_its_headers_say(
    start_router: StartRouter, tmp_path: Path
) -> None:
    write(tmp_path, CA.issue_cert("localhost"))
    CA.cert_pem.write_to_path(tmp_path / "ca.crt")
    settings = {"tls_cert_path": tmp_path, "tls_client_ca": tmp_path / "ca.crt"}
    async with fake_workers(good) as workers, start_router(workers, **settings) as router:
        seen: list[str] = []
        router.router.recorder.readers.append(lambda record: seen.append(record.route.caller.tenant))
        headers = {"x-llm-d-inference-fairness-id": "another"}
        async with secure_client(router, CA.issue_cert("search", common_name="search")) as client:
            assert (await client.post("/v1/completions", json=BODY, headers=headers)).status_code == 200
        with pytest.raises((httpx.TransportError, ssl.SSLError)):  # httpx leaves alerts that come late as they are
            async with secure_client(router) as client:
                await client.post("/v1/completions", json=BODY)
        assert seen == ["search"]
        await until(lambda: router.metric("tls_handshake_failures_total", reason="client_certificate") == 1)


def test_authorities_for_clients_need_a_certificate_of_the_routers() -> None:
    with pytest.raises(SettingsError, match="--tls-client-ca goes with --tls-cert-path"):
        Settings.load(["--tls-client-ca=ca.crt"])
