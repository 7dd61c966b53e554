"""The ConfigMaps: the settings of routers and workers as environment variables."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from controller.api.model import EngineType, KVClusterSpec
from controller.objects.names import FEED_PORT, PICKER_PORT, WORKER_PORT, Cluster, Component, Object
from controller.process_settings import (
    adapters_file,
    chat_settings,
    data_parallel_size,
    environment,
    router_settings,
    worker_settings,
)
from runtime.envoy.settings import Files

EVENTS_PORT = 5557
"""Port inside the pod where the first of vLLM's engines publishes its KV events; those of the others follow it."""


def replay_port(spec: KVClusterSpec) -> int:
    """Port where the first engine replays events that were missed: behind all ports where events are published."""
    return EVENTS_PORT + spec.engine.data_parallel.size


def worker_service_suffixes(spec: KVClusterSpec) -> tuple[str, ...]:
    """What the names of the workers' Services end with: one for each port of the engines, the first one empty. None
    where a pool says which pods the workers are."""
    if not spec.is_external:
        return ("",)
    ports = spec.engine.external.ports if spec.engine.external is not None else []
    return tuple(f"-{port}" if index else "" for index, port in enumerate(ports))


def build_config_map(cluster: Cluster, component: Component) -> Object:
    """The ConfigMap with the settings of a component's pods."""
    return {**cluster.new_object("v1", "ConfigMap", component), "data": settings(cluster, component)}


def settings(cluster: Cluster, component: Component) -> dict[str, str]:
    """The environment variables that all pods of a component share."""
    if component is Component.ROUTER:
        return _router_settings(cluster)
    return _agent_settings(cluster) if cluster.spec.engine.type is EngineType.VLLM else _emulator_settings(cluster)


ADAPTERS_FOLDER, ADAPTERS_FILE = "/run/kvcluster", "adapters.json"
"""Where worker pods find the list of adapters. It is no part of their settings: a change rolls nothing."""


KEYS_FOLDER, KEYS_FILE = "/run/kvcluster-keys", "keys.yaml"
"""Where router pods find the API keys. They are no part of their settings: a change rolls nothing."""


TLS_FILES = ("tls.crt", "tls.key")
"""The keys of a Secret of type `kubernetes.io/tls`."""
TLS_FOLDER, CLIENT_CA_FILE = "/run/kvcluster-tls", "client-ca.crt"
"""Where router pods find their certificate and the authorities of clients' certificates, which roll nothing either."""


ENVOY_FOLDER = "/run/kvcluster-envoy"
"""What the containers of a router pod share where Envoy is the data plane: two sockets, and the list of workers."""
ENVOY_SHARED = Files(f"{ENVOY_FOLDER}/endpoints.json", f"{ENVOY_FOLDER}/picker.sock", f"{ENVOY_FOLDER}/admin.sock")


def build_adapters_config_map(cluster: Cluster) -> tuple[Object, ...]:
    """The ConfigMap with the list of LoRA adapters, where the spec has any."""
    if not cluster.spec.model.adapters:
        return ()
    manifest = cluster.new_object("v1", "ConfigMap", Component.WORKER, "-adapters")
    return ({**manifest, "data": {ADAPTERS_FILE: adapters_file(cluster.spec)}},)


def _adapters_settings(cluster: Cluster) -> dict[str, object]:
    """The setting of the process that keeps the adapters loaded."""
    return {"adapters-file": f"{ADAPTERS_FOLDER}/{ADAPTERS_FILE}"} if cluster.spec.model.adapters else {}


