"""Parts of the manifest that set how a router deals with clients and workers."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from controller.api.base import SpecModel

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class Limits(SpecModel):
    """What a router accepts from clients."""

    max_body_bytes: Annotated[int, Field(ge=1_024, le=2**31)] = 64 * 2**20
    """Largest request body; a larger one is answered with 413."""
    max_total_body_bytes: Annotated[int, Field(ge=1_024, le=2**40)] | None = None
    """Largest total of the bodies of all requests in progress, each until its answer begins; what does not fit is
    answered with 503. It has room for one body at least; default: 512 MiB, or 4 of the largest bodies."""
    max_header_bytes: Annotated[int, Field(ge=1_024, le=2**20)] = 65_536
    """Largest total of request line and headers; more is answered with 431."""
    max_headers: Annotated[int, Field(ge=8, le=10_000)] = 256
    """Most headers of a request; more is answered with 431."""
    max_concurrent_requests: Annotated[int, Field(ge=1, le=1_000_000)] = 4_096
    """Most requests under way in one router; more are answered with 503 and Retry-After."""


class Timeouts(SpecModel):
    """How long a router waits, seconds. What is not set is the router's own default: see `docs/router.md`."""

    connect_seconds: Seconds | None = None
    """To connect to a worker (`--connect-timeout`)."""
    answer_seconds: Seconds | None = None
    """For a live worker to begin its answer (`--answer-timeout`)."""
    idle_seconds: Seconds | None = None
    """Between two pieces of an answer (`--idle-timeout`)."""
    header_seconds: Seconds | None = None
    """For a request's headers to arrive (`--header-timeout`)."""
    body_seconds: Seconds | None = None
    """Of silence within a request's body (`--body-timeout`)."""
    write_seconds: Seconds | None = None
    """For which a client may leave its answer unread (`--write-timeout`)."""
    keep_alive_seconds: Seconds | None = None
    """For which a client's connection may be idle (`--keep-alive`)."""


class Retries(SpecModel):
    """What a router does when a worker fails before its answer has begun."""

    attempts: Annotated[int, Field(ge=1, le=64)] | None = None
    """Workers a request is sent to at most, one after another (`--retry-attempts`)."""
    deadline_seconds: Annotated[float, Field(ge=0, le=3_600, allow_inf_nan=False)] | None = None
    """In which another worker is looked and waited for after a failure (`--retry-deadline`)."""
    share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    """Retries allowed, as a share of the requests of the last 10 s (`--retry-share`)."""
    floor: Annotated[float, Field(ge=0, le=10_000, allow_inf_nan=False)] | None = None
    """Retries a second that are allowed beside that share (`--retry-floor`)."""


class Liveness(SpecModel):
    """When a router takes a worker, or what it knows of the worker's cache, for lost."""

    silence_seconds: Seconds | None = None
    """Silence after which a worker is left out (`--liveness-timeout`)."""
    stall_seconds: Seconds | None = None
    """Silence of a worker after which a request that it has not begun to answer is moved (`--stall-timeout`)."""
    cut_seconds: Seconds | None = None
    """Silence of a worker after which an answer that it has begun is cut (`--cut-timeout`)."""
    view_seconds: Seconds | None = None
    """After which a view of a cache that nothing confirms is not matched against (`--view-timeout`)."""


class Ejection(SpecModel):
    """When a router leaves out a worker that fails where others do not, and for how long."""

    consecutive: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """Failures in a row after which a worker is ejected; 0: never (`--eject-after`)."""
    rate_gap: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    """A worker is ejected when its success rate lies so far below the others' (`--eject-rate-gap`)."""
    first_seconds: Seconds | None = None
    """Duration of a first ejection; each further one doubles it (`--eject-seconds`)."""
    longest_seconds: Seconds | None = None
    """Longest duration of an ejection (`--eject-longest`)."""
    share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    """Largest share of the workers that is ejected at once (`--eject-share`)."""
    pause_seconds: Seconds | None = None
    """For which a worker's Retry-After is honoured at most (`--longest-pause`)."""
