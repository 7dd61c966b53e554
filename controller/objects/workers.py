"""The workers: their Deployment, with an emulated engine or vLLM in each pod, and the Service that lists them."""

from __future__ import annotations

import json

from controller.api.model import ADAPTERS_VOLUME, CPU_CACHE_VOLUME, EngineType, KVClusterSpec
from controller.objects.config import ADAPTERS_FOLDER, EVENTS_PORT, is_ipv6, replay_port, worker_service_suffixes
from controller.objects.names import FEED, FEED_PORT, HTTP, WORKER_PORT, Cluster, Component, Object
from controller.objects.pods import (
    SCRATCH_MOUNT,
    SHUTDOWN_MARGIN,
    build_container,
    build_pod_template,
    build_probe,
    build_probes,
    build_startup_probe,
    container_env,
    container_ports,
    container_resources,
    image_fields,
    ip_families,
    pod_field_variable,
)
from controller.process_settings import data_parallel_size, flags, lora_settings

VLLM_IMAGE = "vllm/vllm-openai:v0.32.0"
"""The release whose behaviour was measured."""
PRE_STOP_SECONDS = 5
"""Seconds between a vLLM pod's removal from the EndpointSlice and its SIGTERM, after which vLLM answers nothing."""
MODEL_LOAD_SECONDS = 3600
"""How long vLLM may take to load its model."""
SHARED_MEMORY = "/dev/shm"  # noqa: S108  a volume of the pod's own
OTHER_SHARED_MEMORY = 2**30
"""Bytes of shared memory for what vLLM's processes tell one another, beside its copies of blocks."""
VLLM_START_SECONDS = 30
"""What vLLM takes at least until it listens. An earlier probe would only record a failure."""

RUNTIME_LORA = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
"""Without this variable vLLM loads adapters only at its start."""

STORED_RESPONSES = "VLLM_ENABLE_RESPONSES_API_STORE"
"""With this variable vLLM stores responses of the Responses API."""

_POD_SECURITY_FIELDS = ("fsGroup", "fsGroupChangePolicy", "supplementalGroups", "supplementalGroupsPolicy")
"""Fields of `workers.securityContext` that Kubernetes has in the pod's security context only."""


def build_worker_deployments(cluster: Cluster) -> tuple[Object, ...]:
    """The workers' Deployment, if their engines are ours. It states no `replicas` while an autoscaler owns them."""
    return () if cluster.spec.is_external else (_build_deployment(cluster),)


def _build_deployment(cluster: Cluster) -> Object:
    workers = cluster.spec.workers
    vllm = cluster.spec.engine.type is EngineType.VLLM
    spec: Object = {
        "selector": {"matchLabels": cluster.selector(Component.WORKER)},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": _rolling_update(cluster)},
        "template": _build_vllm_template(cluster) if vllm else _build_emulator_template(cluster),
    }
    if cluster.spec.autoscaling is None:
        spec["replicas"] = workers.replicas
    return {**cluster.new_object("apps/v1", "Deployment", Component.WORKER), "spec": spec}


def build_worker_services(cluster: Cluster) -> tuple[Object, ...]:
    """Headless Services: routers watch their EndpointSlices. One, but for each port of engines that are not ours; none
    if a pool says which pods these are."""
    spec = cluster.spec
    if not spec.is_external:
        feed = FEED_PORT if spec.engine.type is EngineType.VLLM else None
        return (_build_service(cluster, "", cluster.selector(Component.WORKER), WORKER_PORT, feed),)
    if (pods := spec.engine.external) is None:
        return ()
    labels, suffixes = pods.selector.match_labels, worker_service_suffixes(spec)
    return tuple(
        _build_service(cluster, suffix, labels, port, pods.feed_port if not suffix else None)
        for suffix, port in zip(suffixes, pods.ports, strict=True)
    )


def _build_service(cluster: Cluster, suffix: str, selector: dict[str, str], port: int, feed: int | None) -> Object:
    # By number: the feed's port is a sidecar's, and older EndpointSlice controllers find no named port there.
    named = {HTTP: port} if feed is None else {HTTP: port, FEED: feed}
    ports = [{"name": name, "port": number, "targetPort": number, "protocol": "TCP"} for name, number in named.items()]
    return {
        **cluster.new_object("v1", "Service", Component.WORKER, suffix),
        "spec": {"clusterIP": "None", "selector": selector, "ports": ports, **ip_families(cluster)},
    }


def _rolling_update(cluster: Cluster) -> Object:
    """A new worker starts before an old one leaves, so that capacity never shrinks. GPUs are rarely free for a surplus
    engine, so of several vLLM workers an old one leaves first."""
    spec = cluster.spec
    several = spec.autoscaling.min > 1 if spec.autoscaling is not None else spec.workers.replicas > 1
    surge = spec.engine.type is EngineType.EMULATOR or not several
    return {"maxSurge": 1, "maxUnavailable": 0} if surge else {"maxSurge": 0, "maxUnavailable": 1}


