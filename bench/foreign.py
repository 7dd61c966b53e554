"""Other routers, started by a command of the user's in front of workers that are running."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import socket
import sys
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from bench.result import WorkerTally

HOST = "127.0.0.1"
READY_TIMEOUT = 120.0
"""Most seconds until a router serves every worker."""
POLL_INTERVAL = 0.1
IN_A_ROW = 2
"""Answers in a row for each worker that show that the router is ready."""
LOG_TAIL = 15
PLACEHOLDERS = ("port", "workers", "commas", "model")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


class RouterCommandError(ValueError):
    """A command template cannot be used. The message says what is missing."""


class RouterStartError(RuntimeError):
    """A router did not become ready. The message shows what it wrote last."""


@dataclass(frozen=True, slots=True)
class RouterCommand:
    """`NAME=COMMAND`: a router and how to start it.

    In the words of the command `{port}` is the port that it must listen on at 127.0.0.1, `{workers}` the base URLs of
    the workers, as a word each where it stands alone, `{commas}` the same with commas in one word, and `{model}` the
    name of the model. The words are split as a shell splits them, but no shell runs. Raises `RouterCommandError`.
    """

    name: str
    template: str

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise RouterCommandError(f"a router needs a name: NAME={self.template}")
        try:
            words = shlex.split(self.template)
        except ValueError as error:
            raise RouterCommandError(f"the command of {self.name} cannot be split into words: {error}") from None
        used = {found for word in words for found in _PLACEHOLDER.findall(word)}
        if "port" not in used or not used & {"workers", "commas"}:
            raise RouterCommandError(
                f"the command of {self.name} needs {{port}}, and {{workers}} or {{commas}}: {self.template}"
            )
        if unknown := used - set(PLACEHOLDERS):
            known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
            raise RouterCommandError(
                f"the command of {self.name} has {{{min(unknown)}}}; what is filled in are {known}"
            )

    @classmethod
    def parse(cls, text: str) -> RouterCommand:
        """Of `NAME=COMMAND`. Raises `RouterCommandError`."""
        name, equals, template = text.partition("=")
        if not equals:
            raise RouterCommandError(f"write a router as NAME='COMMAND', not {text!r}")
        return cls(name.strip(), template.strip())

    def words(self, port: int, workers: Sequence[str], model: str) -> list[str]:
        """The words of the command with these values."""
        values = {"port": str(port), "workers": " ".join(workers), "commas": ",".join(workers), "model": model}
        filled: list[str] = []
        for word in shlex.split(self.template):
            if word == "{workers}":
                filled += workers
            else:
                filled.append(_PLACEHOLDER.sub(lambda found: values[found[1]], word))
        return filled


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port


@asynccontextmanager
async def running(
    command: RouterCommand, workers: Sequence[str], model: str, log: Path, timeout: float = READY_TIMEOUT
) -> AsyncIterator[str]:
    """Starts the router and yields its base URL once it answers. Leaving ends it with all its children.

    What it writes goes to the file `log`. Raises `RouterStartError`.
    """
    port = free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    read_end, write_end = os.pipe()
    try:
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "bench.guard", str(read_end), *command.words(port, workers, model)),
                stdin=DEVNULL,
                stdout=output,
                stderr=STDOUT,
                pass_fds=(read_end,),
                # A terminal sends Ctrl-C to its whole foreground group; the guard ends the router when we have ended.
                start_new_session=True,
            )
    except BaseException:
        os.close(write_end)
        raise
    finally:
        os.close(read_end)
    try:
        url = f"http://{HOST}:{port}"
        await _ready(command.name, process, url, model, len(workers), log, timeout)
        yield url
    finally:
        os.close(write_end)
        await process.wait()


async def _ready(name: str, process: Process, url: str, model: str, workers: int, log: Path, timeout: float) -> None:
    """Returns when the router has answered often enough. Prompts are shorter than a block, so no cache is touched."""
    exited = asyncio.create_task(process.wait())
    body = {"model": model, "prompt": "ready", "max_tokens": 1}
    answered = 0
    try:
        async with asyncio.timeout(timeout), aiohttp.ClientSession() as session:
            while answered < IN_A_ROW * workers:
                if exited.done():
                    raise RouterStartError(f"{name} ended with code {exited.result()}{_tail(log)}")
                try:
                    async with session.post(f"{url}/v1/completions", json=body) as answer:
                        answered = answered + 1 if answer.status == 200 else 0
                except aiohttp.ClientError:
                    answered = 0
                if not answered:
                    await asyncio.sleep(POLL_INTERVAL)
    except TimeoutError:
        raise RouterStartError(f"{name} answered no requests within {timeout:g} s{_tail(log)}") from None
    finally:
        exited.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await exited


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
    return "; it wrote last:\n" + "\n".join(lines) if lines else ", and wrote nothing"


_COUNTERS = {
    "vllm:request_success": "requests",
    "vllm:prompt_tokens": "prompt_tokens",
    "vllm:prompt_tokens_cached": "cached_tokens",
    "vllm:generation_tokens": "output_tokens",
}


async def worker_tallies(workers: Mapping[str, str]) -> dict[str, WorkerTally]:
    """What the workers (base URLs by id) say in their metrics that they have done. Raises `ConnectionError`."""
    tallies = {}
    async with aiohttp.ClientSession() as session:
        for worker_id, url in workers.items():
            try:
                async with session.get(f"{url}/metrics", raise_for_status=True) as answer:
                    counted = _counted(await answer.text())
            except aiohttp.ClientError as error:
                raise ConnectionError(f"{worker_id} does not say what it has done ({url}/metrics): {error}") from error
            tallies[worker_id] = WorkerTally(
                requests=counted["requests"],
                prompt_tokens=counted["prompt_tokens"],
                uncached_tokens=counted["prompt_tokens"] - counted["cached_tokens"],
                output_tokens=counted["output_tokens"],
            )
    return tallies


def _counted(exposition: str) -> dict[str, int]:
    totals = dict.fromkeys(_COUNTERS.values(), 0)
    for family in text_string_to_metric_families(exposition):
        name = _COUNTERS.get(family.name)
        if name is not None:
            totals[name] += int(sum(sample.value for sample in family.samples if sample.name.endswith("_total")))
    return totals


def since(after: Mapping[str, WorkerTally], before: Mapping[str, WorkerTally]) -> dict[str, WorkerTally]:
    """What was done between two tallies of the same workers."""
    return {
        name: WorkerTally(
            requests=tally.requests - before[name].requests,
            prompt_tokens=tally.prompt_tokens - before[name].prompt_tokens,
            uncached_tokens=tally.uncached_tokens - before[name].uncached_tokens,
            output_tokens=tally.output_tokens - before[name].output_tokens,
        )
        for name, tally in after.items()
    }
