"""Bounds on the number of pods: disruption budgets and autoscalers."""

from __future__ import annotations

from controller.api.autoscaling import Autoscaling, Scaler
from controller.objects.names import Cluster, Component, Object

WAITING = "vllm:num_requests_waiting"
"""Metric: requests in an engine's queue. The emulator and vLLM both export it."""


ROUTER_WAITING = "kvcluster_router_flow_waiting"
"""Metric: requests in a router's queue, by class."""
ROUTER_IN_FLIGHT = "kvcluster_router_in_flight"
"""Metric: requests of a router that are with a worker."""
_OF_A_DEPLOYMENT = "-[a-z0-9]+(-[a-z0-9]+)?"
"""What a pod's name adds to its Deployment's: the template's hash and a suffix, of a long name without the hyphen. No
more of them, or `rag-worker` would have the pods of a KVCluster that is called `rag-worker-2`."""
POLLING_SECONDS = 5
"""How often KEDA asks where a request may wait for the first worker."""


def build_disruption_budget(cluster: Cluster, component: Component) -> Object:
    """A PodDisruptionBudget: one pod of the component at a time may be evicted."""
    return {
        **cluster.new_object("policy/v1", "PodDisruptionBudget", component),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": cluster.selector(component)}},
    }


def build_autoscalers(cluster: Cluster) -> tuple[Object, ...]:
    """The HorizontalPodAutoscaler or ScaledObject of the workers, where the spec asks for one."""
    scaling = cluster.spec.autoscaling
    if scaling is None:
        return ()
    return (_build_hpa(cluster, scaling) if scaling.type is Scaler.HPA else _build_scaled_object(cluster, scaling),)


def _target(cluster: Cluster) -> Object:
    return {"apiVersion": "apps/v1", "kind": "Deployment", "name": cluster.object_name(Component.WORKER)}


def _behavior(seconds: int) -> Object:
    # One worker at a time, because each takes its cache with it.
    return {
        "scaleDown": {
            "stabilizationWindowSeconds": seconds,
            "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}],
        }
    }


def _build_hpa(cluster: Cluster, scaling: Autoscaling) -> Object:
    target = {"type": "AverageValue", "averageValue": str(scaling.target_queue)}
    return {
        **cluster.new_object("autoscaling/v2", "HorizontalPodAutoscaler", Component.WORKER),
        "spec": {
            "scaleTargetRef": _target(cluster),
            "minReplicas": scaling.min,
            "maxReplicas": scaling.max,
            "metrics": [{"type": "Pods", "pods": {"metric": {"name": WAITING}, "target": target}}],
            "behavior": _behavior(scaling.scale_down_seconds),
        },
    }


def _build_scaled_object(cluster: Cluster, scaling: Autoscaling) -> Object:
    lasts = scaling.scale_down_seconds
    to_zero: Object = {}
    if cluster.spec.scales_to_zero:
        # A worker that still loads when the last request has gone is not taken away: it may have been asked for last.
        lasts = max(lasts, cluster.spec.start_seconds)
        to_zero = {"pollingInterval": POLLING_SECONDS, "cooldownPeriod": lasts, "initialCooldownPeriod": lasts}
    return {
        **cluster.new_object("keda.sh/v1alpha1", "ScaledObject", Component.WORKER),
        "spec": {
            "scaleTargetRef": _target(cluster),
            "minReplicaCount": scaling.min,
            "maxReplicaCount": scaling.max,
            **to_zero,
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _behavior(lasts)}},
            "triggers": _triggers(cluster, scaling),
        },
    }


def _triggers(cluster: Cluster, scaling: Autoscaling) -> list[Object]:
    waiting = _sum(cluster, Component.WORKER, WAITING)
    if cluster.spec.scales_to_zero or cluster.spec.router.flow_control.enabled:
        # A sum of what nobody exports is not 0 but nothing.
        waiting = f"({waiting} or vector(0)) + ({_sum(cluster, Component.ROUTER, ROUTER_WAITING)} or vector(0))"
    triggers = [_trigger(scaling, waiting, scaling.target_queue)]
    if cluster.spec.scales_to_zero:
        # One worker stays while anything runs, however many requests that is.
        running = f"clamp_max({_sum(cluster, Component.ROUTER, ROUTER_IN_FLIGHT)} or vector(0), 1)"
        triggers.append(_trigger(scaling, running, 1))
    return triggers


def _sum(cluster: Cluster, component: Component, metric: str) -> str:
    pods = cluster.object_name(component) + _OF_A_DEPLOYMENT
    return f'sum({metric}{{namespace="{cluster.namespace}", pod=~"{pods}"}})'


def _trigger(scaling: Autoscaling, query: str, threshold: int) -> Object:
    return {
        "type": "prometheus",
        "metricType": "AverageValue",
        "metadata": {
            "serverAddress": scaling.prometheus_address,
            "query": query,
            "threshold": str(threshold),
        },
    }
