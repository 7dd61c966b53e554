"""The part of the manifest about the Envoy of each router's pod, and what an Envoy cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from controller.api.common import PullPolicy, Resources, SpecModel, rule_broken

if TYPE_CHECKING:
    from controller.api.model import Router

_OR_ELSE = "remove it, or set spec.router.dataPlane to router"
SERVES = f"without the router, Envoy would send requests for the others' models to this cluster's workers: {_OR_ELSE}"
RESUMES = f"Envoy cannot go on with a stream at another worker: {_OR_ELSE}"
LOGS_BLOCKS = f"Envoy's access log does not know the blocks of a prompt: {_OR_ELSE}"
WAITS = f"Envoy waits for no worker after a failure, it tries the next one at once: {_OR_ELSE}"
CUTS = f"Envoy cuts an answer off when its worker has been silent for liveness.stallSeconds: {_OR_ELSE}"
LONGEST_DECISION = 3_600
"""Seconds for which an Envoy can wait for the router's decision at most (`message_timeout`)."""
LONGEST_WAIT = LONGEST_DECISION - 10
WAITS_LONG = (
    f"Envoy waits for the router's decision for an hour at most: make it {LONGEST_WAIT} or less, or set "
    "spec.router.dataPlane to router"
)
LONGEST_START = LONGEST_DECISION - 100
"""Seconds for which a worker may start while requests are held: routers hold them for a minute longer."""
STARTS_LONG = (
    f"Envoy waits for the router's decision for an hour at most: make it {LONGEST_START} or less, or set "
    "spec.router.dataPlane to router"
)


class Envoy(SpecModel):
    """The Envoy in each router's pod, for `dataPlane: envoy`: see `docs/envoy.md`."""

    image: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """Its container image, which has the command `envoy`. Default: the release's, a pinned one."""
    image_pull_policy: PullPolicy | None = None
    """When the image is pulled. Default: Kubernetes' own."""
    threads: Annotated[int, Field(ge=1, le=256)] = 2
    """Threads that serve requests (`--concurrency`); each may keep a core busy."""
    resources: Resources = Resources()
    """Resources of its container. It keeps within 256 MiB and twice `limits.maxTotalBodyBytes`."""
    stats: bool = False
    """Whether the PodMonitor has Envoy's own statistics scraped, too (several hundred series)."""


def check_envoy(router: Router) -> None:
    """Raises a broken rule for the first field that an Envoy as the data plane would not honour."""
    for path, message in _unknown_to_envoy(router):
        raise rule_broken(path, message)


def _unknown_to_envoy(router: Router) -> Iterator[tuple[str, str]]:
    if not router.is_behind_envoy:
        return
    if router.serves:
        yield "serves", SERVES
    if router.resume_streams:
        yield "resumeStreams", RESUMES
    if router.access_log.blocks:
        yield "accessLog.blocks", LOGS_BLOCKS
    if router.retries.deadline_seconds is not None:
        yield "retries.deadlineSeconds", WAITS
    if router.liveness.cut_seconds is not None:
        yield "liveness.cutSeconds", CUTS
    if router.flow_control.enabled:
        for index, each in enumerate(router.flow_control.classes):
            if each.ttl_seconds > LONGEST_WAIT:
                yield f"flowControl.classes[{index}].ttlSeconds", WAITS_LONG
