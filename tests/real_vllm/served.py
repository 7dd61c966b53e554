"""The engines that the suite is run against: an emulated one in the test's event loop, or a running vLLM.

Both are reached in the same ways, by HTTP and by ZMQ. Tests that need the engine's process (to end it, to start it
again) ask `restarts` whether there is one that they may end.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path
from subprocess import DEVNULL

import httpx

from kvcache.chat.request import ChatOptions
from kvcache.keys import BlockKey
from kvcache.tokens.tokenizer import Tokenizer, load_tokenizer
from runtime.http.server import HttpServer
from runtime.sockets import listen
from worker.emulator.generators import make_generator
from worker.emulator.timer import precise_timer
from worker.kv_events import KVEventsConfig
from worker.main import Worker
from worker.settings import Settings

URL, EVENTS, REPLAY = "REAL_VLLM_URL", "REAL_VLLM_EVENTS", "REAL_VLLM_REPLAY"
START, IMAGES = "REAL_VLLM_START", "REAL_VLLM_IMAGES"
TEMPLATE = Path(__file__).parents[1] / "data" / "vllm" / "chat_template.jinja"

EMULATED_IMAGES = (50256, 40)
"""GPT-2's `<|endoftext|>` stands for an image, and this often."""
EMULATED_BLOCKS = 160
"""Of each rank. Few, so that blocks are evicted all the time."""

RUNNING_REQUESTS = re.compile(r"^vllm:num_requests_running\{", re.MULTILINE)
"""A metric of which each rank has one."""


class Served(ABC):
    """An engine that serves requests and publishes its KV events."""

    url: str
    events: str
    replay: str
    tokenizer: Tokenizer
    model: str
    max_model_len: int
    adapters: tuple[str, ...] = ()
    """LoRA adapters that are loaded."""
    ranks: int = 1
    """Data-parallel ranks. The ports of rank r follow those of `events` and `replay`."""
    images: tuple[int, int] | None = None
    """The id of the token that stands for an image, and how many of it do; None: the engine takes no images."""
    prompt_logprobs: bool = True
    """Whether requests may ask for them."""
    quiet: float
    """Seconds without an event after which the engine has published all that its last answers changed."""
    restarts: bool
    """Whether `kill`, `terminate` and `start` work."""

    @abstractmethod
    async def start(self) -> None:
        """Start the engine, or find the running one."""

    @abstractmethod
    async def kill(self) -> None:
        """End the engine's process at once."""

    @abstractmethod
    async def terminate(self) -> None:
        """Ask the engine's process to end, and return when it has ended."""

    @abstractmethod
    async def close(self) -> None:
        """Leave nothing of it behind."""

    def published(self) -> list[int] | None:
        """How many batches each rank has published; None if nobody can tell."""
        return None

    def blocks(self) -> list[BlockKey] | None:
        """The keys of all cached blocks of all ranks by the engine's own account; None if it keeps none."""
        return None

    def idle(self) -> bool:
        """Whether the engine has nothing left to do, as far as it says."""
        return True


