"""Where the API server is and who we are there: a kubeconfig, or the service account of the pod we run in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from kubernetes.aio.client import Configuration
from kubernetes.aio.config import ConfigException, list_kube_config_contexts, load_incluster_config, load_kube_config

from runtime.kube.errors import NoClusterError

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
DEFAULT_KUBECONFIG = "~/.kube/config"
DEFAULT_NAMESPACE = "default"

# The official client takes a kubeconfig apart without looking: one of another shape ends in any of these.
_UNUSABLE = (ConfigException, OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Credentials:
    """How to reach one API server. A token is read again when it is due, by the client that `configuration` is for."""

    configuration: Configuration
    namespace: str
    """Of the pod, or of the kubeconfig's context; "default" where neither says."""
    in_pod: bool
    """Whether they are those of the pod's service account."""

    @property
    def server(self) -> str:
        """URL of the API server."""
        return str(self.configuration.host)


async def find_credentials(
    kubeconfig: Path | None, *, context: str | None = None, flag: str = "--kubeconfig", pod: bool = True
) -> Credentials:
    """The kubeconfig that is given, else the pod's service account, else the kubeconfig that kubectl would use.

    `context` names one of the kubeconfig's contexts (None: its current one), `flag` is the command-line flag that names
    a kubeconfig. `pod` False: no service account is used. Raises `NoClusterError`.
    """
    in_pod = pod and kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ
    pod_problem = ""
    if in_pod:
        configuration = Configuration()
        try:
            load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        except (ConfigException, OSError) as error:
            pod_problem = str(error)
        else:
            return Credentials(configuration, _pod_namespace(), in_pod=True)
    files = str(kubeconfig or os.environ.get("KUBECONFIG") or DEFAULT_KUBECONFIG)
    if _exists(files):
        return await _from_kubeconfig(files, context)
    if pod_problem:
        raise NoClusterError(
            f"no cluster to talk to: this pod's service account cannot be used ({pod_problem}): give the pod a "
            f"serviceAccountName and automountServiceAccountToken: true, or name a kubeconfig with {flag}"
        )
    raise NoClusterError(
        f"no cluster to talk to: {'this is no pod, and ' if pod else ''}there is no kubeconfig {files}: name one "
        f"with {flag} or $KUBECONFIG"
    )


async def _from_kubeconfig(files: str, context: str | None) -> Credentials:
    configuration = Configuration()
    try:
        contexts, current = list_kube_config_contexts(files)  # type: ignore[no-untyped-call]
        named: dict[str, dict[str, Any]] = {str(item["name"]): item for item in contexts}
        if context is not None and context not in named:
            raise NoClusterError(f"{files} has no context {context!r}; it has: {', '.join(named) or 'none'}")
        chosen = current if context is None else named[context]
        namespace = str((chosen.get("context") or {}).get("namespace") or DEFAULT_NAMESPACE)
        await load_kube_config(  # type: ignore[no-untyped-call]
            files, context=context, client_configuration=configuration, persist_config=False
        )
    except _UNUSABLE as error:
        raise NoClusterError(
            f"no cluster to talk to: the kubeconfig {files} cannot be used ({error}): does kubectl work with it?"
        ) from None
    return Credentials(configuration, namespace, in_pod=False)


def _exists(files: str) -> bool:
    return any(Path(file).expanduser().is_file() for file in files.split(os.pathsep) if file)


def _pod_namespace() -> str:
    try:
        return NAMESPACE_FILE.read_text("utf-8").strip() or DEFAULT_NAMESPACE
    except OSError:
        return DEFAULT_NAMESPACE
