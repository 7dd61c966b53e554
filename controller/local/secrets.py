"""The Secrets that a manifest names, as folders on this machine."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from controller.api.common import EnvVar
from controller.api.exposure import Auth, Tls
from controller.api.model import KVCluster
from controller.local.desired_processes import LocalModeError
from controller.local.envoy import API_KEYS, CERTIFICATE, CLIENT_CA
from runtime.tls import CERTIFICATE as CERTIFICATE_FILE
from runtime.tls import KEY as KEY_FILE
from runtime.tls import self_signed

LOCAL_NAME = "localhost"
LOCAL_ADDRESSES = (ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1"))
"""Whom a certificate for this machine names."""


@dataclass(frozen=True, slots=True)
class Secrets:
    """A folder with a folder for each Secret, which has a file for each of its keys, as Kubernetes mounts them; and a
    folder with a certificate that takes the place of the manifest's. None: there is none."""

    folder: Path | None = None
    certificate: Path | None = None


def with_secrets(manifest: KVCluster, secrets: Secrets) -> KVCluster:
    """The manifest with what its routers' API keys and certificates are for local processes: variables that name files.
    Without the folder, what needs it stays as it is, for a cluster. Raises `LocalModeError` for a file that is missing.
    """
    router = manifest.spec.router
    variables: dict[str, Path] = {}
    changed: dict[str, object] = {}
    if secrets.certificate is not None:
        variables[CERTIFICATE] = secrets.certificate
        changed["tls"] = Tls()
    if secrets.folder is not None:
        if (keys := router.auth.keys_secret_ref) is not None:
            variables[API_KEYS] = _file(secrets.folder, "spec.router.auth.keysSecretRef", keys.name, keys.key)
            changed["auth"] = Auth()
        if (own := router.tls.secret_ref) is not None and secrets.certificate is None:
            for name in (CERTIFICATE_FILE, KEY_FILE):
                variables[CERTIFICATE] = _file(secrets.folder, "spec.router.tls.secretRef", own.name, name).parent
            changed["tls"] = Tls()
        if (authorities := router.tls.client_ca_secret_ref) is not None:
            where = "spec.router.tls.clientCASecretRef"
            variables[CLIENT_CA] = _file(secrets.folder, where, authorities.name, authorities.key)
    if not variables:
        return manifest
    env = [*router.env, *(EnvVar(name=name, value=str(path)) for name, path in variables.items())]
    of_routers = router.model_copy(update={**changed, "env": env})
    return manifest.model_copy(update={"spec": manifest.spec.model_copy(update={"router": of_routers})})


def _file(folder: Path, field: str, secret: str, key: str) -> Path:
    path = (folder / secret / key).absolute()
    if not path.is_file():
        hint = ", or let --self-signed make a certificate" if key in (CERTIFICATE_FILE, KEY_FILE) else ""
        raise LocalModeError(
            f"{field}: there is no file {path}: --secrets names a folder with a folder for each Secret, which has a "
            f"file for each of its keys{hint}"
        )
    return path


def make_certificate(folder: Path) -> Path:
    """A new certificate for this machine, and its key, in this folder; clients trust it by its own file. Raises
    `LocalModeError` where the library for it is missing."""
    try:
        pair = self_signed(LOCAL_NAME, addresses=LOCAL_ADDRESSES)
    except ImportError:
        raise LocalModeError("--self-signed needs the package cryptography: pip install 'kvcluster[tls]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CERTIFICATE_FILE).write_bytes(pair.certificate)
    with open(folder / KEY_FILE, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write(pair.key)
    return folder.absolute()
