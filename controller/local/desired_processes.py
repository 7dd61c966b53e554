"""Which local processes a manifest asks for: a pure function of the manifest and the addresses they listen on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import urlsplit

from controller.api.common import EnvVar
from controller.api.model import EngineType, KVCluster
from controller.api.routing import DataPlaneType
from controller.local.envoy import CERTIFICATE, EnvoyParts, envoy_files, envoy_flags, router_flags
from controller.process_settings import flags, router_settings, worker_settings
from runtime.envoy.binary import EnvoyMissingError, envoy_binary


class LocalModeError(ValueError):
    """The manifest is valid, but a single machine cannot run it; the message says what to change."""


class Role(StrEnum):
    """What a process does."""

    WORKER = "worker"
    ROUTER = "router"
    ENVOY = "envoy"


class Guard(StrEnum):
    """The module that runs a program, and ends it with the supervisor."""

    MODULE = "controller.local.parent_guard"
    """Of a Python module."""
    EXECUTABLE = "controller.local.exec_guard"
    """Of any other program."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Base URLs whose ports are already bound, `workers` in the order of their indices, and a file."""

    workers: tuple[str, ...]
    router: str
    management: str
    adapters_file: str | None = None
    """File with the list of LoRA adapters, where the manifest has any."""
    envoy: EnvoyParts | None = None
    """The Envoy that serves `router`; None: the router does."""
    token_file: str | None = None
    """File with the token of the management port, where it asks for one."""


@dataclass(frozen=True, slots=True)
class DesiredProcess:
    """A process that should run."""

    name: str
    role: Role
    url: str
    """Base URL that it serves."""
    program: str
    """What it runs: a Python module, or a path, as its guard takes it."""
    args: tuple[str, ...]
    """Its command line, without the listening sockets."""
    listeners: tuple[tuple[str, str], ...]
    """(flag, base URL): the flag that takes the descriptor of the socket bound to the URL's port."""
    probe: str
    """URL that answers 200 once the process is ready; empty: it is asked in a way of its own."""
    grace: float
    """Seconds that it may take to finish its requests once it was told to stop."""
    env: Mapping[str, str] = field(default_factory=dict)
    guard: Guard = Guard.MODULE
    files: Mapping[str, str] = field(default_factory=dict)
    """What has to be in files before it starts, by path."""


def check(manifest: KVCluster) -> None:
    """Raises `LocalModeError` when local mode cannot run this manifest at all."""
    if manifest.spec.engine.type is EngineType.VLLM:
        raise LocalModeError(
            "spec.engine.type: vllm engines need a cluster with GPUs; set it to emulator to run the manifest here"
        )
    if manifest.spec.is_external:
        raise LocalModeError(
            "spec.engine.type: external names pods, which only a cluster has; a router without a manifest takes "
            "engines that run here: python -m router.main --workers http://127.0.0.1:8000"
        )
    if manifest.spec.workers.replicas == 0:
        raise LocalModeError("spec.workers.replicas: 0 leaves nothing to run here; set it to 1 or more")
    if has_envoy(manifest):
        try:
            envoy_binary()
        except EnvoyMissingError as error:
            raise LocalModeError(f"spec.router.dataPlane: envoy, but {error}") from None


def worker_name(manifest: KVCluster, index: int) -> str:
    """Name of a worker, which is also the id that it reports."""
    return f"{manifest.name}-worker-{index}"


def desired_processes(manifest: KVCluster, addresses: Addresses) -> tuple[DesiredProcess, ...]:
    """The workers in the order of their indices, then the router and its Envoy, if any. Raises `LocalModeError`."""
    router = _router(manifest, addresses)
    envoy = [_envoy(manifest, addresses, addresses.envoy, router.env)] if addresses.envoy is not None else []
    return (*desired_workers(manifest, addresses), router, *envoy)


def desired_workers(manifest: KVCluster, addresses: Addresses) -> tuple[DesiredProcess, ...]:
    """The workers alone, for a router that is not ours. Raises `LocalModeError`."""
    check(manifest)
    if len(addresses.workers) != manifest.spec.workers.replicas:
        raise ValueError(f"{len(addresses.workers)} addresses for {manifest.spec.workers.replicas} workers")
    file = addresses.adapters_file
    return tuple(_worker(manifest, index, url, file) for index, url in enumerate(addresses.workers))


def _worker(manifest: KVCluster, index: int, url: str, adapters_file: str | None) -> DesiredProcess:
    spec = manifest.spec
    own = {"worker-id": worker_name(manifest, index), "advertise-url": url, "adapters-file": adapters_file}
    return DesiredProcess(
        name=worker_name(manifest, index),
        role=Role.WORKER,
        url=url,
        program="worker.main",
        args=(*flags(own | worker_settings(spec)), *spec.engine.args),
        listeners=(("--fd", url),),
        probe=f"{url}/health",
        grace=spec.workers.drain_seconds,
        env=_environment([*spec.model.env, *spec.engine.env]),
    )


def has_envoy(manifest: KVCluster) -> bool:
    """Whether an Envoy is to be the data plane."""
    return manifest.spec.router.data_plane is DataPlaneType.ENVOY


def speaks_tls(manifest: KVCluster) -> bool:
    """Whether the data port is one of HTTPS."""
    return bool(_router_environment(manifest).get(CERTIFICATE))


def _router_environment(manifest: KVCluster) -> dict[str, str]:
    return _environment([*manifest.spec.model.env, *manifest.spec.router.env])


def _router(manifest: KVCluster, addresses: Addresses) -> DesiredProcess:
    spec, envoy = manifest.spec, addresses.envoy
    management = ("--management-fd", addresses.management)
    return DesiredProcess(
        name=f"{manifest.name}-router",
        role=Role.ROUTER,
        url=addresses.router if envoy is None else addresses.management,
        program="router.main",
        args=flags(
            {"workers": ",".join(addresses.workers), "management-token-file": addresses.token_file}
            | router_settings(spec)
            | (router_flags(envoy) if envoy is not None else {})
        ),
        listeners=(("--fd", addresses.router), management) if envoy is None else (management,),
        probe=f"{addresses.management}/ready",
        grace=spec.workers.drain_seconds,
        env=_router_environment(manifest),
    )


def _envoy(
    manifest: KVCluster, addresses: Addresses, parts: EnvoyParts, router_env: Mapping[str, str]
) -> DesiredProcess:
    where = urlsplit(addresses.router)
    host, port = where.hostname or "", where.port or 0
    workers = [urlsplit(url).netloc for url in addresses.workers]
    return DesiredProcess(
        name=f"{manifest.name}-envoy",
        role=Role.ENVOY,
        url=addresses.router,
        program=parts.binary,
        args=envoy_flags(parts),
        listeners=(),
        probe="",
        grace=manifest.spec.workers.drain_seconds,
        guard=Guard.EXECUTABLE,
        files=envoy_files(manifest, parts, port, host, workers, router_env),
    )


def _environment(env: Iterable[EnvVar]) -> dict[str, str]:
    """The variables that have a value outside a cluster. Of two with the same name the later wins."""
    return {variable.name: variable.value for variable in env if variable.value_from is None}
