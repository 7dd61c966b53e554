"""Which worker stores a response of the Responses API: its id says so. Pure.

vLLM keeps stored responses in the memory of the process that made them, and no other process can look them up, continue
them or cancel them. A response has the id that its request states (`request_id` in vLLM's
entrypoints/openai/responses/protocol.py), so the router states one that ends with a tag of the worker. The tag is a
digest of the worker's URL: every router computes the same, also after a restart, and nothing is kept about a response.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from hashlib import blake2b

from router.core.decision import NoWorkerReady, StoredResponse
from router.core.worker import Worker
from router.core.worker_state import WorkerPhase

_TAGGED = re.compile(r"resp_[0-9a-f]{32}_([0-9a-f]{12})")
_ASKED = frozenset({WorkerPhase.SERVING, WorkerPhase.HALF_OPEN, WorkerPhase.DRAINING})
"""The phases in which a worker is asked for what only it has."""


@lru_cache(maxsize=4096)
def holder_tag(url: str) -> str:
    """The tag of the worker at this URL. The ranks of a process (`#rank=1`) store in one place and share a tag."""
    return blake2b(url.partition("#")[0].encode(), digest_size=6).hexdigest()


def response_id(unique: str, url: str) -> str:
    """An id for a response that the worker at this URL makes; `unique` are 32 hexadecimal digits."""
    return f"resp_{unique}_{holder_tag(url)}"


def stored_response(name: str) -> StoredResponse:
    """What the id of a response says about where it is stored."""
    tagged = _TAGGED.fullmatch(name)
    return StoredResponse(name, tagged[1] if tagged is not None else None)


class HolderGone(NoWorkerReady):
    """No worker that is known here stores the response."""


def holders(
    workers: Iterable[Worker], stored: StoredResponse, exclude: Collection[str], retry_after: float
) -> list[Worker]:
    """The worker that stores the response, or all ranks of it, in the order given.

    If the id has no tag (a client stated its own, or the response was made without this router), it can only be known
    to be somewhere when there is one worker. Raises `HolderGone`, or `NoWorkerReady` while the worker cannot be asked.
    """
    known = list(workers)
    if stored.tag is not None:
        held = [worker for worker in known if holder_tag(worker.url) == stored.tag]
    else:
        held = known if len({holder_tag(worker.url) for worker in known}) == 1 else []
    if not held and (known or stored.tag is not None):
        raise HolderGone(f"no worker is known that stores {stored.name!r:.200}", retry_after)
    asked = [worker for worker in held if worker.phase in _ASKED and worker.url not in exclude]
    if not asked:
        why = held[0].why_not_ready() if held else "no worker is known"
        raise NoWorkerReady(why or "it failed a moment ago", retry_after)
    return asked
