"""The workers: their Deployment, with an emulated engine or vLLM in each pod, and the Service that lists them."""

from __future__ import annotations

import json

from controller.api.model import EngineType
from controller.objects.config import EVENTS_PORT, REPLAY_PORT
from controller.objects.names import FEED, FEED_PORT, HTTP, WORKER_PORT, Cluster, Component, Object
from controller.objects.pods import (
    RESTRICTED,
    SCRATCH_MOUNT,
    container,
    container_ports,
    families,
    from_pod,
    image_fields,
    probe,
    resources,
    startup_probe,
    template,
    variables,
)

VLLM_IMAGE = "vllm/vllm-openai:v0.32.0"
"""The release whose behaviour was measured."""
LAST_WORDS = 10
"""Seconds beyond the drain for a process to end."""
PRE_STOP = 5
"""Seconds between a vLLM pod's leaving the EndpointSlice and its SIGTERM, from when on it answers with nothing."""
MODEL_LOAD_SECONDS = 3600
VLLM_START_SECONDS = 30
"""What vLLM takes at least until it listens. A probe before would only record a failure."""


def deployment(cluster: Cluster) -> Object:
    """The workers. `replicas` is left to the autoscaler where there is one."""
    workers = cluster.spec.workers
    spec: Object = {
        "selector": {"matchLabels": cluster.selector(Component.WORKER)},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": _rolling(cluster)},
        "template": _vllm(cluster) if cluster.spec.engine.type is EngineType.VLLM else _emulator(cluster),
    }
    if cluster.spec.autoscaling is None:
        spec["replicas"] = workers.replicas
    return {**cluster.head("apps/v1", "Deployment", Component.WORKER), "spec": spec}


def service(cluster: Cluster) -> Object:
    """A headless Service: routers watch its EndpointSlices."""
    # By number: the feed is a sidecar's, and older EndpointSlice controllers find no port of an init container by name.
    ports = [{"name": HTTP, "port": WORKER_PORT, "targetPort": WORKER_PORT, "protocol": "TCP"}]
    if cluster.spec.engine.type is EngineType.VLLM:
        ports.append({"name": FEED, "port": FEED_PORT, "targetPort": FEED_PORT, "protocol": "TCP"})
    return {
        **cluster.head("v1", "Service", Component.WORKER),
        "spec": {
            "clusterIP": "None",
            "selector": cluster.selector(Component.WORKER),
            "ports": ports,
            **families(cluster),
        },
    }


def _rolling(cluster: Cluster) -> Object:
    """A new worker first, then an old one less, so that the capacity never shrinks. Engines on GPUs find no free one to
    start a new worker on, so there an old one goes first, as long as another stays."""
    spec = cluster.spec
    several = spec.autoscaling.min > 1 if spec.autoscaling is not None else spec.workers.replicas > 1
    surge = spec.engine.type is EngineType.EMULATOR or not several
    return {"maxSurge": 1, "maxUnavailable": 0} if surge else {"maxSurge": 0, "maxUnavailable": 1}


def _emulator(cluster: Cluster) -> Object:
    spec = cluster.spec
    worker = container(
        cluster,
        "worker",
        Component.WORKER,
        "worker.main",
        image=spec.engine.image,
        pull_policy=spec.engine.image_pull_policy,
        ports={HTTP: WORKER_PORT},
        env=[from_pod("WORKER_WORKER_ID", "metadata.name"), *_variables(cluster)],
        readinessProbe=probe("/health", HTTP, period=2, failures=2),
        livenessProbe=probe("/health", HTTP, period=10, failures=6, timeout=5),
        startupProbe=startup_probe("/health", HTTP),
        **_arguments(cluster),
        **resources(spec.workers),
        securityContext=RESTRICTED | _container_security(cluster),
    )
    worker["volumeMounts"] = [*worker["volumeMounts"], *spec.workers.volume_mounts]
    return template(
        cluster,
        Component.WORKER,
        spec.workers,
        [worker],
        scrape_port=WORKER_PORT,
        grace=cluster.release.drain_limit + spec.workers.drain_seconds + LAST_WORDS,
        automountServiceAccountToken=False,
        **_further(cluster),
    )


