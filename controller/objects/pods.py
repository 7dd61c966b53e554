"""What the pods of both components have in common: the pod template, containers that run our modules, probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from controller.api.common import EnvVar, Placement, Resources
from controller.api.model import SCRATCH_VOLUME
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

SCRATCH_MOUNT: Object = {"name": SCRATCH_VOLUME, "mountPath": "/tmp"}  # noqa: S108  a volume of the pod's own
"""The one writable folder of a container with a read-only root."""

SHUTDOWN_MARGIN = 10
"""Seconds between the end of a process's drain and SIGKILL: time to close what is open and to exit."""

PROCESS_START_SECONDS = 3
"""What our processes take to start, several at once on two cores: an earlier probe would only record a failure."""


def build_pod_template(
    cluster: Cluster,
    component: Component,
    placement: Placement,
    *,
    containers: Sequence[Object],
    init_containers: Sequence[Object] = (),
    volumes: Sequence[Object] = (),
    scrape_port: int,
    grace_seconds: float,
    automount_token: bool,
    service_account: str | None = None,
    runtime_class: str | None = None,
    security_context: Mapping[str, object] | None = None,
    files: Mapping[str, str] | None = None,
) -> Object:
    """The pod template of a component's Deployment. A change of its settings, or of its configuration `files` by name,
    rolls the pods.

    `volumes` are added to the scratch volume and the model's, `grace_seconds` is the time from SIGTERM to SIGKILL,
    `automount_token` says whether the pod gets the token of its service account, and `security_context` is the pod's,
    not the containers'.
    """
    spec: Object = {
        "containers": list(containers),
        # A Service called "router" in the namespace would set ROUTER_PORT for every pod.
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": int(grace_seconds),
        "topologySpreadConstraints": placement.topology_spread_constraints or [_spread_over_nodes(cluster, component)],
        "volumes": [{"name": SCRATCH_VOLUME, "emptyDir": {}}, *cluster.spec.model.volumes, *volumes],
        "automountServiceAccountToken": automount_token,
    }
    tolerations = [toleration.model_dump(by_alias=True, exclude_none=True) for toleration in placement.tolerations]
    pull_secrets = dict.fromkeys((*cluster.release.image_pull_secrets, *cluster.spec.engine.image_pull_secrets))
    optional = {
        "initContainers": list(init_containers),
        "serviceAccountName": service_account,
        "runtimeClassName": runtime_class,
        "securityContext": security_context,
        "nodeSelector": placement.node_selector,
        "tolerations": tolerations,
        "affinity": placement.affinity,
        "priorityClassName": placement.priority_class_name,
        "imagePullSecrets": [{"name": name} for name in pull_secrets],
    }
    metadata = placement.pod_metadata
    return {
        "metadata": {
            # Ours win: selectors need the labels, and a change of the settings rolls the pods by the annotation.
            "labels": metadata.labels | cluster.labels(component),
            "annotations": (
                _scrape_annotations(cluster, scrape_port)
                | metadata.annotations
                | {CONFIG_HASH: digest(settings(cluster, component) | dict(files or {}))}
            ),
        },
        "spec": spec | {name: value for name, value in optional.items() if value},
    }


def build_container(
    cluster: Cluster,
    component: Component,
    *,
    name: str,
    module: str,
    image: str | None,
    pull_policy: str | None,
    ports: Mapping[str, int],
    args: Sequence[str] = (),
    env: Sequence[Object] = (),
    probes: Mapping[str, Object] | None = None,
    resources: Mapping[str, object] | None = None,
    volume_mounts: Sequence[Object] = (),
    security_context: Mapping[str, object] | None = None,
    restart_policy: str | None = None,
) -> Object:
    """A container that runs one of our modules with the settings of its component's ConfigMap.

    `image` None is the release's own. `volume_mounts` are added to the scratch folder and the model's; what
    `security_context` states wins over `RESTRICTED`. A `restart_policy` makes an init container a sidecar (KEP-753).
    """
    optional = {
        "args": list(args),
        "env": list(env),
        "resources": resources,
        "restartPolicy": restart_policy,
        **(probes or {}),
    }
    return {
        "name": name,
        **image_fields(cluster, image, pull_policy),
        "command": ["python", "-m", module],
        "envFrom": [{"configMapRef": {"name": cluster.object_name(component)}}],
        "ports": container_ports(ports),
        "securityContext": RESTRICTED | dict(security_context or {}),
        "volumeMounts": [SCRATCH_MOUNT, *cluster.spec.model.volume_mounts, *volume_mounts],
        **{field: value for field, value in optional.items() if value},
    }


def build_probes(port: str, *, readiness: str, liveness: str, startup: Object) -> dict[str, Object]:
    """The three probes of a container: paths of the first two at a named port, and the startup probe as a whole."""
    return {
        "readinessProbe": build_probe(readiness, port, period=2, failures=2),
        "livenessProbe": build_probe(liveness, port, period=10, failures=6, timeout=5),
        "startupProbe": startup,
    }


def build_startup_probe(path: str, port: str, *, timeout: int = 2) -> Object:
    """The startup probe of one of our own processes, which has two minutes until it listens."""
    return build_probe(path, port, period=1, failures=120, timeout=timeout, delay=PROCESS_START_SECONDS)


def build_probe(path: str, port: str, *, period: int, failures: int, timeout: int = 2, delay: int = 0) -> Object:
    """An HTTP probe that acts after `failures` in a row. `period`, `timeout` and the initial `delay` in seconds."""
    return {
        **({"initialDelaySeconds": delay} if delay else {}),
        "httpGet": {"path": path, "port": port},
        "periodSeconds": period,
        "failureThreshold": failures,
        "timeoutSeconds": timeout,
    }


def container_ports(ports: Mapping[str, int]) -> list[Object]:
    """A container's ports, by name."""
    return [{"name": name, "containerPort": port, "protocol": "TCP"} for name, port in ports.items()]


def image_fields(cluster: Cluster, image: str | None, pull_policy: str | None) -> Object:
    """`image` and `imagePullPolicy` of a container. The release's pull policy is for the release's own image only."""
    policy = pull_policy or (cluster.release.image_pull_policy if image is None else None)
    return {"image": image or cluster.release.image} | ({"imagePullPolicy": policy} if policy else {})


def container_resources(wanted: Resources) -> Object:
    """`resources` of a container: requests and limits, where any are given."""
    amounts = wanted.model_dump(by_alias=True)
    return {kind: each for kind, each in amounts.items() if each}


def container_env(shared: Sequence[EnvVar], own: Sequence[EnvVar] = ()) -> list[Object]:
    """`env` of a container: variables that it shares with others, and its own, which win."""
    names = {variable.name for variable in own}
    variables = [*(variable for variable in shared if variable.name not in names), *own]
    return [
        {"name": variable.name, "value": variable.value}
        if variable.value_from is None
        else {"name": variable.name, "valueFrom": variable.value_from}
        for variable in variables
    ]


def pod_field_variable(name: str, field: str) -> Object:
    """An environment variable with a field of the pod as its value (`metadata.name`, `status.podIP`)."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": field}}}


def ip_families(cluster: Cluster) -> Object:
    """`ipFamilyPolicy` and `ipFamilies` of a Service, where the spec states them."""
    network = cluster.spec.network
    policy = {} if network.ip_family_policy is None else {"ipFamilyPolicy": network.ip_family_policy}
    return {**policy, **({"ipFamilies": list(network.ip_families)} if network.ip_families else {})}


def _spread_over_nodes(cluster: Cluster, component: Component) -> Object:
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
