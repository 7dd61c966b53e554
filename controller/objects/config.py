"""The ConfigMaps: the settings of routers and workers as environment variables."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from controller.api.model import EngineType
from controller.objects.names import FEED_PORT, WORKER_PORT, Cluster, Component, Object
from controller.process_settings import chat_settings, environment, router_settings, worker_settings

EVENTS_PORT, REPLAY_PORT = 5557, 5558
"""Where vLLM publishes its KV events and answers for lost ones, within the pod."""


def config_map(cluster: Cluster, component: Component) -> Object:
    """The settings of a component."""
    return {**cluster.head("v1", "ConfigMap", component), "data": settings(cluster, component)}


def settings(cluster: Cluster, component: Component) -> dict[str, str]:
    """The environment of a component's pods, apart from what differs from pod to pod."""
    if component is Component.ROUTER:
        return _router(cluster)
    return _agent(cluster) if cluster.spec.engine.type is EngineType.VLLM else _emulator(cluster)


def digest(content: Mapping[str, object]) -> str:
    """16 hexadecimal digits that change with the content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _router(cluster: Cluster) -> dict[str, str]:
    own = {
        "kubernetes-service": cluster.object_name(Component.WORKER),
        "kubernetes-namespace": cluster.namespace,
        "kubernetes-own-service": cluster.object_name(Component.ROUTER),
        "drain-delay": f"{cluster.release.drain_delay:g}",
        "drain-limit": f"{cluster.release.drain_limit:g}",
    }
    return environment("ROUTER", router_settings(cluster.spec) | own)


def _emulator(cluster: Cluster) -> dict[str, str]:
    own = {"port": WORKER_PORT, "drain-limit": f"{cluster.release.drain_limit:g}"}
    return environment("WORKER", worker_settings(cluster.spec) | own)


def _agent(cluster: Cluster) -> dict[str, str]:
    spec = cluster.spec
    return environment(
        "AGENT",
        {
            "port": FEED_PORT,
            "engine-url": f"http://127.0.0.1:{WORKER_PORT}",
            "events-endpoint": f"tcp://127.0.0.1:{EVENTS_PORT}",
            "replay-endpoint": f"tcp://127.0.0.1:{REPLAY_PORT}",
            "model": spec.model_name,
            "tokenizer": spec.tokenizer,
            "block-size": spec.cache.block_size,
            "blocks": spec.cache.blocks,
            **chat_settings(spec),
        },
    )
