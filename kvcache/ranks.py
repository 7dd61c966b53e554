"""Data-parallel ranks: engines of one process that share its port, each with a cache, a queue and a feed of its own.

A process with several ranks is several workers to a router. Each is addressed by the process's URL, with the fragment
`#rank=r` for every rank but the first. A fragment is never sent (RFC 9110 4.2.5): a request names its rank in the
header `RANK_HEADER`, which vLLM reads for chat and completion requests (vllm/entrypoints/generate/base/serving.py,
`_get_data_parallel_rank`).
"""

from __future__ import annotations

RANK_HEADER = "x-data-parallel-rank"
"""Picks the rank that takes a request. Without it the process picks one itself."""
MAX_RANKS = 1024
"""Most ranks that a process may state: a router makes a worker of each."""
_FRAGMENT = "#rank="


def rank_url(address: str, rank: int) -> str:
    """The URL of one rank of the process at `address`."""
    return f"{address}{_FRAGMENT}{rank}" if rank else address


def split_rank(url: str) -> tuple[str, int]:
    """Inverse of `rank_url`. Raises `ValueError` if the URL has another fragment."""
    address, _, fragment = url.partition("#")
    if not fragment:
        return address, 0
    digits = fragment.removeprefix("rank=")
    if digits == fragment or not (digits.isascii() and digits.isdecimal()) or int(digits[:9]) >= MAX_RANKS:
        raise ValueError(f"{url!r:.200} has a fragment, but not that of a rank, such as #rank=1")
    return address, int(digits)


def rank_id(worker_id: str, rank: int, ranks: int) -> str:
    """The worker id of a rank: `pod/1`; of a process with a single engine it is the process's."""
    return f"{worker_id}/{rank}" if ranks > 1 else worker_id


def asked_rank(value: str) -> int | None:
    """The rank that a request's header names. None if it is no whole number: vLLM ignores such a header."""
    try:
        return int(value)
    except ValueError:
        return None