def _vllm(cluster: Cluster) -> Object:
    """vLLM as its image has it, and beside it the agent that tells routers what its cache holds."""
    spec = cluster.spec
    scratch = [SCRATCH_MOUNT] if _unprivileged(cluster) else []
    mounts = [*scratch, *spec.model.volume_mounts, *spec.workers.volume_mounts]
    engine = {
        "name": "worker",
        **image_fields(cluster, spec.engine.image or VLLM_IMAGE, spec.engine.image_pull_policy),
        "command": ["vllm", "serve"],
        "args": vllm_arguments(cluster),
        "env": [from_pod("VLLM_HOST_IP", "status.podIP"), *_home(cluster), *_variables(cluster)],
        "ports": container_ports({HTTP: WORKER_PORT}),
        "readinessProbe": probe("/health", HTTP, period=2, failures=2),
        "livenessProbe": probe("/health", HTTP, period=10, failures=6, timeout=5),
        "startupProbe": probe("/health", HTTP, period=5, failures=MODEL_LOAD_SECONDS // 5, delay=VLLM_START_SECONDS),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(PRE_STOP)]}}},
        # The image runs as root and writes its caches: the rest of the restricted profile holds.
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
            **_container_security(cluster),
        },
        **({"volumeMounts": mounts} if mounts else {}),
        **resources(spec.workers),
    }
    agent = container(
        cluster,
        "agent",
        Component.WORKER,
        "worker.agent.main",
        image=None,
        pull_policy=None,
        ports={FEED: FEED_PORT},
        env=[from_pod("AGENT_WORKER_ID", "metadata.name"), *variables(spec.model.env)],
        # No probe: a pod whose view is lost serves on, by load, and the router says so (CacheViewFresh).
        # A native sidecar (KEP-753) outlives the engine: while that drains, routers want to know of its load.
        restartPolicy="Always",
    )
    return template(
        cluster,
        Component.WORKER,
        spec.workers,
        [engine],
        initContainers=[agent],
        scrape_port=WORKER_PORT,
        grace=PRE_STOP + spec.workers.drain_seconds + LAST_WORDS,
        automountServiceAccountToken=False,
        **_further(cluster),
    )


def vllm_arguments(cluster: Cluster) -> list[str]:
    """The command line of `vllm serve`."""
    spec = cluster.spec
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{EVENTS_PORT}",
        # Always bound, wherever it is (the other binds only with a *, and is for the agent beside it too).
        "replay_endpoint": f"tcp://127.0.0.1:{REPLAY_PORT}",
        "topic": "",
    }
    return [
        spec.loaded_model,
        # vLLM's own default is IPv4 alone.
        *(["--host=::"] if _ipv6(cluster) else []),
        f"--port={WORKER_PORT}",
        "--served-model-name",
        *spec.served_names,
        f"--block-size={spec.cache.block_size}",
        *([] if spec.model.max_model_len is None else [f"--max-model-len={spec.model.max_model_len}"]),
        *([] if spec.cache.blocks is None else [f"--num-gpu-blocks-override={spec.cache.blocks}"]),
        *([] if spec.model.tokenizer is None else [f"--tokenizer={spec.model.tokenizer}"]),
        "--enable-prefix-caching",
        "--enable-prompt-tokens-details",
        f"--shutdown-timeout={spec.workers.drain_seconds}",
        f"--kv-events-config={json.dumps(events)}",
        *spec.engine.args,
    ]


def _ipv6(cluster: Cluster) -> bool:
    """Whether routers and the kubelet may ask the engine under an IPv6 address. `::` listens for IPv4 as well."""
    families = cluster.spec.network.ip_families
    return "IPv6" in families if families else cluster.release.ipv6


def _arguments(cluster: Cluster) -> Object:
    return {"args": [*cluster.spec.engine.args]} if cluster.spec.engine.args else {}


def _variables(cluster: Cluster) -> list[Object]:
    """The engine's own variables win over the model's."""
    own = {variable.name for variable in cluster.spec.engine.env}
    shared = [variable for variable in cluster.spec.model.env if variable.name not in own]
    return variables([*shared, *cluster.spec.engine.env])


def _further(cluster: Cluster) -> Object:
    workers = cluster.spec.workers
    runtime = {} if workers.runtime_class_name is None else {"runtimeClassName": workers.runtime_class_name}
    pod = {name: value for name, value in workers.security_context.items() if name in _OF_THE_POD}
    return {"volumes": workers.volumes, **runtime, **({"securityContext": pod} if pod else {})}


_OF_THE_POD = ("fsGroup", "fsGroupChangePolicy", "supplementalGroups", "supplementalGroupsPolicy")
"""Fields of `workers.securityContext` that Kubernetes has in the pod's security context only."""


def _container_security(cluster: Cluster) -> Object:
    given = cluster.spec.workers.security_context
    return {name: value for name, value in given.items() if name not in _OF_THE_POD}


def _unprivileged(cluster: Cluster) -> bool:
    """Whether an engine whose image means to run as root is told not to, or may not write to its root."""
    given = cluster.spec.workers.security_context
    return bool(given.get("runAsNonRoot") or given.get("runAsUser") or given.get("readOnlyRootFilesystem"))


def _home(cluster: Cluster) -> list[Object]:
    """A home that another user than root can write to, and a name: libraries ask for one, and the uid has none."""
    if not _unprivileged(cluster):
        return []
    given = {variable.name for variable in (*cluster.spec.engine.env, *cluster.spec.model.env)}
    home = {"HOME": SCRATCH_MOUNT["mountPath"], "USER": "vllm"}
    return [{"name": name, "value": value} for name, value in home.items() if name not in given]
