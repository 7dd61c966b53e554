"""What a fleet serves, by its workers' own words: models, the further names of these, and LoRA adapters.

A `Catalogue` is a value: reading it is safe in any thread, and a change makes a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from kvcache.feed import WorkerInfo
from kvcache.images import ImageRule
from router.core.decision import NoWorkerReady, RouteRequest
from router.core.standing import Changes
from router.core.strategies import candidates, of_rank
from router.core.table import Rows
from router.core.worker import Worker
from router.core.worker_state import WorkerPhase

OWN_TOKENIZER = ""
"""`Served.tokenizer` of the model that the router itself was configured for."""


@dataclass(frozen=True, slots=True)
class Served:
    """One name under which requests may ask."""

    name: str
    model: str
    """The model that answers, by its first name: for an adapter its base."""
    adapter: bool
    tokenizer: str | None
    """Which of the router's tokenizers reads its prompts, by the model's name in `FleetConfig.fingerprints`; None: it
    has none for it."""
    max_model_len: int | None
    """Most tokens of one request, by the worker that takes most; None while one of the workers has not said."""
    images: ImageRule | None = None
    """How its workers read images; None: not all of them say the same."""


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All names, those of each model before its adapters, in the order in which the workers joined."""

    served: Mapping[str, Served] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    """Adapters that are loaded nowhere and that a worker should have loaded, each with a reason."""
    complete: bool = False
    """Every worker has said what it serves, so that nothing else is served."""
    default: str | None = None
    """What a request without a model means; None: any worker's own."""

    @property
    def models(self) -> list[str]:
        """The names of models, without adapters."""
        return [served.name for served in self.served.values() if not served.adapter]

    @property
    def max_model_len(self) -> int | None:
        """The most tokens that any worker takes in one request; None while one of them has not said."""
        longest = 0
        for served in self.served.values():
            if served.max_model_len is None:
                return None
            longest = max(longest, served.max_model_len)
        return longest if self.complete else None

    @property
    def several(self) -> bool:
        """Whether more than one model is served, so that a request has to name one unless there is a default."""
        return len({served.model for served in self.served.values()}) > 1

    def find(self, name: str | None) -> Served | None:
        """What a request for this model gets. As in vLLM an empty name is none."""
        asked = name or self.default
        return self.served.get(asked) if asked is not None else None

    def adapter(self, name: str | None) -> str:
        """The adapter that a request for `name` is served by; empty: none. Its blocks are apart from those of others
        (`kvcache.keys.CacheScope`). An adapter that is not loaded yet counts: its request waits for it."""
        if not name:
            return ""
        served = self.served.get(name)
        if served is None:
            return name if name in self.missing else ""
        return name if served.adapter else ""


def names_of(info: WorkerInfo) -> tuple[str, ...]:
    """The names of a worker's model, the first one first."""
    return (info.model, *info.names)


def serves(info: WorkerInfo | None, name: str) -> bool:
    """Whether a worker serves this name. One that has not said what it serves may serve anything."""
    return info is None or name == info.model or name in info.names or name in info.adapters


def catalogue(stated: Iterable[tuple[WorkerInfo | None, str | None]], own: str) -> Catalogue:
    """The catalogue of workers that state this, each with the tokenizer that reads its prompts. `own`: the model that
    the router was configured for, if any."""
    bases: dict[str, Served] = {}
    adapters: dict[str, Served] = {}
    missing: dict[str, str] = {}
    complete = True
    for info, tokenizer in stated:
        if info is None:
            complete = False
            continue
        for name in names_of(info):
            _add(bases, Served(name, info.model, False, tokenizer, info.max_model_len or None, info.images))
        for name in info.adapters:
            _add(adapters, Served(name, info.model, True, tokenizer, info.max_model_len or None, info.images))
        missing |= {name: why for name, why in info.missing_adapters.items() if not missing.get(name)}
    found = adapters | bases  # a name that one worker gives to its model and another to an adapter is the model's
    ordered = {name: found[name] for name in ([own] if own in bases else []) + [*bases, *adapters]}
    models = {each.model for each in bases.values()}
    return Catalogue(
        ordered,
        {name: why for name, why in missing.items() if name not in ordered},
        complete and bool(ordered),
        own if own in bases else models.pop() if len(models) == 1 else None,
    )


def _add(found: dict[str, Served], stated: Served) -> None:
    known = found.setdefault(stated.name, stated)
    if known.max_model_len is None or stated.max_model_len is None:
        longest = None
    else:
        longest = max(known.max_model_len, stated.max_model_len)
    images = known.images if known.images == stated.images else None
    if longest != known.max_model_len or images != known.images:
        found[stated.name] = replace(known, max_model_len=longest, images=images)