class Emulated(Served):
    """An emulated engine that speaks vLLM's ZMQ, in this process."""

    quiet = 0.0
    restarts = True
    model = "tiny-llama"
    max_model_len = 2048

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, *flags: str, adapters: tuple[str, ...] = (), ranks: int = 1
    ) -> None:
        self.tokenizer = tokenizer
        self.adapters = adapters
        self.ranks = ranks
        self.images = EMULATED_IMAGES
        lora = ("--enable-lora", "--max-loras", "2", "--lora-modules", *(f"{name}=acme/{name}" for name in adapters))
        self.events, self.replay = f"ipc://{folder}/events:1", f"ipc://{folder}/replay:1"
        config = KVEventsConfig(enable_kv_cache_events=True, endpoint=self.events, replay_endpoint=self.replay)
        self._settings = Settings.load(
            [
                *("--kv-events-config", config.model_dump_json(exclude_none=True), "--model", self.model),
                *("--blocks", str(EMULATED_BLOCKS), "--max-model-len", str(self.max_model_len), "--max-num-seqs", "8"),
                *("--speed", "1000", "--dev-mode", "--enable-auto-tool-choice", "--grace-period", "5"),
                *("--data-parallel-size", str(ranks), "--image-tokens", str(self.images[1])),
                *(lora if adapters else ()),
                *flags,
            ]
        )
        self._port = 0
        self._worker: Worker | None = None
        self._server: HttpServer | None = None

    @property
    def worker(self) -> Worker:
        assert self._worker is not None
        return self._worker

    async def start(self) -> None:
        sock = listen("127.0.0.1", self._port)
        self._port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        generator = make_generator("sampler", self.tokenizer, seed=0, mean_tokens=64)
        self._worker = Worker(self._settings, self.tokenizer, generator, self._port, timer=precise_timer())
        self._server = HttpServer(self._worker.app, sock, cancel_on_disconnect=True)
        await self._server.start()

    async def kill(self) -> None:
        if self._worker is not None and self._server is not None:
            self._worker.close()
            await self._server.stop(0)
        self._worker = self._server = None

    async def terminate(self) -> None:
        await self.worker.finish_requests(self._settings.grace_period)
        await self.kill()

    async def close(self) -> None:
        await self.kill()

    def published(self) -> list[int] | None:
        return [rank.kv_events.published for rank in self.worker.ranks if rank.kv_events is not None]

    def blocks(self) -> list[BlockKey] | None:
        return [key for rank in self.worker.ranks for key, _ in rank.engine.blocks()]

    def idle(self) -> bool:
        return all(rank.async_engine.active == 0 and rank.engine.next_event() is None for rank in self.worker.ranks)


class Running(Served):
    """The vLLM that the environment names. `REAL_VLLM_START` is a command that runs it in the foreground."""

    quiet = 0.1

    def __init__(self) -> None:
        self.url, self.events = os.environ[URL], os.environ[EVENTS]
        self.replay = os.environ.get(REPLAY, "")
        self.tokenizer = load_tokenizer(os.environ["REAL_VLLM_TOKENIZER"], chat_options())
        self.restarts = START in os.environ
        if IMAGES in os.environ:
            token, _, tokens = os.environ[IMAGES].partition(":")
            self.images = (int(token), int(tokens))
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        if self.restarts and (self._process is None or self._process.poll() is not None):
            self._process = self._launched()
        async with asyncio.timeout(900), httpx.AsyncClient(trust_env=False) as client:
            while not await self._healthy(client):  # noqa: ASYNC110  # another process: nothing to wait on
                await asyncio.sleep(0.5)
            models = (await client.get(f"{self.url}/v1/models")).json()["data"]
            self.ranks = len(RUNNING_REQUESTS.findall((await client.get(f"{self.url}/metrics")).text))
        self.model, self.max_model_len = models[0]["id"], models[0]["max_model_len"]
        self.adapters = tuple(each["id"] for each in models if each["parent"] is not None)
        self.prompt_logprobs = not self.adapters  # the two together end vLLM 0.32's CPU engine

    async def kill(self) -> None:
        self.end(signal.SIGKILL)

    async def terminate(self) -> None:
        await asyncio.to_thread(self.end, signal.SIGTERM)

    async def close(self) -> None:
        """The next test finds it running."""

    def _launched(self) -> subprocess.Popen[bytes]:
        command = shlex.split(os.environ[START])
        return subprocess.Popen(command, start_new_session=True, stdout=DEVNULL, stderr=DEVNULL)

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send the signal, and wait for the end of the process. Does nothing if the suite has not started it."""
        if self._process is None:
            return
        if number is signal.SIGKILL:
            os.killpg(self._process.pid, number)
        else:
            self._process.send_signal(number)
        self._process.wait()
        self._process = None

    async def _healthy(self, client: httpx.AsyncClient) -> bool:
        try:
            return (await client.get(f"{self.url}/health")).status_code == 200
        except httpx.HTTPError:
            return False


def chat_options() -> ChatOptions:
    return ChatOptions(trust_request_chat_template=True)


def emulated_tokenizer() -> Tokenizer:
    """The bundled vocabulary with the recorded model's template."""
    template = TEMPLATE.read_text(encoding="utf-8")
    return load_tokenizer("gpt2", ChatOptions(chat_template=template, trust_request_chat_template=True))
