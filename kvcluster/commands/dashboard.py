"""`kvcluster dashboard`: the live page of a KVCluster in a Kubernetes cluster, on a local port and in the browser."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import webbrowser
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from rich.console import Console

from controller.objects.names import MANAGEMENT_PORT
from kvcluster.explain.gather import (
    BadNameError,
    NotFoundError,
    RouterPod,
    check_names,
    find_cluster,
    router_pods,
)
from kvcluster.management_token import NoTokenError, pod_token
from kvcluster.portforward import ForwardError, PortForward
from kvcluster.terminal import BAD_INPUT, FAILED, complain
from runtime.kube.client import ApiServer
from runtime.kube.credentials import find_credentials
from runtime.kube.errors import KubeApiError, NoClusterError

HOST = "127.0.0.1"


def dashboard(
    name: str, *, namespace: str | None, context: str | None, kubeconfig: Path | None, port: int, browser: bool
) -> int:
    """Runs the command until Ctrl-C; returns its exit code."""
    show = functools.partial(Console().print, markup=False, highlight=False, soft_wrap=True)
    try:
        asyncio.run(_serve(name, namespace, context, kubeconfig, port, show, _open if browser else None))
    except (BadNameError, NotFoundError) as error:
        complain(error)
        return BAD_INPUT
    except NoClusterError as error:
        complain(f"{error} (kvcluster up runs a manifest without a cluster, and prints the address of its page)")
        return BAD_INPUT
    except (KubeApiError, ForwardError, NoTokenError) as error:
        complain(f"the page of {name} cannot be reached: {error}")
        return FAILED
    except OSError as error:
        complain(f"port {port} cannot be used: {error}")
        return FAILED
    return 0


def _open(url: str) -> None:
    """Best effort: the address is printed anyway."""
    with contextlib.suppress(webbrowser.Error):
        webbrowser.open(url)


async def _serve(
    name: str,
    namespace: str | None,
    context: str | None,
    kubeconfig: Path | None,
    port: int,
    show: Callable[[str], None],
    browser: Callable[[str], None] | None,
) -> None:
    check_names(name, namespace)
    credentials = await find_credentials(kubeconfig, context=context, pod=False)
    space = namespace or credentials.namespace
    async with ApiServer(credentials, "kvcluster-dashboard") as api:
        await find_cluster(api, name, space)

        async def routers() -> list[RouterPod]:
            found = await router_pods(api, name, space)
            if not found:
                raise ForwardError(f"no router pod of it runs: kubectl kvcluster explain {name} -n {space} says why")
            return found

        async def pods() -> list[str]:
            return [pod.name for pod in await routers()]

        forward = PortForward(
            api,
            space,
            MANAGEMENT_PORT,
            pods,
            on_pod=lambda pod: show(f"connected to pod {pod}"),
            on_error=_once(lambda why: show(f"cannot connect: {why}")),
        )
        # While an upgrade replaces the routers, the older ones may ask for none.
        secret = next((pod.secret for pod in await routers() if pod.secret), "")
        token = await pod_token(api, space, secret)
        await forward.check()
        stop = _stop_signals()
        fragment = f"#token={quote(token, safe='')}" if token else ""
        async with forward.listening(HOST, port) as bound:
            url = f"http://{HOST}:{bound}/{fragment}"
            show(f"{name} in namespace {space}: {url} (Ctrl-C ends it)")
            if browser is not None:
                await asyncio.to_thread(browser, url)
            await stop.wait()


def _stop_signals() -> asyncio.Event:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    return stop


def _once(tell: Callable[[str], None]) -> Callable[[str], None]:
    """Tells what differs from the last time: a page tries again every few seconds."""
    last = ""

    def changed(why: str) -> None:
        nonlocal last
        if why != last:
            last = why
            tell(why)

    return changed
