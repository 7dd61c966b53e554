"""The routers: their Deployment and their two Services, data and management apart."""

from __future__ import annotations

from collections.abc import Mapping

from controller.api.model import EngineType
from controller.objects.names import HTTP, MANAGEMENT, MANAGEMENT_PORT, ROUTER_PORT, Cluster, Component, Object
from controller.objects.pods import container, families, probe, resources, startup_probe, template, variables

LAST_WORDS = 10
"""Seconds beyond the drain for a process to end."""
FIRST_WORKER_SECONDS = {EngineType.EMULATOR: 30, EngineType.VLLM: 900}
"""For which a router that has just started may wait for its first worker before it counts as not ready: what the
engine takes to start, its model's loading included."""
ANSWER_SECONDS = 5


def deployment(cluster: Cluster) -> Object:
    """The routers. A new one is ready before an old one leaves, so that there is always somebody to answer."""
    router = cluster.spec.router
    process = container(
        cluster,
        "router",
        Component.ROUTER,
        "router.main",
        image=router.image,
        pull_policy=router.image_pull_policy,
        ports={HTTP: ROUTER_PORT, MANAGEMENT: MANAGEMENT_PORT},
        readinessProbe=probe("/ready", MANAGEMENT, period=2, failures=2),
        livenessProbe=probe("/health", MANAGEMENT, period=10, failures=6, timeout=5),
        startupProbe=_startup(cluster),
        **({"env": variables(cluster.spec.model.env)} if cluster.spec.model.env else {}),
        **resources(router),
    )
    return {
        **cluster.head("apps/v1", "Deployment", Component.ROUTER),
        "spec": {
            "replicas": router.replicas,
            "selector": {"matchLabels": cluster.selector(Component.ROUTER)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": template(
                cluster,
                Component.ROUTER,
                router,
                [process],
                scrape_port=MANAGEMENT_PORT,
                grace=max(cluster.release.drain_delay, cluster.release.drain_limit)
                + cluster.spec.workers.drain_seconds
                + LAST_WORDS,
                serviceAccountName=cluster.object_name(Component.ROUTER),
                # The account itself says no: whatever else is given it gets no token.
                automountServiceAccountToken=True,
            ),
        },
    }


def _startup(cluster: Cluster) -> Object:
    """A router that waits for its first worker holds the answer back: a readiness probe would record a failure every
    two seconds meanwhile, and find the worker up to two seconds late."""
    seconds = FIRST_WORKER_SECONDS[cluster.spec.engine.type]
    return startup_probe(f"/started?wait={seconds}", MANAGEMENT, timeout=seconds + ANSWER_SECONDS)


def service(cluster: Cluster) -> Object:
    """What clients talk to: the OpenAI API and nothing else."""
    wanted = cluster.spec.router.service
    manifest = cluster.head("v1", "Service", Component.ROUTER)
    if wanted.annotations:
        manifest["metadata"]["annotations"] = dict(wanted.annotations)
    return {
        **manifest,
        "spec": {
            "type": wanted.type,
            "selector": cluster.selector(Component.ROUTER),
            "ports": [{"name": HTTP, "port": ROUTER_PORT, "targetPort": HTTP, "protocol": "TCP"}],
            **({} if wanted.load_balancer_class is None else {"loadBalancerClass": wanted.load_balancer_class}),
            **families(cluster),
        },
    }


def management_service(cluster: Cluster) -> Object:
    """Health, metrics and explanations, within the cluster only; headless, for every router is asked by itself."""
    return {
        **cluster.head("v1", "Service", Component.ROUTER, "-management"),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": cluster.selector(Component.ROUTER),
            "ports": [{"name": MANAGEMENT, "port": MANAGEMENT_PORT, "targetPort": MANAGEMENT, "protocol": "TCP"}],
            **families(cluster),
        },
    }


def entrances(cluster: Cluster) -> tuple[Object, ...]:
    """What the spec asks for of the two."""
    return (*_ingress(cluster), *_http_route(cluster))


def _ingress(cluster: Cluster) -> tuple[Object, ...]:
    wanted = cluster.spec.router.ingress
    if wanted is None:
        return ()
    service = {"name": cluster.object_name(Component.ROUTER), "port": {"name": HTTP}}
    path = {"path": wanted.path, "pathType": "Prefix", "backend": {"service": service}}
    host = {} if wanted.host is None else {"host": wanted.host}
    spec: Object = {"rules": [{**host, "http": {"paths": [path]}}]}
    if wanted.class_name is not None:
        spec["ingressClassName"] = wanted.class_name
    if wanted.tls_secret is not None:
        hosts = {} if wanted.host is None else {"hosts": [wanted.host]}
        spec["tls"] = [{**hosts, "secretName": wanted.tls_secret}]
    return ({**_annotated(cluster, "networking.k8s.io/v1", "Ingress", wanted.annotations), "spec": spec},)


def _http_route(cluster: Cluster) -> tuple[Object, ...]:
    wanted = cluster.spec.router.http_route
    if wanted is None:
        return ()
    rule = {
        "matches": [{"path": {"type": "PathPrefix", "value": wanted.path}}],
        "backendRefs": [{"name": cluster.object_name(Component.ROUTER), "port": ROUTER_PORT}],
    }
    spec: Object = {"parentRefs": wanted.parent_refs, "rules": [rule]}
    if wanted.hostnames:
        spec["hostnames"] = list(wanted.hostnames)
    return ({**_annotated(cluster, "gateway.networking.k8s.io/v1", "HTTPRoute", wanted.annotations), "spec": spec},)


def _annotated(cluster: Cluster, api_version: str, kind: str, annotations: Mapping[str, str]) -> Object:
    manifest = cluster.head(api_version, kind, Component.ROUTER)
    if annotations:
        manifest["metadata"]["annotations"] = dict(annotations)
    return manifest
