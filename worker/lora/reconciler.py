"""What has to be done so that an engine has the adapters that are wanted. It does no I/O and knows no clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from runtime.backoff import Backoff

RETRY = Backoff(2.0, 60.0)
"""Between two attempts to load an adapter that the engine refuses."""


class AdapterState(StrEnum):
    """How far a wanted adapter has got."""

    PENDING = "pending"
    """It is not loaded, and the next look at the engine will have it loaded."""
    LOADED = "loaded"
    FAILED = "failed"
    """The engine refused it; another attempt follows."""


class AdapterEvent(StrEnum):
    """What changes that."""

    SEEN = "seen"
    """The engine lists it, from the wanted source."""
    UNSEEN = "unseen"
    """The engine does not list it, or lists it from another source: it restarted, or someone unloaded it."""
    REFUSED = "refused"
    """The engine did not load it."""
    DUE = "due"
    """It is time for another attempt."""


ADAPTER_TRANSITIONS: Mapping[tuple[AdapterState, AdapterEvent], AdapterState] = {
    (AdapterState.PENDING, AdapterEvent.SEEN): AdapterState.LOADED,
    (AdapterState.PENDING, AdapterEvent.REFUSED): AdapterState.FAILED,
    (AdapterState.LOADED, AdapterEvent.UNSEEN): AdapterState.PENDING,
    (AdapterState.FAILED, AdapterEvent.SEEN): AdapterState.LOADED,
    (AdapterState.FAILED, AdapterEvent.DUE): AdapterState.PENDING,
}
"""What is not listed changes nothing."""


@dataclass(frozen=True, slots=True)
class Load:
    """Load an adapter; `replace`: the engine has one of this name from another source."""

    name: str
    source: str
    replace: bool = False


@dataclass(frozen=True, slots=True)
class Unload:
    name: str


Action = Load | Unload


@dataclass(slots=True)
class _Wanted:
    source: str
    state: AdapterState = AdapterState.PENDING
    why: str = ""
    """The engine's words, while FAILED."""
    failures: int = 0
    due: float = 0.0
    """When to try again, while FAILED."""

    def advance(self, event: AdapterEvent) -> None:
        """The one place where the state changes."""
        self.state = ADAPTER_TRANSITIONS.get((self.state, event), self.state)


@dataclass(slots=True)
class AdapterReconciler:
    """The wanted list has the last word: what an engine has beyond it is unloaded.

    Call `want` when the list may have changed, `observe` with what the engine lists, then carry out `actions` and
    report each with `refused` if it failed. Times are seconds of any origin.
    """

    backoff: Backoff = RETRY
    _wanted: dict[str, _Wanted] = field(default_factory=dict, init=False)
    _loaded: Mapping[str, str] = field(default_factory=dict, init=False)
    _now: float = field(default=0.0, init=False)
    _kept_until: dict[str, float] = field(default_factory=dict, init=False)
    """When to try again to unload an adapter that the engine did not unload."""

    def want(self, sources: Mapping[str, str]) -> None:
        """The whole list: source by name. An adapter whose source has changed starts anew."""
        self._wanted = {
            name: known if (known := self._wanted.get(name)) and known.source == source else _Wanted(source)
            for name, source in sources.items()
        }

    def observe(self, loaded: Mapping[str, str], now: float) -> None:
        """What the engine lists: source by name."""
        self._loaded, self._now = loaded, now
        self._kept_until = {name: due for name, due in self._kept_until.items() if name in loaded}
        for name, wanted in self._wanted.items():
            if loaded.get(name) == wanted.source:
                wanted.advance(AdapterEvent.SEEN)
                wanted.failures = 0
                continue
            if wanted.state is AdapterState.LOADED:
                wanted.why = ""
            wanted.advance(AdapterEvent.UNSEEN)
            if now >= wanted.due:
                wanted.advance(AdapterEvent.DUE)

    def actions(self) -> Iterator[Action]:
        """What is due now: what is no longer wanted first, for it may take the place of another."""
        for name in self._loaded:
            if name not in self._wanted and self._now >= self._kept_until.get(name, 0.0):
                yield Unload(name)
        for name, wanted in self._wanted.items():
            if wanted.state is AdapterState.PENDING:
                yield Load(name, wanted.source, replace=name in self._loaded)

    def refused(self, action: Action, why: str, now: float) -> None:
        """The engine did not carry it out."""
        wanted = self._wanted.get(action.name)
        if wanted is None:
            self._kept_until[action.name] = now + self.backoff.longest
            return
        wanted.failures += 1
        wanted.why = why
        wanted.due = now + self.backoff.delay(wanted.failures)
        wanted.advance(AdapterEvent.REFUSED)

    def missing(self) -> dict[str, str]:
        """The wanted adapters that are not loaded, each with the reason; empty: it is about to be loaded."""
        return {name: wanted.why for name, wanted in self._wanted.items() if wanted.state is not AdapterState.LOADED}
