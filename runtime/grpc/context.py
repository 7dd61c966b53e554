"""What the connections of one gRPC server share, and the bounds on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runtime.connections import OpenConnections
from runtime.grpc.call import Call, Handler

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


@dataclass(slots=True)
class GrpcContext:
    """What the connections of one server share."""

    methods: Mapping[bytes, Method]
    """By path."""
    limits: GrpcLimits
    connections: OpenConnections[Connection] = field(default_factory=OpenConnections)
    calls: int = 0
    held: int = 0
