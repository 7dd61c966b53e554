"""The two kinds of pods that a KVCluster has."""

from __future__ import annotations

from enum import StrEnum


class Component(StrEnum):
    """Value of the label `app.kubernetes.io/component`."""

    ROUTER = "router"
    WORKER = "worker"
