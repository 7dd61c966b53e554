"""Certificates: one that is read from a directory again when it changes, or one that a process signs itself."""

from __future__ import annotations

import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple, Protocol

from runtime.logs import EventLogger

logger = EventLogger(__name__)

CERTIFICATE, KEY = "tls.crt", "tls.key"
"""Files of a Secret of type `kubernetes.io/tls`."""
SELF_SIGNED_YEARS = 10


class TlsError(ValueError):
    """The certificate or its key cannot be used; the message says which file, why, and what to do."""


class KeyPair(NamedTuple):
    """A chain of certificates and its private key, in PEM."""

    certificate: bytes
    key: bytes


class Certificates(Protocol):
    """Where a server finds its certificate at each handshake."""

    def current(self) -> KeyPair: ...


class SelfSigned:
    """A certificate for a process whose clients do not check it, as gateways do not check an endpoint picker's."""

    def __init__(self, name: str = "kvcluster") -> None:
        self._pair = self_signed(name)

    def current(self) -> KeyPair:
        return self._pair


def self_signed(name: str) -> KeyPair:
    """A new key (ECDSA P-256) and a certificate that it signs itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=365 * SELF_SIGNED_YEARS))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return KeyPair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


class CertificateFiles:
    """`tls.crt` and `tls.key` of a directory. A pair that cannot be used replaces none: the last good one is kept."""

    def __init__(self, path: Path) -> None:
        """Raises `TlsError`."""
        self._path = path
        self._lock = threading.Lock()
        self._stamp = self._stat()
        self._pair = self._read()

    def current(self) -> KeyPair:
        """The pair, read again if a file has changed. May be called from any thread."""
        with self._lock:
            try:
                stamp = self._stat()
                if stamp != self._stamp:
                    self._pair = self._read()
                    self._stamp = stamp
                    logger.info("certificate_reloaded", path=str(self._path))
            except TlsError as error:
                logger.warning("certificate_not_reloaded", why=str(error))
            return self._pair

    def _stat(self) -> tuple[tuple[int, int, int], ...]:
        """What changes when a file does; a Secret's files are links to others that replace them."""
        try:
            stats = [(self._path / name).stat() for name in (CERTIFICATE, KEY)]
        except OSError as error:
            raise TlsError(
                f"{error.filename}: {error.strerror}. {self._path} must hold {CERTIFICATE} and {KEY}"
            ) from None
        return tuple((stat.st_mtime_ns, stat.st_ino, stat.st_size) for stat in stats)

    def _read(self) -> KeyPair:
        certificate, key = self._path / CERTIFICATE, self._path / KEY
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
            return KeyPair(certificate.read_bytes(), key.read_bytes())
        except (ssl.SSLError, OSError) as error:
            raise TlsError(f"{certificate} and {key} are no certificate and its key in PEM: {error}") from None
