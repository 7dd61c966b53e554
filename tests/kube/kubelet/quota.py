"""Pod quotas of namespaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.kube.kubelet.client import ApiError
from tests.kube.kubelet.informer import Informer

NAME = "pods"
FORBIDDEN = 403


class Quotas:
    """How many pods a namespace may have."""

    def __init__(self, pods: Informer) -> None:
        self._pods = pods
        self._limits: dict[str, int] = {}

    def set(self, namespace: str, pods: int | None) -> None:
        """From now on at most this many; None: any number."""
        if pods is None:
            self._limits.pop(namespace, None)
        else:
            self._limits[namespace] = pods

    def check(self, pod: Mapping[str, Any]) -> None:
        """Raises `ApiError`, as the API server answers, when the namespace is full."""
        namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        limit = self._limits.get(namespace)
        if limit is None:
            return
        used = sum(each["metadata"]["namespace"] == namespace and _counts(each) for each in self._pods)
        if used + 1 > limit:
            said = f"requested: pods=1, used: pods={used}, limited: pods={limit}"
            raise ApiError(FORBIDDEN, "Forbidden", f'pods "{name}" is forbidden: exceeded quota: {NAME}, {said}')


def _counts(pod: Mapping[str, Any]) -> bool:
    return pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")
