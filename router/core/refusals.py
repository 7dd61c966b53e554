"""Whose fault a refusal (4xx) is: the client's, who asked for what nobody serves, or the worker's.

The two look alike in one answer. They differ in another worker's answer to the very same request: so a refusal is
doubted, which means asked again elsewhere, while nothing is known about it, and counts against its worker only when the
other one answered. What two workers refuse alike is the client's fault, and is not doubted again for a while.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

DOUBT_AFTER = 3
"""Refusals in a row, by one worker, after which any further one is doubted."""
REMEMBERED = 60.0
"""Seconds for which it is known that two workers refuse a kind of request alike."""
MAX_KINDS = 1024

ABOUT_THE_KIND = frozenset({401, 403, 404, 405, 410, 415})
"""Statuses that speak of the address, the method, the model or the caller: every request of the kind gets them.
Others (400, 413, 422) speak of one request's body."""


class Kind(NamedTuple):
    """What requests have in common that a refusal may be about."""

    method: str
    path: str
    model: str | None


class Refusals:
    """What is known about refusals. O(1) a request; at most `MAX_KINDS` kinds and a number a worker."""

    def __init__(self) -> None:
        self._streaks: dict[str, int] = {}
        self._agreed: OrderedDict[Kind, float] = OrderedDict()

    def doubtful(self, url: str, kind: Kind, status: int, now: float) -> bool:
        """The worker refuses with `status`: whether another one should be asked."""
        streak = self._streaks[url] = self._streaks.get(url, 0) + 1
        if status not in ABOUT_THE_KIND:
            return streak > DOUBT_AFTER
        agreed_at = self._agreed.get(kind)
        return agreed_at is None or now - agreed_at > REMEMBERED

    def answered(self, url: str, kind: Kind) -> None:
        """The worker answered: it does not refuse everything, and requests of this kind are served."""
        self._streaks.pop(url, None)
        self._agreed.pop(kind, None)

    def agreed(self, url: str, kind: Kind, status: int, now: float) -> None:
        """Another worker refused with the same status what this one had refused: it is the client's fault."""
        self._streaks.pop(url, None)
        if status not in ABOUT_THE_KIND:
            return
        self._agreed[kind] = now
        self._agreed.move_to_end(kind)
        while len(self._agreed) > MAX_KINDS:
            self._agreed.popitem(last=False)

    def forget(self, url: str) -> None:
        """The worker is gone."""
        self._streaks.pop(url, None)
