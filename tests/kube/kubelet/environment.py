"""A container's command and environment from its spec, as the kubelet builds them. Pure.

Played: values, fields of the pod, whole ConfigMaps. Checked by `test_container_rules.py`, and against what the same
pods find under Kubernetes 1.36 and containerd 1.6. Not played, and refused: single keys of ConfigMaps and Secrets
(`pod.py`), references to other variables, labels and annotations, names of Services.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Data = Mapping[str, Mapping[str, str]]
"""The data of the ConfigMaps of the pod's namespace, by name."""


class ConfigError(ValueError):
    """The container cannot be configured (yet); the message is the kubelet's."""


def references(container: Mapping[str, Any]) -> list[str]:
    """The ConfigMaps that a container's environment reads."""
    return [source["configMapRef"]["name"] for source in container.get("envFrom") or ()]


def container_env(container: Mapping[str, Any], pod: Mapping[str, Any], data: Data) -> dict[str, str]:
    """What the spec sets: `envFrom` first, then `env`. `data` has what `references` names, as far as it exists.

    Raises `ConfigError`.
    """
    env: dict[str, str] = {}
    for name in references(container):
        if name not in data:
            raise ConfigError(f'configmap "{name}" not found')
        env.update(data[name])
    for variable in container.get("env") or ():
        field = (variable.get("valueFrom") or {}).get("fieldRef")
        env[variable["name"]] = _field(pod, field["fieldPath"]) if field else _plain(variable.get("value", ""))
    return env


def _field(pod: Mapping[str, Any], path: str) -> str:
    metadata, spec, status = pod["metadata"], pod["spec"], pod.get("status", {})
    fields = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "metadata.uid": metadata["uid"],
        "spec.nodeName": spec.get("nodeName", ""),
        "status.podIP": status.get("podIP", ""),
        "status.hostIP": status.get("hostIP", ""),
    }
    if path not in fields:
        raise ConfigError(f"the fake node knows no field {path}")
    return str(fields[path])


def _plain(text: str) -> str:
    """The text itself. Raises `ConfigError` where the kubelet would replace a reference in it."""
    if "$(" in text or "$$" in text:
        raise ConfigError(f"the fake node replaces no references to variables: {text}")
    return text


def command_line(container: Mapping[str, Any]) -> list[str]:
    """`command` and `args`. Raises `ConfigError` without a command: images have no entrypoint here."""
    if not container.get("command"):
        raise ConfigError(
            f"container {container['name']} has no command, and the fake node knows no image's entrypoint"
        )
    return [_plain(part) for part in (*container["command"], *(container.get("args") or ()))]


def addresses(ip: str) -> dict[str, str]:
    """Settings that make the processes of a pod listen on its address only."""
    hosts = ("WORKER_HOST", "ROUTER_HOST", "ROUTER_MANAGEMENT_HOST", "AGENT_HOST")
    controller = ("CONTROLLER_HOST", "CONTROLLER_HEALTH_HOST", "CONTROLLER_METRICS_HOST")
    return dict.fromkeys((*hosts, *controller, "MINIATURE_HOST"), ip)


def at_home(text: str, ip: str) -> str:
    """What a container says of 127.0.0.1, or of all addresses, means its own pod, which has no network of its own here
    but an address."""
    return text.replace("127.0.0.1", ip).replace("0.0.0.0", ip)


def local_command(argv: Sequence[str], python: str) -> list[str]:
    """The command with the image's `python` replaced by the interpreter of this machine."""
    return [python if argv[0] in ("python", "python3") else argv[0], *argv[1:]]
