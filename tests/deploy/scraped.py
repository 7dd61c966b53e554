"""A KVCluster of real processes in which everything happens that metrics tell of, and what its clients saw of it.

Three emulated workers (one with a CPU tier and a LoRA adapter), two routers, a cache agent, a controller at a fake API
server; later also workers that fail, one whose blocks cannot be matched, and one that is not there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import orjson

from controller.api.load import validate_manifest
from controller.api.model import KVCluster
from controller.local.cluster import LocalCluster
from controller.local.desired_processes import Addresses, DesiredProcess, desired_processes
from controller.local.process import ProcessStatus
from deploy.helm.docs import ROOT
from runtime.http.server import HttpServer
from runtime.sockets import listen
from tests.deploy.controller import running_controller
from tests.kube.operator.support import NAMESPACE, OPERATOR, Cluster, prepared
from tests.processes import eventually, free_port
from tests.router.fakes import Connection, FakeWorker, Received, answering, token
from tests.worker.agent.engine import FakeEngine
from worker.agent.agent import Agent
from worker.agent.main import App
from worker.agent.prompts import Expected
from worker.agent.settings import Settings as AgentSettings

NAME = "rag"
ADAPTER = "style"
MODEL = "meta-llama/Llama-2-13b-hf"
"""That of the default profile."""
DOCUMENTS = [" ".join(f"fact{document}x{word}" for word in range(150)) for document in range(6)]
REFUSED = "broken"
"""A KVCluster of which the API server refuses an object."""


@dataclass(frozen=True)
class Answer:
    """One answer, from its head and bytes alone."""

    status: int
    worker: str | None = None
    attempts: int = 0
    usage: dict[str, Any] = field(default_factory=dict)
    streamed: bool = False

    @property
    def cached(self) -> int | None:
        """Cached tokens, where the answer reports them."""
        return (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens")


class Clients:
    """Who asks the routers, in turn, and keeps what they are answered."""

    def __init__(self, urls: list[str], http: httpx.AsyncClient) -> None:
        self.answers: list[Answer] = []
        self._urls, self._http = urls, http
        self._numbers = count()
        self.stopping = asyncio.Event()
        """Set: every client ends with the answer that it waits for."""

    async def ask(self, path: str = "/v1/completions", **fields: Any) -> Answer:
        """Ask the next router; without fields, with a body that is no JSON."""
        url = self._urls[next(self._numbers) % len(self._urls)]
        body = orjson.dumps(fields) if fields else b"{"
        answer = await self._http.post(f"{url}{path}", content=body, headers={"content-type": "application/json"})
        lines = [line[6:] for line in answer.content.splitlines() if line.startswith(b"data: {")]
        usages = [found["usage"] for line in lines or [answer.content] if (found := _parsed(line)).get("usage")]
        head = answer.headers
        kept = Answer(
            answer.status_code,
            head.get("x-kvcluster-worker"),
            int(head.get("x-kvcluster-attempts", 0)),
            usages[-1] if usages else {},
            bool(lines),
        )
        self.answers.append(kept)
        return kept

    async def question(self, **fields: Any) -> Answer:
        """A question about a document, streamed."""
        number = next(self._numbers)
        prompt = f"{DOCUMENTS[number % len(DOCUMENTS)]} Question {number}:"
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        return await self.ask(**{"prompt": prompt, "max_tokens": 40, **stream, **fields})

    async def keep_asking(self) -> None:
        """Until `stopping` is set: questions, now and then of the adapter, without a stream, or refused."""
        for number in count():
            if self.stopping.is_set():
                return
            await self.question()
            if number % 4 == 1:
                await self.question(model=ADAPTER)
                await self.ask(prompt=f"Nobody has asked {next(self._numbers)} before.", max_tokens=2)
                await self.ask()

    async def generated(self, worker: str) -> float:
        """Tokens that the worker at this URL has generated, as it says itself."""
        text = (await self._http.get(f"{worker}/metrics")).text
        found = re.search(r"^vllm:generation_tokens_total{.*} (\S+)$", text, re.MULTILINE)
        assert found is not None
        return float(found[1])

    @staticmethod
    def by(part: Callable[[Answer], float], answers: list[Answer]) -> dict[str, float]:
        """A sum over answers, by worker."""
        sums: dict[str, float] = {}
        for answer in answers:
            if answer.worker is not None:
                sums[answer.worker] = sums.get(answer.worker, 0) + part(answer)
        return sums


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        found: dict[str, Any] = orjson.loads(line)
    except orjson.JSONDecodeError:
        return {}
    return found


async def breaking(connection: Connection, request: Received) -> None:
    """A stream that breaks off after its first token; anything else is an error."""
    if b'"stream":true' not in request.body:
        await answering(500)(connection, request)
        return
    await connection.begin_stream()
    await connection.chunk(token("Hel"))
    connection.reset()


@dataclass
class Run:
    """What runs, and where it can be scraped."""

    local: LocalCluster
    clients: Clients
    api: Cluster
    """The API server of the controller."""
    routers: list[str]
    """Addresses of the routers' management ports."""
    controller: str
    agent: str
    file: Path
    """List of the workers."""
    failing: list[FakeWorker]
    asking: list[asyncio.Task[None]] = field(default_factory=list)

    def targets(self) -> list[dict[str, Any]]:
        """As Kubernetes' service discovery finds pods of ours."""
        pods = [(worker.url.removeprefix("http://"), worker.name, "worker", "http") for worker in self.local.workers]
        pods += [
            (address, f"{NAME}-router-{index}", "router", "management") for index, address in enumerate(self.routers)
        ]
        pods.append((self.agent, f"{NAME}-worker-agent", "worker", "feed"))
        found = [target(*pod, NAME, NAMESPACE) for pod in pods]
        return [*found, target(self.controller, "controller-0", "controller", "metrics", "release", "kvcluster-system")]

    async def trouble(self) -> None:
        """Everything that can go wrong does."""
        # First, while the retry budget is whole.
        await self._kill_while_it_answers(self.local.workers[0])
        listed = [*(worker.url for worker in self.failing), f"http://127.0.0.1:{free_port()}", f"http://{self.agent}"]
        self.file.write_text("\n".join([self.file.read_text(), *listed]))
        for number in range(24):  # new prompts: they go to whoever has the least to do, which is who fails
            await self.clients.question(prompt=f"Trouble {number}. " * 40, max_tokens=4)
        refused = {"verb": "patch", "resource": "configmaps", "name": f"{REFUSED}-router"}
        self.api.server.faults.fail(user=OPERATOR, status=422, **refused)
        await self.api.create(REFUSED)
        await self.api.delete("services", f"{NAME}-router-management")

    async def _kill_while_it_answers(self, worker: ProcessStatus) -> None:
        """In the middle of streams, which go on elsewhere."""
        streams = [asyncio.create_task(self.clients.question(max_tokens=400)) for _ in range(12)]

        async def answers() -> bool:
            return await self.clients.generated(worker.url) > before + 100

        before = await self.clients.generated(worker.url)
        await eventually(answers, f"{worker.name} is in the middle of answers")
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        await asyncio.gather(*streams)

    def ask_on(self) -> None:
        """Clients ask until `rest`."""
        self.clients.stopping.clear()
        self.asking = [asyncio.create_task(self.clients.keep_asking()) for _ in range(6)]

    async def rest(self) -> None:
        """The clients end, with all that they wait for answered."""
        self.clients.stopping.set()
        await asyncio.gather(*self.asking)


