"""Where the API server is and who we are there."""

from __future__ import annotations

import os
from pathlib import Path

from kubernetes.aio.client import Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config


class NoClusterError(RuntimeError):
    """No way to an API server is configured; the message says what to do."""


def in_pod(kubeconfig: Path | None) -> bool:
    """Whether the pod's service account is who we are: no kubeconfig was given, and this is a pod."""
    return kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ


async def connection(kubeconfig: Path | None = None) -> Configuration:
    """The given kubeconfig, else the pod's service account, else the user's own kubeconfig. Raises `NoClusterError`."""
    configuration = Configuration()
    if in_pod(kubeconfig):
        try:
            load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        except ConfigException as error:
            raise NoClusterError(f"the pod's service account cannot be used: {error}") from None
        return configuration
    try:
        await load_kube_config(  # type: ignore[no-untyped-call]
            config_file=None if kubeconfig is None else str(kubeconfig),
            client_configuration=configuration,
            persist_config=False,
        )
    except (ConfigException, OSError) as error:
        raise NoClusterError(
            f"no cluster to talk to: run in a pod, or name a kubeconfig with --kubeconfig or KUBECONFIG ({error})"
        ) from None
    return configuration