def digest(content: Mapping[str, object]) -> str:
    """A digest of the content, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


NOTICE_SECONDS = 60
"""How long it may take until a held request shows in Prometheus, KEDA has asked for it, and a pod has a node."""


def _router_settings(cluster: Cluster) -> dict[str, str]:
    others, pool = cluster.spec.router.serves, cluster.spec.gateway.inference_pool_ref
    own_services = [cluster.object_name(Component.WORKER, suffix) for suffix in worker_service_suffixes(cluster.spec)]
    tokenizers = [f"{other.model}={other.tokenizer}" for other in others if other.model is not None]
    own = {
        "kubernetes-service": ",".join([*own_services, *(f"{other.cluster}-{Component.WORKER}" for other in others)])
        or None,
        "inference-pool": pool.name if pool is not None else None,
        "model-tokenizers": ",".join(tokenizers) or None,
        "kubernetes-namespace": cluster.namespace,
        "kubernetes-own-service": cluster.object_name(Component.ROUTER),
        "kubernetes-management-service": cluster.object_name(Component.ROUTER, "-management"),
        "drain-delay": f"{cluster.release.drain_delay:g}",
        "drain-limit": f"{cluster.release.drain_limit:g}",
    }
    if held := hold_seconds(cluster.spec):
        own["hold-seconds"] = str(held)
    if cluster.spec.router.auth.keys_secret_ref is not None:
        own["api-keys-file"] = f"{KEYS_FOLDER}/{KEYS_FILE}"
    if cluster.spec.router.tls.secret_ref is not None:
        own["tls-cert-path"] = TLS_FOLDER
    if cluster.spec.router.tls.client_ca_secret_ref is not None:
        own["tls-client-ca"] = f"{TLS_FOLDER}/{CLIENT_CA_FILE}"
    if cluster.spec.management_auth == "tokenExceptMetrics":
        own["management-open-metrics"] = "true"
    if cluster.spec.gateway.picks:
        own |= {"mode": "both", "picker-port": str(PICKER_PORT)}
    if cluster.spec.gateway.inference_pool:
        own["objectives-pool"] = cluster.object_name(Component.WORKER)
    return environment("ROUTER", router_settings(cluster.spec) | own)


def picker_settings(cluster: Cluster) -> dict[str, str]:
    """Settings of a router that only decides, for the Envoy beside it; none of another. Gateways may ask it, too, at
    the ports for them. They are variables of the pod's, not in the ConfigMap, which containers that restart in older
    pods read as well: those have no Envoy."""
    if not cluster.spec.router.is_behind_envoy:
        return {}
    ports = {} if cluster.spec.gateway.picks else {"picker-port": "-1", "picker-health-port": "-1"}
    shared = ENVOY_SHARED
    own = {"picker-socket": shared.picker, "envoy-endpoints": shared.endpoints, "envoy-admin": shared.admin}
    return environment("ROUTER", {"mode": "picker", **ports, **own})


def hold_seconds(spec: KVClusterSpec) -> int:
    """How long routers hold requests while no worker is ready; 0: not longer than usual."""
    return spec.start_seconds + NOTICE_SECONDS if spec.scales_to_zero else 0


def is_ipv6(cluster: Cluster) -> bool:
    """Whether clients and the kubelet may ask a pod under an IPv6 address. `::` listens on IPv4 as well."""
    families = cluster.spec.network.ip_families
    return "IPv6" in families if families else cluster.release.ipv6


def _emulator_settings(cluster: Cluster) -> dict[str, str]:
    own = {"port": WORKER_PORT, "drain-limit": f"{cluster.release.drain_limit:g}"}
    return environment("WORKER", worker_settings(cluster.spec) | own | _adapters_settings(cluster))


def _agent_settings(cluster: Cluster) -> dict[str, str]:
    spec = cluster.spec
    return environment(
        "AGENT",
        {
            "port": FEED_PORT,
            "engine-url": f"http://127.0.0.1:{WORKER_PORT}",
            "events-endpoint": f"tcp://127.0.0.1:{EVENTS_PORT}",
            "replay-endpoint": f"tcp://127.0.0.1:{replay_port(spec)}",
            "data-parallel-size": data_parallel_size(spec),
            "model": spec.model_name,
            "tokenizer": spec.tokenizer,
            "block-size": spec.cache.block_size,
            "blocks": spec.cache.blocks,
            "cpu-bandwidth": f"{spec.cpu_bandwidth:g}" if spec.engine.cpu_cache is not None else None,
            **chat_settings(spec),
            **_adapters_settings(cluster),
        },
    )