def target(address: str, pod: str, component: str, port: str, instance: str, namespace: str) -> dict[str, Any]:
    label = "__meta_kubernetes_pod_label_app_kubernetes_io_"
    return {
        "targets": [address],
        "labels": {
            "__meta_kubernetes_namespace": namespace,
            "__meta_kubernetes_pod_name": pod,
            f"{label}name": "kvcluster",
            f"{label}component": component,
            f"{label}instance": instance,
            "__meta_kubernetes_pod_annotation_prometheus_io_scrape": "true",
            "__meta_kubernetes_pod_container_port_name": port,
        },
    }


def processes(file: Path, router_args: list[str]) -> Callable[[KVCluster, Addresses], tuple[DesiredProcess, ...]]:
    """Local mode's, but the router reads its workers from a file, a source with an age as in a cluster, and the last
    worker has a CPU tier and an adapter. `router_args` becomes the router's arguments."""

    def plan(manifest: KVCluster, addresses: Addresses) -> tuple[DesiredProcess, ...]:
        file.write_text("\n".join(addresses.workers))
        *workers, router = desired_processes(manifest, addresses)
        router_args[:] = [f"--workers-file={file}" if arg.startswith("--workers=") else arg for arg in router.args]
        adapter = file.parent / ADAPTER
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text('{"r": 8}')
        caches = ("--blocks=150", "--max-model-len=2048", "--cpu-blocks=2000")
        tiered = dataclasses.replace(
            workers[-1], args=(*workers[-1].args, *caches, "--enable-lora", f"--lora-modules={ADAPTER}={adapter}")
        )
        return (*workers[:-1], tiered, dataclasses.replace(router, args=tuple(router_args)))

    return plan


