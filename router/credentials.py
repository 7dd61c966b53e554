"""What a router asks of its clients and what it proves to them, made from its settings: API keys and certificates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from router.metrics import Metrics
from router.server.key_file import KeyFile, KeyFileError
from router.settings import Settings
from runtime.http.tokens import TokenFile, TokenFileError
from runtime.settings import SettingsError
from runtime.tls import CertificateFiles, TlsError
from runtime.tls_listener import TlsPort


def key_file(settings: Settings, clock: Callable[[], float]) -> KeyFile | None:
    """The API keys that the settings name; None: none are asked for. Raises `SettingsError`."""
    if settings.api_keys_file is None:
        return None
    try:
        return KeyFile(settings.api_keys_file, clock)
    except KeyFileError as error:
        raise SettingsError(f"--api-keys-file {settings.api_keys_file} cannot be used: {error}") from None


def token_file(settings: Settings) -> TokenFile | None:
    """The tokens of the management port; None: none is asked for. Raises `SettingsError`."""
    if settings.management_token_file is None:
        return None
    try:
        return TokenFile(settings.management_token_file)
    except TokenFileError as error:
        file = settings.management_token_file
        raise SettingsError(f"--management-token-file {file} cannot be used: {error}") from None


def certificate_files(
    port: str, flag: str, path: Path | None, metrics: Metrics, client_ca: Path | None = None
) -> CertificateFiles | None:
    """The certificate in the directory that `flag` names, whose state `metrics` show for this port; None: there is
    none. Raises `SettingsError`."""
    if path is None:
        return None
    try:
        files = CertificateFiles(path, client_ca)
    except TlsError as error:
        raise SettingsError(f"{flag}: {error}") from None
    metrics.certificate_expires.labels(port).set_function(lambda: files.expires)
    metrics.certificate_unusable.labels(port).set_function(lambda: bool(files.problem))
    return files


def tls_port(files: CertificateFiles | None, settings: Settings, metrics: Metrics) -> TlsPort | None:
    """How the data port speaks TLS with this certificate; None without one."""
    if files is None:
        return None
    return TlsPort(
        lambda: files.context,
        settings.tls_handshake_timeout,
        settings.tls_max_handshakes,
        on_done=lambda version: metrics.tls_handshakes.labels(version).inc(),
        on_failure=lambda failure: metrics.tls_failures.labels(failure.value).inc(),
    )
