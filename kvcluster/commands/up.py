"""`kvcluster up`: runs a manifest as local processes until it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console

from controller.api.fields import cluster_only_in
from controller.api.load import load_manifest, override
from controller.api.model import KVCluster
from controller.api.problems import ManifestError
from controller.local.cluster import LocalCluster, Options, StartError
from controller.local.desired_processes import LocalModeError, check
from controller.local.secrets import Secrets, make_certificate, with_secrets
from controller.local.view import observe
from kvcluster.display import Display, Endpoints, JsonDisplay, LineDisplay, TableDisplay
from kvcluster.options import TOKEN_VARIABLE
from kvcluster.terminal import BAD_INPUT, FAILED, complain
from runtime.http.tokens import TokenFileError, parse

VIEW_INTERVAL = 1.0


@dataclass(frozen=True, slots=True)
class UpOptions:
    """The command's options, as `kvcluster up --help` describes them."""

    port: int
    management_port: int
    strategy: str | None
    data_plane: str | None
    speed: float | None
    log_dir: Path | None
    verbose: bool
    json: bool
    timeout: float
    secrets: Path | None = None
    self_signed: bool = False


NEED_SECRETS = frozenset({"spec.router.auth", "spec.router.tls"})
"""Fields that local mode honours where it has their Secrets."""


def up(file: str, options: UpOptions) -> int:
    """Runs the command; returns its exit code."""
    try:
        manifest = overridden(load_manifest(file), options)
        check(manifest)
        token = _management_token()
        with_secrets(manifest, Secrets(options.secrets))  # what is missing is said before anything is made
    except (ManifestError, LocalModeError, TokenFileError) as error:
        complain(error)
        return BAD_INPUT
    log_dir = options.log_dir or Path(tempfile.mkdtemp(prefix=f"kvcluster-{manifest.name}-"))
    try:
        certificate = make_certificate(log_dir / "certificate") if options.self_signed else None
        manifest = with_secrets(manifest, Secrets(options.secrets, certificate))
        return asyncio.run(_serve(manifest, options, _display(manifest, options), log_dir, token))
    except LocalModeError as error:
        complain(error)
        return BAD_INPUT
    except (StartError, OSError) as error:
        complain(error)
        return FAILED
    finally:
        with contextlib.suppress(OSError):
            log_dir.rmdir()  # succeeds only if nothing was logged, when a port was taken for example


def overridden(manifest: KVCluster, options: UpOptions) -> KVCluster:
    """The manifest with the values that the command line gives instead. Raises `ManifestError`."""
    flags = (
        ("--strategy", ("spec", "router", "strategy"), options.strategy),
        ("--data-plane", ("spec", "router", "dataPlane"), options.data_plane),
        ("--speed", ("spec", "engine", "speed"), options.speed),
    )
    for flag, path, value in flags:
        if value is not None:
            manifest = override(manifest, {path: value}, f"{manifest.name} with {flag} {value}")
    return manifest


def _display(manifest: KVCluster, options: UpOptions) -> Display:
    console = Console()
    if options.json:
        return JsonDisplay(_write)
    # The processes' log lines would break the table.
    if console.is_terminal and not options.verbose:
        return TableDisplay(console, f"{manifest.name} · {manifest.spec.router.strategy}")
    return LineDisplay(_write)


def _write(line: str) -> None:
    try:
        sys.stdout.write(line)
        sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads our output any more: stop as on Ctrl-C, silently.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        os.kill(os.getpid(), signal.SIGTERM)


def _echo(name: str, line: str) -> None:
    sys.stderr.write(f"{name} | {line}\n")


def _management_token() -> str:
    """The token in the environment, by which the other commands are let in; empty: the port asks for none. Raises
    `TokenFileError`."""
    given = os.environ.get(TOKEN_VARIABLE, "").strip()
    try:
        return parse(given.encode())[0] if given else ""
    except TokenFileError as error:
        raise TokenFileError(f"{TOKEN_VARIABLE}: {error}") from None


async def _serve(manifest: KVCluster, options: UpOptions, display: Display, log_dir: Path, token: str) -> int:
    cluster = LocalCluster(
        manifest,
        Options(
            port=options.port,
            management_port=options.management_port,
            log_dir=log_dir,
            echo=_echo if options.verbose else None,
            on_change=display.change,
            management_token=token,
        ),
    )
    with display, _stop_signals(cluster, display) as stop:
        for path in cluster_only_in(manifest):
            how = (
                "ignored here without --secrets" if path in NEED_SECRETS else "only a cluster honours it; ignored here"
            )
            display.say(f"{path}: {how}")
        if options.self_signed:
            display.say(
                f"certificate in {log_dir / 'certificate' / 'tls.crt'}: clients trust it by --ca or KVCLUSTER_CA"
            )
        display.say(f"logs in {log_dir}")
        if token:
            display.say(
                f"the management port asks for the token in {TOKEN_VARIABLE}; its page takes it behind /#token="
            )
        async with cluster:
            if await _ready_before(stop, cluster, options.timeout):
                display.ready(Endpoints(cluster.url, cluster.management_url, log_dir, cluster.envoy_admin))
                if display.watches:
                    await _watch(cluster, display, stop)
                await stop.wait()
        display.say("stopped")
    return 0


@contextlib.contextmanager
def _stop_signals(cluster: LocalCluster, display: Display) -> Iterator[asyncio.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second one cuts the drain short."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def signalled() -> None:
        if stop.is_set():
            cluster.kill()
            return
        stop.set()
        display.say("stopping: requests in progress may finish; press Ctrl-C again to stop at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signalled)
    try:
        yield stop
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _ready_before(stop: asyncio.Event, cluster: LocalCluster, timeout: float) -> bool:
    """Waits until the cluster is ready (True) or `stop` is set (False). Raises `StartError`."""
    ready, stopped = asyncio.create_task(cluster.wait_ready(timeout)), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((ready, stopped), return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            ready.result()
        return ready.done()
    finally:
        ready.cancel()
        stopped.cancel()


async def _watch(cluster: LocalCluster, display: Display, stop: asyncio.Event) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        while not stop.is_set():
            display.view(await observe(cluster, client))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), VIEW_INTERVAL)
