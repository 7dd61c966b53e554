"""A KVCluster as local processes: `async with LocalCluster(manifest) as cluster`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from controller.api.model import KVCluster
from controller.local.desired_processes import (
    Addresses,
    DesiredProcess,
    Role,
    check,
    desired_processes,
    has_envoy,
    speaks_tls,
)
from controller.local.envoy import EnvoyControl, EnvoyParts
from controller.local.process import Control, HttpControl, ManagedProcess, ProcessState, ProcessStatus
from controller.process_settings import adapters_file
from kvcache.ranks import split_rank
from runtime.envoy.binary import envoy_binary
from runtime.http.tokens import token_headers
from runtime.sockets import listen, reserve, url_of

LOOPBACK = "127.0.0.1"
FAILED_STARTS = 3
"""A process that ends so often in a row without having been ready is given up."""
EXIT_USAGE = 2
"""Exit code of a process whose settings are wrong: another start would end the same way."""
POLL_INTERVAL = 0.05


class StartError(RuntimeError):
    """The cluster did not become ready; the message names the process and shows what it wrote last."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is not in the manifest: where to listen and to log.

    Port 0 takes any free one. `log_dir` None: a temporary folder that is removed with the cluster. `echo` is called
    with (process name, line) for each line a process writes, `on_change` with each change of a process.
    `management_token` is what the management port asks for, if anything: `runtime.http.tokens.parse` says what it may
    be.
    """

    port: int = 0
    management_port: int = 0
    log_dir: Path | None = None
    echo: Callable[[str, str], None] | None = None
    on_change: Callable[[ProcessStatus], None] | None = None
    management_token: str = field(default="", repr=False)


class LocalCluster:
    """Runs a manifest on this machine while its context is entered.

    Entering starts every process and returns at once: `await wait_ready()` before use. Leaving stops Envoy, if there is
    one, and the router, which finish their requests, then the workers, and returns when all processes are gone.
    Leaving by an exception waits for no request. The constructor raises `LocalModeError` for a manifest that a single
    machine cannot run; entering raises `PortTakenError` or another `OSError`.
    """

    def __init__(
        self,
        manifest: KVCluster,
        options: Options | None = None,
        *,
        desired: Callable[[KVCluster, Addresses], tuple[DesiredProcess, ...]] = desired_processes,
    ) -> None:
        check(manifest)
        self.manifest = manifest
        self._options = options or Options()
        self._desired = desired
        self._cleanup = contextlib.AsyncExitStack()
        self._changed = asyncio.Event()
        self._processes: dict[Role, list[ManagedProcess]] = {role: [] for role in Role}
        self._envoy: EnvoyControl | None = None
        self._sockets: dict[str, socket.socket] = {}
        self._missing = ""

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as cleanup:
            self._client = await cleanup.enter_async_context(httpx.AsyncClient(trust_env=False))
            addresses = self._listen(cleanup)
            self.log_dir = self._options.log_dir or Path(
                cleanup.enter_context(tempfile.TemporaryDirectory(prefix=f"kvcluster-{self.manifest.name}-"))
            )
            self.addresses = replace(
                addresses, adapters_file=self._write_adapters(), token_file=self._write_token(cleanup)
            )
            read_end, write_end = os.pipe()
            cleanup.callback(os.close, write_end)
            cleanup.callback(os.close, read_end)
            for desired in self._desired(self.manifest, self.addresses):
                _write(desired.files)
                process = self._managed(desired, read_end, await self._control(desired, cleanup))
                self._processes[desired.role].append(process)
                process.start()
            self._cleanup = cleanup.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.kill()
        async with self._cleanup:
            for role in (Role.ENVOY, Role.ROUTER, Role.WORKER):
                for process in self._processes[role]:
                    process.stop()
                if role is Role.ROUTER:
                    # From here on new connections are refused, instead of waiting for a router that will not start.
                    for url in (self.addresses.router, self.addresses.management):
                        self._sockets[url].close()
                await asyncio.gather(*(process.ended() for process in self._processes[role]))

    def _write_adapters(self) -> str | None:
        """The file with the manifest's LoRA adapters, beside the logs; None where it lists none."""
        if not self.manifest.spec.model.adapters:
            return None
        self.log_dir.mkdir(parents=True, exist_ok=True)
        file = self.log_dir / f"{self.manifest.name}-adapters.json"
        file.write_text(adapters_file(self.manifest.spec), encoding="utf-8")
        return str(file)

    def _write_token(self, cleanup: contextlib.AsyncExitStack) -> str | None:
        """The file with the token of the management port, for nobody else to read, as long as the cluster runs."""
        if not self._options.management_token:
            return None
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="kvcluster-token-")))
        file = folder / "token"
        file.write_text(self._options.management_token, encoding="utf-8")
        return str(file)

    def _listen(self, cleanup: contextlib.AsyncExitStack) -> Addresses:
        """Binds the sockets that the processes inherit. A process that is restarted keeps its address, and connections
        that are made meanwhile wait in the socket's queue instead of being refused."""

        def address(port: int = 0, flag: str = "", bound: Callable[..., socket.socket] = listen) -> str:
            listener = cleanup.enter_context(contextlib.closing(bound(LOOPBACK, port, flag)))
            self._sockets[url := url_of(listener)] = listener
            return url

        envoy = None
        if has_envoy(self.manifest):
            folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="kvcluster-envoy-"))
            envoy = EnvoyParts(str(envoy_binary()), folder)
        # Envoy takes no socket of ours, but listens beside it.
        router = address(self._options.port, "--port", listen if envoy is None else reserve)
        management = address(self._options.management_port, "--management-port")
        workers = tuple(address() for _ in range(self.manifest.spec.workers.replicas))
        return Addresses(workers, router, management, envoy=envoy)

    async def _control(self, desired: DesiredProcess, cleanup: contextlib.AsyncExitStack) -> Control:
        parts = self.addresses.envoy
        if desired.role is not Role.ENVOY or parts is None:
            return HttpControl(self._client, desired.probe)
        self._envoy = EnvoyControl(parts, desired.grace)
        cleanup.push_async_callback(self._envoy.close)
        return self._envoy

    def _managed(self, desired: DesiredProcess, parent_pipe: int, control: Control) -> ManagedProcess:
        return ManagedProcess(
            desired,
            descriptors={url: listener.fileno() for url, listener in self._sockets.items()},
            parent_pipe=parent_pipe,
            log=self.log_dir / f"{desired.name}.log",
            control=control,
            on_change=self._on_change,
            echo=self._options.echo,
        )

    def _on_change(self, status: ProcessStatus) -> None:
        self._changed.set()
        if self._options.on_change is not None:
            self._options.on_change(status)

    @property
    def url(self) -> str:
        """Base URL of the OpenAI API."""
        url = self.addresses.router
        return url.replace("http:", "https:", 1) if speaks_tls(self.manifest) else url

    @property
    def management_url(self) -> str:
        """Base URL of the router's management port."""
        return self.addresses.management

    @property
    def envoy_admin(self) -> str | None:
        """Unix socket of Envoy's administration interface; None: the router is the data plane."""
        parts = self.addresses.envoy
        return parts.files.admin if parts is not None else None

    @property
    def management_headers(self) -> dict[str, str]:
        """What the management port asks of each request."""
        return token_headers(self._options.management_token)

    @property
    def workers(self) -> tuple[ProcessStatus, ...]:
        """The workers now, in the order of their indices; a worker's name is the id it reports."""
        return self._statuses(Role.WORKER)

    @property
    def router(self) -> ProcessStatus:
        """The router now."""
        return self._processes[Role.ROUTER][0].status

    @property
    def processes(self) -> tuple[ProcessStatus, ...]:
        """The router, its Envoy if there is one, and the workers now."""
        return (self.router, *self._statuses(Role.ENVOY), *self.workers)

    def _statuses(self, role: Role) -> tuple[ProcessStatus, ...]:
        return tuple(process.status for process in self._processes[role])

    async def wait_ready(self, timeout: float = 60.0) -> None:
        """Returns when every process is ready and the router may choose every worker. Raises `StartError`."""
        try:
            async with asyncio.timeout(timeout):
                await self._processes_ready()
                if self._processes[Role.ROUTER]:
                    await self._workers_known()
                if self._envoy is not None:
                    self._missing = "nothing, but Envoy does not know the router or the workers yet"
                    await self._envoy.knows(len(self._processes[Role.WORKER]))
        except TimeoutError:
            waiting = [process for process in self._all() if process.status.state is not ProcessState.READY]
            raise StartError(
                f"not ready after {timeout:g} s: "
                + ("; ".join(_describe(process) for process in waiting) or f"the router says of {self._missing}")
            ) from None

    def kill(self) -> None:
        """Cuts the grace periods short: leaving the context then kills what still runs."""
        for process in self._all():
            process.kill()

    def _all(self) -> list[ManagedProcess]:
        return [process for processes in self._processes.values() for process in processes]

    async def _processes_ready(self) -> None:
        while any(process.status.state is not ProcessState.READY for process in self._all()):
            for process in self._all():
                hopeless = process.exit_code == EXIT_USAGE or process.failed_starts >= FAILED_STARTS
                if process.failed_starts and hopeless:
                    raise StartError(f"does not start: {_describe(process)}")
            self._changed.clear()
            await self._changed.wait()

    async def _workers_known(self) -> None:
        self._missing = "the workers: nothing"
        while self._missing:
            with contextlib.suppress(httpx.HTTPError):
                answer = await self._client.get(f"{self.management_url}/workers", headers=self.management_headers)
                ranks = self.manifest.spec.engine.data_parallel.size
                self._missing = _unmatched(by_address(answer.json()["workers"]), self.workers, ranks)
            await asyncio.sleep(POLL_INTERVAL if self._missing else 0)


