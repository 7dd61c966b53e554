"""What the pods of both components have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from controller.api.kubernetes import Placement
from controller.api.model import SCRATCH_VOLUME, EnvVar
from controller.objects.config import digest, settings
from controller.objects.names import CONFIG_HASH, Cluster, Component, Object

RESTRICTED: Object = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
"""Security context of our own containers: the Pod Security Standard `restricted`, and a read-only root."""

SCRATCH = SCRATCH_VOLUME
"""The one writable folder of a read-only container."""
SCRATCH_MOUNT: Object = {"name": SCRATCH, "mountPath": "/tmp"}  # noqa: S108  a volume of the pod's own


def template(
    cluster: Cluster,
    component: Component,
    placement: Placement,
    containers: list[Object],
    *,
    scrape_port: int,
    grace: float,
    **pod: Any,
) -> Object:
    """A Deployment's pod template. `grace`: seconds from SIGTERM to SIGKILL; `pod`: further fields of the PodSpec."""
    spec: Object = {
        "containers": containers,
        # A Service called "router" in the namespace would set ROUTER_PORT for every pod.
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": int(grace),
        "topologySpreadConstraints": placement.topology_spread_constraints or [_spread(cluster, component)],
        "volumes": [{"name": SCRATCH, "emptyDir": {}}, *cluster.spec.model.volumes, *pod.pop("volumes", [])],
        **pod,
    }
    if placement.node_selector:
        spec["nodeSelector"] = placement.node_selector
    if placement.tolerations:
        spec["tolerations"] = [
            toleration.model_dump(by_alias=True, exclude_none=True) for toleration in placement.tolerations
        ]
    if placement.affinity:
        spec["affinity"] = placement.affinity
    if placement.priority_class_name is not None:
        spec["priorityClassName"] = placement.priority_class_name
    if secrets := dict.fromkeys((*cluster.release.image_pull_secrets, *cluster.spec.engine.image_pull_secrets)):
        spec["imagePullSecrets"] = [{"name": name} for name in secrets]
    metadata = placement.pod_metadata
    return {
        "metadata": {
            # Ours last: selectors and the rolling of pods hang on them.
            "labels": metadata.labels | cluster.labels(component),
            "annotations": (
                _scrape_annotations(cluster, scrape_port)
                | metadata.annotations
                | {CONFIG_HASH: digest(settings(cluster, component))}
            ),
        },
        "spec": spec,
    }


def container(
    cluster: Cluster,
    name: str,
    component: Component,
    module: str,
    *,
    image: str | None,
    pull_policy: str | None,
    ports: dict[str, int],
    **fields: Any,
) -> Object:
    """A container that runs one of our modules with the settings of its component's ConfigMap."""
    return {
        "name": name,
        **image_fields(cluster, image, pull_policy),
        "command": ["python", "-m", module],
        "envFrom": [{"configMapRef": {"name": cluster.object_name(component)}}],
        "ports": container_ports(ports),
        "securityContext": RESTRICTED,
        "volumeMounts": [SCRATCH_MOUNT, *cluster.spec.model.volume_mounts],
        **fields,
    }


def container_ports(ports: dict[str, int]) -> list[Object]:
    """A container's ports by name."""
    return [{"name": name, "containerPort": port, "protocol": "TCP"} for name, port in ports.items()]


def image_fields(cluster: Cluster, image: str | None, pull_policy: str | None) -> Object:
    """The image, and how it is pulled: the installation's own policy is about the installation's own image."""
    policy = pull_policy or (cluster.release.image_pull_policy if image is None else None)
    return {"image": image or cluster.release.image} | ({"imagePullPolicy": policy} if policy else {})


def resources(placement: Placement) -> Object:
    """The container's resources, where any are given."""
    wanted = placement.resources.model_dump(by_alias=True)
    given = {kind: amounts for kind, amounts in wanted.items() if amounts}
    return {"resources": given} if given else {}


START_SECONDS = 3
"""What our processes take to start, several at once on two cores: a probe before would only record a failure."""


def startup_probe(path: str, port: str, *, timeout: int = 2) -> Object:
    """The startup probe of one of our own processes, which gets two minutes until it listens."""
    return probe(path, port, period=1, failures=120, timeout=timeout, delay=START_SECONDS)


def probe(path: str, port: str, *, period: int, failures: int, timeout: int = 2, delay: int = 0) -> Object:
    """An HTTP probe. Seconds."""
    return {
        **({"initialDelaySeconds": delay} if delay else {}),
        "httpGet": {"path": path, "port": port},
        "periodSeconds": period,
        "failureThreshold": failures,
        "timeoutSeconds": timeout,
    }


def variables(env: Iterable[EnvVar]) -> list[Object]:
    """Environment variables as a container has them."""
    return [
        {"name": variable.name, "value": variable.value}
        if variable.value_from is None
        else {"name": variable.name, "valueFrom": variable.value_from}
        for variable in env
    ]


def from_pod(name: str, field: str) -> Object:
    """An environment variable that holds a field of the pod."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": field}}}


def _spread(cluster: Cluster, component: Component) -> Object:
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": cluster.selector(component)},
    }


def _scrape_annotations(cluster: Cluster, port: int) -> dict[str, str]:
    if not cluster.spec.monitoring.scrape_annotations:
        return {}
    return {"prometheus.io/scrape": "true", "prometheus.io/port": str(port), "prometheus.io/path": "/metrics"}


def families(cluster: Cluster) -> Object:
    """The IP families of a Service, where the spec says something of them."""
    network = cluster.spec.network
    policy = {} if network.ip_family_policy is None else {"ipFamilyPolicy": network.ip_family_policy}
    return {**policy, **({"ipFamilies": list(network.ip_families)} if network.ip_families else {})}