def _build_worker_template(
    cluster: Cluster, container: Object, sidecars: tuple[Object, ...], *, drain_seconds: float
) -> Object:
    workers = cluster.spec.workers
    return build_pod_template(
        cluster,
        Component.WORKER,
        workers,
        containers=[container],
        init_containers=sidecars,
        volumes=[*_shared_memory(cluster.spec), *_adapters_volumes(cluster), *workers.volumes],
        scrape_port=WORKER_PORT,
        grace_seconds=drain_seconds + SHUTDOWN_MARGIN,
        automount_token=False,
        runtime_class=workers.runtime_class_name,
        security_context={
            name: value for name, value in workers.security_context.items() if name in _POD_SECURITY_FIELDS
        },
    )


def _build_emulator_template(cluster: Cluster) -> Object:
    spec = cluster.spec
    worker = build_container(
        cluster,
        Component.WORKER,
        name="worker",
        module="worker.main",
        image=spec.engine.image,
        pull_policy=spec.engine.image_pull_policy,
        ports={HTTP: WORKER_PORT},
        args=spec.engine.args,
        env=[pod_field_variable("WORKER_WORKER_ID", "metadata.name"), *_engine_env(cluster)],
        probes=build_probes(
            HTTP, readiness="/health", liveness="/health", startup=build_startup_probe("/health", HTTP)
        ),
        resources=container_resources(spec.workers.resources),
        volume_mounts=[*_adapters_mounts(cluster), *spec.workers.volume_mounts],
        security_context=_container_security(cluster),
    )
    drain = cluster.release.drain_limit + spec.workers.drain_seconds
    return _build_worker_template(cluster, worker, (), drain_seconds=drain)


def _build_vllm_template(cluster: Cluster) -> Object:
    """vLLM as its image has it, and beside it the agent that tells routers what its cache holds."""
    spec = cluster.spec
    scratch = [SCRATCH_MOUNT] if _is_unprivileged(cluster) else []
    startup = build_probe("/health", HTTP, period=5, failures=MODEL_LOAD_SECONDS // 5, delay=VLLM_START_SECONDS)
    engine = {
        "name": "worker",
        **image_fields(cluster, spec.engine.image or VLLM_IMAGE, spec.engine.image_pull_policy),
        "command": ["vllm", "serve"],
        "args": vllm_arguments(cluster),
        "env": [
            pod_field_variable("VLLM_HOST_IP", "status.podIP"),
            *_lora_env(cluster),
            *_user_env(cluster),
            *_engine_env(cluster),
        ],
        "ports": container_ports({HTTP: WORKER_PORT}),
        **build_probes(HTTP, readiness="/health", liveness="/health", startup=startup),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(PRE_STOP_SECONDS)]}}},
        # The image runs as root and writes its caches to the root: the rest of the restricted profile holds.
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
            **_container_security(cluster),
        },
    }
    shared = [{"name": volume["name"], "mountPath": SHARED_MEMORY} for volume in _shared_memory(spec)]
    if mounts := [*scratch, *shared, *spec.model.volume_mounts, *spec.workers.volume_mounts]:
        engine["volumeMounts"] = mounts
    if resources := container_resources(spec.workers.resources):
        engine["resources"] = resources
    agent = build_container(
        cluster,
        Component.WORKER,
        name="agent",
        module="worker.agent.main",
        image=None,
        pull_policy=None,
        ports={FEED: FEED_PORT},
        env=[pod_field_variable("AGENT_WORKER_ID", "metadata.name"), *container_env(spec.model.env)],
        # No probes: a pod whose view is lost goes on serving by load, and the router reports it (CacheViewFresh).
        # A native sidecar (KEP-753) outlives the engine: routers want to know the load of an engine that drains.
        volume_mounts=_adapters_mounts(cluster),
        restart_policy="Always",
    )
    drain = PRE_STOP_SECONDS + spec.workers.drain_seconds
    return _build_worker_template(cluster, engine, (agent,), drain_seconds=drain)


def _adapters_volumes(cluster: Cluster) -> list[Object]:
    if not cluster.spec.model.adapters:
        return []
    return [{"name": ADAPTERS_VOLUME, "configMap": {"name": cluster.object_name(Component.WORKER, "-adapters")}}]


def _adapters_mounts(cluster: Cluster) -> list[Object]:
    """A whole folder: a single file (`subPath`) would not follow the ConfigMap."""
    if not cluster.spec.model.adapters:
        return []
    return [{"name": ADAPTERS_VOLUME, "mountPath": ADAPTERS_FOLDER, "readOnly": True}]


