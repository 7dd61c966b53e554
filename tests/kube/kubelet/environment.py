"""A container's command and environment from its spec, as the kubelet builds them. Pure."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

_REFERENCE = re.compile(r"\$(?:\$|\(([^()]*)\))")
_KEYED = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")

Data = Mapping[tuple[str, str], Mapping[str, str]]
"""The data of the pod's namespace by (kind, name), kind being ConfigMap or Secret."""


class ConfigError(ValueError):
    """The container cannot be configured (yet); the message is the kubelet's."""


def references(container: Mapping[str, Any]) -> set[tuple[str, str]]:
    """The ConfigMaps and Secrets a container's environment reads, as (kind, name)."""
    found = set()
    for source in container.get("envFrom") or ():
        for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
            if field in source:
                found.add((kind, source[field]["name"]))
    for variable in container.get("env") or ():
        for field, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
            if field in (variable.get("valueFrom") or {}):
                found.add((kind, variable["valueFrom"][field]["name"]))
    return found


def container_env(container: Mapping[str, Any], pod: Mapping[str, Any], data: Data) -> dict[str, str]:
    """What the spec sets: `envFrom` first, then `env`, which may refer to all that was set before it.

    `data` has what `references` names, as far as it exists. Raises `ConfigError`.
    """
    env: dict[str, str] = {}
    for source in container.get("envFrom") or ():
        for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
            if field not in source:
                continue
            values = _values(data, kind, source[field])
            env.update({source.get("prefix", "") + key: value for key, value in values.items()})
    for variable in container.get("env") or ():
        value = _value(variable, pod, data, env)
        if value is not None:
            env[variable["name"]] = value
    return env


def _value(variable: Mapping[str, Any], pod: Mapping[str, Any], data: Data, env: Mapping[str, str]) -> str | None:
    source = variable.get("valueFrom")
    if not source:
        return expand(variable.get("value", ""), env)
    if "fieldRef" in source:
        return _field(pod, source["fieldRef"]["fieldPath"])
    for field, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
        if field in source:
            reference = source[field]
            values, key = _values(data, kind, reference), reference["key"]
            if key not in values and not reference.get("optional"):
                namespace = pod["metadata"]["namespace"]
                raise ConfigError(f"couldn't find key {key} in {kind} {namespace}/{reference['name']}")
            return values.get(key)
    raise ConfigError(f"the fake node knows no {next(iter(source))} (variable {variable['name']})")


def _values(data: Data, kind: str, reference: Mapping[str, Any]) -> Mapping[str, str]:
    found = data.get((kind, reference["name"]))
    if found is None and not reference.get("optional"):
        raise ConfigError(f'{kind.lower()} "{reference["name"]}" not found')
    return found or {}


def _field(pod: Mapping[str, Any], path: str) -> str:
    metadata, spec, status = pod["metadata"], pod["spec"], pod.get("status", {})
    if keyed := _KEYED.fullmatch(path):
        return str((metadata.get(keyed[1]) or {}).get(keyed[2], ""))
    fields = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "metadata.uid": metadata["uid"],
        "spec.nodeName": spec.get("nodeName", ""),
        "spec.serviceAccountName": spec.get("serviceAccountName", "default"),
        "status.podIP": status.get("podIP", ""),
        "status.podIPs": status.get("podIP", ""),
        "status.hostIP": status.get("hostIP", ""),
    }
    if path not in fields:
        raise ConfigError(f"the fake node knows no field {path}")
    return str(fields[path])


def expand(text: str, env: Mapping[str, str]) -> str:
    """`$(NAME)` becomes its value, stays as it is when there is none, and `$$` becomes `$`."""

    def replaced(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return env.get(match[1], match[0])

    return _REFERENCE.sub(replaced, text)


def data_of(kind: str, item: Mapping[str, Any]) -> dict[str, str]:
    """The values of a ConfigMap or a Secret."""
    data = item.get("data") or {}
    return {key: base64.b64decode(value).decode() for key, value in data.items()} if kind == "Secret" else dict(data)


def command_line(container: Mapping[str, Any], env: Mapping[str, str]) -> list[str]:
    """`command` and `args` with references replaced. Raises `ConfigError`: images have no entrypoint here."""
    if not container.get("command"):
        raise ConfigError(
            f"container {container['name']} has no command, and the fake node knows no image's entrypoint"
        )
    return [expand(part, env) for part in (*container["command"], *(container.get("args") or ()))]


def service_env(services: Iterable[Mapping[str, Any]], address: Callable[[Mapping[str, Any]], str]) -> dict[str, str]:
    """Variables that name Services: `REDIS_SERVICE_HOST`, `REDIS_PORT_6379_TCP_ADDR` ... `address` gives the IP."""
    env: dict[str, str] = {}
    for service in services:
        ports = service["spec"].get("ports") or ()
        if service["spec"].get("clusterIP") == "None" or not ports:
            continue
        name, ip = service["metadata"]["name"].upper().replace("-", "_"), address(service)
        env |= {f"{name}_SERVICE_HOST": ip, f"{name}_SERVICE_PORT": str(ports[0]["port"])}
        for port in ports:
            if port.get("name"):
                env[f"{name}_SERVICE_PORT_{port['name'].upper().replace('-', '_')}"] = str(port["port"])
        first = f"{ports[0].get('protocol', 'TCP').lower()}://{ip}:{ports[0]['port']}"
        env[f"{name}_PORT"] = first
        for port in ports:
            protocol = port.get("protocol", "TCP")
            prefix = f"{name}_PORT_{port['port']}_{protocol}"
            env |= {prefix: f"{protocol.lower()}://{ip}:{port['port']}", f"{prefix}_PROTO": protocol.lower()}
            env |= {f"{prefix}_PORT": str(port["port"]), f"{prefix}_ADDR": ip}
    return env


def api_server_service(port: int) -> dict[str, Any]:
    """The Service `kubernetes` of the namespace default, which every pod has in its environment."""
    ports = [{"name": "https", "port": port, "protocol": "TCP"}]
    return {"metadata": {"namespace": "default", "name": "kubernetes"}, "spec": {"ports": ports}}


def addresses(ip: str) -> dict[str, str]:
    """Settings that make the processes of a pod listen on its address only."""
    hosts = ("WORKER_HOST", "ROUTER_HOST", "ROUTER_MANAGEMENT_HOST", "AGENT_HOST")
    controller = ("CONTROLLER_HOST", "CONTROLLER_HEALTH_HOST", "CONTROLLER_METRICS_HOST")
    return dict.fromkeys((*hosts, *controller, "MINIATURE_HOST"), ip)


def at_home(text: str, ip: str) -> str:
    """What a container says of 127.0.0.1 means its own pod, which has no network of its own here but an address."""
    return text.replace("127.0.0.1", ip)


def local_command(argv: Sequence[str], python: str) -> list[str]:
    """The command with the image's `python` replaced by the interpreter of this machine."""
    return [python if argv[0] in ("python", "python3") else argv[0], *argv[1:]]
