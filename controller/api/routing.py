"""Parts of the manifest that set how a router deals with clients and workers."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated

from pydantic import Field, model_validator

from controller.api.common import SpecModel, rule_broken

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class Strategy(StrEnum):
    """How a router chooses a worker; `docs/routing.md` has the formula of each."""

    CACHE_AWARE = "cache_aware"
    LONGEST_PREFIX = "longest_prefix"
    ROUND_ROBIN = "round_robin"
    LEAST_LOADED = "least_loaded"
    LMETRIC = "lmetric"
    LINEAR = "linear"


class DataPlaneType(StrEnum):
    """Who receives clients' requests and passes them on to workers."""

    ROUTER = "router"
    ENVOY = "envoy"


class ServedCluster(SpecModel):
    """Another KVCluster whose workers the routers serve, too."""

    cluster: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=45)]
    """Name of a KVCluster in the same namespace. It need not exist yet."""
    model: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """A name under which its workers serve their model; goes with `tokenizer`."""
    tokenizer: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """What turns that model's prompts into token ids, as `spec.model.tokenizer`. Default: none, and its requests are
    routed by load."""

    @model_validator(mode="after")
    def _model_and_tokenizer(self) -> ServedCluster:
        if (self.model is None) != (self.tokenizer is None):
            missing = "model" if self.model is None else "tokenizer"
            raise rule_broken(missing, "model and tokenizer go together: give both, or none")
        if (self.model is not None and re.search("[,=]", self.model)) or re.search(",", self.tokenizer or ""):
            raise rule_broken("model", "a name with a comma or an equals sign cannot be given to a router")
        return self


class Limits(SpecModel):
    """What a router accepts from clients."""

    max_body_bytes: Annotated[int, Field(ge=1_024, le=2**31)] = 64 * 2**20
    """Largest request body; a larger one is answered with 413."""
    max_total_body_bytes: Annotated[int, Field(ge=1_024, le=2**40)] | None = None
    """Largest total of the bodies of all requests in progress, where a body counts until its answer begins. A request
    that does not fit is answered with 503. One body always fits. Default: 512 MiB, or 4 of the largest bodies if that
    is more."""
    max_header_bytes: Annotated[int, Field(ge=1_024, le=2**20)] = 65_536
    """Largest total of request line and headers; more is answered with 431."""
    max_headers: Annotated[int, Field(ge=8, le=10_000)] = 256
    """Most headers of a request; more is answered with 431."""
    max_concurrent_requests: Annotated[int, Field(ge=1, le=1_000_000)] = 4_096
    """Most requests in progress in one router; more are answered with 503 and Retry-After."""


class Timeouts(SpecModel):
    """How long a router waits, seconds. What is not set is the router's own default: see `docs/router.md`."""

    connect_seconds: Seconds | None = None
    """Seconds to connect to a worker (`--connect-timeout`)."""
    answer_seconds: Seconds | None = None
    """Seconds for a live worker to begin its answer (`--answer-timeout`)."""
    idle_seconds: Seconds | None = None
    """Seconds between two pieces of an answer (`--idle-timeout`)."""
    header_seconds: Seconds | None = None
    """Seconds for a request's headers to arrive (`--header-timeout`)."""
    body_seconds: Seconds | None = None
    """Seconds of silence within a request's body (`--body-timeout`)."""
    write_seconds: Seconds | None = None
    """Seconds for which a client may leave its answer unread (`--write-timeout`)."""
    keep_alive_seconds: Seconds | None = None
    """Seconds for which a client's connection may be idle (`--keep-alive`)."""


class Retries(SpecModel):
    """What a router does when a worker fails before its answer has begun."""

    attempts: Annotated[int, Field(ge=1, le=64)] | None = None
    """Most workers that a request is sent to, one after another (`--retry-attempts`)."""
    deadline_seconds: Annotated[float, Field(ge=0, le=3_600, allow_inf_nan=False)] | None = None
    """Seconds after a failure in which another worker is looked for and waited for (`--retry-deadline`)."""
    share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    """Retries allowed, as a share of the requests of the last 10 s (`--retry-share`)."""
    floor: Annotated[float, Field(ge=0, le=10_000, allow_inf_nan=False)] | None = None
    """Retries per second that are allowed in addition to that share (`--retry-floor`)."""


class Liveness(SpecModel):
    """When a router gives up a worker, or its view of the worker's cache, as lost."""

    silence_seconds: Seconds | None = None
    """Seconds of silence after which a worker gets no requests (`--liveness-timeout`)."""
    stall_seconds: Seconds | None = None
    """Seconds of silence after which a request that the worker has not begun to answer is moved (`--stall-timeout`)."""
    cut_seconds: Seconds | None = None
    """Seconds of silence after which an answer that the worker has begun is cut off (`--cut-timeout`)."""
    view_seconds: Seconds | None = None
    """Seconds after which a view of a cache that nothing confirms is no longer used (`--view-timeout`)."""


class LogForm(StrEnum):
    """How lines of the access log are written."""

    OFF = "off"
    TEXT = "text"
    JSON = "json"


class AccessLog(SpecModel):
    """A line for each request on the router's standard output: see `docs/router.md`."""

    format: Annotated[LogForm, Field(strict=False)] = LogForm.OFF
    """`json`, `text` (key=value), or `off`."""
    blocks: bool = False
    """Whether a line names the blocks of its prompt by salted digests, for `kvcluster record`. So that the lines of
    several routers can be joined, give all of them one salt: `ROUTER_ACCESS_LOG_SALT` in `spec.router.env`."""


class Sessions(SpecModel):
    """Which sessions a router remembers, so that a session's requests stay together where workers cost the same."""

    ttl_seconds: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)] | None = None
    """Seconds after its last request in which a session is remembered; 0: sessions are ignored (`--session-ttl`)."""
    limit: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    """Most sessions that a router remembers, about 250 bytes each (`--session-limit`)."""


class Ejection(SpecModel):
    """When a router ejects a worker that fails while others do not, and for how long."""

    consecutive: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """Failures in a row after which a worker is ejected; 0: never (`--eject-after`)."""
    rate_gap: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    """A worker is ejected when its success rate is lower than the others' by this much (`--eject-rate-gap`)."""
    first_seconds: Seconds | None = None
    """Seconds of a first ejection; each further one doubles them (`--eject-seconds`)."""
    longest_seconds: Seconds | None = None
    """Most seconds of an ejection (`--eject-longest`)."""
    share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    """Largest share of the workers that is ejected at the same time (`--eject-share`)."""
    pause_seconds: Seconds | None = None
    """Most seconds for which a worker's Retry-After is honoured (`--longest-pause`)."""