class Candidates:
    """The workers that a request may go to, in the order in which they joined."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = workers

    @cached_property
    def slots(self) -> int:
        """The bitmask of their slots."""
        slots = 0
        for worker in self.workers:
            slots |= worker.bit
        return slots

    @cached_property
    def members(self) -> frozenset[Worker]:
        return frozenset(self.workers)

    @cached_property
    def rows(self) -> Rows:
        """Where `Table` has them. It is that of the moment when it is first asked for."""
        return np.array([worker.work.row for worker in self.workers], np.intp)


class Directory:
    """Which of a fleet's workers serve which name. Derived from what they state, and anew after `changed`."""

    def __init__(
        self,
        workers: Mapping[str, Worker],
        own: str,
        tokenizer: Callable[[WorkerInfo], str | None],
        changes: Changes,
    ) -> None:
        self._workers = workers
        self._changes = changes
        self._noted = (-1, -1)
        self._candidates: dict[str | None, Candidates] = {}
        """By the name that is asked for, as long as nothing changes."""
        self._own = own
        self._tokenizer = tokenizer
        self._catalogue: Catalogue | None = None
        self._serving: dict[str, list[Worker]] = {}

    def changed(self) -> None:
        """A worker joined, left, or states something else than before."""
        self._catalogue = None
        self._serving.clear()
        self._candidates.clear()

    @property
    def catalogue(self) -> Catalogue:
        """What the workers serve now."""
        if self._catalogue is None:
            infos = [worker.view.info for worker in self._workers.values() if worker.phase is not WorkerPhase.AGENT]
            self._catalogue = catalogue(
                ((info, None if info is None else self._tokenizer(info)) for info in infos), self._own
            )
        return self._catalogue

    def candidates(self, request: RouteRequest, exclude: Collection[str], retry_after: float) -> Candidates:
        """The workers that the request may go to (`router.core.strategies.candidates`). A name that no worker states
        can be asked of any: it says itself that it does not serve it. Raises `NoWorkerReady`.

        O(1) for a name that is served, as long as no worker's state changes and none is probed after an ejection.
        """
        noted = self._changes.members, self._changes.phases
        if self._noted != noted:
            self._noted = noted
            self._candidates.clear()
        if exclude or request.rank is not None or (name := request.model) not in self._candidates:
            return self._find_candidates(request, exclude, retry_after)
        return self._candidates[name]

    def _find_candidates(self, request: RouteRequest, exclude: Collection[str], retry_after: float) -> Candidates:
        found = candidates(of_rank(self.serving(request.model), request.rank), exclude)
        if not found and self.unknown(request.model):
            found = candidates(of_rank(self._workers.values(), request.rank), exclude)
        if not found:
            known, ready = len(self._workers), len(candidates(self._workers.values()))
            why = self.why_none(request.model)
            raise NoWorkerReady(f"{why}: {known} known, {ready} ready, {len(exclude)} excluded", retry_after)
        chosen, name = Candidates(found), request.model
        lasting = not exclude and request.rank is None and (not name or name in self.catalogue.served)
        if lasting and not any(worker.phase is WorkerPhase.HALF_OPEN for worker in self.serving(name)):
            self._candidates[name] = chosen
        return chosen

    def ranks(self, url: str) -> list[str]:
        """URLs of the workers whose process is that of the worker at `url`, which is one of them if it is known."""
        worker = self._workers.get(url)
        return [other.url for other in self._workers.values() if worker is not None and other.address == worker.address]

    def load_spread(self) -> tuple[int, float]:
        """Requests, of all routers, on the ready worker that has most, and their mean over the ready workers."""
        requests = [worker.work.in_flight() for worker in candidates(self._workers.values())]
        return (max(requests), sum(requests) / len(requests)) if requests else (0, 0.0)

    @property
    def stated(self) -> bool:
        """Whether every worker that takes requests has said what it serves; False while there is none."""
        ready = candidates(self._workers.values())
        return bool(ready) and all(worker.view.info is not None for worker in ready)

    def unknown(self, name: str | None) -> bool:
        """Whether no worker states to serve this name, or that it will."""
        known = self.catalogue
        asked = name or known.default
        return asked is not None and asked not in known.served and asked not in known.missing

    def why_none(self, name: str | None) -> str:
        """Why no worker can take a request for this name, in words."""
        known = self.catalogue
        if name and name not in known.served and (why := known.missing.get(name)) is not None:
            return f"no worker has loaded the adapter {name!r:.200} yet" + (f" ({why})" if why else "")
        return (
            "no worker is ready" if not name or not known.several else f"no worker that serves {name!r:.200} is ready"
        )

    def serving(self, name: str | None) -> Collection[Worker]:
        """The workers that serve this name, or may, in the order in which they joined. O(1) for a name that is served,
        as long as nothing changes."""
        known = self.catalogue
        asked = name or known.default
        if asked is None:
            return self._workers.values()
        found = self._serving.get(asked)
        if found is None:
            found = [worker for worker in self._workers.values() if serves(worker.view.info, asked)]
            if asked in known.served:
                self._serving[asked] = found
        return found
