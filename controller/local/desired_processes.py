"""Which local processes a manifest asks for: a pure function of the manifest and the addresses they listen on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from controller.api.common import EnvVar
from controller.api.model import EngineType, KVCluster
from controller.objects.names import Component
from controller.process_settings import flags, router_settings, worker_settings


class LocalModeError(ValueError):
    """The manifest is valid, but a single machine cannot run it; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Base URLs whose ports are already bound, `workers` in the order of their indices, and a file."""

    workers: tuple[str, ...]
    router: str
    management: str
    adapters_file: str | None = None
    """File with the list of LoRA adapters, where the manifest has any."""


@dataclass(frozen=True, slots=True)
class DesiredProcess:
    """A process that should run."""

    name: str
    role: Component
    url: str
    """Base URL that it serves."""
    module: str
    """Python module that it runs."""
    args: tuple[str, ...]
    """Its command line, without the listening sockets."""
    listeners: tuple[tuple[str, str], ...]
    """(flag, base URL): the flag that takes the descriptor of the socket bound to the URL's port."""
    probe: str
    """URL that answers 200 once the process is ready."""
    grace: float
    """Seconds that it may take to finish its requests once it was told to stop."""
    env: Mapping[str, str] = field(default_factory=dict)


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


def worker_name(manifest: KVCluster, index: int) -> str:
    """Name of a worker, which is also the id that it reports."""
    return f"{manifest.name}-worker-{index}"


def desired_processes(manifest: KVCluster, addresses: Addresses) -> tuple[DesiredProcess, ...]:
    """The workers in the order of their indices, then the router. Raises `LocalModeError`."""
    return (*desired_workers(manifest, addresses), _router(manifest, addresses))


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
        role=Component.WORKER,
        url=url,
        module="worker.main",
        args=(*flags(own | worker_settings(spec)), *spec.engine.args),
        listeners=(("--fd", url),),
        probe=f"{url}/health",
        grace=spec.workers.drain_seconds,
        env=_environment([*spec.model.env, *spec.engine.env]),
    )


def _router(manifest: KVCluster, addresses: Addresses) -> DesiredProcess:
    spec = manifest.spec
    return DesiredProcess(
        name=f"{manifest.name}-router",
        role=Component.ROUTER,
        url=addresses.router,
        module="router.main",
        args=flags({"workers": ",".join(addresses.workers)} | router_settings(spec)),
        listeners=(("--fd", addresses.router), ("--management-fd", addresses.management)),
        probe=f"{addresses.management}/ready",
        grace=spec.workers.drain_seconds,
        env=_environment([*spec.model.env, *spec.router.env]),
    )


def _environment(env: Iterable[EnvVar]) -> dict[str, str]:
    """The variables that have a value outside a cluster. Of two with the same name the later wins."""
    return {variable.name: variable.value for variable in env if variable.value_from is None}