def vllm_arguments(cluster: Cluster) -> list[str]:
    """The command line of `vllm serve`."""
    spec = cluster.spec
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{EVENTS_PORT}",
        # vLLM always binds this one. It binds the other only with a `*`, though only the agent beside it connects.
        "replay_endpoint": f"tcp://127.0.0.1:{replay_port(spec)}",
        "topic": "",
    }
    return [
        spec.loaded_model,
        # By default vLLM listens on IPv4 alone.
        *(["--host=::"] if is_ipv6(cluster) else []),
        f"--port={WORKER_PORT}",
        "--served-model-name",
        *spec.served_names,
        f"--block-size={spec.cache.block_size}",
        *_data_parallel_arguments(spec),
        *([] if spec.model.max_model_len is None else [f"--max-model-len={spec.model.max_model_len}"]),
        *([] if spec.cache.blocks is None else [f"--num-gpu-blocks-override={spec.cache.blocks}"]),
        *([] if spec.model.tokenizer is None else [f"--tokenizer={spec.model.tokenizer}"]),
        "--enable-prefix-caching",
        "--enable-prompt-tokens-details",
        f"--shutdown-timeout={spec.workers.drain_seconds}",
        f"--kv-events-config={json.dumps(events)}",
        *_offloading_arguments(spec),
        *flags(lora_settings(spec)),
        *spec.engine.args,
    ]


def _data_parallel_arguments(spec: KVClusterSpec) -> list[str]:
    """Several engines, and a single API server where it keeps something that every request has to find: by default vLLM
    starts as many servers as engines, and each has adapters and stored responses of its own."""
    size = data_parallel_size(spec)
    if size is None:
        return []
    given = {variable.name for variable in (*spec.engine.env, *spec.model.env)}
    alone = bool(spec.model.adapters) or not given.isdisjoint((RUNTIME_LORA, STORED_RESPONSES))
    return [f"--data-parallel-size={size}", *(["--api-server-count=1"] if alone else [])]


def _offloading_arguments(spec: KVClusterSpec) -> list[str]:
    """The offloading connector, with events that say which blocks it holds. vLLM's shorter --kv-offloading-size leaves
    these out."""
    if spec.engine.cpu_cache is None:
        return []
    extra = {"cpu_bytes_to_use": spec.engine.cpu_cache.size_bytes, "self_describing_kv_events": True}
    connector = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }
    return [f"--kv-transfer-config={json.dumps(connector)}"]


def _shared_memory(spec: KVClusterSpec) -> list[Object]:
    """A volume for vLLM's copies of blocks, which it keeps in /dev/shm: by default that has 64 MiB. None where the user
    mounts one."""
    cache = spec.engine.cpu_cache
    mounted = any(mount.get("mountPath") == SHARED_MEMORY for mount in spec.workers.volume_mounts)
    if cache is None or mounted or spec.engine.type is not EngineType.VLLM:
        return []
    size = cache.size_bytes * spec.engine.data_parallel.size + OTHER_SHARED_MEMORY
    return [{"name": CPU_CACHE_VOLUME, "emptyDir": {"medium": "Memory", "sizeLimit": f"{-(-size // 2**20)}Mi"}}]


def _engine_env(cluster: Cluster) -> list[Object]:
    """The variables of model and engine. The engine's own win."""
    return container_env(cluster.spec.model.env, cluster.spec.engine.env)


def _container_security(cluster: Cluster) -> Object:
    given = cluster.spec.workers.security_context
    return {name: value for name, value in given.items() if name not in _POD_SECURITY_FIELDS}


def _is_unprivileged(cluster: Cluster) -> bool:
    """Whether vLLM, whose image runs as root, runs as another user here or with a read-only root."""
    given = cluster.spec.workers.security_context
    return bool(given.get("runAsNonRoot") or given.get("runAsUser") or given.get("readOnlyRootFilesystem"))


def _lora_env(cluster: Cluster) -> list[Object]:
    """What lets the agent load adapters. Clients cannot: routers do not pass on the paths."""
    given = {variable.name for variable in (*cluster.spec.engine.env, *cluster.spec.model.env)}
    if not cluster.spec.model.adapters or RUNTIME_LORA in given:
        return []
    return [{"name": RUNTIME_LORA, "value": "True"}]


def _user_env(cluster: Cluster) -> list[Object]:
    """A home that a user other than root can write to, and a user name: libraries ask for one, and the uid has none."""
    if not _is_unprivileged(cluster):
        return []
    given = {variable.name for variable in (*cluster.spec.engine.env, *cluster.spec.model.env)}
    home = {"HOME": SCRATCH_MOUNT["mountPath"], "USER": "vllm"}
    return [{"name": name, "value": value} for name, value in home.items() if name not in given]
