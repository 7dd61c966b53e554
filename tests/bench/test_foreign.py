"""Other routers: their command templates, how they are started and ended, and what is counted behind them.

Not covered: real ones, which are not installed here; `standin_router.py` stands in for them.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import orjson
import pytest
from aiohttp import web
from rich.console import Console

from bench.compare import Target, cluster_play
from bench.foreign import RouterCommand, RouterCommandError, RouterStartError, running, since, worker_tallies
from bench.result import WarmUp, WorkerTally
from bench.run import LiveOptions
from bench.workloads import WorkloadSpec
from tests.processes import eventually, runs

STANDIN = f"{sys.executable} -m tests.bench.standin_router --port {{port}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sglang", "write a router as NAME='COMMAND'"),
        ("=run {port} {workers}", "needs a name"),
        ("a=run --port {port}", "needs {port}, and {workers} or {commas}"),
        ("a=run {workers}", "needs {port}"),
        ("a=run {port} {workers} {modell}", "has {modell}; what is filled in are {port}, {workers}"),
        ("a=run {port} {workers} {0.__class__}", "has {0.__class__}"),
        ("a=run '{port} {workers}", "cannot be split into words"),
    ],
    ids=["no command", "no name", "no workers", "no port", "unknown", "no format string", "open quote"],
)
def test_a_command_that_cannot_be_used_is_refused(text: str, message: str) -> None:
    with pytest.raises(RouterCommandError) as refused:
        RouterCommand.parse(text)
    assert message in str(refused.value)


def test_a_command_is_filled_in_word_by_word_and_no_shell_sees_it() -> None:
    router = RouterCommand.parse(
        "my router=run --urls {workers} --list={commas} --port {port} '--name=a b; {model}' $HOME"
    )
    assert router.name == "my router"
    assert router.words(80, ["http://a", "http://b"], "m $(x)") == [
        "run", "--urls", "http://a", "http://b", "--list=http://a,http://b", "--port", "80", "--name=a b; m $(x)",
        "$HOME",
    ]  # fmt: skip


METRICS = """# TYPE vllm:request_success_total counter
vllm:request_success_total{{finished_reason="length"}} {requests}
vllm:request_success_total{{finished_reason="stop"}} 1
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total {prompt}
# TYPE vllm:prompt_tokens_cached_total counter
vllm:prompt_tokens_cached_total 30
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total 7
"""


@asynccontextmanager
async def worker() -> AsyncIterator[tuple[str, list[str]]]:
    """A worker that answers everything, and the paths that it was asked for."""
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path)
        if request.path == "/metrics":
            return web.Response(text=METRICS.format(requests=len(asked), prompt=100 * len(asked)))
        return web.json_response({"choices": [{"text": "ok"}]})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", asked
    finally:
        await runner.cleanup()


async def test_what_workers_did_is_the_difference_of_their_counters() -> None:
    async with worker() as (url, _):
        before = await worker_tallies({"w": url})
        after = await worker_tallies({"w": url})
    assert before == {"w": WorkerTally(2, 100, 70, 7)}
    assert since(after, before) == {"w": WorkerTally(1, 100, 100, 0)}


async def test_a_worker_that_says_nothing_is_named() -> None:
    with pytest.raises(ConnectionError, match="w1 does not say what it has done"):
        await worker_tallies({"w1": "http://127.0.0.1:9"})


@dataclass
class CountingWorker:
    """A worker that answers its first five requests, and the others once it has been asked a second time what it has
    counted, for which it waits for those five: the order is the same on a busy machine."""

    served: int = 0
    asked: int = 0
    warm: asyncio.Event = field(default_factory=asyncio.Event)
    counted: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if self.served == 5:
            await self.counted.wait()
        self.served += 1
        if self.served == 5:
            self.warm.set()
        stream = web.StreamResponse()
        await stream.prepare(request)
        await stream.write(b'data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n')
        return stream

    async def tallies(self) -> dict[str, WorkerTally]:
        self.asked += 1
        if self.asked == 2:
            await self.warm.wait()
            self.counted.set()
        return {"w": WorkerTally(requests=self.served)}


async def test_what_workers_did_in_the_warm_up_is_not_counted(tmp_path: Path) -> None:
    """Of eight requests the first five are due at once and the others a second later."""
    worker: CountingWorker

    @asynccontextmanager
    async def launch(contender: str) -> AsyncIterator[Target]:
        app = web.Application()
        app.router.add_post("/v1/completions", worker.answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield Target(f"http://127.0.0.1:{runner.addresses[0][1]}", tallies=worker.tallies)
        await runner.cleanup()

    row = {"input_length": 8, "output_length": 1, "hash_ids": [0]}
    lines = [orjson.dumps({"timestamp": 0 if n < 5 else 2000, **row}).decode() for n in range(8)]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(lines))
    counted = {}
    for warm_up in (WarmUp(requests=5), WarmUp(seconds=1.0)):
        worker = CountingWorker()
        play = cluster_play(launch, LiveOptions(speed=2), warm_up, Console(quiet=True))
        played = await play("theirs", WorkloadSpec("trace", trace=trace))
        assert played.info.tallies is not None
        counted[str(warm_up)] = played.info.tallies["w"].requests
    assert counted == {"5 requests": 3, "1 s": 3}


@pytest.mark.process
async def test_a_router_serves_and_ends_with_its_children(tmp_path: Path) -> None:
    child, log = tmp_path / "pid", tmp_path / "logs" / "standin.log"
    router = RouterCommand("standin", f"{STANDIN} --child {child} {{workers}}")
    async with worker() as (url, asked), running(router, [url], "m", log) as base:
        assert asked == ["/v1/completions"] * 2, "it is ready when it has answered twice for each worker"
        async with aiohttp.ClientSession() as session, session.get(f"{base}/v1/models") as answer:
            assert answer.status == 200
        assert asked[2:] == ["/v1/models"]
        pid = int(child.read_text())
        assert runs(pid)
    await eventually(lambda: not runs(pid), "its child has ended")
    assert "the stand-in starts" in log.read_text()


@pytest.mark.process
@pytest.mark.parametrize(
    ("command", "timeout", "message"),
    [
        (f"{sys.executable} -c 'raise SystemExit(\"no such policy\")' {{port}} {{workers}}", 60, "no such policy"),
        ("/nowhere/router {port} {workers}", 60, "/nowhere/router cannot be run: No such file"),
        (
            f"{STANDIN} --deaf {{workers}}",
            0.3,
            "answered no requests within 0.3 s",
        ),
    ],
    ids=["ends", "does not exist", "never answers"],
)
async def test_a_router_that_does_not_start_shows_what_it_wrote(
    tmp_path: Path, command: str, timeout: float, message: str
) -> None:
    with pytest.raises(RouterStartError) as failed:
        async with running(RouterCommand("it", command), ["http://127.0.0.1:9"], "m", tmp_path / "log", timeout):
            pass
    assert message in str(failed.value)
    assert str(failed.value).startswith("it ")


@pytest.mark.process
async def test_a_router_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    child = tmp_path / "pid"
    read_end, write_end = os.pipe()
    command = STANDIN.format(port=9).split()
    guard = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.guard", str(read_end), *command, "--deaf", "--child", str(child)),
        pass_fds=(read_end,),
    )
    os.close(read_end)
    while not child.exists() or not child.read_text():  # noqa: ASYNC110 - another process writes it
        await asyncio.sleep(0.01)
    pid = int(child.read_text())
    assert runs(pid)
    os.close(write_end)  # as the kernel does when its holder dies
    assert await guard.wait() == 128 + 15
    await eventually(lambda: not runs(pid), "its child has ended")
