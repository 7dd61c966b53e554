"""The states a worker goes through, and the one function that moves it from one to another.

Three things are known of a worker independently of one another: whether it can be reached (`Contact`), whether it takes
new requests (`Intake`), and whether it answers them well (`Circuit`, a circuit breaker). `State` is what they come to.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, IntEnum, StrEnum, auto
from types import MappingProxyType
from typing import NamedTuple


class Contact(Enum):
    """Whether the worker has been heard from."""

    NONE = auto()
    """Never."""
    ALIVE = auto()
    LOST = auto()
    """It was, and has fallen silent or refuses connections since."""
    AGENT = auto()
    """It has been, but it is a cache agent, listed as if it were the engine beside it."""


class Intake(IntEnum):
    """What the worker does with new requests; the larger is the graver."""

    OPEN = 0
    """It takes them."""
    DRAINING = 1
    """It leaves and still takes them: for when there is no other worker."""
    CLOSED = 2
    """It takes none, and finishes what it has."""


class Circuit(Enum):
    """The circuit breaker's three states, and a pause that the worker itself asks for."""

    CLOSED = auto()
    """Requests go there."""
    PAUSED = auto()
    """It turned a request away (429, 503): none do for a moment, as long as there are others."""
    OPEN = auto()
    """It is ejected: none do."""
    HALF_OPEN = auto()
    """One at a time does, to find out."""


class State(StrEnum):
    """What a worker is good for now. `GET /workers` and label `state` of `kvcluster_router_worker_states`."""

    STARTING = "starting"
    """Not heard from yet."""
    SERVING = "serving"
    PAUSED = "paused"
    """It turned a request away and asked for (or is given) a pause: chosen only when all others are paused too."""
    HALF_OPEN = "half_open"
    """After an ejection: one request at a time shows whether it is well again."""
    EJECTED = "ejected"
    """It failed where others did not: left out for a while."""
    DRAINING = "draining"
    """It leaves but still accepts: chosen only when no other worker is left."""
    CLOSED = "closed"
    """It takes nothing new: terminating, or not ready."""
    UNREACHABLE = "unreachable"
    """Silent, or refusing connections."""
    AGENT = "agent"
    """No worker at all: a cache agent, which takes no requests."""


class Event(Enum):
    """What happens to a worker."""

    HEARD = auto()
    """A sign of life."""
    LOST = auto()
    UNMASKED = auto()
    """Its feed says that it is an agent."""
    OPENED = auto()
    """It takes new requests."""
    DRAINS = auto()
    CLOSES = auto()
    PAUSED = auto()
    RESUMED = auto()
    """The pause is over."""
    EJECTED = auto()
    PROBED = auto()
    """The ejection is over: it may show itself well."""
    RECOVERED = auto()
    """The probes went well."""


class Life(NamedTuple):
    """Where a worker stands."""

    contact: Contact = Contact.NONE
    intake: Intake = Intake.OPEN
    circuit: Circuit = Circuit.CLOSED

    @property
    def state(self) -> State:
        """What the three facts come to; the gravest decides."""
        if self.contact is not Contact.ALIVE:
            return _BY_CONTACT[self.contact]
        if self.intake is not Intake.OPEN:
            return State.DRAINING if self.intake is Intake.DRAINING else State.CLOSED
        return _BY_CIRCUIT[self.circuit]


_BY_CONTACT: Mapping[Contact, State] = MappingProxyType(
    {Contact.NONE: State.STARTING, Contact.LOST: State.UNREACHABLE, Contact.AGENT: State.AGENT}
)
_BY_CIRCUIT: Mapping[Circuit, State] = MappingProxyType(
    {
        Circuit.CLOSED: State.SERVING,
        Circuit.PAUSED: State.PAUSED,
        Circuit.OPEN: State.EJECTED,
        Circuit.HALF_OPEN: State.HALF_OPEN,
    }
)

_CONTACT: Mapping[tuple[Contact, Event], Contact] = MappingProxyType(
    {
        (Contact.NONE, Event.HEARD): Contact.ALIVE,
        (Contact.LOST, Event.HEARD): Contact.ALIVE,
        **{(contact, Event.LOST): Contact.LOST for contact in Contact},
        **{(contact, Event.UNMASKED): Contact.AGENT for contact in Contact},
    }
)
_INTAKE: Mapping[Event, Intake] = MappingProxyType(
    {Event.OPENED: Intake.OPEN, Event.DRAINS: Intake.DRAINING, Event.CLOSES: Intake.CLOSED}
)
_CIRCUIT: Mapping[tuple[Circuit, Event], Circuit] = MappingProxyType(
    {
        (Circuit.CLOSED, Event.PAUSED): Circuit.PAUSED,
        (Circuit.PAUSED, Event.RESUMED): Circuit.CLOSED,
        (Circuit.CLOSED, Event.EJECTED): Circuit.OPEN,
        (Circuit.PAUSED, Event.EJECTED): Circuit.OPEN,
        (Circuit.HALF_OPEN, Event.EJECTED): Circuit.OPEN,
        (Circuit.OPEN, Event.PROBED): Circuit.HALF_OPEN,
        (Circuit.HALF_OPEN, Event.RECOVERED): Circuit.CLOSED,
    }
)


def transition(life: Life, event: Event) -> Life:
    """Where `event` takes a worker: the only way a `Life` changes. What is not listed changes nothing; an ejected
    worker, for one, is not well before it has been probed."""
    return Life(
        _CONTACT.get((life.contact, event), life.contact),
        _INTAKE.get(event, life.intake),
        _CIRCUIT.get((life.circuit, event), life.circuit),
    )
