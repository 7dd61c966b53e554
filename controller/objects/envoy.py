"""The Envoy beside each router, where it is the data plane: its configuration, its containers, its volumes."""

from __future__ import annotations

import json

from controller.api.model import ENVOY_CONFIG_VOLUME, ENVOY_VOLUME
from controller.data_plane import data_plane
from controller.objects.config import (
    CLIENT_CA_FILE,
    ENVOY_FOLDER,
    ENVOY_SHARED,
    TLS_FOLDER,
    hold_seconds,
    is_ipv6,
)
from controller.objects.names import (
    ENVOY,
    ENVOY_PORT,
    HTTP,
    MANAGEMENT_PORT,
    ROUTER_PORT,
    Cluster,
    Component,
    Object,
)
from controller.objects.pods import RESTRICTED, build_probe, container_ports, container_resources, image_fields
from runtime.envoy.bootstrap import bootstrap
from runtime.envoy.settings import DataPlane, Tls
from runtime.envoy.tls import secrets

CONFIG_FOLDER = "/run/kvcluster-envoy-config"
BOOTSTRAP_FILE = "bootstrap.json"
START_SECONDS = 60
"""What Envoy may take until it listens."""
SHARED_MOUNT: Object = {"name": ENVOY_VOLUME, "mountPath": ENVOY_FOLDER}


def build_envoy_config_map(cluster: Cluster) -> tuple[Object, ...]:
    """The ConfigMap with Envoy's configuration, where it is the data plane."""
    if not cluster.spec.router.is_behind_envoy:
        return ()
    return ({**cluster.new_object("v1", "ConfigMap", Component.ROUTER, f"-{ENVOY}"), "data": envoy_files(cluster)},)


def envoy_files(cluster: Cluster) -> dict[str, str]:
    """The files of that ConfigMap by name; none without an Envoy."""
    if not cluster.spec.router.is_behind_envoy:
        return {}
    plane = _plane(cluster)
    files = {BOOTSTRAP_FILE: bootstrap(plane)} | ({} if plane.tls is None else secrets(plane.tls))
    return {name: json.dumps(content, indent=1) for name, content in files.items()}


def _plane(cluster: Cluster) -> DataPlane:
    router = cluster.spec.router
    return data_plane(
        cluster.spec,
        ENVOY_SHARED,
        ROUTER_PORT,
        # A kernel without IPv6 has no `::`.
        address="::" if is_ipv6(cluster) else "0.0.0.0",  # noqa: S104  a pod's own addresses
        ready_port=ENVOY_PORT,
        router_port=MANAGEMENT_PORT,
        tls=_tls(cluster),
        asks_for_keys=router.auth.keys_secret_ref is not None,
        holds=hold_seconds(cluster.spec),
    )


def _tls(cluster: Cluster) -> Tls | None:
    wanted = cluster.spec.router.tls
    if wanted.secret_ref is None:
        return None
    authorities = f"{TLS_FOLDER}/{CLIENT_CA_FILE}" if wanted.client_ca_secret_ref is not None else None
    return Tls(TLS_FOLDER, CONFIG_FOLDER, authorities)


def envoy_volumes(cluster: Cluster) -> list[Object]:
    """What the pod's containers share, and Envoy's configuration."""
    return [
        {"name": ENVOY_VOLUME, "emptyDir": {"sizeLimit": "16Mi"}},
        {"name": ENVOY_CONFIG_VOLUME, "configMap": {"name": cluster.object_name(Component.ROUTER, f"-{ENVOY}")}},
    ]


def build_envoy_containers(cluster: Cluster, secret_mounts: list[Object]) -> list[Object]:
    """The init containers of a router pod: one that makes the empty list of workers, without which Envoy does not
    start, and Envoy itself, a native sidecar (KEP-753): it starts before the router and ends after it, when the router
    has waited for the last answer. `secret_mounts`: where it finds its certificate."""
    router, release = cluster.spec.router, cluster.release
    wanted = router.envoy
    image = wanted.image or release.envoy_image
    policy = wanted.image_pull_policy or (release.envoy_image_pull_policy if wanted.image is None else None)
    seed: Object = {
        "name": "endpoints",
        **image_fields(cluster, router.image, router.image_pull_policy),
        "command": ["python", "-m", "runtime.envoy.seed", ENVOY_SHARED.endpoints],
        "securityContext": RESTRICTED,
        "volumeMounts": [SHARED_MOUNT],
    }
    envoy: Object = {
        "name": ENVOY,
        "image": image,
        **({"imagePullPolicy": policy} if policy else {}),
        "command": ["envoy"],
        "args": [
            # It takes no `=` after a flag.
            *("--config-path", f"{CONFIG_FOLDER}/{BOOTSTRAP_FILE}"),
            *("--concurrency", str(wanted.threads)),
            *("--log-level", "warning"),
            # That would want shared memory, and pods are replaced instead.
            "--disable-hot-restart",
        ],
        "ports": container_ports({HTTP: ROUTER_PORT, ENVOY: ENVOY_PORT}),
        "securityContext": RESTRICTED,
        "volumeMounts": [
            SHARED_MOUNT,
            {"name": ENVOY_CONFIG_VOLUME, "mountPath": CONFIG_FOLDER, "readOnly": True},
            *secret_mounts,
        ],
        "restartPolicy": "Always",
        "startupProbe": build_probe("/live", ENVOY, period=1, failures=START_SECONDS, delay=1),
        "readinessProbe": build_probe("/ready", ENVOY, period=2, failures=2),
        "livenessProbe": build_probe("/live", ENVOY, period=10, failures=6, timeout=5),
    }
    # The first runs before the router and gets what that one gets, so that no quota objects to it.
    for container, resources in ((seed, router.resources), (envoy, wanted.resources)):
        if found := container_resources(resources):
            container["resources"] = found
    return [seed, envoy]
