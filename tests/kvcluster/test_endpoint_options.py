"""How the commands that send requests show an API key, and whom they trust.

Not covered: that a router asks for keys (tests/router/test_auth.py), and certificates of local mode
(tests/controller/test_local_secrets.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send
from typer.testing import CliRunner

from bench.loadgen import EndpointError, LoadOptions, drive
from bench.workloads import WorkloadSpec, build_workload
from kvcluster.cli import app
from kvcluster.options import API_KEY_VARIABLE, CA_VARIABLE, EndpointOptions, tls_context
from runtime.http.server import HttpServer
from runtime.sockets import listen
from runtime.tls import CertificateFiles, self_signed
from runtime.tls_listener import TlsPort


def test_the_key_of_a_file_or_of_the_environment_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file := tmp_path / "key").write_text(" sk-of-the-file\n")
    assert EndpointOptions().headers() == {}
    monkeypatch.setenv(API_KEY_VARIABLE, "sk-of-the-shell\n")
    assert EndpointOptions().headers() == {"authorization": "Bearer sk-of-the-shell"}
    assert EndpointOptions(api_key_file=file).headers() == {"authorization": "Bearer sk-of-the-file"}
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="does not hold one API key"):
        EndpointOptions(api_key_file=tmp_path / "empty").headers()


@pytest.mark.parametrize(
    "command", [["bench", "https://127.0.0.1:1"], ["metrics"], ["top"], ["route", "a prompt"]], ids=" ".join
)
def test_authorities_that_are_none_are_a_wrong_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    (tmp_path / "ca").write_text("no certificate")
    monkeypatch.setenv(CA_VARIABLE, str(tmp_path / "ca"))
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 2
    assert "it takes certificates in PEM" in ran.output


async def unauthorized(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


async def test_an_endpoint_that_is_not_trusted_or_asks_for_a_key_is_said_with_what_to_do(tmp_path: Path) -> None:
    pair = self_signed("localhost")
    (tmp_path / "tls.crt").write_bytes(pair.certificate)
    (tmp_path / "tls.key").write_bytes(pair.key)
    files = CertificateFiles(tmp_path)
    server = HttpServer(unauthorized, listen("127.0.0.1", 0), tls=TlsPort(lambda: files.context))
    await server.start()
    url, workload = f"https://localhost:{server.port}", build_workload(WorkloadSpec("uniform", limit=1))
    with pytest.raises(EndpointError, match=r"is not trusted .*--ca takes the authorities"):
        await drive(url, workload, LoadOptions(), lambda sent, answered, failed: None)
    trusting = LoadOptions(tls=tls_context(tmp_path / "tls.crt"))
    with pytest.raises(EndpointError, match="asks for an API key: set KVCLUSTER_API_KEY"):
        await drive(url, workload, trusting, lambda sent, answered, failed: None)
    await server.stop(0)
