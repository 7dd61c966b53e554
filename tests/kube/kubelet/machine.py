"""What the pods of one node share."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from tests.kube.kubelet.client import Api
from tests.kube.kubelet.events import Events
from tests.kube.kubelet.loopback import Loopback

SHORTEST = 0.02

KubeconfigFor = Callable[[str, str], Path]
"""The kubeconfig of a service account: (namespace, name)."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How much faster than on a real node time passes, so that tests need not wait.

    `scale` multiplies probe periods and delays, restart and image backoff, minReadySeconds and
    progressDeadlineSeconds, but no timeout and no grace period: those are for the real processes. `deadly` multiplies
    the time after which a liveness or startup probe that fails ends its container: a process on a busy machine may be
    slow to start. `pre_stop` multiplies the sleep action of preStop hooks. `proxy_delay` is the time in seconds from
    a change of an EndpointSlice until Service proxies act on it.
    """

    scale: float = 0.1
    deadly: float = 1.0
    pre_stop: float = 1.0
    proxy_delay: float = 0.2

    def scaled(self, seconds: float) -> float:
        """A period or a delay on this node."""
        return max(seconds * self.scale, SHORTEST)

    def failures(self, threshold: int) -> int:
        """How often a probe that can end its container must fail in a row to do so."""
        return max(math.ceil(threshold * self.deadly / self.scale), 1)


class Images:
    """Which images can be pulled."""

    def __init__(self) -> None:
        self._refused: set[str] = set()
        self._changed = asyncio.Event()

    def refuse(self, image: str) -> None:
        """From now on it cannot be pulled."""
        self._refused.add(image)

    def allow(self, image: str) -> None:
        """From now on it can; pods that wait for it start at once."""
        self._refused.discard(image)
        self._changed.set()
        self._changed = asyncio.Event()

    def can_pull(self, image: str) -> bool:
        """Whether the image can be pulled now."""
        return image not in self._refused

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next `allow`."""
        return self._changed


@dataclass(frozen=True, slots=True)
class Machine:
    """The node as its pods see it."""

    api: Api
    session: aiohttp.ClientSession
    events: Events
    loopback: Loopback
    logs: Path
    tether: int
    kubeconfig_for: KubeconfigFor | None
    timing: Timing = field(default_factory=Timing)
    images: Images = field(default_factory=Images)
    name: str = "node-1"
