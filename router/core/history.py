"""What a worker without a cache feed should hold, by what this router has sent there.

Such a worker says nothing of its cache. An engine keeps the blocks of the requests that it has answered and evicts the
least recently used ones first, a prompt's last block before its first (vLLM's `BlockPool`). The history does the same
with the blocks of prompts. It does not know those of answers, nor requests of others, so the worker may hold less.
"""

from __future__ import annotations

from collections import OrderedDict

from kvcache.keys import BlockKey
from router.core.index import Assumption, PrefixIndex


class History:
    """The history of one worker; the index has its blocks. Takes assumptions as `router.core.ticket.Assumptions` does.

    O(blocks of the prompt) for each request. Invariant: no block was used later than those before it in its prompt, so
    that what is left after an eviction is prefix-closed, as the index needs it.
    """

    __slots__ = ("_capacity", "_index", "_slot", "_used")

    def __init__(self, index: PrefixIndex, slot: int, capacity: int) -> None:
        """`capacity`: blocks of the router that the worker is taken to hold at most."""
        self._index = index
        self._slot = slot
        self._capacity = capacity
        self._used: OrderedDict[BlockKey, None] = OrderedDict()
        """The least recently used block first."""

    def __len__(self) -> int:
        return len(self._used)

    def confirm_by(self, assumption: Assumption, now: float) -> None:
        """The worker has the blocks of a request from now on."""
        keys = self._index.end(assumption)
        new = [key for key in keys if key not in self._used]
        for key in reversed(keys):
            self._used[key] = None
            self._used.move_to_end(key)
        self._index.store(self._slot, new)
        evicted = [self._used.popitem(last=False)[0] for _ in range(len(self._used) - self._capacity)]
        self._index.remove(self._slot, evicted)

    def give_up(self, assumption: Assumption) -> None:
        """The request never reached the worker."""
        self._index.withdraw(assumption)

    def clear(self) -> None:
        """The worker's process is gone, or tells itself what it holds."""
        self._used.clear()
        self._index.clear(self._slot)
