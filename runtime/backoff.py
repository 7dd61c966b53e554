"""How long to wait before what failed is tried again: the one back-off of all processes.

Pure: callers count the failures, draw the random number and sleep, because what ends their sleep differs (a watch that
is cut, an earlier entry in a queue, an event). tenacity and stamina were rejected for that reason: they wrap a call,
sleep in its stead and draw from the global random generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_DOUBLINGS = 62
"""As many as a float takes without overflowing, whatever `first` is."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Seconds: `first` after the first failure, twice as long after each further one, `longest` at most."""

    first: float
    longest: float

    def delay(self, failures: int, chance: float = 1.0) -> float:
        """Seconds to wait after so many failures in a row (at least 1).

        `chance` spreads those that failed together: a random number from 0 to 1 gives between half of the time and all
        of it; without one it is all of it.
        """
        return min(self.first * 2.0 ** min(failures - 1, _DOUBLINGS), self.longest) * (0.5 + 0.5 * chance)

    def __iter__(self) -> Iterator[float]:
        """The delays after the first, the second, ... failure in a row, without an end."""
        failures = 0
        while True:
            failures += 1
            yield self.delay(failures)