def _write(files: Mapping[str, str]) -> None:
    for path, content in files.items():
        Path(path).write_text(content, encoding="utf-8")


def by_address(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """The rows of the router's `/workers`, by the address that the data-parallel ranks of a process share."""
    grouped: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        grouped[split_rank(row["url"])[0]].append(row)
    return grouped


def _unmatched(rows: Mapping[str, Sequence[Mapping[str, Any]]], workers: Iterable[ProcessStatus], ranks: int) -> str:
    """What keeps the router from matching prompts against the caches of the workers' data-parallel ranks; empty when it
    matches all."""
    reasons = []
    for worker in workers:
        known = rows.get(worker.url, ())
        if len(known) < ranks:
            reasons.append(f"{worker.name}: nothing")
        for row in known:
            if not (row["ready"] and row["matching"]):
                reasons.append(f"{worker.name}: {row['why_not_ready'] or row['why_not_matching']}")
    return "; ".join(reasons)


def _describe(process: ManagedProcess) -> str:
    """The state of a process that is not ready, in words, with the end of its log."""
    status, tail = process.status, process.log_tail()
    why = f" ({status.detail})" if status.detail else ""
    wrote = f"; it wrote last:\n{tail}" if tail else ""
    return f"{status.name} is {status.state}{why}{wrote}"
