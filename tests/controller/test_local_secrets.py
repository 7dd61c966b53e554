"""Secrets of a manifest as files on this machine, and the certificate that local mode makes.

Not covered: that a router serves with them (tests/kvcluster/test_up.py).
"""

from __future__ import annotations

import ipaddress
import ssl

import pytest
from cryptography import x509

from controller.api.fields import cluster_only_in
from controller.local.desired_processes import LocalModeError, speaks_tls
from controller.local.secrets import Secrets, make_certificate, with_secrets
from runtime.tls import CertificateFiles

ROUTER = {
    "auth": {"keysSecretRef": {"name": "api-keys", "key": "keys.yaml"}},
    "tls": {"secretRef": {"name": "llm-tls"}, "clientCASecretRef": {"name": "clients"}},
    "env": [{"name": "ROUTER_API_KEYS_FILE", "value": "another"}],
}


@pytest.fixture
def folder(tmp_path):
    """A folder with every Secret that `ROUTER` names."""
    for path in ("api-keys/keys.yaml", "llm-tls/tls.crt", "llm-tls/tls.key", "clients/ca.crt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("")
    return tmp_path


def variables(manifest):
    return {each.name: each.value for each in manifest.spec.router.env}


def test_secrets_become_files_and_nothing_of_them_is_ignored(make_manifest, folder):
    manifest = with_secrets(make_manifest(router=ROUTER), Secrets(folder))
    assert variables(manifest) == {
        "ROUTER_API_KEYS_FILE": str(folder / "api-keys" / "keys.yaml"),
        "ROUTER_TLS_CERT_PATH": str(folder / "llm-tls"),
        "ROUTER_TLS_CLIENT_CA": str(folder / "clients" / "ca.crt"),
    }
    assert cluster_only_in(manifest) == []
    assert speaks_tls(manifest)


def test_without_a_folder_they_stay_for_a_cluster(make_manifest):
    manifest = make_manifest(router=ROUTER)
    assert with_secrets(manifest, Secrets()) is manifest
    assert cluster_only_in(manifest) == ["spec.router.auth", "spec.router.tls"]
    assert not speaks_tls(manifest)


def test_a_certificate_that_was_made_takes_the_place_of_the_manifests(make_manifest, folder, tmp_path):
    (folder / "llm-tls" / "tls.crt").unlink()
    made = make_certificate(tmp_path / "made")
    manifest = with_secrets(make_manifest(router=ROUTER), Secrets(folder, made))
    assert variables(manifest)["ROUTER_TLS_CERT_PATH"] == str(made)
    assert "ROUTER_TLS_CLIENT_CA" in variables(manifest)
    plain = with_secrets(make_manifest(), Secrets(None, made))
    assert variables(plain) == {"ROUTER_TLS_CERT_PATH": str(made)}


@pytest.mark.parametrize(
    ("missing", "field"),
    [
        ("api-keys/keys.yaml", "spec.router.auth.keysSecretRef"),
        ("llm-tls/tls.key", "spec.router.tls.secretRef"),
        ("clients/ca.crt", "spec.router.tls.clientCASecretRef"),
    ],
)
def test_what_is_missing_is_named_with_its_field(make_manifest, folder, missing, field):
    (folder / missing).unlink()
    with pytest.raises(LocalModeError, match=f"{field}: there is no file .*/{missing}: --secrets names a folder"):
        with_secrets(make_manifest(router=ROUTER), Secrets(folder))


def test_a_certificate_that_was_made_is_one_of_this_machine_that_clients_can_trust(tmp_path):
    folder = make_certificate(tmp_path / "made")
    assert (folder / "tls.key").stat().st_mode & 0o077 == 0
    certificate = x509.load_pem_x509_certificate((folder / "tls.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert ipaddress.ip_address("127.0.0.1") in names.get_values_for_type(x509.IPAddress)
    client, server = ssl.create_default_context(cafile=folder / "tls.crt"), CertificateFiles(folder).context
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # the default of later versions of Python
    handshake(client, server)


def handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> None:
    """Raises `ssl.SSLError` where one of the two refuses the other."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(back, there, server_hostname="127.0.0.1"),
        server.wrap_bio(there, back, server_side=True),
    )
    done = set()
    for _ in range(10):
        for end in ends:
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                continue
    assert len(done) == len(ends)
