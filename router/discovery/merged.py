"""Workers of several sources as one list: those behind the Services of several clusters."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

from router.discovery.discovered import DiscoveredWorker, DiscoveredWorkers
from router.discovery.sources import Discovery, DiscoveryStatus


class MergedDiscovery:
    """The union of what `sources`, at least one, know. An address that two of them name is the first one's.

    It is known once the first source is: a further one whose Service does not exist yet names no workers, and the
    router serves meanwhile.
    """

    def __init__(self, sources: Sequence[Discovery]) -> None:
        self._sources = sources
        self._found: dict[int, DiscoveredWorkers] = {}
        """The last list of each source, by its number."""
        self._changed = asyncio.Event()

    def status(self) -> DiscoveryStatus:
        statuses = [source.status() for source in self._sources]
        ages = [status.age for status in statuses]
        return DiscoveryStatus(
            statuses[0].source,
            known=statuses[0].known,
            healthy=all(status.healthy for status in statuses),
            age=None if None in ages else max(age for age in ages if age is not None),
            error="; ".join(dict.fromkeys(status.error for status in statuses if status.error)),
            failures=_sum(status.failures for status in statuses),
            relists=_sum(status.relists for status in statuses),
        )

    async def watch(self) -> AsyncIterator[DiscoveredWorkers]:
        """The union, again whenever it changes. Ends only with its task."""
        tasks = [asyncio.create_task(self._follow(number, source)) for number, source in enumerate(self._sources)]
        for task in tasks:
            task.add_done_callback(lambda _: self._changed.set())
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                for task in tasks:
                    if task.done():
                        task.result()  # it ends with an exception, if at all
                if 0 in self._found:
                    yield self._union()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _union(self) -> DiscoveredWorkers:
        union: dict[str, DiscoveredWorker] = {}
        for number in sorted(self._found, reverse=True):
            union |= self._found[number]
        return union

    async def _follow(self, number: int, source: Discovery) -> None:
        async for workers in source.watch():
            self._found[number] = workers
            self._changed.set()


def _sum(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return total
