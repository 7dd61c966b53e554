"""One container of a pod: pulls, configures, runs, probes, restarts and ends its process.

Played: back-off of pulls and restarts, probes, commands before the end, grace periods, with the events and reasons
that the kubelet gives. Checked by `test_kubelet_failures.py`. Not played: what `pod.py` refuses, logs by the API,
`exec`.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
from asyncio.subprocess import Process
from collections.abc import Callable, Mapping
from typing import Any

from tests.kube.kubelet.api import CONFIG_MAPS, PODS, Object, now
from tests.kube.kubelet.environment import (
    ConfigError,
    addresses,
    at_home,
    command_line,
    container_env,
    references,
)
from tests.kube.kubelet.machine import Machine
from tests.kube.kubelet.podstatus import Record, Running, Terminated, Waiting
from tests.kube.kubelet.probes import Prober, Tally
from tests.kube.kubelet.process import Isolation, ended, launch, signal_group, spawn, user
from tests.kube.kubelet.volumes import PodVolumes, mounts_of

CONFIG_RETRY = 10.0
FIRST_BACKOFF = 10.0
LONGEST_BACKOFF = 300.0
FORGIVEN_AFTER = 600.0
"""Seconds of life after which the backoff starts anew."""
LEAST_GRACE = 2.0
"""Seconds a process gets after its preStop hook, even when that took all there was."""
NOT_STARTED = 128


class Container:
    """From the pod's start to its end. `pod` gives the pod as it is, `changed` hears of changes of `record`."""

    def __init__(
        self,
        machine: Machine,
        spec: Mapping[str, Any],
        ip: str,
        volumes: PodVolumes,
        pod: Callable[[], Object],
        changed: Callable[[], None],
    ) -> None:
        metadata = pod()["metadata"]
        self.spec = spec
        self.started = asyncio.Event()
        """It has begun, and passed its startup probe if it has one."""
        self.record = Record(spec["name"], spec.get("image", ""))
        self.log = machine.logs / f"{metadata['namespace']}_{metadata['name']}_{spec['name']}.log"
        self._machine = machine
        self._ip = ip
        self._volumes = volumes
        self._pod = pod
        self._changed = changed
        self._prober = Prober(machine.session, ip, spec)
        self._stopping = asyncio.Event()
        self._process: Process | None = None
        self._env: dict[str, str] = {}
        self._launch = ""

    @property
    def pid(self) -> int | None:
        """Of the process while it runs."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process, if it runs."""
        if self._process is not None:
            signal_group(self._process, number)

    async def run(self) -> None:
        """Returns when the container was stopped; until then it is restarted whenever it ends. An init container that
        has ended well is done."""
        if not await self._pulled():
            return
        backoff = 0.0
        while (argv := await self._configured()) is not None:
            began = asyncio.get_running_loop().time()
            end = await self._live(argv)
            self.record.started = self.record.ready = False
            self._become(end)
            if self._stopping.is_set():
                return
            if self.record.completes and end.code == 0:
                self.record.ready = True
                self._changed()
                return
            if asyncio.get_running_loop().time() - began > self._machine.timing.scaled(FORGIVEN_AFTER):
                backoff = 0.0
            self.record.last = end
            if backoff and await self._back_off(backoff):
                return
            backoff = min(2 * backoff or FIRST_BACKOFF, LONGEST_BACKOFF)
            self.record.restarts += 1

    async def stop(self, grace: float) -> None:
        """Ends the container for good, its process gracefully. Returns when the process is gone."""
        self._stopping.set()
        if self._process is not None:
            await self._end(self._process, grace)

    def kill(self) -> None:
        """Ends the container for good and at once."""
        self._stopping.set()
        self.signal(signal.SIGKILL)

    def _become(self, state: Waiting | Running | Terminated) -> None:
        self.record.state = state
        self._changed()

    def _say(self, reason: str, message: str, *, warning: bool = False) -> None:
        self._machine.api.say(PODS, self._pod(), reason, message, warning=warning)

    async def _wait(self, seconds: float) -> bool:
        """Waits, and says whether the container is to stop."""
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _pulled(self) -> bool:
        """Whether the image is there; False when the container is to stop."""
        image, images, delay = self.record.image, self._machine.images, FIRST_BACKOFF
        self._say("Pulling", f'Pulling image "{image}"')
        while not images.can_pull(image):
            name = image.rpartition("@")[0] or image
            error = (
                f'failed to pull and unpack image "{image}": failed to resolve reference "{image}": {name}: not found'
            )
            self._say("Failed", f'Failed to pull image "{image}": {error}', warning=True)
            self._become(Waiting("ErrImagePull", error))
            if await self._wait(self._machine.timing.scaled(1.0)):
                return False
            said = f'Back-off pulling image "{image}"'
            self._say("BackOff", said)
            self._become(Waiting("ImagePullBackOff", f"{said}: ErrImagePull: {error}"))
            if await self._wait(self._machine.timing.scaled(delay)):
                return False
            delay = min(2 * delay, LONGEST_BACKOFF)
        return True

    async def _configured(self) -> list[str] | None:
        """The command line, with the environment at hand; None when the container is to stop."""
        while True:
            try:
                return self._configure()
            except ConfigError as error:
                self._say("Failed", f"Error: {error}", warning=True)
                self._become(Waiting("CreateContainerConfigError", str(error)))
            if await self._wait(self._machine.timing.scaled(CONFIG_RETRY)):
                return None

    def _configure(self) -> list[str]:
        pod, machine = self._pod(), self._machine
        data = {}
        for name in references(self.spec):
            found = machine.api.get(CONFIG_MAPS, (pod["metadata"]["namespace"], name))
            if found is not None:
                data[name] = found.get("data") or {}
        image = machine.images.find(self.record.image)
        placed = {**pod, "status": {"podIP": self._ip, "hostIP": machine.loopback.node_ip}}
        env = {**machine.always, **container_env(self.spec, placed, data)}
        env = {name: at_home(value, self._ip) for name, value in env.items()}
        argv = [at_home(part, self._ip) for part in command_line(self.spec)]
        ours = {"HOSTNAME": pod["metadata"]["name"]}
        token = self._volumes.token(pod, machine.isolation)
        if token is not None and machine.isolation is Isolation.NONE:
            ours["KUBECONFIG"], token = str(token), None
        mounts = mounts_of(self.spec, self._volumes.prepare(pod), token)
        who = user(pod, self.spec, image.uid)
        self._launch = launch(pod, self.spec, who, mounts, machine.isolation)
        self._env = {**image.env, **env, **addresses(self._ip), **ours}
        return argv

    async def _back_off(self, seconds: float) -> bool:
        """Waits before a restart, and says whether the container is to stop."""
        metadata = self._pod()["metadata"]
        message = (
            f"back-off {_duration(seconds)} restarting failed container={self.record.name} "
            f"pod={metadata['name']}_{metadata['namespace']}({metadata['uid']})"
        )
        self._say("BackOff", f"Back-off restarting failed container {self.record.name}", warning=True)
        self._become(Waiting("CrashLoopBackOff", message))
        return await self._wait(self._machine.timing.scaled(seconds))

    async def _live(self, argv: list[str]) -> Terminated:
        """One life of the process."""
        began = now()
        try:
            self._process = process = await self._spawn(argv)
        except OSError as error:
            return Terminated(NOT_STARTED, began, now(), str(error))
        try:
            self.record.container_id = f"process://{secrets.token_hex(32)}"
            if "startupProbe" not in self.spec:
                self._begun()
            self.record.ready = self.record.started and "readinessProbe" not in self.spec
            self._say("Started", f"Started container {self.record.name}")
            self._become(Running(began))
            if self._stopping.is_set():
                # `stop` came while the process was being made and saw none.
                signal_group(process, signal.SIGKILL)
            return await self._probed(process, began)
        finally:
            await ended(process)
            self._process = None

    def _begun(self) -> None:
        self.record.started = True
        self.started.set()

    async def _probed(self, process: Process, began: str) -> Terminated:
        async with asyncio.TaskGroup() as group:
            probes = [group.create_task(self._probes(process))]
            code = await process.wait()
            for each in probes:
                each.cancel()
        return Terminated(code, began, now())

    async def _probes(self, process: Process) -> None:
        if "startupProbe" in self.spec and not await self._startup(process):
            return
        async with asyncio.TaskGroup() as group:
            if "livenessProbe" in self.spec:
                group.create_task(self._liveness(process))
            if "readinessProbe" in self.spec:
                group.create_task(self._readiness())

    def _tally(self, kind: str) -> Tally:
        probe = self.spec[kind]
        failures = probe.get("failureThreshold", 3)
        if kind != "readinessProbe":
            failures = self._machine.timing.failures(failures)
        return Tally(probe.get("successThreshold", 1), failures)

    async def _verdict(self, kind: str, count: Tally) -> bool:
        """Asks until the verdict changes, and gives the new one."""
        probe, timing = self.spec[kind], self._machine.timing
        period = timing.scaled(probe.get("periodSeconds", 10))
        first = probe.get("initialDelaySeconds", 0)
        await asyncio.sleep(period if count.verdict is not None else timing.scaled(first) if first else 0)
        while True:
            why = await self._prober.ask(probe)
            if why:
                what = kind.removesuffix("Probe").capitalize()
                self._say("Unhealthy", f"{what} probe failed: {why}", warning=True)
            if count.add(not why):
                return not why
            await asyncio.sleep(period)

    async def _startup(self, process: Process) -> bool:
        if not await self._verdict("startupProbe", self._tally("startupProbe")):
            await self._fail(process, "startup")
            return False
        self._begun()
        self.record.ready = "readinessProbe" not in self.spec
        self._changed()
        return True

    async def _liveness(self, process: Process) -> None:
        count = self._tally("livenessProbe")
        while await self._verdict("livenessProbe", count):
            pass
        await self._fail(process, "liveness")

    async def _readiness(self) -> None:
        count = self._tally("readinessProbe")
        while True:
            ready = await self._verdict("readinessProbe", count)
            if self.record.ready != ready:
                self.record.ready = ready
                self._changed()

    async def _fail(self, process: Process, probe: str) -> None:
        # A pod that ends is not probed for life any more.
        if not self._stopping.is_set():
            self._say("Killing", f"Container {self.record.name} failed {probe} probe, will be restarted")
            await self._end(process, self._pod()["spec"].get("terminationGracePeriodSeconds", 30))

    async def _end(self, process: Process, grace: float) -> None:
        """preStop hook, SIGTERM, SIGKILL when the grace period is over. Returns when the process is gone."""
        exited = asyncio.ensure_future(process.wait())
        deadline = asyncio.get_running_loop().time() + grace
        hook = (self.spec.get("lifecycle") or {}).get("preStop")
        try:
            if hook and grace > 0:
                await self._hooked(hook, exited, grace)
            signal_group(process, signal.SIGTERM)
            left = deadline - asyncio.get_running_loop().time()
            await asyncio.wait((exited,), timeout=max(left, LEAST_GRACE) if grace > 0 else 0)
            signal_group(process, signal.SIGKILL)
            await exited
        finally:
            exited.cancel()

    async def _hooked(self, hook: Mapping[str, Any], exited: asyncio.Future[int], grace: float) -> None:
        """Runs the hook while the process and the grace period last."""
        hooked = asyncio.ensure_future(self._hook(hook))
        try:
            await asyncio.wait((exited, hooked), timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        finally:
            hooked.cancel()
            await asyncio.gather(hooked, return_exceptions=True)

    async def _hook(self, hook: Mapping[str, Any]) -> None:
        if code := await self._exec(hook["exec"]["command"]):
            self._say("FailedPreStopHook", f"PreStopHook failed: command exited with {code}", warning=True)

    async def _spawn(self, argv: list[str]) -> Process:
        return await spawn(argv, self._env, self._launch, self.log, self._machine.parent_pipe)

    async def _exec(self, argv: list[str]) -> int:
        process = await self._spawn(argv)
        try:
            return await process.wait()
        finally:
            await ended(process)


def _duration(seconds: float) -> str:
    """As Go prints it."""
    minutes, rest = divmod(int(seconds), 60)
    return (f"{minutes}m" if minutes else "") + f"{rest}s"
