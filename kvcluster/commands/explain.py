"""`kvcluster explain`: one page about a KVCluster in a Kubernetes cluster."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import orjson

from kvcluster.explain.gather import BadNameError, NotFoundError, check_names, gather
from kvcluster.explain.page import Page, page
from kvcluster.explain.render import rendered, width
from kvcluster.terminal import BAD_INPUT, FAILED, complain, output
from runtime.kube.client import ApiServer
from runtime.kube.credentials import find_credentials
from runtime.kube.errors import KubeApiError, NoClusterError


def explain(name: str, *, namespace: str | None, context: str | None, kubeconfig: Path | None, as_json: bool) -> int:
    """Runs the command; returns its exit code."""
    try:
        found = asyncio.run(read_page(name, namespace, context, kubeconfig))
    except (BadNameError, NotFoundError) as error:
        complain(error)
        return BAD_INPUT
    except NoClusterError as error:
        complain(f"{error} (kvcluster up runs a manifest without a cluster)")
        return BAD_INPUT
    except KubeApiError as error:
        complain(f"KVCluster {name} cannot be read: {error}")
        return FAILED
    if as_json:
        sys.stdout.write(orjson.dumps(asdict(found), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode())
    else:
        console = output()
        console.width = width(found, console)
        console.print(rendered(found))
    return 0


async def read_page(
    name: str, namespace: str | None = None, context: str | None = None, kubeconfig: Path | None = None
) -> Page:
    """The page as of now. Raises `BadNameError`, `NoClusterError`, `NotFoundError` or `KubeApiError`."""
    check_names(name, namespace)
    credentials = await find_credentials(kubeconfig, context=context, pod=False)
    async with ApiServer(credentials, "kvcluster-explain") as api:
        gathered = await gather(api, name, namespace or credentials.namespace)
        return page(gathered, datetime.now(UTC))