@asynccontextmanager
async def second_router(args: list[str], log: Path) -> AsyncIterator[tuple[str, str]]:
    """URL and management address of one more router process."""
    port, management = free_port(), free_port()
    own = (f"--port={port}", f"--management-port={management}", "--host=127.0.0.1", "--management-host=127.0.0.1")

    def written() -> str:
        return log.read_text()

    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "router.main", *args, *own), cwd=ROOT, stdout=output, stderr=output
        )
    try:
        async with httpx.AsyncClient(trust_env=False) as client:

            async def ready() -> bool:
                assert process.returncode is None, written()
                try:
                    return (await client.get(f"http://127.0.0.1:{management}/ready")).status_code == 200
                except httpx.HTTPError:
                    return False

            await eventually(ready, "the second router is ready")
        yield f"http://127.0.0.1:{port}", f"127.0.0.1:{management}"
    finally:
        process.kill()
        await process.wait()


async def keep_changing(api: Cluster) -> None:
    """Someone changes the spec twice a second."""
    for number in count():
        await api.patch("kvclusters", NAME, {"spec": {"workers": {"replicas": 1 + number % 2}}})
        await asyncio.sleep(0.5)


@asynccontextmanager
async def agent() -> AsyncIterator[str]:
    """Address of a cache agent that follows an engine."""
    async with FakeEngine() as engine:
        settings = AgentSettings(
            engine_url=engine.url, events_endpoint=engine.events_endpoint, replay_endpoint=engine.replay_endpoint
        )
        sock = listen("127.0.0.1", 0)
        one = Agent(settings, lambda: Expected("f" * 32, ()), sock.getsockname()[1])
        server = HttpServer(App(one), sock, cancel_on_disconnect=True)
        await server.start()
        task = asyncio.create_task(one.run())
        yield f"127.0.0.1:{server.port}"
        one.stop_serving()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await server.stop(0)
        one.close()


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Run]:
    """All of it, healthy, with clients that ask."""
    head = {"apiVersion": "kvcluster.dev/v1alpha1", "kind": "KVCluster", "metadata": {"name": NAME}}
    spec = {"engine": {"speed": 5}, "workers": {"replicas": 3}, "router": {"resumeStreams": True}}
    manifest = validate_manifest({**head, "spec": spec})
    file, router_args = folder / "workers", list[str]()
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        local = await enter(LocalCluster(manifest, desired=processes(file, router_args)))
        api = await enter(prepared())
        await api.create(NAME)
        kubeconfig = api.server.kubeconfig(folder / "kubeconfig", OPERATOR)
        settings = {"CONTROLLER_IMAGE": "kvcluster:test"}
        operator = await enter(running_controller(kubeconfig, folder / "controller.log", settings))
        url, management = await enter(second_router(router_args, folder / "router.log"))
        following = await enter(agent())
        failing = [
            FakeWorker(answering(500)),
            FakeWorker(answering(500)),
            FakeWorker(breaking, name="breaks", model=MODEL, block_size=24),
        ]
        for worker in failing:
            await worker.start()
            stack.push_async_callback(worker.stop)
        failing[2].serve_feed("f" * 32)
        await local.wait_ready()
        http = await enter(httpx.AsyncClient(timeout=30, trust_env=False))
        clients = Clients([local.url, url], http)
        run = Run(
            local,
            clients,
            api,
            [local.management_url.removeprefix("http://"), management],
            operator.metrics,
            following,
            file,
            failing,
        )
        changing = asyncio.create_task(keep_changing(api))
        run.ask_on()
        try:
            yield run
        finally:
            for task in (changing, *run.asking):
                task.cancel()
            await asyncio.gather(changing, *run.asking, return_exceptions=True)
