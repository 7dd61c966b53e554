"""What the pods of one node share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from tests.kube.kubelet.api import Api
from tests.kube.kubelet.images import Images
from tests.kube.kubelet.network import Loopback
from tests.kube.kubelet.process import Isolation
from tests.kube.kubelet.volumes import Credentials

SHORTEST = 0.02


@dataclass(frozen=True, slots=True)
class Timing:
    """How much faster than on a real node time passes, so that tests need not wait.

    `scale` multiplies probe periods and delays, restart and image backoff, and progressDeadlineSeconds, but no timeout
    and no grace period: those are for the real processes. `deadly` multiplies the time after which a liveness or
    startup probe that fails ends its container: a process on a busy machine may be slow to start. `proxy_delay` is the
    time in seconds from a change of an EndpointSlice until Service proxies act on it.
    """

    scale: float = 0.1
    deadly: float = 1.0
    proxy_delay: float = 0.2

    def scaled(self, seconds: float) -> float:
        """A period or a delay on this node."""
        return max(seconds * self.scale, SHORTEST)

    def failures(self, threshold: int) -> int:
        """How often a probe that can end its container must fail in a row to do so."""
        return max(math.ceil(threshold * self.deadly / self.scale), 1)


@dataclass(frozen=True, slots=True)
class Machine:
    """The node as its pods see it."""

    api: Api
    session: aiohttp.ClientSession
    loopback: Loopback
    logs: Path
    parent_pipe: int
    isolation: Isolation
    credentials: Credentials
    always: Mapping[str, str] = field(default_factory=dict)
    """Variables of every pod: where the API server is."""
    timing: Timing = field(default_factory=Timing)
    images: Images = field(default_factory=Images)
    name: str = "node-1"
