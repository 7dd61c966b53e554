"""Certificates: those that are read from files again when they change, or one that a process signs itself."""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

from runtime.logs import EventLogger

logger = EventLogger(__name__)

CERTIFICATE, KEY = "tls.crt", "tls.key"
"""Files of a Secret of type `kubernetes.io/tls`."""
SELF_SIGNED_YEARS = 10
_READS = 3
"""Attempts to read files that are replaced meanwhile."""


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


def self_signed(
    name: str,
    valid: timedelta = timedelta(days=365 * SELF_SIGNED_YEARS),
    addresses: Sequence[IPv4Address | IPv6Address] = (),
) -> KeyPair:
    """A new key (ECDSA P-256) and a certificate that it signs itself, for this host and these addresses. Raises
    `ImportError` without the package cryptography."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    names = [x509.DNSName(name), *map(x509.IPAddress, addresses)]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + valid) - timedelta(hours=1))
        .not_valid_after(now + valid)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return KeyPair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


class _Loaded(NamedTuple):
    """What the files held when they were read."""

    pair: KeyPair
    context: ssl.SSLContext
    expires: float


class CertificateFiles:
    """`tls.crt` and `tls.key` of a directory, and optionally a file with the authorities of clients' certificates.

    Files that cannot be used replace nothing: the last good ones stay. All methods may be called from any thread.
    """

    def __init__(self, path: Path, client_ca: Path | None = None) -> None:
        """Raises `TlsError`."""
        self._path = path
        self._files = [path / CERTIFICATE, path / KEY, *([client_ca] if client_ca is not None else [])]
        self._lock = threading.Lock()
        self._stamp = self._stat()
        self._loaded = self._load()
        self.problem = ""
        """Why the files as they are now cannot be used; empty: they are used."""

    @property
    def context(self) -> ssl.SSLContext:
        """How a server is to shake hands now: TLS 1.2 or later, and with a certificate of the client if there are
        authorities for them."""
        return self._loaded.context

    @property
    def expires(self) -> float:
        """Unix time at which the certificate in use ends, or one of its chain."""
        return self._loaded.expires

    def current(self) -> KeyPair:
        """The certificate and its key, read again if a file has changed."""
        self.refresh()
        return self._loaded.pair

    async def follow(self, interval: float = 1.0) -> None:
        """Look for changes again and again; `interval` in seconds."""
        while True:
            await asyncio.sleep(interval)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        """Read the files again if one has changed."""
        with self._lock:
            try:
                stamp = self._stat()
                if stamp != self._stamp or self.problem:
                    self._loaded = self._load()
                    self._stamp, self.problem = stamp, ""
                    logger.info("certificate_reloaded", path=str(self._path), expires=_day(self._loaded.expires))
            except TlsError as error:
                if str(error) != self.problem:
                    self.problem = str(error)
                    logger.error("certificate_not_reloaded", why=self.problem)

    def _stat(self) -> list[tuple[int, int, int]]:
        """What changes when a file does; a Secret's files are links to others that replace them."""
        try:
            stats = [file.stat() for file in self._files]
        except OSError as error:
            raise _unreadable(error) from None
        return [(stat.st_mtime_ns, stat.st_ino, stat.st_size) for stat in stats]

    def _load(self) -> _Loaded:
        """Raises `TlsError`. Files that were replaced between the reading of the first and of the last are read again:
        a certificate and the key of another would be the result."""
        for _ in range(_READS):
            before = self._read()
            try:
                loaded = self._parse(before)
            except TlsError:
                if self._read() == before:
                    raise
            else:
                if self._read() == before:
                    return loaded
        raise TlsError(f"{self._path} changes while it is read")

    def _read(self) -> list[bytes]:
        try:
            return [file.read_bytes() for file in self._files]
        except OSError as error:
            raise _unreadable(error) from None

    def _parse(self, contents: list[bytes]) -> _Loaded:
        certificate, key, *authorities = contents
        expires = _judge(self._files[0], certificate)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._files[0], self._files[1], self._no_password)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise TlsError(
                    f"{self._files[1]} is not the key of the first certificate in {self._files[0]}"
                ) from None
            raise TlsError(f"{self._files[1]} is no private key in PEM ({error.reason or error})") from None
        except OSError as error:
            raise _unreadable(error) from None
        for authority in authorities:
            try:
                context.load_verify_locations(cadata=authority.decode("ascii"))
            except (ssl.SSLError, ValueError):
                raise TlsError(f"{self._files[2]} holds no certificates in PEM") from None
            context.verify_mode = ssl.CERT_REQUIRED
            # A session that is resumed is not verified again, whatever has become of the authorities meanwhile.
            context.options |= ssl.OP_NO_TICKET
            context.num_tickets = 0
        return _Loaded(KeyPair(certificate, key), context, expires)

    def _no_password(self) -> NoReturn:
        raise TlsError(f"{self._files[1]} is encrypted: store the key without a password")


def _judge(file: Path, certificate: bytes) -> float:
    """When a chain of certificates ends, as Unix time. Raises `TlsError` for one that is not valid now."""
    try:
        from cryptography import x509
    except ImportError:
        raise TlsError("TLS needs the package cryptography: pip install 'kvcluster[tls]'") from None
    try:
        chain = x509.load_pem_x509_certificates(certificate)
    except ValueError:
        raise TlsError(f"{file} holds no certificate in PEM") from None
    begins = max(each.not_valid_before_utc.timestamp() for each in chain)
    expires = min(each.not_valid_after_utc.timestamp() for each in chain)
    now = time.time()
    if now >= expires:
        raise TlsError(f"{file} has expired on {_day(expires)}: renew the certificate")
    if now < begins:
        raise TlsError(f"{file} is not valid before {_day(begins)}: is this machine's clock right?")
    return expires


def _day(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")


def _unreadable(error: OSError) -> TlsError:
    return TlsError(f"{error.filename}: {error.strerror}. A directory with {CERTIFICATE} and {KEY} is needed")
