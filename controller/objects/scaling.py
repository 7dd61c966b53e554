"""Bounds on the number of pods: disruption budgets and autoscalers."""

from __future__ import annotations

from controller.api.autoscaling import Autoscaling, Scaler
from controller.objects.names import Cluster, Component, Object

WAITING = "vllm:num_requests_waiting"
"""Metric: requests in an engine's queue. The emulator and vLLM both export it."""


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


def _behavior(scaling: Autoscaling) -> Object:
    # One worker at a time, because each takes its cache with it.
    return {
        "scaleDown": {
            "stabilizationWindowSeconds": scaling.scale_down_seconds,
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
            "behavior": _behavior(scaling),
        },
    }


def _build_scaled_object(cluster: Cluster, scaling: Autoscaling) -> Object:
    pods = f"{cluster.object_name(Component.WORKER)}-.+"
    return {
        **cluster.new_object("keda.sh/v1alpha1", "ScaledObject", Component.WORKER),
        "spec": {
            "scaleTargetRef": _target(cluster),
            "minReplicaCount": scaling.min,
            "maxReplicaCount": scaling.max,
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _behavior(scaling)}},
            "triggers": [
                {
                    "type": "prometheus",
                    "metricType": "AverageValue",
                    "metadata": {
                        "serverAddress": scaling.prometheus_address,
                        "query": f'sum({WAITING}{{namespace="{cluster.namespace}", pod=~"{pods}"}})',
                        "threshold": str(scaling.target_queue),
                    },
                }
            ],
        },
    }
