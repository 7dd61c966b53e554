"""The files that a certificate is read from.

Covers: what is wrong with them, in words, and what happens when they change. Not covered: handshakes
(tests/runtime/http/test_tls.py), gRPC (tests/router/picker/test_server.py).
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from runtime.tls import CertificateFiles, KeyPair, TlsError, self_signed

PAIR = self_signed("a")


def write(folder: Path, pair: KeyPair = PAIR) -> None:
    (folder / "tls.crt").write_bytes(pair.certificate)
    (folder / "tls.key").write_bytes(pair.key)


def encrypted(folder: Path) -> None:
    key = load_pem_private_key(PAIR.key, None)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password"))
    write(folder, KeyPair(PAIR.certificate, pem))


def without_ca(folder: Path) -> None:
    write(folder)
    (folder / "ca.crt").write_bytes(b"")


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        pytest.param(lambda _: None, r"tls\.crt: No such file .* tls\.crt and tls\.key is needed", id="no file"),
        pytest.param(
            lambda folder: write(folder, KeyPair(PAIR.certificate, self_signed("b").key)),
            r"tls\.key is not the key of the first certificate in .*tls\.crt",
            id="the key of another",
        ),
        pytest.param(
            lambda folder: write(folder, KeyPair(b"secret", PAIR.key)), r"tls\.crt holds no cert", id="no certificate"
        ),
        pytest.param(
            lambda folder: write(folder, KeyPair(PAIR.certificate, b"secret")), r"tls\.key is no private", id="no key"
        ),
        pytest.param(encrypted, r"tls\.key is encrypted: store the key without", id="a key with a password"),
        pytest.param(
            lambda folder: write(folder, self_signed("a", timedelta(days=-1))), "has expired on .* renew", id="expired"
        ),
        pytest.param(without_ca, r"ca\.crt holds no certificates", id="no authorities"),
    ],
)
def test_files_that_cannot_be_used_are_explained(tmp_path: Path, prepare: Callable[[Path], None], says: str) -> None:
    prepare(tmp_path)
    authorities = tmp_path / "ca.crt"
    with pytest.raises(TlsError, match=says) as raised:
        CertificateFiles(tmp_path, authorities if authorities.exists() else None)
    assert "secret" not in str(raised.value).replace(str(tmp_path), "")


def test_a_changed_pair_is_used_and_a_broken_one_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path)
    files = CertificateFiles(tmp_path)
    first = files.context
    files.refresh()
    assert files.context is first
    second = self_signed("a", timedelta(days=1))
    write(tmp_path, second)
    assert files.current() == second
    assert files.context is not first
    assert files.context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert files.expires < CertificateFiles(tmp_path).expires + 1
    used = files.context
    (tmp_path / "tls.key").write_bytes(PAIR.key)
    for _ in range(3):
        assert files.current() == second
    assert "is not the key" in files.problem
    assert [record.message for record in caplog.records].count("certificate_not_reloaded") == 1
    write(tmp_path)
    files.refresh()
    assert (files.problem, files.context is used) == ("", False)


def test_a_certificate_is_never_paired_with_the_key_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As kubelet does it: a link leads to another folder between two reads."""
    second = self_signed("b")
    for name, pair in (("first", PAIR), ("second", second)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, pair)
    link = tmp_path / "link"
    link.symlink_to("first")
    read, reads = Path.read_bytes, []

    def replacing(path: Path) -> bytes:
        content = read(path)
        reads.append(path)
        if len(reads) == 1:
            (tmp_path / "new").symlink_to("second")
            (tmp_path / "new").replace(link)
        return content

    monkeypatch.setattr(Path, "read_bytes", replacing)
    assert CertificateFiles(link).current() == second
