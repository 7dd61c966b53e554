"""The cache feed: how a worker tells routers which blocks it holds and how loaded it is.

Pull (the usual way): `GET /cache/state` answers a `Snapshot`, `GET /cache/events` streams `Batch`es. Push (for
workers outside a cluster): the same values in the bodies of `/internal/heartbeat`, `/internal/sync` and
`/internal/eviction`.

The *epoch* names one incarnation of a worker: microseconds since 1970 at process start, so that a later incarnation has
a greater one. Within an epoch every batch that changes the cache has the next *seq*; a snapshot at seq S contains every
batch up to S. A consumer that sees a gap or another epoch takes a new snapshot.

One event is one *physical* block. An engine may hold two blocks of the same key (vLLM rule 9), so the same key
can be stored k times and removed k times: consumers count.

A block lies in a *tier* (the GPU's memory, or a slower one that the engine loads blocks back from) and belongs to a
*group* of layers. Most models have one; a model whose layers attend in different ways has several
(`WorkerInfo.groups`), and a prefix is reused as far as every group can serve it. One
process may run several data-parallel *ranks*, each with a cache of its own: rank r has its own feed
(`/cache/state?rank=r`, `/cache/events?rank=r`; without `rank` it is rank 0).

`kvcache.feed.codec` encodes and decodes these values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from kvcache.images import ImageRule
from kvcache.keys import BlockKey


class Tier(StrEnum):
    """Where a block lies."""

    GPU = "gpu"
    """In the memory that the engine computes with: reusing the block costs nothing."""
    CPU = "cpu"
    """In the host's memory: reusing it costs the time of loading it."""
    DISK = "disk"
    """On a disk or in an object store."""


@dataclass(frozen=True, slots=True)
class Load:
    """The work of an engine at one moment.

    `prefill_tokens` are prompt tokens still to be computed, waiting requests included; `free_blocks` are
    blocks no running request refers to (cached or not), of `total_blocks` usable ones. `prefilled` and
    `prefilled_tokens` only grow: requests that reached their first token, and prompt tokens computed for these; 0 if
    the worker does not say.
    """

    running: int = 0
    waiting: int = 0
    prefill_tokens: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    prefilled: int = 0
    prefilled_tokens: int = 0


FULL_ATTENTION = "full"
"""The attention of a group whose layers look at everything before a token: it serves a prefix of which it holds every
block."""
SLIDING_WINDOW = "sliding"
"""The attention of a group whose layers look at the last `CacheGroup.window` tokens: it serves a prefix of which it
holds the blocks in the window before the next token."""


MAX_GROUPS = 256
"""Most groups of a cache. Engines have a few; a reader keeps something for each that is named."""


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers whose blocks are stored, evicted and looked up together."""

    attention: str
    """`FULL_ATTENTION`, `SLIDING_WINDOW`, or the engine's name of another kind, which routers do not match."""
    block_size: int
    window: int = 0
    """Tokens of a sliding window; 0 for any other attention."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Who a worker is, and what must agree before a router may match prompts against its cache."""

    worker_id: str
    epoch: int
    model: str
    block_size: int
    fingerprint: str
    """Of the tokenizer: see `kvcache.tokens.tokenizer.Tokenizer.fingerprint`."""
    key_scheme: str
    capacity: int
    """Usable blocks."""
    max_model_len: int = 0
    """Most tokens of one request, prompt and answer together; 0: not known."""
    engine: str = ""
    """URL of the engine, by its agent's settings, where another process takes the requests; empty: this one does."""
    names: tuple[str, ...] = ()
    """Further names under which requests may ask for the model."""
    adapters: tuple[str, ...] = ()
    """LoRA adapters that are loaded; `AdaptersChanged` changes them within an epoch."""
    missing_adapters: Mapping[str, str] = field(default_factory=dict)
    """Adapters that the worker was told to load and that are not loaded, each with the reason; empty: it is about to
    load it."""
    rank: int = 0
    """Data-parallel rank of the engine that this feed is about."""
    ranks: int = 1
    """Ranks of the whole process."""
    groups: tuple[CacheGroup, ...] = ()
    """The groups of the cache, if it is not one of full attention with blocks of `block_size`. A prefix is reused in
    multiples of `block_size`, which is then the least common multiple of the groups'."""
    images: ImageRule | None = None
    """How the engine reads images; None: it takes none, or it is not known."""
    tier_seconds: Mapping[Tier, float] = field(default_factory=dict)
    """Seconds that loading one block (`block_size` tokens) takes, by tier. Blocks of other tiers than these and the
    GPU's are not reused."""
    complete: bool = True
    """Every block that the engine holds is in the feed. False where an agent did not see all of them being stored; once
    the cache is cleared (`Cleared`) that no longer matters."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Blocks that entered the cache: a run of one sequence, each block the child of the one before."""

    parent: BlockKey | None
    """Key of the block before the first; None when the run starts a prompt."""
    keys: tuple[BlockKey, ...]
    tier: Tier = Tier.GPU
    group: int = 0


@dataclass(frozen=True, slots=True)
class Removed:
    """Blocks that were evicted, in the order of their eviction."""

    keys: tuple[BlockKey, ...]
    tier: Tier = Tier.GPU
    group: int = 0


@dataclass(frozen=True, slots=True)
class Cleared:
    """The whole cache was reset: every tier and group."""


@dataclass(frozen=True, slots=True)
class AdaptersChanged:
    """An adapter was loaded or unloaded, or could not be: `names` are all that are loaded now, `missing` those that
    should be and are not, each with the reason."""

    names: tuple[str, ...]
    missing: Mapping[str, str] = field(default_factory=dict)


Event = Stored | Removed | Cleared | AdaptersChanged


@dataclass(frozen=True, slots=True)
class HeldElsewhere:
    """Blocks outside the GPU's tier of group 0, in a snapshot. A key held by k physical blocks is listed k times."""

    tier: Tier
    group: int
    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """What changed at one moment. With events, `seq` is one more than the last batch's; without events (a load report
    only) it is that of the last batch."""

    epoch: int
    seq: int
    events: tuple[Event, ...]
    load: Load


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole cache at `seq`. A key held by k physical blocks is listed k times."""

    info: WorkerInfo
    seq: int
    load: Load
    blocks: tuple[tuple[BlockKey, BlockKey | None], ...]
    """(key, parent key) of every cached block of group 0 in the GPU's tier, a parent before its children."""
    elsewhere: tuple[HeldElsewhere, ...] = ()
    """The blocks of the other tiers and groups; each pair of tier and group appears once at most."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Pushed at an interval: it registers the worker at `url`. `seq` is that of the worker's last batch."""

    info: WorkerInfo
    url: str
    seq: int
    load: Load


@dataclass(frozen=True, slots=True)
class Eviction:
    """Pushed removals between two syncs."""

    worker_id: str
    epoch: int
    seq: int
    keys: tuple[BlockKey, ...]
