"""The sequences of an engine that do not run, and which of them may be admitted next.

New and preempted ones wait in a queue, first come first served. Those that wait for a load from the CPU tier are aside:
they keep nobody from being admitted, and when their load has ended they go before the queue. With `max_loras`, a
sequence is passed over while as many other adapters run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, ValuesView

from worker.emulator.engine.sequence import Sequence, SequenceState

_LOADING = SequenceState.LOADING
"""Read once: an attribute of an enum is slow enough to show in a step of one sequence (3 % each)."""


class WaitingSequences:
    """By request id. Not thread-safe; called by the scheduler alone."""

    def __init__(self, max_loras: int) -> None:
        """`max_loras`: adapters that may run at the same time; 0: any number."""
        self._max_loras = max_loras
        self._queue: OrderedDict[str, Sequence] = OrderedDict()
        """In the order of admission."""
        self._blocked: OrderedDict[str, Sequence] = OrderedDict()
        self._deferred: set[str] = set()

    def __len__(self) -> int:
        return len(self._queue) + len(self._blocked)

    @property
    def queued(self) -> ValuesView[Sequence]:
        """Those of the queue, in the order of admission: a live view."""
        return self._queue.values()

    @property
    def blocked(self) -> ValuesView[Sequence]:
        """Those that wait for a load, their own or that of another request, or whose load has ended: a live view."""
        return self._blocked.values()

    @property
    def deferred(self) -> int:
        """How many were passed over because `max_loras` other adapters ran."""
        return len(self._deferred)

    def enqueue(self, sequence: Sequence) -> None:
        """Append to the queue."""
        self._queue[sequence.request.request_id] = sequence

    def enqueue_first(self, sequence: Sequence) -> None:
        """A sequence was preempted: it is the next."""
        self.enqueue(sequence)
        self._queue.move_to_end(sequence.request.request_id, last=False)

    def block(self, sequence: Sequence) -> None:
        """The sequence waits for a load."""
        request_id = sequence.request.request_id
        self._blocked[request_id] = sequence
        self._queue.pop(request_id, None)

    def remove(self, sequence: Sequence) -> bool:
        """The sequence was admitted or aborted. False if it does not wait."""
        request_id = sequence.request.request_id
        self._deferred.discard(request_id)
        return self._queue.pop(request_id, None) is not None or self._blocked.pop(request_id, None) is not None

    def candidates(self, running: Collection[Sequence]) -> Iterator[Sequence]:
        """The sequences that may be admitted beside those that run, in turn. The caller admits or blocks each, which
        changes `running` at once, or asks for no further one."""
        return self._candidates_with_adapters(running) if self._max_loras else self._candidates()

    def _candidates(self) -> Iterator[Sequence]:
        for sequence in tuple(self._blocked.values()):
            if sequence.state is not _LOADING:
                yield sequence
        while self._queue:
            yield next(iter(self._queue.values()))

    def _candidates_with_adapters(self, running: Collection[Sequence]) -> Iterator[Sequence]:
        """Those that are passed over do not block the queue (vLLM: `max_loras`)."""
        adapters: set[str] = set()
        counted = -1
        for sequence in (*self._blocked.values(), *self._queue.values()):
            if sequence.state is _LOADING:
                continue
            if counted != len(running):
                adapters, counted = _adapters(running), len(running)
            adapter = sequence.request.scope.adapter
            if not adapter or adapter in adapters or len(adapters) < self._max_loras:
                yield sequence
            else:
                self._deferred.add(sequence.request.request_id)


def _adapters(sequences: Iterable[Sequence]) -> set[str]:
    """The adapters that these sequences use."""
    return {adapter for sequence in sequences if (adapter := sequence.request.scope.adapter)}
