"""A pod's volumes as folders of this machine, and the token that its service account gets.

Played: emptyDir (of any size), ConfigMaps and Secrets (whole, each key a file, addresses in ConfigMaps as `at_home` has
them; a changed one is written again within a second, where a kubelet takes up to a minute or two; one that is deleted
leaves its files behind), and the files of the ServiceAccount admission (token, namespace, CA certificate), which are
written when a container starts. Checked by `test_pod_surroundings.py`, and, Secrets apart, against what the same pods
find under Kubernetes 1.36 and containerd 1.6. Not played, and refused (`pod.py`): all others, and `items` and
`optional` of ConfigMaps and Secrets. Tokens do not expire.
"""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.kube.kubelet.api import CONFIG_MAPS, SECRETS, SERVICE_ACCOUNTS, Api, Object
from tests.kube.kubelet.environment import ConfigError, at_home
from tests.kube.kubelet.process import TOKEN_MOUNT, Isolation, Mount, token_is_mounted

Tokens = Callable[[str, str], str]
"""The bearer token of a service account: (namespace, name)."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a pod needs to be let in by the API server."""

    token: Tokens
    certificate: bytes
    """Of the authority, PEM: what `ca.crt` holds."""
    url: str
    """Of the API server, for the kubeconfig of a pod that cannot be given files."""


def account_of(api: Api, pod: Object) -> Object:
    """The pod's service account. Raises `ConfigError` when there is none: every namespace has one called default."""
    namespace, name = pod["metadata"]["namespace"], pod["spec"].get("serviceAccountName") or "default"
    found = api.get(SERVICE_ACCOUNTS, (namespace, name))
    if found is None and name != "default":
        raise ConfigError(f'error looking up service account {namespace}/{name}: serviceaccount "{name}" not found')
    return found or {"metadata": {"namespace": namespace, "name": name}}


def is_followed(volume: Mapping[str, Any]) -> bool:
    """Whether the volume's files are those of another object, and change with it."""
    return bool(volume.get("configMap") or volume.get("secret"))


class PodVolumes:
    """The volumes of one pod, below one folder."""

    def __init__(self, folder: Path, api: Api, credentials: Credentials, ip: str) -> None:
        self._folder = folder
        self._ip = ip
        self._api = api
        self._credentials = credentials

    def prepare(self, pod: Object) -> dict[str, Path]:
        """Folders by the name of the volume. What an emptyDir holds stays. Raises `ConfigError` for a missing
        ConfigMap or Secret."""
        found = {}
        for volume in pod["spec"].get("volumes") or ():
            folder = found[volume["name"]] = self._folder / volume["name"]
            folder.mkdir(parents=True, exist_ok=True)
            self._open(folder, (pod["spec"].get("securityContext") or {}).get("fsGroup"))
        self.refresh(pod)
        return found

    def refresh(self, pod: Object) -> None:
        """Write the files of ConfigMaps and Secrets that have changed. Raises `ConfigError` for one that does not
        exist."""
        for volume in pod["spec"].get("volumes") or ():
            if not is_followed(volume):
                continue
            files, folder = self._files(pod["metadata"]["namespace"], volume), self._folder / volume["name"]
            for name, content in files.items():
                file = folder / name
                if not file.exists() or file.read_bytes() != content:
                    written = file.with_name(f"..{name}")
                    written.write_bytes(content)
                    written.replace(file)
            for file in folder.iterdir():
                if file.name not in files:
                    file.unlink()

    def _files(self, namespace: str, volume: Object) -> dict[str, bytes]:
        """What the volume's ConfigMap or Secret holds. Raises `ConfigError`."""
        if (reference := volume.get("secret")) is not None:
            kind, name = SECRETS, reference["secretName"]
        else:
            kind, name = CONFIG_MAPS, volume["configMap"]["name"]
        if (found := self._api.get(kind, (namespace, name))) is None:
            raise ConfigError(f'{kind.name.lower()} "{name}" not found')
        data = found.get("data") or {}
        if kind is SECRETS:
            return {key: base64.b64decode(value) for key, value in data.items()}
        return {key: at_home(value, self._ip).encode() for key, value in data.items()}

    def token(self, pod: Object, isolation: Isolation) -> Path | None:
        """What is mounted at `TOKEN_MOUNT` (or a kubeconfig, where nothing can be mounted); None: no token."""
        account = account_of(self._api, pod)
        if not token_is_mounted(pod, account):
            return None
        namespace, name = pod["metadata"]["namespace"], account["metadata"]["name"]
        token = self._credentials.token(namespace, name)
        folder = self._folder / "kube-api-access"
        folder.mkdir(parents=True, exist_ok=True)
        if isolation is Isolation.FULL:
            files = {"token": token, "namespace": namespace, "ca.crt": self._credentials.certificate.decode()}
            self._write(folder, files)
            return folder
        self._write(folder, {"kubeconfig": _kubeconfig(self._credentials.url, token, namespace)})
        return folder / "kubeconfig"

    @staticmethod
    def _write(folder: Path, files: Mapping[str, str]) -> None:
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")

    @staticmethod
    def _open(folder: Path, group: int | None) -> None:
        if group is not None and os.geteuid() == 0:
            os.chown(folder, -1, group)
        folder.chmod(0o2777 if group is not None else 0o777)

    def remove(self) -> None:
        """With the pod."""
        shutil.rmtree(self._folder, ignore_errors=True)


def mounts_of(container: Mapping[str, Any], volumes: Mapping[str, Path], token: Path | None) -> list[Mount]:
    """Where a container finds its volumes. Raises `ConfigError` for a folder that this machine does not have."""
    found = []
    for each in container.get("volumeMounts") or ():
        target = each["mountPath"]
        if not (target.startswith(("/run/", "/var/run/")) or Path(target).is_dir()):
            # A runtime would make it in the container's own root, which is this machine's here.
            raise ConfigError(f"the fake node mounts volumes where this machine has a folder, and it has no {target}")
        found.append(Mount(volumes[each["name"]], target, bool(each.get("readOnly"))))
    if token is not None and all(each.target != TOKEN_MOUNT for each in found):
        found.append(Mount(token, TOKEN_MOUNT, read_only=True))
    return found


def _kubeconfig(url: str, token: str, namespace: str) -> str:
    config: dict[str, Any] = {
        "apiVersion": "v1", "kind": "Config", "current-context": "pod",
        "clusters": [{"name": "pod", "cluster": {"server": url}}],
        "users": [{"name": "pod", "user": {"token": token}}],
        "contexts": [{"name": "pod", "context": {"cluster": "pod", "user": "pod", "namespace": namespace}}],
    }  # fmt: skip
    text: str = yaml.safe_dump(config)
    return text
