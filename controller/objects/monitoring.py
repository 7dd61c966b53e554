"""PodMonitors, by which a Prometheus of the Prometheus operator finds the pods."""

from __future__ import annotations

from controller.api.model import EngineType
from controller.objects.management import scrape_authorization
from controller.objects.names import ENVOY, FEED, HTTP, MANAGEMENT, Cluster, Component, Object

_POD_LABEL = "__meta_kubernetes_pod_label_app_kubernetes_io_"
_PATHS = {ENVOY: "/stats/prometheus"}
"""Port -> path of its metrics, where that is another than /metrics."""
_LABELS = {"instance": "kvcluster", "component": "component"}
"""Label of a pod, without the prefix app.kubernetes.io/ -> label of its time series (docs/dashboards.md)."""


def build_pod_monitors(cluster: Cluster) -> tuple[Object, ...]:
    """A PodMonitor for the routers' management port and one for the workers, where the spec asks for them."""
    if not cluster.spec.monitoring.pod_monitor:
        return ()
    feeds = (FEED,) if cluster.spec.engine.type is EngineType.VLLM else ()
    if cluster.spec.is_external:  # the pods are their owner's to monitor
        return (_build_routers_monitor(cluster),)
    return (_build_routers_monitor(cluster), _build_pod_monitor(cluster, Component.WORKER, (HTTP, *feeds)))


def _build_routers_monitor(cluster: Cluster) -> Object:
    router = cluster.spec.router
    stats = (ENVOY,) if router.is_behind_envoy and router.envoy.stats else ()
    manifest = _build_pod_monitor(cluster, Component.ROUTER, (MANAGEMENT, *stats))
    management, *_ = manifest["spec"]["podMetricsEndpoints"]
    management |= scrape_authorization(cluster)
    return manifest


def _build_pod_monitor(cluster: Cluster, component: Component, ports: tuple[str, ...]) -> Object:
    manifest = cluster.new_object("monitoring.coreos.com/v1", "PodMonitor", component)
    metadata = manifest["metadata"]
    metadata["labels"] = cluster.spec.monitoring.pod_monitor_labels | metadata["labels"]
    return {
        **manifest,
        "spec": {
            "selector": {"matchLabels": cluster.selector(component)},
            "podMetricsEndpoints": [_endpoint(cluster, port) for port in ports],
        },
    }


def _endpoint(cluster: Cluster, port: str) -> Object:
    return {
        "port": port,
        "path": _PATHS.get(port, "/metrics"),
        "interval": f"{cluster.spec.monitoring.interval_seconds}s",
        "relabelings": [
            {"action": "replace", "sourceLabels": [_POD_LABEL + label], "targetLabel": name}
            for label, name in _LABELS.items()
        ],
        # Some versions of the Python Prometheus client send `vllm_x` instead of `vllm:x` to Prometheus 2.
        "metricRelabelings": [
            {
                "action": "replace",
                "sourceLabels": ["__name__"],
                "regex": "vllm_(.+)",
                "replacement": "vllm:$1",
                "targetLabel": "__name__",
            }
        ],
    }
