"""The routers: their Deployment, their two Services (data and management), and what leads clients to them."""

from __future__ import annotations

from collections.abc import Mapping

from controller.api.model import KEYS_VOLUME, MANAGEMENT_VOLUME, START_SECONDS, TLS_VOLUME
from controller.objects.config import CLIENT_CA_FILE, KEYS_FILE, KEYS_FOLDER, TLS_FILES, TLS_FOLDER, picker_settings
from controller.objects.envoy import SHARED_MOUNT, build_envoy_containers, envoy_files, envoy_volumes
from controller.objects.management import MANAGEMENT_FOLDER, management_secret, management_variables
from controller.objects.names import (
    HTTP,
    MANAGEMENT,
    MANAGEMENT_PORT,
    PICKER,
    PICKER_PORT,
    ROUTER_PORT,
    Cluster,
    Component,
    Object,
)
from controller.objects.pods import (
    SHUTDOWN_MARGIN,
    build_container,
    build_pod_template,
    build_probes,
    build_startup_probe,
    container_env,
    container_resources,
    ip_families,
)

ANSWER_SECONDS = 5
"""Seconds beyond that wait for the router to answer the probe."""


def build_router_deployment(cluster: Cluster) -> Object:
    """The routers' Deployment. A new router is ready before an old one leaves, so that one always answers."""
    router, release = cluster.spec.router, cluster.release
    drain = max(release.drain_delay, release.drain_limit) + cluster.spec.workers.drain_seconds
    # A router without workers holds its answer back: a readiness probe would record a failure every two seconds
    # meanwhile, and find the first worker up to two seconds late.
    wait = START_SECONDS[cluster.spec.engine.type]
    startup = build_startup_probe(f"/started?wait={wait}", MANAGEMENT, timeout=wait + ANSWER_SECONDS)
    picker = {PICKER: PICKER_PORT} if cluster.spec.gateway.picks else {}
    tls = _tls_volume(cluster)
    secrets = (*_keys_volume(cluster), *tls, *_management_volume(cluster))
    volumes, mounts = [volume for volume, _ in secrets], [mount for _, mount in secrets]
    decides = picker_settings(cluster)
    env = [each for each in container_env(cluster.spec.model.env, router.env) if each["name"] not in decides]
    probes = build_probes(MANAGEMENT, readiness="/ready", liveness="/health", startup=startup)
    ports = {HTTP: ROUTER_PORT, MANAGEMENT: MANAGEMENT_PORT, **picker}
    beside: list[Object] = []
    if router.is_behind_envoy:
        # Envoy listens, and asks the router itself whether requests should come. Both have the certificate: the router
        # tells when it ends.
        beside = build_envoy_containers(cluster, [mount for _, mount in tls])
        mounts.append(SHARED_MOUNT)
        volumes += envoy_volumes(cluster)
        del ports[HTTP], probes["readinessProbe"]
    process = build_container(
        cluster,
        Component.ROUTER,
        name="router",
        module="router.main",
        image=router.image,
        pull_policy=router.image_pull_policy,
        ports=ports,
        env=[
            *env,
            *({"name": name, "value": value} for name, value in decides.items()),
            *management_variables(cluster),
        ],
        probes=probes,
        resources=container_resources(router.resources),
        volume_mounts=mounts,
    )
    template = build_pod_template(
        cluster,
        Component.ROUTER,
        router,
        containers=[process],
        init_containers=beside,
        volumes=volumes,
        files=envoy_files(cluster),
        scrape_port=MANAGEMENT_PORT,
        grace_seconds=drain + SHUTDOWN_MARGIN,
        service_account=cluster.object_name(Component.ROUTER),
        # The account itself says no, so that no other pod that uses it gets a token.
        automount_token=True,
    )
    return {
        **cluster.new_object("apps/v1", "Deployment", Component.ROUTER),
        "spec": {
            "replicas": router.replicas,
            "selector": {"matchLabels": cluster.selector(Component.ROUTER)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": template,
        },
    }


Mounted = tuple[Object, Object]
"""A volume and where the router's container mounts it: a folder, because a mounted single file never changes."""


def _mounted(name: str, folder: str, source: Object) -> Mounted:
    return {"name": name, **source}, {"name": name, "mountPath": folder, "readOnly": True}


def _keys_volume(cluster: Cluster) -> tuple[Mounted, ...]:
    """The API keys."""
    wanted = cluster.spec.router.auth.keys_secret_ref
    if wanted is None:
        return ()
    items = [{"key": wanted.key, "path": KEYS_FILE}]
    return (_mounted(KEYS_VOLUME, KEYS_FOLDER, {"secret": {"secretName": wanted.name, "items": items}}),)


def _tls_volume(cluster: Cluster) -> tuple[Mounted, ...]:
    """The certificate, its key, and the authorities of clients' certificates."""
    tls = cluster.spec.router.tls
    if tls.secret_ref is None:
        return ()
    own = [{"key": name, "path": name} for name in TLS_FILES]
    sources = [{"secret": {"name": tls.secret_ref.name, "items": own}}]
    if (authorities := tls.client_ca_secret_ref) is not None:
        items = [{"key": authorities.key, "path": CLIENT_CA_FILE}]
        sources.append({"secret": {"name": authorities.name, "items": items}})
    return (_mounted(TLS_VOLUME, TLS_FOLDER, {"projected": {"sources": sources}}),)


def _management_volume(cluster: Cluster) -> tuple[Mounted, ...]:
    """The tokens of the management port."""
    name = management_secret(cluster)
    return () if name is None else (_mounted(MANAGEMENT_VOLUME, MANAGEMENT_FOLDER, {"secret": {"secretName": name}}),)


def build_router_service(cluster: Cluster) -> Object:
    """The Service that clients talk to: the OpenAI API and nothing else."""
    wanted = cluster.spec.router.service
    protocol = {"appProtocol": "https"} if cluster.spec.router.tls.secret_ref is not None else {}
    # By number: Envoy is a sidecar, and older EndpointSlice controllers find no named port there.
    target = ROUTER_PORT if cluster.spec.router.is_behind_envoy else HTTP
    return {
        **_annotated(cluster, "v1", "Service", wanted.annotations),
        "spec": {
            "type": wanted.type,
            "selector": cluster.selector(Component.ROUTER),
            "ports": [{"name": HTTP, "port": ROUTER_PORT, "targetPort": target, "protocol": "TCP", **protocol}],
            **({} if wanted.load_balancer_class is None else {"loadBalancerClass": wanted.load_balancer_class}),
            **ip_families(cluster),
        },
    }


def build_router_management_service(cluster: Cluster) -> Object:
    """Health, metrics and explanations, inside the cluster only. Headless, because each router is asked by itself."""
    return {
        **cluster.new_object("v1", "Service", Component.ROUTER, "-management"),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": cluster.selector(Component.ROUTER),
            "ports": [{"name": MANAGEMENT, "port": MANAGEMENT_PORT, "targetPort": MANAGEMENT, "protocol": "TCP"}],
            **ip_families(cluster),
        },
    }


def build_router_entrances(cluster: Cluster) -> tuple[Object, ...]:
    """The Ingress and the Gateway API HTTPRoute to the routers' Service, as far as the spec asks for them."""
    return (*_build_ingress(cluster), *_build_http_route(cluster))


def _build_ingress(cluster: Cluster) -> tuple[Object, ...]:
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


def _build_http_route(cluster: Cluster) -> tuple[Object, ...]:
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
    manifest = cluster.new_object(api_version, kind, Component.ROUTER)
    if annotations:
        manifest["metadata"]["annotations"] = dict(annotations)
    return manifest
