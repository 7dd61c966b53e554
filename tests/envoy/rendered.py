"""A router pod as the operator renders it, as processes: its containers with exactly their commands, arguments,
variables and files, in the order in which a kubelet starts and stops them.

Paths of mounts are mapped to folders and ports to free ones, and the list of workers is given, in place of the
EndpointSlices that there are none of. Secrets and ConfigMaps are written as a kubelet writes them: files are symbolic
links through `..data`, which is replaced as a whole (AtomicWriter in `pkg/volume/util`). Not modelled: users, read-only
roots, probes and restarts, which tests/kube/kubelet plays.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controller.objects.names import Release
from runtime.envoy.binary import envoy_binary
from tests.controller.objects.support import objects
from tests.processes import free_port

Object = dict[str, Any]


def publish(folder: Path, files: Mapping[str, bytes]) -> None:
    """The files of a volume, all at once, as a kubelet does it."""
    folder.mkdir(exist_ok=True)
    number = sum(1 for _ in folder.glob("..version*"))
    version = folder / f"..version{number}"
    version.mkdir()
    for name, content in files.items():
        (version / name).write_bytes(content)
    (folder / "..data_tmp").symlink_to(version.name)
    (folder / "..data_tmp").replace(folder / "..data")
    for name in files:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")


@dataclass
class RenderedPod:
    """The pod of `Deployment/rag-router`. `folder` has to be short: sockets are below it."""

    found: Mapping[str, Object]
    folder: Path
    workers: Sequence[str]
    secrets: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)
    """Files by the name of the volume."""
    processes: dict[str, Process] = field(default_factory=dict)
    """By the name of the container."""

    def __post_init__(self) -> None:
        spec = self.found["Deployment/rag-router"]["spec"]["template"]["spec"]
        self.initial, self.main = spec["initContainers"], spec["containers"]
        self.every = {each["name"]: each for each in (*self.initial, *self.main)}
        declared = [port["containerPort"] for each in self.every.values() for port in each.get("ports", ())]
        self.ports = {port: free_port() for port in declared}
        self.paths = {
            mount["mountPath"]: str(self.folder / mount["name"])
            for each in self.every.values()
            for mount in each["volumeMounts"]
            if mount["mountPath"].startswith("/run/")
        }
        for volume in spec["volumes"]:
            name = volume["name"]
            if "configMap" in volume:
                data = self.found[f"ConfigMap/{volume['configMap']['name']}"]["data"]
                publish(self.folder / name, {file: self._here(file, text) for file, text in data.items()})
            elif name in self.secrets:
                publish(self.folder / name, self.secrets[name])
            else:
                assert "emptyDir" in volume, f"a file for the volume {name}"
                (self.folder / name).mkdir()

    def _path(self, text: str) -> str:
        for target in sorted(self.paths, key=len, reverse=True):
            text = re.sub(rf"{target}(?=/|\"|$)", self.paths[target], text)
        return text

    def _here(self, file: str, text: str) -> bytes:
        """A file of a ConfigMap with this machine's paths and ports."""

        def replaced(value: Any) -> Any:
            if isinstance(value, dict):
                value = {name: replaced(each) for name, each in value.items()}
                if "port_value" in value:
                    value |= {"port_value": self.ports[value["port_value"]], "address": "127.0.0.1"}
            elif isinstance(value, list):
                return [replaced(each) for each in value]
            return value

        return json.dumps(replaced(json.loads(self._path(text)))).encode()

    def _environment(self, container: Object) -> dict[str, str]:
        given = {
            name: self._path(value)
            for source in container.get("envFrom", ())
            for name, value in self.found[f"ConfigMap/{source['configMapRef']['name']}"]["data"].items()
            if not name.startswith("ROUTER_KUBERNETES_")
        }
        given |= {each["name"]: self._path(each["value"]) for each in container.get("env", ())}
        if given:
            given |= {"ROUTER_WORKERS": ",".join(self.workers), "ROUTER_MANAGEMENT_HOST": "127.0.0.1"}
            given["ROUTER_MANAGEMENT_PORT"] = str(self.ports[9000])
        return {"PATH": os.environ["PATH"], **given}

    async def start(self, name: str) -> Process:
        """Starts a container's process."""
        container = self.every[name]
        program, *arguments = container["command"]
        executable = {"python": sys.executable, "envoy": str(envoy_binary())}[program]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = self.processes[name] = await asyncio.create_subprocess_exec(
                executable,
                *(self._path(each) for each in (*arguments, *container.get("args", ()))),
                env=self._environment(container),
                stdout=log,
                stderr=log,
            )
        return process

    async def stop(self) -> None:
        """SIGTERM to the containers, and then to the sidecars, the last one first."""
        for each in (*self.main, *reversed(self.initial)):
            process = self.processes[each["name"]]
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            await process.wait()

    def log(self, name: str) -> str:
        """What a container has written."""
        return (self.folder / f"{name}.log").read_text(errors="replace")


@asynccontextmanager
async def running(
    folder: Path, workers: Sequence[str], secrets: Mapping[str, Mapping[str, bytes]] | None = None, **router: Any
) -> AsyncIterator[RenderedPod]:
    """The pod of a KVCluster with this `spec.router`: its init containers have ended, and the others run."""
    release = Release("kvcluster:1.2.3", drain_delay=0.5, drain_limit=0.5)
    found = objects(release=release, router={"dataPlane": "envoy", **router})
    token = {"kvcluster-management": {"token": b"a-token-of-the-test"}}
    pod = RenderedPod(found, folder, workers, {**token, **(secrets or {})})
    try:
        for each in (*pod.initial, *pod.main):
            process = await pod.start(each["name"])
            if each in pod.initial and each.get("restartPolicy") != "Always":
                assert await process.wait() == 0, pod.log(each["name"])
        yield pod
    finally:
        for process in pod.processes.values():
            if process.returncode is None:
                process.kill()
            await process.wait()
