"""The gRPC health service (grpc/doc/health-checking.md): `Check` and `Watch`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum

from runtime.grpc.call import Call, Handler
from runtime.grpc.context import Method
from runtime.grpc.frames import Status

SERVICE = "grpc.health.v1.Health"
_NAME_FIELD = 0x0A
"""Tag of `HealthCheckRequest.service`."""
_STATUS_FIELD = 0x08
"""Tag of `HealthCheckResponse.status`."""
LONGEST_NAME = 127


class Serving(IntEnum):
    """`HealthCheckResponse.ServingStatus`."""

    SERVING = 1
    NOT_SERVING = 2
    SERVICE_UNKNOWN = 3


class Health:
    """What is said of each name."""

    def __init__(self, names: Iterable[str]) -> None:
        self._status = dict.fromkeys(names, Serving.SERVING)
        self._watching: dict[_Watch, str] = {}

    def methods(self) -> Mapping[str, Method]:
        return {
            f"/{SERVICE}/Check": lambda call: _Check(self, call),
            f"/{SERVICE}/Watch": lambda call: _Watch(self, call),
        }

    def set(self, name: str, status: Serving) -> None:
        """From now on, and to those that watch."""
        if self._status[name] is not status:
            self._status[name] = status
            for watch, watched in list(self._watching.items()):
                if watched == name:
                    watch.call.send([_response(status)])

    def status(self, name: str) -> Serving | None:
        return self._status.get(name)

    def watch(self, watch: _Watch, name: str) -> None:
        self._watching[watch] = name

    def watches(self, watch: _Watch) -> bool:
        return watch in self._watching

    @property
    def watched(self) -> int:
        """How many watch."""
        return len(self._watching)

    def unwatch(self, watch: _Watch) -> None:
        self._watching.pop(watch, None)

    def close(self) -> None:
        """Nobody watches any more."""
        for watch in list(self._watching):
            watch.call.finish(Status.UNAVAILABLE, "the server stops")
        self._watching.clear()


def _response(status: Serving) -> bytes:
    return bytes((_STATUS_FIELD, status))


def _name(request: bytes) -> str | None:
    """The name that a request asks for; None if it is no request."""
    if not request:
        return ""
    if request[0] != _NAME_FIELD or len(request) < 2 or request[1] > LONGEST_NAME or request[1] != len(request) - 2:
        return None
    try:
        return request[2:].decode()
    except UnicodeDecodeError:
        return None


class _Check(Handler):
    def __init__(self, health: Health, call: Call) -> None:
        self._health = health
        self._call = call

    def message(self, data: bytes) -> None:
        name = _name(data)
        if name is None:
            self._call.finish(Status.INVALID_ARGUMENT, "not a HealthCheckRequest")
        elif (status := self._health.status(name)) is None:
            self._call.finish(Status.NOT_FOUND, "no such service")
        else:
            self._call.finish(messages=[_response(status)])

    def input_ended(self) -> None:
        self._call.finish(Status.INVALID_ARGUMENT, "no HealthCheckRequest came")

    def lost(self) -> None:
        pass


class _Watch(Handler):
    def __init__(self, health: Health, call: Call) -> None:
        self._health = health
        self.call = call

    def message(self, data: bytes) -> None:
        name = _name(data) if not self._health.watches(self) else None
        if name is None:
            self._health.unwatch(self)
            self.call.finish(Status.INVALID_ARGUMENT, "not a HealthCheckRequest, or not the only one")
            return
        self._health.watch(self, name)
        self.call.send([_response(self._health.status(name) or Serving.SERVICE_UNKNOWN)])

    def input_ended(self) -> None:
        pass

    def lost(self) -> None:
        self._health.unwatch(self)
