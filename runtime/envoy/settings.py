"""What Envoy's configuration is made from. Defaults are those of the router's own data port."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Files:
    """Absolute paths that Envoy and the router beside it share, all in folders of theirs alone."""

    endpoints: str
    """The workers, written by the router (`runtime.envoy.endpoints`) and followed by Envoy."""
    picker: str
    """Unix socket of the endpoint picker."""
    admin: str
    """Unix socket of Envoy's administration interface."""


@dataclass(frozen=True, slots=True)
class Tls:
    """The certificate of the data port: paths, as Envoy finds them. Changed files are read again."""

    folder: str
    """Has `tls.crt` and `tls.key`."""
    secrets: str
    """The folder with the files of `runtime.envoy.tls.secrets`."""
    client_ca: str | None = None
    """File with the authorities of clients' certificates; None: clients need none."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What is accepted from clients."""

    body_bytes: int = 64 * 2**20
    total_body_bytes: int = 512 * 2**20
    header_bytes: int = 65_536
    headers: int = 256
    requests: int = 4096
    """Requests at workers at the same time."""
    connections: int = 50_000
    """Connections of clients. Each may hold a file descriptor and some KiB without a request."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds."""

    connect: float = 2.0
    answer: float = 600.0
    idle: float = 600.0
    stall: float = 10.0
    header: float = 10.0
    body: float = 30.0
    write: float = 30.0
    keep_alive: float = 75.0


@dataclass(frozen=True, slots=True)
class Retries:
    """What happens to a request that fails before its answer has begun. `share` and `floor` bound those under way."""

    attempts: int = 4
    share: float = 0.2
    floor: float = 10.0


@dataclass(frozen=True, slots=True)
class Ejection:
    """When a worker that fails gets no requests for a while. Seconds; `share` of the workers, at most."""

    consecutive: int = 5
    first: float = 10.0
    longest: float = 300.0
    share: float = 0.5


@dataclass(frozen=True, slots=True)
class Asking:
    """How the endpoint picker is asked. Seconds."""

    decision: float = 60.0
    """For a decision. With flow control a request may wait for its turn meanwhile, so that this is no sign of failure:
    health checks find a picker that does not answer any more."""
    check_interval: float = 0.25
    check_timeout: float = 0.75
    """Requests wait for a frozen picker for `check_interval` and this together, at most."""
    fail_open: bool = True
    """Whether requests go on without the picker, to the worker with the fewest of them."""


@dataclass(frozen=True, slots=True)
class DataPlane:
    """One Envoy."""

    files: Files
    port: int
    address: str = "::"
    """`::` is every address of IPv6 and IPv4."""
    ready_port: int | None = None
    """Port of `/live`, `/ready` and `/stats/prometheus` alone; None: none is served."""
    tls: Tls | None = None
    limits: Limits = field(default_factory=Limits)
    timeouts: Timeouts = field(default_factory=Timeouts)
    retries: Retries = field(default_factory=Retries)
    ejection: Ejection = field(default_factory=Ejection)
    asking: Asking = field(default_factory=Asking)
    access_log: Literal["off", "text", "json"] = "off"
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may send requests; `*` among them: all."""
    allowed_paths: tuple[str, ...] = ()
    """Paths that clients may reach in addition to inference APIs."""
    router_port: int | None = None
    """Management port of the router at 127.0.0.1, which says at `/ready` whether requests should come here; None:
    Envoy's own state counts."""
