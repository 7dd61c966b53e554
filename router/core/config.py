"""What a fleet has to know before its first worker joins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvcache.feed import FULL_ATTENTION, SLIDING_WINDOW, WorkerInfo
from kvcache.keys import KEY_SCHEME
from kvcache.profiles import LatencyModel
from router.core.errors import Mismatch, RejectReason
from router.core.outliers import OutlierPolicy


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """Seconds and tokens throughout."""

    block_size: int
    """Tokens of a block, in which depths are counted. Those of the workers may be multiples of it."""
    fingerprint: str
    """Of the router's tokenizer; the blocks of a worker with another one are not matched. Empty: it is not loaded
    (yet), and no worker's blocks are matched."""
    latency: LatencyModel
    """That of the profile, at the speed at which the workers run."""
    key_scheme: str = KEY_SCHEME
    model: str = ""
    """The model that the router's own tokenizer reads; empty: every model that `fingerprints` does not name."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Of the router's tokenizers for other models, by model; empty: not loaded (yet)."""
    strategy: str = "cache_aware"
    liveness_timeout: float = 2.0
    """A worker that is silent for this long becomes unreachable. Call `Fleet.expire` at least twice as often."""
    view_timeout: float = 10.0
    """A copy of a worker's cache that nothing has confirmed for this long is not used: the worker gets requests by load
    until its feed is back. A pushed view is confirmed at least every 5 s, a streamed one each second."""
    speculation_grace: float = 1.0
    """For how long after the first byte of a request its blocks are assumed to be on its worker; by then the feed has
    confirmed them."""
    history_blocks: int = 4096
    """Blocks (of the router) that a worker without a cache feed is taken to hold: `router.core.history`."""
    recompute_charge: float = 4.0
    """Seconds added to the cost for each second of computing blocks that another worker holds. Later requests have to
    wait for this computation."""
    popular_charge: float = 1.0
    """The same where the prefix is popular: a copy of it will be used, but displaces other blocks."""
    retry_after: float = 1.0
    """The Retry-After that a client is told when no worker is ready."""
    outliers: OutlierPolicy = field(default_factory=OutlierPolicy)
    """When workers that fail are ejected."""
    longest_pause: float = 30.0
    """The longest pause of a worker that turns requests away (429, 503), also if it asks for more."""
    forget_after: float = 60.0
    """A worker that is known by its heartbeats alone is forgotten after being silent for this long."""
    assigned_half_life: float = 60.0
    """In the tie-break by work assigned lately, work that is this old counts half."""
    reuse_half_life: float = 600.0
    """In the reuse score of a worker, blocks that were reused this long ago count half."""
    session_ttl: float = 600.0
    """A session breaks ties for this long after its last request; 0: never."""
    session_limit: int = 65_536
    """Most sessions that are remembered."""
    expected_output_tokens: int = 128
    """Assumed length of an answer until lengths have been observed."""

    def tokenizer_of(self, info: WorkerInfo) -> str | None:
        """Which tokenizer reads the prompts of a worker's model: a key of `fingerprints`, or empty for the router's
        own; None: it has none for this model."""
        names = (info.model, *info.names)
        for name in names:
            if name in self.fingerprints:
                return name
        return "" if self.model in ("", *names) else None

    def mismatch(self, info: WorkerInfo) -> Mismatch | None:
        """Why this worker's blocks cannot be matched here; None when they can."""
        tokenizer = self.tokenizer_of(info)
        if tokenizer is None:
            return Mismatch(
                RejectReason.MODEL,
                f"worker {info.worker_id!r} serves model {info.model!r}, and this router's tokenizer is that of "
                f"{self.model!r}: give it the other one with --model-tokenizers {info.model}=TOKENIZER",
            )
        fingerprint = self.fingerprints[tokenizer] if tokenizer else self.fingerprint
        if not fingerprint:
            return Mismatch(RejectReason.NO_TOKENIZER, "the router's tokenizer is not loaded: see /status for why")
        for size in (info.block_size, *(group.block_size for group in info.groups)):
            if size % self.block_size or not size:
                return Mismatch(
                    RejectReason.BLOCK_SIZE,
                    f"worker {info.worker_id!r} has block size {size}, which is no multiple of this router's "
                    f"{self.block_size}: start the router with a --block-size that divides it",
                )
        for group in info.groups:
            if group.attention not in (FULL_ATTENTION, SLIDING_WINDOW):
                return Mismatch(
                    RejectReason.ATTENTION,
                    f"worker {info.worker_id!r} has layers of attention {group.attention!r}: what they reuse of a "
                    "prefix is not modelled, so it gets requests by load",
                )
        checks = (
            (RejectReason.KEY_SCHEME, "key scheme", info.key_scheme, self.key_scheme, "run the same release on both"),
            (
                RejectReason.FINGERPRINT,
                "tokenizer fingerprint",
                info.fingerprint,
                fingerprint,
                "give the router the worker's tokenizer and chat template; beside an agent, its log says what differs",
            ),
        )
        for reason, what, theirs, ours, remedy in checks:
            if theirs != ours:
                return Mismatch(
                    reason, f"worker {info.worker_id!r} has {what} {theirs!r}, this router {ours!r}: {remedy}"
                )
        return None
