"""The states of a worker, and the one function that moves a worker from one to another.

Three facts about a worker are independent of one another: whether it can be reached (`Liveness`), whether it takes new
requests (`Intake`), and whether it answers them well (`Circuit`, a circuit breaker). `WorkerPhase` is what they amount
to. docs/states.md shows the transitions.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, IntEnum, StrEnum, auto
from typing import NamedTuple


class Liveness(Enum):
    """Whether the worker can be reached."""

    KNOWN = auto()
    """The router knows the worker and has not heard from it yet."""
    ALIVE = auto()
    OVERDUE = auto()
    """The worker has been silent for too long, but the router was held up and may not have read what the worker sent:
    it counts as alive for one more period."""
    UNREACHABLE = auto()
    """The worker has been silent for too long, or refuses connections."""
    AGENT = auto()
    """The URL is that of a cache agent, listed as if it were the engine."""
    GONE = auto()
    """The worker was removed from the fleet."""


class Intake(IntEnum):
    """What the worker does with new requests. A larger value is a stronger reason not to send it any."""

    OPEN = 0
    """It takes them."""
    DRAINING = 1
    """It is leaving and still takes them, for when there is no other worker."""
    CLOSED = 2
    """It takes none, and finishes those that it has."""


class Circuit(Enum):
    """The three states of a circuit breaker, and the pauses of a worker that turned a request away (429, 503)."""

    CLOSED = auto()
    """Requests go to the worker."""
    BACKING_OFF = auto()
    """It turned a request away: it gets none for a moment, or until it answers one, as long as there are others."""
    RETRY_AFTER = auto()
    """It turned a request away and said for how long (Retry-After): it gets none until then."""
    OPEN = auto()
    """It is ejected and gets none."""
    HALF_OPEN = auto()
    """Its ejection is over and it gets one request at a time, as a probe."""


class WorkerPhase(StrEnum):
    """What a worker can be used for now. `state` in `GET /workers` and label of `kvcluster_router_worker_states`."""

    STARTING = "starting"
    """Known, and not heard from yet."""
    SERVING = "serving"
    PAUSED = "paused"
    """It turned a request away: chosen only when no other worker serves."""
    HALF_OPEN = "half_open"
    """After an ejection: one request at a time shows whether the worker has recovered."""
    EJECTED = "ejected"
    """It failed where others did not: it gets no requests for a while."""
    DRAINING = "draining"
    """It is leaving but still accepts requests: chosen only when no other worker is left."""
    CLOSED = "closed"
    """It takes no new requests: it is terminating, or not ready."""
    UNREACHABLE = "unreachable"
    """It is silent, or refuses connections."""
    AGENT = "agent"
    """It is no worker but a cache agent, which takes no requests."""
    GONE = "gone"
    """It was removed: the fleet does not list it any more."""


class WorkerEvent(Enum):
    """What happens to a worker. What it changes is given first."""

    HEARD = auto()
    """Liveness: a sign of life."""
    EXCUSED = auto()
    """Liveness: it is silent for too long, but the router was held up itself."""
    LOST = auto()
    """Liveness: it is silent for too long, or refuses connections."""
    FOUND_TO_BE_AGENT = auto()
    """Liveness: its feed says that it is an agent."""
    REMOVED = auto()
    """Liveness: it left the fleet."""
    OPENED = auto()
    """Intake: it takes new requests."""
    DRAINING = auto()
    """Intake: it is leaving and still takes new requests."""
    CLOSED = auto()
    """Intake: it takes no new requests."""
    TURNED_AWAY = auto()
    """Circuit: it turned a request away."""
    TURNED_AWAY_UNTIL = auto()
    """Circuit: it turned a request away and said for how long."""
    ANSWERED = auto()
    """Circuit: it answered a request successfully."""
    PAUSE_ENDED = auto()
    """Circuit: the time of its pause is over."""
    EJECTED = auto()
    """Circuit: it failed where others did not, or failed a probe."""
    EJECTION_ENDED = auto()
    """Circuit: the time of its ejection is over."""
    RECOVERED = auto()
    """Circuit: its probes went well."""
    RESTARTED = auto()
    """Circuit: it may be a new process, so a pause is over and an ejection is to be probed."""


class WorkerState(NamedTuple):
    """The three facts about a worker."""

    liveness: Liveness = Liveness.KNOWN
    intake: Intake = Intake.OPEN
    circuit: Circuit = Circuit.CLOSED

    @property
    def reachable(self) -> bool:
        return self.liveness in (Liveness.ALIVE, Liveness.OVERDUE)

    @property
    def phase(self) -> WorkerPhase:
        """What the three facts amount to: liveness counts before intake, intake before the circuit."""
        if not self.reachable:
            return _BY_LIVENESS[self.liveness]
        if self.intake is not Intake.OPEN:
            return WorkerPhase.DRAINING if self.intake is Intake.DRAINING else WorkerPhase.CLOSED
        return _BY_CIRCUIT[self.circuit]


_BY_LIVENESS: Mapping[Liveness, WorkerPhase] = {
    Liveness.KNOWN: WorkerPhase.STARTING,
    Liveness.UNREACHABLE: WorkerPhase.UNREACHABLE,
    Liveness.AGENT: WorkerPhase.AGENT,
    Liveness.GONE: WorkerPhase.GONE,
}
_BY_CIRCUIT: Mapping[Circuit, WorkerPhase] = {
    Circuit.CLOSED: WorkerPhase.SERVING,
    Circuit.BACKING_OFF: WorkerPhase.PAUSED,
    Circuit.RETRY_AFTER: WorkerPhase.PAUSED,
    Circuit.OPEN: WorkerPhase.EJECTED,
    Circuit.HALF_OPEN: WorkerPhase.HALF_OPEN,
}

_NOT_GONE = tuple(liveness for liveness in Liveness if liveness is not Liveness.GONE)
_LIVENESS: Mapping[tuple[Liveness, WorkerEvent], Liveness] = {
    (Liveness.KNOWN, WorkerEvent.HEARD): Liveness.ALIVE,
    (Liveness.OVERDUE, WorkerEvent.HEARD): Liveness.ALIVE,
    (Liveness.UNREACHABLE, WorkerEvent.HEARD): Liveness.ALIVE,
    (Liveness.ALIVE, WorkerEvent.EXCUSED): Liveness.OVERDUE,
    **{(liveness, WorkerEvent.LOST): Liveness.UNREACHABLE for liveness in _NOT_GONE},
    **{(liveness, WorkerEvent.FOUND_TO_BE_AGENT): Liveness.AGENT for liveness in _NOT_GONE},
    **{(liveness, WorkerEvent.REMOVED): Liveness.GONE for liveness in _NOT_GONE},
}
_INTAKE: Mapping[WorkerEvent, Intake] = {
    WorkerEvent.OPENED: Intake.OPEN,
    WorkerEvent.DRAINING: Intake.DRAINING,
    WorkerEvent.CLOSED: Intake.CLOSED,
}
_CIRCUIT: Mapping[tuple[Circuit, WorkerEvent], Circuit] = {
    **{
        (circuit, event): target
        for circuit in (Circuit.CLOSED, Circuit.BACKING_OFF, Circuit.RETRY_AFTER)
        for event, target in (
            (WorkerEvent.TURNED_AWAY, Circuit.BACKING_OFF),
            (WorkerEvent.TURNED_AWAY_UNTIL, Circuit.RETRY_AFTER),
            (WorkerEvent.PAUSE_ENDED, Circuit.CLOSED),
            (WorkerEvent.EJECTED, Circuit.OPEN),
            (WorkerEvent.RESTARTED, Circuit.CLOSED),
        )
    },
    (Circuit.BACKING_OFF, WorkerEvent.ANSWERED): Circuit.CLOSED,
    (Circuit.OPEN, WorkerEvent.EJECTION_ENDED): Circuit.HALF_OPEN,
    (Circuit.OPEN, WorkerEvent.RESTARTED): Circuit.HALF_OPEN,
    (Circuit.HALF_OPEN, WorkerEvent.EJECTED): Circuit.OPEN,
    (Circuit.HALF_OPEN, WorkerEvent.RECOVERED): Circuit.CLOSED,
}


def transition(state: WorkerState, event: WorkerEvent) -> WorkerState:
    """The state after `event`: the only way in which a `WorkerState` changes. An event changes nothing in a state for
    which no transition is listed; an ejected worker, for one, has to be probed before it recovers."""
    return WorkerState(
        _LIVENESS.get((state.liveness, event), state.liveness),
        _INTAKE.get(event, state.intake),
        _CIRCUIT.get((state.circuit, event), state.circuit),
    )
