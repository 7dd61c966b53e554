"""What the connections of one gRPC server share, and the bounds on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runtime.connections import OpenConnections
from runtime.grpc.call import Call, Handler
from runtime.grpc.idle import IdleConnections
from runtime.tls_listener import MAX_HANDSHAKES

if TYPE_CHECKING:
    from runtime.grpc.connection import Connection

Method = Callable[[Call], Handler]


@dataclass(frozen=True, slots=True)
class GrpcLimits:
    """Bounds. Bytes, calls, seconds."""

    message: int = 4 * 2**20
    """Of one message."""
    held: int = 512 * 2**20
    """Of messages that have not come whole, or that clients have not read yet, in all."""
    metadata: int = 16_384
    """Of a call's header block, encoded and decoded."""
    calls: int = 20_000
    """In all; more are answered with RESOURCE_EXHAUSTED."""
    unread: int = 2**20
    """Written to a client that does not read, beside messages, before its connection is given up."""
    greeting: float = 10.0
    """For a connection to say what it is."""
    write: float = 60.0
    """For which a client may read nothing of what it is sent."""
    handshake: float = 10.0
    """For TLS, from a connection's acceptance on."""
    handshakes: int = MAX_HANDSHAKES
    """Of TLS, at once. One more takes the place of the oldest."""
    connections: int = 2048
    """At once. One more takes the place of the one that has been without a call for longest; if all have calls, it is
    refused. A gateway's proxy needs one for each of its threads."""
    idle: float = 300.0
    """Without a call, before a client is asked to connect anew when it needs to; as long again, and it is cut off."""


@dataclass(slots=True)
class GrpcContext:
    """What the connections of one server share."""

    methods: Mapping[bytes, Method]
    """By path."""
    limits: GrpcLimits
    connections: OpenConnections[Connection] = field(default_factory=OpenConnections)
    idle: IdleConnections = field(init=False)
    calls: int = 0
    held: int = 0

    def __post_init__(self) -> None:
        self.idle = IdleConnections(self.limits.idle)

    def make_room(self) -> bool:
        """For one more connection; False if there is none, since all have calls."""
        if len(self.connections) < self.limits.connections:
            return True
        oldest = self.idle.oldest()
        if oldest is not None:
            oldest.displace()
        return oldest is not None
